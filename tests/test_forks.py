"""A script in a fork of the warm process is a program: arguments, folder, output, warnings, end."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.forks import Done

WARNS = "import warnings\nwarnings.warn('mind', stacklevel=1)\n"
BEGINS_ANOTHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(forks, tmp_path):
    def run(code: str, *arguments: str, timeout: float = 60) -> Done:
        script = tmp_path / "script.py"
        script.write_text(code)
        return forks.run(script, *arguments, cwd=tmp_path, timeout=timeout)

    return run


def test_arguments_folder_and_output_are_the_script_s(run, tmp_path):
    code = "import os, sys\nprint(__name__, sys.argv[1:], os.getcwd())\nprint(sys.path[0], file=sys.stderr)"
    done = run(code, "--a", "b")
    assert done == (0, f"__main__ ['--a', 'b'] {tmp_path}\n", f"{tmp_path}\n")
    assert run("import sys\nprint(sys.stdin.read())").stdout == "\n"


def test_nothing_is_left_of_the_script_before(run):
    assert run("import sys\nsys.answer = 1\nimport os\nos.environ['X'] = '1'\nos.chdir('/')").returncode == 0
    assert run("import os, sys\nprint(hasattr(sys, 'answer'), 'X' in os.environ)").stdout == "False False\n"
    assert run("import recfx\nprint(recfx.capture)").stderr.endswith("has no attribute 'capture'\n")


def test_a_script_ends_as_a_program_does(run):
    assert run("import atexit\natexit.register(print, 'bye')\nraise SystemExit(3)") == (3, "bye\n", "")
    done = run("\n\nraise ValueError('no')")
    assert done.returncode == 1
    assert 'script.py", line 3, in <module>' in done.stderr
    assert done.stderr.endswith("ValueError: no\n")
    assert run("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)").returncode == -11
    done = run(WARNS)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "UserWarning: mind")


def test_a_script_that_takes_too_long_ends_with_its_processes(run):
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run(BEGINS_ANOTHER, timeout=1)
    for _ in range(100):
        if subprocess.run(["ps", "-o", "stat=", "-p", caught.value.stdout.strip()], capture_output=True).stdout[:1] in (
            b"",
            b"Z",
        ):
            break
        time.sleep(0.05)
    else:
        pytest.fail("its process is there still")
    assert run("print(1)").stdout == "1\n"


def test_a_compiled_function_and_several_threads_work_in_a_fork(run):
    code = """
import torch
torch.set_num_threads(2)
x = torch.arange(100_000.0)
assert torch.equal(torch.compile(lambda x: (x + 1).sum(), backend="eager")(x), (x + 1).sum())
"""
    assert run(code) == (0, "", "")
