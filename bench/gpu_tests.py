"""The tests marked gpu of some files, in several processes: by pytest-xdist, or divided here when it is not installed.

`python -m bench.gpu_tests PATH...`: prints what pytest prints, then names what failed; writes
tests_<first path's name>_<device>_<yyyymm>.md and .json. WORKERS in the environment: how many processes, 8 if unset.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_timing import Results, arguments, copy_bytes, need_device, results_folder

ROOT = Path(__file__).parents[1]
OPTIONS = ["-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-rfE", "--durations=5"]
PYTEST = [sys.executable, "-m", "pytest", *OPTIONS]
NOTHING_RUN = 5  # pytest's exit code
# The cores per process: by default each process would use all.
SHARE = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected|xfailed|warnings?)\b")


def workers() -> int:
    return max(1, min(int(os.environ.get("WORKERS", "8")), os.cpu_count() or 1))


def has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


def by_xdist(paths: Sequence[str], num: int) -> tuple[int, str]:
    """(exit code, what was printed)."""
    lines: list[str] = []
    process = subprocess.Popen(
        [*PYTEST, "-n", str(num), *paths], cwd=ROOT, env=os.environ | SHARE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.poll() is None:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        except KeyboardInterrupt:  # pytest receives it too and prints the failures so far
            continue
    process.stdout.close()
    return process.returncode, "".join(lines)


def collected(paths: Sequence[str]) -> list[str]:
    command = [*PYTEST, "--collect-only", *paths]
    said = subprocess.run(command, cwd=ROOT, env=os.environ | SHARE, capture_output=True, text=True, check=False)
    return [line for line in said.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]


def by_shards(paths: Sequence[str], num: int) -> tuple[int, str]:
    """(exit code, what was printed): process i runs every num-th test, so that each runs tests of all files."""
    tests = collected(paths)
    num = max(1, min(num, len(tests)))
    with tempfile.TemporaryDirectory() as folder:
        outputs, processes = [], []
        for k in range(num):
            listed, output = Path(folder) / f"tests{k}", Path(folder) / f"output{k}"
            listed.write_text("\n".join(tests[k::num]))
            with output.open("w") as file:
                command = [*PYTEST, f"@{listed}"]
                process = subprocess.Popen(command, cwd=ROOT, env=os.environ | SHARE, stdout=file, stderr=file)
            processes.append(process)
            outputs.append(output)
        try:
            codes = [process.wait() for process in processes]
        except KeyboardInterrupt:  # they receive it too and print the failures so far
            codes = [process.wait() for process in processes]
        said = "".join(output.read_text() for output in outputs)
    print(said, end="", flush=True)
    return max((code for code in codes if code != NOTHING_RUN), default=0), said


def counted(said: str) -> dict[str, int]:
    """The counts in pytest's last lines, over all processes."""
    counts: dict[str, int] = {}
    for line in said.splitlines():
        if re.search(r" in \d+\.\d+s", line):
            for num, what in COUNTS.findall(line):
                counts[what] = counts.get(what, 0) + int(num)
    return counts


def failures(said: str) -> list[tuple[str, str]]:
    """(test, its error in one line), from pytest's short summary."""
    lines = [line for line in said.splitlines() if re.match(r"(FAILED|ERROR) \S", line)]
    pairs = [line.partition(" ")[2].partition(" - ") for line in lines]
    return [(test, error) for test, _, error in pairs]


def main() -> None:
    need_device("bench.gpu_tests")
    args = arguments()
    code, said = (by_xdist if has_xdist() else by_shards)(args.paths, workers())
    theme = f"tests_{Path(args.paths[0]).stem.removeprefix('test_')}"
    command = f"python -m bench.gpu_tests {' '.join(args.paths)}"
    to = Results(theme, results_folder(args), command=command, copy_bytes=copy_bytes(args))
    failed = failures(said)
    if failed:
        to.add_table("Failed", ["test", "error"], failed)
    summary = ", ".join(f"{num} {what}" for what, num in counted(said).items())
    how = "pytest-xdist" if has_xdist() else "this module"
    to.note(f"{summary or 'no test ran'}; exit code {code}, divided by {how} between {workers()} processes.")
    raise SystemExit(0 if code == NOTHING_RUN else code)


if __name__ == "__main__":
    main()
