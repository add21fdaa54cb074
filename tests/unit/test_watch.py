"""Whether the content of files has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from bulkhead.service import watch
from bulkhead.service.watch import FileWatch


def test_content_counts_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    files = FileWatch()
    before = files.look([file])
    os.utime(file, ns=(1, 1))
    file.chmod(0o600)
    assert files.look([file]) == before
    file.write_text("two")
    after = files.look([file])
    assert after != before
    file.write_text("one")
    assert files.look([file]) == before


def test_a_change_that_keeps_size_and_modification_time_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    os.utime(file, ns=(5, 5))
    files = FileWatch()
    before = files.look([file])
    file.write_text("two")
    os.utime(file, ns=(5, 5))
    assert files.look([file]) != before


def test_links_are_followed_when_they_are_swapped(tmp_path: Path) -> None:
    """As Kubernetes mounts a Secret: name -> ..data/name, ..data -> ..2026_01."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "tls.crt").write_text(version)
    data, name = tmp_path / "..data", tmp_path / "tls.crt"
    data.symlink_to("one")
    name.symlink_to("..data/tls.crt")
    files = FileWatch()
    before = files.look([name])
    (tmp_path / "..data_tmp").symlink_to("two")
    (tmp_path / "..data_tmp").rename(data)
    assert files.look([name]) != before


def test_a_file_that_goes_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    files = FileWatch()
    absent = files.look([file])
    file.write_text("one")
    present = files.look([file])
    assert present != absent
    file.unlink()
    assert files.look([file]) == absent
    file.mkdir()
    assert files.look([file]) == absent, "what cannot be read is as good as gone"


def test_an_old_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_RACY_NS", -(10**12))
    file = tmp_path / "file"
    file.write_text("one")
    files = FileWatch()
    before = files.look([file])
    file.chmod(0o000)
    file.chmod(0o600)
    reads: list[object] = []
    real = hashlib.file_digest

    def counted(*arguments: Any) -> Any:
        reads.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    assert files.look([file]) == before
    assert len(reads) == 1, "its times have changed"
    assert files.look([file]) == before
    assert len(reads) == 1
