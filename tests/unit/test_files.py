"""Folders and files that only we may write."""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path

import pytest

from bulkhead.sandbox import SandboxError
from bulkhead.sandbox.files import make_private_directory, write_atomically


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestPrivateDirectory:
    def test_is_made_for_its_owner_alone(self, tmp_path: Path) -> None:
        make_private_directory(tmp_path / "a" / "b")
        assert mode_of(tmp_path / "a" / "b") == 0o700

    def test_that_is_there_already_is_taken_as_it_is(self, tmp_path: Path) -> None:
        folder = tmp_path / "mine"
        folder.mkdir(mode=0o755)
        (folder / "file").write_bytes(b"content")
        make_private_directory(folder)
        assert (folder / "file").read_bytes() == b"content"

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o1777])
    def test_that_others_may_write_is_refused_with_what_to_do(self, tmp_path: Path, mode: int) -> None:
        folder = tmp_path / "open"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(SandboxError, match=f"chmod go-w {folder}"):
            make_private_directory(folder)

    def test_of_another_user_is_refused(self, tmp_path: Path) -> None:
        folder = Path("/usr")  # root's
        if os.geteuid() == 0:
            folder = tmp_path / "theirs"
            folder.mkdir()
            os.chown(folder, 12345, -1)
        with pytest.raises(SandboxError, match="belongs to another user"):
            make_private_directory(folder)

    def test_in_the_place_of_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(SandboxError, match="cannot make the folder"):
            make_private_directory(tmp_path / "file")
        with pytest.raises(SandboxError, match="cannot make the folder"):
            make_private_directory(tmp_path / "file" / "below")


class TestWriteAtomically:
    def test_leaves_the_content_and_nothing_else(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "file", b"one")
        write_atomically(tmp_path / "file", b"two", mode=0o400)
        assert (tmp_path / "file").read_bytes() == b"two"
        assert mode_of(tmp_path / "file") == 0o400
        assert os.listdir(tmp_path) == ["file"]

    def test_is_readable_for_the_owner_alone(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "file", b"")
        assert mode_of(tmp_path / "file") == 0o600

    def test_whoever_has_the_old_file_open_keeps_it(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "file", b"old")
        with (tmp_path / "file").open("rb") as reader:
            write_atomically(tmp_path / "file", b"new")
            assert reader.read() == b"old"

    def test_that_fails_leaves_the_old_file_and_no_other(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "file", b"old")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_atomically(tmp_path / "file", b"new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "file").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]

    def test_into_a_folder_that_is_not_there_fails(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="No such file"):
            write_atomically(tmp_path / "none" / "file", b"x")
