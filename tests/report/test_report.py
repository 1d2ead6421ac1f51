"""The page about a run: well-formed, alone, and with the numbers of the run; in a browser where there is one."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from recfx import cli
from recfx.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def run(tmp_path):
    """A run of two tasks."""
    rng = np.random.default_rng(0)
    user, click = rng.integers(0, 30, 2000), rng.integers(0, 2, 2000)
    table = {"click": click, "buy": click * rng.integers(0, 2, 2000), "user": user, "price": rng.random(2000)}
    pq.write_table(pa.table(table), tmp_path / "clicks.parquet")
    args = ["--label", "click", "--label", "buy", "--model", "mmoe", "--set", "batch_size=200", "--log_steps", "2"]
    shutil.copy(tmp_path / "clicks.parquet", tmp_path / "more.parquet")
    files = [str(tmp_path / "clicks.parquet"), "--eval", str(tmp_path / "more.parquet")]
    out = ["--output_dir", str(tmp_path / "run"), "--backend", "eager"]
    assert cli.main(["train", *files, *args, *out]) == 0
    yield tmp_path / "run"
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).endswith("program.py")]:
        del sys.modules[name]


class Page(HTMLParser):
    """Open tags, to see that each is closed; links and scripts."""

    def __init__(self):
        super().__init__()
        self.open, self.external, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "use", "rect", "line"):
            self.open.append(tag)
        self.external += [value for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")]
        self.external += ["script"] if tag == "script" else []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_without_matplotlib_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        write_report(run)


def test_a_folder_without_a_run_is_an_error(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "contains no run.json" in capsys.readouterr().err


def test_it_is_one_file_with_the_numbers_of_the_run(run, capsys):
    pytest.importorskip("matplotlib", reason="an optional package")
    assert cli.main(["report", str(run), "--files", str(run.parent / "more.parquet")]) == 0
    path = run / "report.html"
    assert capsys.readouterr().out.strip().endswith(str(path))
    text = path.read_text()
    assert 20_000 < len(text) < 1_000_000
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.external == []
    assert text.count("<svg") >= 8
    shown = "".join(page.text)
    for part in ("Learning", "Speed", "Tables", "Rows", "Calibration", "click/auc", "program.py"):
        assert part in shown
    assert "steps  10" in shown
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", text)


@pytest.mark.slow
def test_a_browser_shows_it(run, tmp_path):
    pytest.importorskip("matplotlib", reason="an optional package")
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    path, picture = write_report(run), tmp_path / "page.png"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--enable-logging=stderr", f"--screenshot={picture}", str(path)],
        timeout=60, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert picture.stat().st_size > 20_000
    assert "CONSOLE" not in done.stderr
