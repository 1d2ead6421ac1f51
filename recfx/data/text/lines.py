"""Text files as blocks of whole lines, so that a large file can be read in parallel and resumed in the middle."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

import pyarrow as pa

from recfx.checks import check_int
from recfx.data.files import File

__all__ = ["COMPRESSIONS", "InBlocks", "Lines", "first_lines", "is_utf8"]

COMPRESSIONS = {"gz": "gzip", "gzip": "gzip", "bz2": "bz2", "zst": "zstd", "zstd": "zstd", "lz4": "lz4"}  # by extension
LINE_BYTES = 1 << 16  # bytes per read, to find the end of a line


@dataclass(frozen=True, kw_only=True)
class InBlocks:
    """A text file that is read in blocks of `block_bytes`. A compressed file (.gz, .zst, ...) is one block.

    Raises:   TypeError or ValueError when block_bytes is not an int of at least 1.
    """

    block_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        check_int("block_bytes", self.block_bytes, 1)


class Lines:
    """The lines of a file. A file with the extension of a compression is decompressed whole and is one block.

    Args:     block_bytes: bytes of text in a block. Its last line is complete and may exceed them.
    """

    def __init__(self, file: File, block_bytes: int) -> None:
        self._file, self._text = file, _decompressed(file)
        self._num_bytes = file.size if self._text is None else len(self._text)
        self._block_bytes = block_bytes if self._text is None else max(self._num_bytes, 1)
        self.start = 0  # the byte where the first block begins: after a header

    @property
    def num_blocks(self) -> int:
        return -(-(self._num_bytes - self.start) // self._block_bytes)

    def block(self, number: int, max_bytes: int | None = None) -> bytes:
        """The lines that begin in this block, or in its first max_bytes bytes, without a byte order mark."""
        num_bytes = min(self._block_bytes, max_bytes or self._block_bytes)
        begin = self.start + number * self._block_bytes
        text = self._read(begin, num_bytes)
        if number > 0 and self._read(begin - 1, 1) != b"\n":  # the first line began in the previous block
            cut = text.find(b"\n") + 1
            text = text[cut:] if cut else b""
        if text and not text.endswith(b"\n"):
            text += self.line_at(begin + num_bytes)
        return text.removeprefix(codecs.BOM_UTF8) if begin == 0 else text

    def line_at(self, place: int) -> bytes:
        """The text from a byte to the end of its line, line end included."""
        chunks = []
        while chunk := self._read(place, LINE_BYTES):
            end = chunk.find(b"\n") + 1
            chunks.append(chunk[: end or len(chunk)])
            if end:
                break
            place += len(chunk)
        return b"".join(chunks)

    def _read(self, begin: int, num_bytes: int) -> bytes:
        if self._text is not None:
            return self._text[begin : begin + num_bytes]
        with self._file.filesystem.open_input_file(self._file.path) as stream:
            stream.seek(begin)
            return stream.read(num_bytes)


def first_lines(file: File, num: int) -> bytes:
    """At least `num` lines of a file, decompressed; all of it when it has fewer."""
    head = b""
    with file.filesystem.open_input_stream(file.path, compression=_compression(file)) as stream:
        while head.count(b"\n") < num and (chunk := stream.read(1 << 16)):
            head += chunk
    return head


def _compression(file: File) -> str | None:
    """The compression that the extension names."""
    return COMPRESSIONS.get(file.name.rpartition(".")[2].lower())


def _decompressed(file: File) -> bytes | None:
    """All of a file whose extension names a compression; None for other files."""
    if _compression(file) is None:
        return None
    with file.filesystem.open_input_stream(file.path, compression=_compression(file)) as stream:
        return stream.read()


def is_utf8(text: bytes) -> bool:
    """Whether it is UTF-8. Arrow checks it without creating a string."""
    if text.isascii():
        return True
    try:
        pa.array([text], pa.large_binary()).cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True
