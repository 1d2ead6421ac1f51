"""The folder of compiled kernels: what another user may have put there is not loaded, and errors say what to do."""

from __future__ import annotations

import errno
import os
import pwd
import stat
import sys
from pathlib import Path

import pytest

from recfx.kernels import build
from tests.faults.children import folder_for_all, in_child

ELSEWHERE = "Set TMPDIR to a private folder"


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """A temporary folder in which a compilation takes no time; its library is empty."""
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, sources, path, num_processes: touch(path))
    return tmp_path


def touch(path: Path, mode: int = 0o700) -> Path:
    path.touch()
    path.chmod(mode)
    return path


def planted(path: Path, how: str) -> None:
    """Something else in the place of a folder, or of a library."""
    as_folder = path.is_dir()
    other = path.rename(path.with_name("other"))
    match how:
        case "link":
            path.symlink_to(other)
        case "dangling":
            path.symlink_to(path.with_name("nowhere"))
        case "kind":
            touch(path) if as_folder else path.mkdir()
        case "owner":
            other.rename(path)
            os.chown(path, 12345, 12345)
        case "group":
            other.rename(path).chmod(0o770)
        case "others":
            other.rename(path).chmod(0o702)


REFUSED = {
    "link": "a link to .*other", "dangling": "a link to .*nowhere", "kind": "another kind of file",
    "owner": "a (file|folder) of user 12345", "group": "mode 770", "others": "mode 702",
}  # fmt: skip


@pytest.mark.parametrize("what", ["folder", "library"])
@pytest.mark.parametrize("how", REFUSED)
def test_what_another_user_may_have_planted_is_refused(temporary, what, how):
    if how == "owner" and os.getuid():
        pytest.skip("only root can give a file away")
    library = build._built(1)
    path = library.parent if what == "folder" else library
    planted(path, how)
    with pytest.raises(RuntimeError, match=rf"^{path}: got {REFUSED[how]}, expected a .* Delete it .* {ELSEWHERE}"):
        build._built(1)
    if how in ("link", "dangling", "kind"):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        os.chown(path, os.getuid(), os.getgid())
        path.chmod(0o700)
    assert build._built(1) == library


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_what_is_built_is_nobody_else_s_whatever_the_umask(tmp_path, monkeypatch, umask):
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(
        build, "_run", lambda command: touch(Path(command[-1]), 0o777) and "" if "-o" in command else ""
    )
    before = os.umask(umask)
    try:
        library = build._built(1)
        assert build._built(1) == library
    finally:
        os.umask(before)
    assert library.parent.name == f"recfx_{os.getuid()}"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (library, library.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("name", ["../planted", "/absolute", "", "a b"])
def test_the_name_of_a_user_is_no_path(temporary, monkeypatch, name):
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, name)
    assert build._built(1).parent == temporary / f"recfx_{os.getuid()}"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_a_name(monkeypatch):
    with folder_for_all() as folder:
        folder.chmod(0o777)
        monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(folder))
        monkeypatch.setattr(build, "_compile", lambda compiler, sources, path, num_processes: touch(path))

        def work() -> None:
            os.setgid(54321), os.setuid(54321)
            with pytest.raises(KeyError):
                pwd.getpwuid(os.getuid())
            assert build._built(1).parent.name == "recfx_54321"

        in_child(work)


# Folders that are not there, full, read-only or of another kind.


def test_a_temporary_folder_that_is_gone(temporary, monkeypatch):
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(temporary / "nowhere"))
    with pytest.raises(RuntimeError, match=rf"{temporary}/nowhere/recfx_\d+: No such file .*, expected .* {ELSEWHERE}"):
        build._built(1)


def test_no_temporary_folder_at_all(monkeypatch):
    def fail() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(build.tempfile, "gettempdir", fail)
    with pytest.raises(RuntimeError, match=f"temporary folder: .*No usable temporary directory .* {ELSEWHERE}"):
        build._built(1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_cannot_be_written(temporary, monkeypatch, number):
    library = build._built(1)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(build, "_compile", fail)
    assert build._built(1) == library  # what is there is used
    library.unlink()
    with pytest.raises(RuntimeError, match=f"{library.parent}: .*{os.strerror(number)}, expected .* {ELSEWHERE}"):
        build._built(1)
    library.parent.rmdir()
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(
        RuntimeError, match=f"{library.parent}: {os.strerror(number)}, expected a folder to .* {ELSEWHERE}"
    ):
        build._built(1)


def test_a_compiler_without_room_and_one_that_fails(tmp_path):
    for words, hint in (("No space left on device", ELSEWHERE), ("syntax error", "")):
        with pytest.raises(RuntimeError, match=rf"exit status 3\.\n{hint}.*\n?{words}"):
            build._run([sys.executable, "-c", f"import sys; sys.stderr.write({words!r}); sys.exit(3)"])


def test_a_library_that_does_not_load(temporary):
    """It is empty here; on a file system mounted noexec the loader's words are others."""
    with pytest.raises(RuntimeError, match=rf"{temporary}/recfx_\d+/\w+\.so: .*file too short.* {ELSEWHERE}"):
        build.library.__wrapped__()
