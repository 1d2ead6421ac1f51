"""Files of every format that are damaged or odd, each made from a number, and a process that reads them and may die:
`python -m tests.faults.fuzz_files`."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import orc
from pyarrow import parquet as pq

from recfx.data import Csv, JsonLines, Libsvm, fixedlen, reader, varlen
from recfx.data.convert import convert
from recfx.data.describe import describe
from recfx.data.files import match_files
from recfx.types import NUM_SAMPLES, pack

FORMATS = {
    "orc": "orc", "parquet": "parquet", "parquet with checksums": "parquet", "arrow": "arrow", "csv": "csv",
    "jsonl": "jsonl", "libsvm": "svm", "csv, compressed": "csv.gz", "jsonl, compressed": "json.zst",
    "libsvm, compressed": "libsvm.BZ2",
}  # fmt: skip
TEXTS = {"csv": Csv, "jsonl": JsonLines, "libsvm": Libsvm}
CPU_S, LIMIT_S, LIMIT_BYTES = 20, 120, 2 << 30  # for one file; of memory more than before the first one
NUM_ROWS, MOST_BLOCKS = 60, 40


def content_of(kind: str, seed: int) -> bytes:
    """A file of that kind, which depends on the numbers alone."""
    rng = random.Random(f"{kind} {seed}")
    name = kind.split(",")[0]
    compress = COMPRESS.get(kind, bytes)
    if name in TEXTS and rng.random() < 0.5:
        content = odd_text(name, rng)
        return compress(content) if rng.random() < 0.8 else damaged(compress(content), rng)
    content = whole(name, rng.randrange(4))
    if kind in COMPRESS and rng.random() < 0.5:
        return compress(damaged(content, rng))
    return damaged(compress(content), rng)


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "csv, compressed": lambda content: gzip.compress(content, mtime=0),
    "jsonl, compressed": _zstd,
    "libsvm, compressed": bz2.compress,
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """With one to three injuries; they may be the same bytes by chance."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = rng.choice(INJURIES)(content, rng)
    return content


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(content) + 1)
    return begin, min(begin + int(10 ** rng.uniform(0, 3)), len(content))


def _flip_bit(content: bytes, rng: random.Random) -> bytes:
    return _over(content, rng, 1, lambda byte: byte ^ (1 << rng.randrange(8)))


def _set_byte(content: bytes, rng: random.Random) -> bytes:
    return _over(content, rng, 1, lambda _: rng.choice([0, 1, 10, 34, 44, 58, 127, 128, 255]))


def _zero(content: bytes, rng: random.Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + bytes(end - begin) + content[end:]


def _noise(content: bytes, rng: random.Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + rng.randbytes(end - begin) + content[end:]


def _over(content: bytes, rng: random.Random, num: int, change: Callable[[int], int]) -> bytes:
    changed = bytearray(content)
    for _ in range(num if content else 0):
        # Most of what a format is made of is at its ends.
        place = rng.choice([rng.randrange(len(content)), -1 - rng.randrange(min(len(content), 300))])
        changed[place] = change(changed[place])
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _behead(content: bytes, rng: random.Random) -> bytes:
    return content[rng.randrange(len(content) + 1) :]


def _delete(content: bytes, rng: random.Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + content[end:]


def _double(content: bytes, rng: random.Random) -> bytes:
    begin, end = _span(content, rng)
    return content[:end] + content[begin:end] * rng.choice([1, 1, 5]) + content[end:]


def _swap(content: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice([rng.randbytes(rng.randrange(1, 100)), bytes(50), content, b"\n"])


INJURIES = [_flip_bit, _flip_bit, _set_byte, _set_byte, _zero, _noise, _cut, _behead, _delete, _double, _swap, _append]


@cache
def whole(name: str, variant: int) -> bytes:
    """An undamaged file of a format, in one of four ways."""
    rng, stream = random.Random(f"{name} {variant}"), io.BytesIO()
    table = _table(rng)
    compression = ["uncompressed", "snappy", "zstd", "zlib"][variant]
    if name == "orc":
        with orc.ORCWriter(stream, compression=compression, stripe_size=1, batch_size=16) as writer:
            for start in range(0, NUM_ROWS, 16):
                writer.write(table.slice(start, 16))
    elif name.startswith("parquet"):
        pq.write_table(
            table, stream, row_group_size=16, write_page_checksum=name != "parquet",
            compression={"uncompressed": "none", "zlib": "gzip"}.get(compression, compression),
            use_dictionary=variant % 2 == 0, data_page_version=["1.0", "2.0"][variant // 2],
        )  # fmt: skip
    elif name == "arrow":
        codec = {"zstd": "zstd", "zlib": "lz4"}.get(compression)
        with pa.ipc.new_file(stream, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            for start in range(0, NUM_ROWS, 16):
                writer.write_table(table.slice(start, 16))
    else:
        stream.write(b"".join(LINES[name](row) for row in table.to_pylist()))
        if name == "csv":
            return b"label,x,c,word\n" + stream.getvalue()
    return stream.getvalue()


def _table(rng: random.Random) -> pa.Table:
    rows = [
        {
            "label": float(i % 2),
            "x": [rng.random() for _ in range(i % 3)],
            "c": [rng.getrandbits(60) for _ in range(i % 4)],
            "word": [f"w{rng.getrandbits(20)}" for _ in range(i % 2)],
            "user": None if i % 7 == 0 else {"age": rng.randrange(90), "city": rng.choice(["rome", "\u00e9vora", ""])},
            "features": [{"k": rng.getrandbits(30), "v": rng.random()} for _ in range(i % 3)],
        }
        for i in range(NUM_ROWS)
    ]
    features = pa.list_(pa.struct([("k", pa.int64()), ("v", pa.float64())]))
    schema = pa.schema(
        {
            "label": pa.float64(), "x": pa.list_(pa.float64()), "c": pa.list_(pa.int64()),
            "word": pa.list_(pa.string()), "user": pa.struct([("age", pa.int64()), ("city", pa.string())]),
            "features": features,
        }
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def _csv_line(row: dict[str, Any]) -> bytes:
    cells = [row["label"], *(str(row[name][0]) if row[name] else "" for name in ("x", "c")), "".join(row["word"])]
    return (",".join(map(str, cells[:3])) + f',"{cells[3]}"\n').encode()


def _libsvm_line(row: dict[str, Any]) -> bytes:
    items = " ".join(f"{item['k']}:{item['v']}" for item in row["features"])
    query = f"qid:{row['user']['age']} " if row["user"] else ""
    return f"{row['label']} {query}{items} # {row['word']}\n".encode()


LINES = {"csv": _csv_line, "jsonl": lambda row: json.dumps(row).encode() + b"\n", "libsvm": _libsvm_line}

WORDS = [
    b"", b" ", b"\t", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", "\u2028\u0085\U0001f600".encode(), b'"', b'""', b'"a',
    b"'", b"\\", b"\\N", b"NULL", b"null", b"nan", b"-nan(3)", b"inf", b"-Infinity", b"1e400", b"-1e-400", b"+1", b"1.",
    b".5", b"0x1p3", b"1_000", b"01", b"-0", b"9" * 400, b"9223372036854775808", b"-9223372036854775809",
    b"18446744073709551616", b"9007199254740993", b"true", b"1,2", b"a:b", b"1:2:3", b"qid:", b"#", b"|", b"=1+1",
    b"{}", b"[]", b'{"a":1}', b"x" * 100_000, b"\r", b"\r\n", b"\n", b"2026-11-30", b"\\ud800", b"\\u0000",
]  # fmt: skip


def odd_text(name: str, rng: random.Random) -> bytes:
    """Text that somebody may have written, or meant for another program."""
    lines = whole(name, rng.randrange(4)).splitlines()
    first = 1 if name == "csv" else 0
    for _ in range(rng.randrange(1, 6)):
        i = rng.randrange(first, len(lines))
        lines[i] = rng.choice([_odd_line, _odd_cell])(name, lines[i], rng)
    if rng.random() < 0.3:
        lines = _odd_whole(name, lines, rng)
    ending = rng.choice([b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n"])
    content = rng.choice([b"", b"", b"", b"\xef\xbb\xbf", b"\n\n", b"\xff\xfe", b"# comment\n"])
    content += ending.join(lines) + rng.choice([ending, b"", b" ", b"\x1a", b"\x00"])
    return content if rng.random() < 0.97 else content.decode(errors="replace").encode("utf-16")


def _odd_cell(name: str, line: bytes, rng: random.Random) -> bytes:
    separator = {"csv": b",", "jsonl": b": ", "libsvm": b" "}[name]
    cells = line.split(separator)
    cells[rng.randrange(len(cells))] = rng.choice(WORDS)
    return separator.join(cells)


def _odd_line(name: str, line: bytes, rng: random.Random) -> bytes:
    if name == "jsonl":
        value = b'"%s"' % rng.choice(WORDS) if rng.random() < 0.5 else rng.choice(WORDS)
        depth = rng.choice([1, 100, 5000, 100_000])
        nested = b'{"c": ' + b"[" * depth + b"]" * depth + b', "label": 1}'
        twice = line[:-1] + b", " + line[1:] if line else b""
        return rng.choice([b'{"label": %s}' % value, b'{"user": %s, "label": 1}' % value, nested, twice, line * 2])
    separator = b"," if name == "csv" else b" "
    cells = [rng.choice(WORDS) for _ in range(rng.choice([0, 1, 3, 4, 4, 4, 5, 2000]))]
    return separator.join(cells)


def _odd_whole(name: str, lines: list[bytes], rng: random.Random) -> list[bytes]:
    long = b"1" * rng.choice([1000, 300_000])
    if name == "csv":
        wide = b",".join(b"c%d" % i for i in range(2000))
        names = rng.choice(
            [b"label,x,c,word,label", b"label,,c,word", b"", b'"label","x', wide, b"label", b"\xff,x,c,word", long]
        )
        return rng.choice([[names, *lines[1:]], lines[:1], [*lines, lines[0], *lines], [b",".join(lines)], [long]])
    if name == "jsonl":
        wide = b"{" + b", ".join(b'"c%d": %d' % (i, i) for i in range(2000)) + b', "label": 1}'
        pretty = b'{\n "label": 1,\n "c": [\n 1\n ]\n}'
        return rng.choice(
            [[wide, *lines], [pretty] * 3, [b"[", *lines, b"]"], [b" ".join(lines)], [long], [b""], lines[:1]]
        )
    wide = b"1 " + b" ".join(b"%d:1" % i for i in range(20_000))
    return rng.choice([[wide, *lines], [b" ".join(lines)], [long], [b""], [b"#"] * 9, lines[:1]])


def columns_of(kind: str) -> list:
    """What is read of a file of that kind."""
    label = fixedlen("label", [0.5], null="empty")
    features = varlen("features", torch.int64, weighted=True, null="empty")
    if kind.startswith("libsvm"):
        return [label, varlen("qid", torch.int64, null="empty"), features]
    lists = [varlen("x", torch.float32, null="empty"), varlen("c", torch.int64, null="empty")]
    flat = [label, *lists, varlen("word", torch.uint8, null="empty")]
    if kind.startswith("csv"):
        return flat
    return [
        *flat,
        varlen("user.age", torch.int64, null="empty"),
        varlen("user.city", torch.uint8, null="empty"),
        features,
    ]


def outcome(path: str, kind: str, seed: int, checksums: str | None, *, all_ways: bool) -> str:
    """One word for what came of reading the file. "WRONG: ..." is what must never be."""
    rng, name = random.Random(seed), kind.split(",")[0]
    block_bytes = max(rng.choice([64, 1000, 1 << 24]), os.path.getsize(path) // MOST_BLOCKS)
    how = TEXTS[name](block_bytes=block_bytes) if name in TEXTS else None
    options = {"on_bad": rng.choice(["raise", "skip"]), "format": how, "threads": 1, "prefetch": 0}
    words = [_tried(path, lambda: _read(path, columns_of(kind), checksums, options))]
    if all_ways:
        out = Path(f"{path}.out")
        words.append(_tried(path, lambda: bool(describe(match_files(path), format=how).num_rows)))
        words.append(_tried(path, lambda: bool(convert(path, out, format=how))))
        shutil.rmtree(out, ignore_errors=True)
    return next((word for word in words if word.startswith("WRONG")), words[0])


def _tried(path: str, work: Callable[[], bool]) -> str:
    try:
        return "rows" if work() else "no rows"
    except ValueError as error:
        if type(error) is not ValueError or path not in str(error):
            return f"WRONG: {type(error).__name__} that does not name the file: {error}"
        return "error"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"


def _read(path: str, columns: list, checksums: str | None, options: dict[str, Any]) -> bool:
    num_rows = 0
    for batch in reader(path, columns, 8, drop_remainder=False, checksums=checksums, **options):
        try:
            pack(dict(batch))
        except ValueError as error:  # would be taken for an error of the file
            raise AssertionError(f"a batch that is none: {error}") from error
        num_rows += int(batch[NUM_SAMPLES])
    return num_rows > 0


def main() -> None:
    """Answers each line of standard input, the arguments of `outcome`, with its word."""
    warnings.simplefilter("ignore")
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        path, kind, seed, checksums, all_ways = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # ends the process
        signal.alarm(LIMIT_S)  # so does this, if it waits
        word = outcome(path, kind, seed, checksums, all_ways=all_ways)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(json.dumps(word), flush=True)


if __name__ == "__main__":
    main()
