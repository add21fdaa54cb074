"""The module store: what it keeps, what it refuses, and what survives a kill or a full disk."""

from __future__ import annotations

import fcntl
import inspect
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bulkhead
from bulkhead.sandbox import store as store_module
from bulkhead.sandbox.errors import InvalidRequest, SandboxError, UnknownModule
from bulkhead.sandbox.module import digest_of
from bulkhead.sandbox.store import ModuleStore, StoredModule, StoreFull

MIB = 1 << 20
OpenStore = Callable[..., ModuleStore]


@pytest.fixture
def open_store(tmp_path: Path) -> OpenStore:
    """Opens a store at `tmp_path/modules`; twice gives two views of the same one."""
    return lambda max_total_bytes=MIB: ModuleStore(tmp_path / "modules", max_total_bytes=max_total_bytes)


def file_of(tmp_path: Path, digest: str) -> Path:
    return tmp_path / "modules" / "sha256" / f"{digest.removeprefix('sha256:')}.wasm"


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "modules" / "sha256").iterdir())


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


class TestPut:
    def test_keeps_the_bytes_under_their_digest(self, open_store: OpenStore) -> None:
        store = open_store()
        assert store.put_bytes(b"module") == (digest_of(b"module"), True)
        assert store.read(digest_of(b"module")) == b"module"
        assert store.find(digest_of(b"module")) == StoredModule(digest_of(b"module"), 6)

    def test_twice_is_the_same_as_once(self, open_store: OpenStore, tmp_path: Path) -> None:
        store = open_store()
        digest, _ = store.put_bytes(b"module")
        before = file_of(tmp_path, digest).stat()
        assert store.put_bytes(b"module") == (digest, False)
        assert file_of(tmp_path, digest).stat().st_ino == before.st_ino
        assert store.total_bytes() == 4096

    def test_leaves_files_that_only_their_owner_can_read(self, open_store: OpenStore, tmp_path: Path) -> None:
        digest, _ = open_store().put_bytes(b"module")
        assert file_of(tmp_path, digest).stat().st_mode & 0o777 == 0o400
        assert (tmp_path / "modules").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "modules" / "sha256").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "modules" / "lock").stat().st_mode & 0o777 == 0o600

    def test_is_seen_by_another_view_of_the_store(self, open_store: OpenStore) -> None:
        one, other = open_store(), open_store()
        digest, _ = one.put_bytes(b"module")
        assert other.read(digest) == b"module"
        assert other.put_bytes(b"module") == (digest, False)

    @pytest.mark.parametrize("wrong", [b"", b"modulf", b"module and more", b"x" * 10_000])
    def test_replaces_a_damaged_copy(self, open_store: OpenStore, tmp_path: Path, wrong: bytes) -> None:
        store = open_store()
        digest, _ = store.put_bytes(b"module")
        damage(file_of(tmp_path, digest), wrong)
        assert store.put_bytes(b"module") == (digest, True)
        assert store.read(digest) == b"module"


class TestRead:
    def test_of_an_absent_module_is_a_miss(self, open_store: OpenStore) -> None:
        for method in (open_store().read, open_store().find, open_store().delete):
            with pytest.raises(UnknownModule, match=digest_of(b"absent")):
                method(digest_of(b"absent"))

    def test_reports_a_damaged_module_and_never_returns_it(
        self, open_store: OpenStore, tmp_path: Path
    ) -> None:
        store = open_store()
        digest, _ = store.put_bytes(b"module")
        damage(file_of(tmp_path, digest), b"modulE")
        for _ in range(2):
            with pytest.raises(SandboxError, match="is damaged"):
                store.read(digest)

    @pytest.mark.parametrize(
        "digest", ["../lock", "sha256:../lock", "", "\0", "sha256:" + "g" * 64, "/etc/passwd", "x" * MIB]
    )
    def test_makes_no_path_of_what_is_not_a_digest(self, open_store: OpenStore, digest: str) -> None:
        store = open_store()
        for method in (store.read, store.find, store.delete):
            with pytest.raises(UnknownModule, match="is not a module digest"):
                method(digest)

    def test_reports_a_store_that_was_taken_away(self, open_store: OpenStore, tmp_path: Path) -> None:
        store = open_store()
        (tmp_path / "modules").rename(tmp_path / "elsewhere")
        with pytest.raises(SandboxError, match="cannot use the module store"):
            store.put_bytes(b"module")
        with pytest.raises(SandboxError, match="cannot list the module store"):
            store.list()


class TestList:
    def test_is_sorted_by_digest_and_tells_sizes(self, open_store: OpenStore) -> None:
        store = open_store()
        expected = sorted(store.put_bytes(bytes(size))[0] for size in range(20))
        listed = store.list()
        assert [each.digest for each in listed] == expected
        assert sorted(each.size_bytes for each in listed) == list(range(20))

    def test_pages_cover_everything_once(self, open_store: OpenStore) -> None:
        store = open_store()
        for size in range(23):
            store.put_bytes(bytes(size))
        pages = [store.list(limit=5)]
        while pages[-1]:
            pages.append(store.list(start_after=pages[-1][-1].digest, limit=5))
        assert [len(page) for page in pages] == [5, 5, 5, 5, 3, 0]
        assert [each for page in pages for each in page] == list(store.list())

    def test_goes_on_after_a_module_that_was_deleted(self, open_store: OpenStore) -> None:
        store = open_store()
        digests = sorted(store.put_bytes(bytes(size))[0] for size in range(4))
        store.delete(digests[1])
        assert [each.digest for each in store.list(start_after=digests[1])] == digests[2:]

    def test_refuses_a_page_token_that_is_no_digest(self, open_store: OpenStore) -> None:
        with pytest.raises(InvalidRequest, match="bad page token"):
            open_store().list(start_after="../lock")

    def test_passes_over_files_that_are_not_modules(self, open_store: OpenStore, tmp_path: Path) -> None:
        store = open_store()
        for name in ("README", "a" * 63 + ".wasm", "A" * 64 + ".wasm", "a" * 64 + ".wasm.bak"):
            (tmp_path / "modules" / "sha256" / name).write_bytes(b"x")
        assert store.list() == ()
        assert open_store().total_bytes() == 0


class TestDelete:
    def test_removes_the_module_and_frees_its_space(self, open_store: OpenStore, tmp_path: Path) -> None:
        store = open_store()
        digest, _ = store.put_bytes(bytes(5000))
        assert store.total_bytes() == 8192
        store.delete(digest)
        assert store.total_bytes() == 0
        assert files(tmp_path) == []
        with pytest.raises(UnknownModule):
            store.read(digest)


class TestSpace:
    def test_counts_whole_blocks(self, open_store: OpenStore) -> None:
        store = open_store()
        for size in (1, 4096, 4097):
            store.put_bytes(bytes(size))
        assert store.total_bytes() == 4096 + 4096 + 8192

    def test_a_full_store_refuses_and_keeps_nothing(self, open_store: OpenStore, tmp_path: Path) -> None:
        store = open_store(8192)
        first, _ = store.put_bytes(b"one")
        with pytest.raises(StoreFull, match="needs 8192 bytes, and 4096 of 8Ki are free"):
            store.put_bytes(bytes(4097))
        assert files(tmp_path) == [file_of(tmp_path, first).name]
        assert store.put_bytes(b"two")[1]
        with pytest.raises(StoreFull, match="and 0 of 8Ki are free"):
            store.put_bytes(b"three")

    def test_a_full_store_still_accepts_what_it_has(self, open_store: OpenStore, tmp_path: Path) -> None:
        store = open_store(4096)
        digest, _ = store.put_bytes(b"one")
        assert store.put_bytes(b"one") == (digest, False)
        damage(file_of(tmp_path, digest), b"onf")
        assert store.put_bytes(b"one") == (digest, True)
        assert store.total_bytes() == 4096

    def test_counts_what_other_views_put_and_delete(self, open_store: OpenStore) -> None:
        one, other = open_store(8192), open_store(8192)
        digest, _ = one.put_bytes(b"one")
        other.put_bytes(b"two")
        with pytest.raises(StoreFull):
            one.put_bytes(b"three")
        other.delete(digest)
        assert one.put_bytes(b"three")[1]

    def test_notices_files_that_were_deleted_by_hand(self, open_store: OpenStore, tmp_path: Path) -> None:
        store = open_store(4096)
        digest, _ = store.put_bytes(b"one")
        file_of(tmp_path, digest).unlink()
        assert store.put_bytes(b"two")[1]
        assert store.total_bytes() == 4096

    @pytest.mark.parametrize("written", [b"", b"?" * 20, b"7", b"0" * 21, b"-1", "٣".encode() * 10])
    def test_counts_again_when_the_written_total_is_unreadable(
        self, open_store: OpenStore, tmp_path: Path, written: bytes
    ) -> None:
        store = open_store()
        store.put_bytes(b"one")
        (tmp_path / "modules" / "lock").write_bytes(written)
        assert store.total_bytes() == 4096

    def test_does_not_count_again_at_every_put(self, open_store: OpenStore, tmp_path: Path) -> None:
        """A file that appears behind our back is seen when the store is opened, not before."""
        store = open_store()
        store.put_bytes(b"one")
        (tmp_path / "modules" / "sha256" / ("a" * 64 + ".wasm")).write_bytes(b"x")
        store.put_bytes(b"two")
        assert store.total_bytes() == 8192
        assert open_store().total_bytes() == 12288


class TestOpen:
    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
    @pytest.mark.parametrize("folder", ["modules", "modules/sha256"])
    def test_refuses_a_folder_that_others_may_write_to(
        self, open_store: OpenStore, tmp_path: Path, folder: str, mode: int
    ) -> None:
        open_store()
        (tmp_path / folder).chmod(mode)
        with pytest.raises(SandboxError, match="others may write to the folder"):
            open_store()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
    def test_refuses_a_folder_of_somebody_else(self, open_store: OpenStore, tmp_path: Path) -> None:
        open_store()
        os.chown(tmp_path / "modules", 65534, 65534)
        with pytest.raises(SandboxError, match="belongs to another user"):
            open_store()

    def test_refuses_a_file_in_the_folders_place(self, open_store: OpenStore, tmp_path: Path) -> None:
        (tmp_path / "modules").write_bytes(b"")
        with pytest.raises(SandboxError, match="cannot make the folder"):
            open_store()

    def test_refuses_a_lock_that_is_a_link(self, open_store: OpenStore, tmp_path: Path) -> None:
        (tmp_path / "modules").mkdir(mode=0o700)
        (tmp_path / "modules" / "lock").symlink_to(tmp_path / "victim")
        with pytest.raises(SandboxError, match="cannot use the module store"):
            open_store()
        assert not (tmp_path / "victim").exists()

    def test_clears_away_what_a_killed_process_left(self, open_store: OpenStore, tmp_path: Path) -> None:
        digest, _ = open_store().put_bytes(b"one")
        half_written = tmp_path / "modules" / "sha256" / f".{'b' * 64}.wasm.123.0badcafe"
        half_written.write_bytes(b"half")
        assert open_store().read(digest) == b"one"
        assert files(tmp_path) == [file_of(tmp_path, digest).name]


def put_many(root: Path, seed: int, count: int) -> None:
    store = ModuleStore(root, max_total_bytes=64 * MIB)
    for number in range(count):
        store.put_bytes(b"shared %d" % number)
        store.put_bytes(b"own %d %d" % (seed, number))
        if number % 3 == 0:
            store.delete(digest_of(b"own %d %d" % (seed, number)))


# For child processes, which cannot import this file.
PUT_MANY = f"""
from pathlib import Path
from bulkhead.sandbox.module import digest_of
from bulkhead.sandbox.store import ModuleStore
MIB = {MIB}
{inspect.getsource(put_many)}
"""


class TestShared:
    def test_hammered_by_processes_and_threads_it_loses_nothing(self, tmp_path: Path) -> None:
        root, workers, count = tmp_path / "modules", 4, 30
        processes = [
            python(f"{PUT_MANY}\nput_many(Path({str(root)!r}), {seed}, {count})") for seed in range(workers)
        ]
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(lambda seed: put_many(root, seed, count), range(workers, 2 * workers)))
        for process in processes:
            process.communicate(timeout=60)
            assert process.returncode == 0
        store = ModuleStore(root, max_total_bytes=64 * MIB)
        expected = {digest_of(b"shared %d" % number) for number in range(count)} | {
            digest_of(b"own %d %d" % (seed, number))
            for seed in range(2 * workers)
            for number in range(count)
            if number % 3
        }
        listed = store.list(limit=10_000)
        assert {each.digest for each in listed} == expected
        assert all(digest_of(store.read(each.digest)) == each.digest for each in listed)
        assert store.total_bytes() == 4096 * len(expected)

    def test_the_written_total_is_right_after_the_hammering(self, tmp_path: Path) -> None:
        """Not by counting again: two threads put and delete, a third reads only the lock file."""
        root = tmp_path / "modules"
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda seed: put_many(root, seed, 30), range(2)))
        total = int((root / "lock").read_bytes())
        assert total == 4096 * len(ModuleStore(root, max_total_bytes=MIB).list(limit=1_000))

    def test_a_process_killed_in_the_middle_of_puts_leaves_a_sound_store(self, tmp_path: Path) -> None:
        root = tmp_path / "modules"
        script = f"""
            import itertools
            from pathlib import Path
            from bulkhead.sandbox.store import ModuleStore
            store = ModuleStore(Path({str(root)!r}), max_total_bytes=1 << 30)
            for number in itertools.count():
                store.put_bytes(b"%d" % number + bytes(300_000))
                print(flush=True)
        """
        for puts in (1, 2, 3, 5, 8):
            with python(script) as process:
                assert process.stdout is not None
                for _ in range(puts):
                    process.stdout.readline()
                process.send_signal(signal.SIGKILL)
                process.wait()
            total = ModuleStore(root, max_total_bytes=1 << 30).total_bytes()
            store = ModuleStore(root, max_total_bytes=1 << 30)
            listed = store.list(limit=10_000)
            assert len(listed) >= puts
            assert all(digest_of(store.read(each.digest)) == each.digest for each in listed)
            assert total == sum(-(-each.size_bytes // 4096) * 4096 for each in listed)
            assert len(files(tmp_path)) == len(listed)

    def test_says_so_when_another_process_never_lets_go(
        self, open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store()
        digest, _ = store.put_bytes(b"one")
        monkeypatch.setattr(store_module, "LOCK_WAIT_SECONDS", 0.05)
        with (tmp_path / "modules" / "lock").open("rb") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            with pytest.raises(SandboxError, match="another process has held"):
                store.put_bytes(b"two")
            assert store.read(digest) == b"one"
        assert store.put_bytes(b"two")[1]


class TestFullDisk:
    def test_refuses_and_keeps_nothing(self, tmp_path: Path) -> None:
        """On a real full disk: a tmpfs of one MiB, in a mount namespace of its own."""
        mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        if subprocess.run([*mount, f"mount -t tmpfs none {tmp_path}"], check=False).returncode != 0:
            if os.environ.get("CI"):
                pytest.fail("this machine cannot make user namespaces, and CI must")
            pytest.skip("this machine cannot make user namespaces")
        script = textwrap.dedent(f"""
            import os
            from pathlib import Path
            from bulkhead.sandbox.store import ModuleStore, StoreFull
            root = Path({str(tmp_path / "modules")!r})
            store = ModuleStore(root, max_total_bytes=1 << 30)
            kept, _ = store.put_bytes(bytes(500_000))
            for _ in range(3):
                try:
                    store.put_bytes(bytes(2_000_000))
                except StoreFull as error:
                    assert "disk" in str(error), error
                else:
                    raise AssertionError("stored two million bytes on a disk of one")
            assert [path.name for path in (root / "sha256").iterdir()] == [kept[7:] + ".wasm"]
            assert store.read(kept) == bytes(500_000)
            small, created = store.put_bytes(bytes(200_000))
            assert created
            store.delete(kept)
            assert store.put_bytes(bytes(700_000))[1]
            print("sound")
        """)
        command = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$0" -c "$1"'
        done = subprocess.run(
            [*mount, command, sys.executable, script],
            env=python_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr


def python(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env=python_environment(),
    )


def python_environment() -> dict[str, str]:
    """So that a child finds the package that we test, installed or not."""
    source = Path(next(iter(bulkhead.__path__))).parent
    return {**os.environ, "PYTHONPATH": str(source)}
