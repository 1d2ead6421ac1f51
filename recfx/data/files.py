"""Finds the files that paths and globs match, on any file system that pyarrow supports."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import PurePath

import pyarrow as pa
import xxhash
from pyarrow import fs

__all__ = ["CHUNK_BYTES", "File", "Paths", "match_files", "quoted", "subject"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
ARRAYS, ROWS = "the arrays", "the rows"  # used as the path of data that are not in a file
CHUNK_BYTES = 1 << 22
MAGIC_CHARACTERS = frozenset("*?[")
SAMPLE_BYTES, TAIL_BYTES = 1 << 12, 1 << 16  # of a file that identify it: footers are at the end


@dataclass(frozen=True)
class File:
    """A file as it was found: `size` and `mtime_ns` show whether it has changed since."""

    filesystem: fs.FileSystem = field(hash=False)
    path: str
    size: int
    mtime_ns: int | None

    @property
    def name(self) -> str:
        """Without folders."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def local_path(self) -> str | None:
        """The path for the operating system; None where the file is not local."""
        root = _root(self.filesystem)
        return None if root is None else root + self.path

    def sample(self) -> str:
        """XXH3 of the last 64 KiB, of 4 KiB at the start and at three places between; of all bytes of a smaller file.

        It tells files of one size apart, also after they are moved. Cost: up to five reads, once for each `File`.

        Raises:   ValueError when the file cannot be read.
        """
        if "_sample" not in self.__dict__:  # not functools.cached_property: its lock admits one file at a time
            self.__dict__["_sample"] = self._read_sample()
        return self.__dict__["_sample"]

    def _read_sample(self) -> str:
        digest, tail = xxhash.xxh3_64(), self.size - TAIL_BYTES
        parts = [*((tail * i // 4, SAMPLE_BYTES) for i in range(4)), (tail, TAIL_BYTES)]
        try:
            with self.filesystem.open_input_file(self.path) as stream:
                for start, num_bytes in parts if tail > 4 * SAMPLE_BYTES else [(0, self.size)]:
                    digest.update(stream.read_at(num_bytes, start))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"file '{self.path}': got {error}, expected a readable file.") from error
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises ValueError when a local file has changed since it was found. A remote file would cost a request."""
        if not self.is_local:
            return
        now = self.filesystem.get_file_info(self.path)
        if now.type != fs.FileType.NotFound and (now.size, now.mtime_ns) != (self.size, self.mtime_ns):
            raise ValueError(
                f"file '{self.path}': got {now.size} bytes, written at {_time(now.mtime_ns)}, expected {self.size}, "
                f"written at {_time(self.mtime_ns)}. It was changed while it was read. Build the reader again."
            )


def quoted(path: str) -> str:
    """The path as an error quotes it."""
    return path if path.startswith((ARRAYS, ROWS)) else f"'{path}'"


def subject(path: str) -> str:
    """The first words of an error about a whole file."""
    return path if quoted(path) == path else f"file '{path}'"


def _root(filesystem: fs.FileSystem) -> str | None:
    """The prefix of a local file system's paths; None for other file systems."""
    if isinstance(filesystem, fs.SubTreeFileSystem) and isinstance(filesystem.base_fs, fs.LocalFileSystem):
        return filesystem.base_path
    return "" if isinstance(filesystem, fs.LocalFileSystem) else None


def _time(ns: int | None) -> str:
    return "?" if ns is None else datetime.fromtimestamp(ns / 1e9, UTC).isoformat()


def match_files(paths: Paths, filesystem: fs.FileSystem | None = None) -> list[File]:
    """The files that the paths match, sorted, each once.

    A local file is listed once, even when several names match it: two globs, a folder and a link to it, a symbolic
    link, a hard link. The name that is kept has the fewest symbolic links in it, and is the first of these. Copies are
    separate files.

    Args:     paths: a file, glob or folder, a list of them, or one string with commas between; local paths or URIs
                  ("s3://bucket/train/*.orc"). A folder matches the files directly in it whose names start with
                  neither '.' nor '_'. A glob that matches only folders ("logs/dt=2026-11-*") matches the files in
                  each. "**" in a glob matches folders of any depth, also through links.
              filesystem: where the paths are; None: the file system of each path.
    Raises:   ValueError when a path matches no file.
    """
    if isinstance(paths, str):
        items = [item.strip() for item in paths.split(",") if item.strip()]
    else:
        given = [paths] if isinstance(paths, os.PathLike) else list(paths) if isinstance(paths, Iterable) else [paths]
        if not all(isinstance(path, str | os.PathLike) for path in given):
            raise TypeError(f"paths: got {paths!r}, expected strings or paths.")
        items = [os.fspath(path) for path in given]
    if not items:
        raise ValueError(f"paths: got {paths!r}, expected at least one file, folder or glob.")
    files = dict.fromkeys(file for item in items for file in _match(item, filesystem))
    return _each_once(sorted(files, key=lambda file: file.path))


def _each_once(files: Sequence[File]) -> list[File]:
    """The files in their order, each local file under one name only."""
    folders: dict[str, str] = {}
    kept: dict[object, File] = {}
    for file in files:
        key = _identity(file, folders)
        if key not in kept or _num_links(file) < _num_links(kept[key]):
            kept[key] = file
    return sorted(kept.values(), key=lambda file: file.path)


def _identity(file: File, folders: dict[str, str]) -> object:
    """A key that is equal for all names of one local file; for a remote file, the file itself.

    Device and inode are used only for a file with hard links: not every file system numbers its files.

    Args:     folders: the real paths of the folders seen so far.
    """
    if file.local_path is None:
        return file
    folder, name = os.path.split(file.local_path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    path = os.path.join(folders[folder], name)
    try:
        if os.path.islink(path):
            path = os.path.realpath(path)
        facts = os.stat(path)
    except OSError:  # the file is gone: reading it raises the error
        return path
    return path if facts.st_nlink == 1 else (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _num_links(file: File) -> int:
    """How many parts of its path are symbolic links."""
    parts = PurePath(file.local_path or "").parts
    return sum(os.path.islink(os.path.join(*parts[:end])) for end in range(1, len(parts) + 1))


def _match(item: str, filesystem: fs.FileSystem | None) -> list[File]:
    path = item
    if filesystem is None:
        try:
            filesystem, path = fs.FileSystem.from_uri(item) if "://" in item else (fs.LocalFileSystem(), item)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"paths: got '{item}', expected a URI that pyarrow knows: {error}.") from error
    if isinstance(filesystem, fs.LocalFileSystem):
        path = str(PurePath(path))  # one name for a//b, a/./b and a/b
    info = filesystem.get_file_info(path)
    found = _glob(path, filesystem) if info.type == fs.FileType.NotFound else [info]
    if all(f.type == fs.FileType.Directory for f in found):
        found = [f for folder in found for f in _inside(folder, filesystem)]
    files = [File(filesystem, f.path, f.size, f.mtime_ns) for f in found if f.type == fs.FileType.File]
    if not files:
        hint = f" It has folders: '{item.rstrip('/')}/*' matches the files in them." if found else ""
        raise ValueError(
            f"paths: got '{item}', which matches no file, expected a file, a folder of files or a glob.{hint}"
        )
    return files


def _inside(folder: fs.FileInfo, filesystem: fs.FileSystem) -> list[fs.FileInfo]:
    """The entries directly in a folder that are not hidden."""
    inside = filesystem.get_file_info(fs.FileSelector(folder.path))
    return [f for f in inside if not f.base_name.startswith((".", "_"))]


def _glob(pattern: str, filesystem: fs.FileSystem) -> list[fs.FileInfo]:
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if MAGIC_CHARACTERS & set(part)), len(parts))
    if first == len(parts):
        return []
    base = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
    root = _root(filesystem)
    if root is not None:
        found = [path.removeprefix(root) for path in _walk(root + base, parts[first:])]
        return filesystem.get_file_info(found) if found else []
    inside = fs.FileSelector(base, recursive=first < len(parts) - 1, allow_not_found=True)
    start = len(base.rstrip("/")) + 1
    return [f for f in filesystem.get_file_info(inside) if _fits(f.path[start:].split("/"), parts[first:])]


def _walk(base: str, pattern: list[str]) -> Iterator[str]:
    """The local paths in a folder that match, by the rules of `_fits`. Links to folders are followed.

    No folder is searched twice for one part of the pattern, so circular links end. Folders that are reached without a
    link come first, so the name that is found has the fewest links.
    """
    folders, seen = deque([(base, os.path.realpath(base), 0)]), set[tuple[str, int]]()
    while folders:
        folder, real, i = folders.popleft()
        if (real, i) in seen or not os.path.isdir(folder):
            continue
        seen.add((real, i))
        is_deep, is_last = pattern[i] == "**", i == len(pattern) - 1
        if is_deep and not is_last:
            folders.appendleft((folder, real, i + 1))
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            fits = not is_deep and _name_fits(entry.name, pattern[i])
            path = os.path.join(folder, entry.name)
            if fits and is_last:
                yield path
            elif (fits or is_deep) and entry.is_dir():
                place = i if is_deep else i + 1
                if entry.is_symlink():
                    folders.append((path, os.path.realpath(path), place))
                else:
                    folders.appendleft((path, os.path.join(real, entry.name), place))


def _fits(names: list[str], pattern: list[str]) -> bool:
    if not pattern or not names:
        return not pattern and not names
    if pattern[0] == "**":
        return _fits(names, pattern[1:]) or _fits(names[1:], pattern)
    return _name_fits(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _name_fits(name: str, pattern: str) -> bool:
    hidden = name.startswith(".") and not pattern.startswith(".")
    return not hidden and fnmatchcase(name, pattern)
