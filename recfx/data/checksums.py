"""Checksums of files, and a manifest of them that a reader compares its files with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import xxhash

from recfx.data.files import CHUNK_BYTES, File

__all__ = ["checksum", "read_manifest", "write_manifest"]


def checksum(file: File) -> str:
    """XXH3 of the whole file, 128 bits in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with file.filesystem.open_input_stream(file.path, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(path: str | os.PathLike[str], files: Sequence[File]) -> None:
    """Writes the checksums of the files, by name without folders, to a JSON file, in one rename.

    Raises:   ValueError when two files have one name.
    """
    checksums = {file.name: checksum(file) for file in files}
    if len(checksums) < len(files):
        raise ValueError(
            f"paths: got {len(files)} files with {len(checksums)} names, expected distinct names. Write one per folder."
        )
    scratch = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(scratch, "w") as stream:
        json.dump({"algorithm": "xxh3_128", "files": checksums}, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, str]:
    """Checksums by file name, as `write_manifest` wrote them.

    Raises:   ValueError when the file is not such a manifest.
    """
    try:
        with open(path) as stream:
            content = json.load(stream)
        if content["algorithm"] != "xxh3_128":
            raise ValueError(f"algorithm {content['algorithm']}")
        return dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checksums: got '{os.fspath(path)}' ({error}), expected a manifest of `recfx inspect --checksums`."
        ) from error
