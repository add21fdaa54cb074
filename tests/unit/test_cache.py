"""The compile cache believes only what carries its own seal."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bulkhead
from bulkhead.sandbox import SandboxError
from bulkhead.sandbox.cache import CompileCache, cache_key

KEY = cache_key("sha256:" + "1" * 64, "wasmtime", ("-W", "gc=n"))
ARTIFACT = b"\x7fELF native code" * 100


def open_cache(folder: Path) -> CompileCache:
    return CompileCache(folder / "cache", folder / "cache.secret")


def test_returns_what_was_saved_to_whoever_opens_it_next(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert cache.load(KEY) is None
    assert cache.save(KEY, ARTIFACT)
    assert open_cache(tmp_path).load(KEY) == ARTIFACT


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "longer"])
def test_forgets_a_damaged_artifact(tmp_path: Path, damage: str) -> None:
    cache = open_cache(tmp_path)
    cache.save(KEY, ARTIFACT)
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 if damage == "flipped" else 0
    whole = bytes(data)
    shapes = {"flipped": whole, "truncated": whole[:-1], "empty": b"", "longer": whole + b"x"}
    path.write_bytes(shapes[damage])
    assert cache.load(KEY) is None
    assert not path.exists()


def test_does_not_take_one_artifact_for_another(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.save(KEY, ARTIFACT)
    other = cache_key("sha256:" + "2" * 64, "wasmtime", ("-W", "gc=n"))
    (path,) = (tmp_path / "cache").iterdir()
    path.rename(path.with_name(f"{other}.cwasm"))
    assert cache.load(other) is None


def test_does_not_believe_artifacts_sealed_with_another_secret(tmp_path: Path) -> None:
    open_cache(tmp_path).save(KEY, ARTIFACT)
    (tmp_path / "cache.secret").unlink()
    assert open_cache(tmp_path).load(KEY) is None


def test_everything_that_changes_the_code_changes_the_key() -> None:
    keys = {
        KEY,
        cache_key("sha256:" + "2" * 64, "wasmtime", ("-W", "gc=n")),
        cache_key("sha256:" + "1" * 64, "another wasmtime", ("-W", "gc=n")),
        cache_key("sha256:" + "1" * 64, "wasmtime", ("-W", "gc=n", "-W", "fuel=1")),
    }
    assert len(keys) == 4


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    open_cache(tmp_path).save(KEY, ARTIFACT)
    (path,) = (tmp_path / "cache").iterdir()
    for each in (tmp_path / "cache", tmp_path / "cache.secret", path):
        assert each.stat().st_mode & 0o077 == 0


def test_refuses_a_folder_or_a_secret_that_others_can_touch(tmp_path: Path) -> None:
    open_cache(tmp_path)
    (tmp_path / "cache.secret").chmod(0o644)
    with pytest.raises(SandboxError, match="readable for others"):
        open_cache(tmp_path)
    (tmp_path / "cache.secret").chmod(0o600)
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(SandboxError, match="others may write"):
        open_cache(tmp_path)


def test_a_disk_that_takes_nothing_costs_only_time(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    (tmp_path / "cache").rmdir()
    assert cache.save(KEY, ARTIFACT) is False
    assert cache.load(KEY) is None


def test_processes_that_start_at_once_agree_on_the_secret(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from bulkhead.sandbox.cache import CompileCache
        folder = Path(sys.argv[1])
        sys.stdin.read()  # until all are there
        cache = CompileCache(folder / "cache", folder / "cache.secret")
        assert cache.save(sys.argv[2] * 64, b"artifact")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    environment = {"PYTHONPATH": str(Path(bulkhead.__path__[0]).parent)}
    names = "0123456789abcdef"
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, env=environment) for name in names[:6]
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0] * 6
    cache = open_cache(tmp_path)
    assert all(cache.load(name * 64) == b"artifact" for name in names[:6])
    assert sorted(os.listdir(tmp_path)) == ["cache", "cache.secret"]


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_damaged_secret_stops_the_start_and_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    open_cache(tmp_path)
    (tmp_path / "cache.secret").write_bytes(content)
    with pytest.raises(SandboxError, match="delete it"):
        open_cache(tmp_path)
    (tmp_path / "cache.secret").unlink()
    assert open_cache(tmp_path).save(KEY, ARTIFACT)


def test_no_key_of_others_is_believed_even_with_a_seal_of_ours(tmp_path: Path) -> None:
    """The seal is over the key and the bytes: neither can be moved, nor a part of one to the other."""
    cache = open_cache(tmp_path)
    cache.save("aa", b"b" + ARTIFACT)
    (tmp_path / "cache" / "aa.cwasm").rename(tmp_path / "cache" / "aab.cwasm")
    assert cache.load("aab") is None


def test_forgets_what_it_is_told_to(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.save(KEY, ARTIFACT)
    cache.discard(KEY)
    cache.discard(KEY)
    assert cache.load(KEY) is None
    assert os.listdir(tmp_path / "cache") == []


def test_no_two_keys_are_made_of_the_same_words() -> None:
    """Of two parts of a key, none can pass for a part of the other."""
    assert cache_key("ab", "c", ()) != cache_key("a", "bc", ())
    assert cache_key("a", "b", ("c", "d")) != cache_key("a", "b", ("cd",))


def test_many_that_start_at_once_agree_on_the_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        caches = list(threads.map(lambda _: open_cache(tmp_path), range(64)))
    caches[0].save(KEY, ARTIFACT)
    assert all(cache.load(KEY) == ARTIFACT for cache in caches)
    assert sorted(os.listdir(tmp_path)) == ["cache", "cache.secret"]
