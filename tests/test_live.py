"""Progress bars: a few lines in a log, one bar where somebody watches."""

import subprocess
import sys
import time

import pytest
from tqdm import tqdm
from tqdm.auto import tqdm as drawn_in_place

from sarm_lib import live


@pytest.fixture
def headless(monkeypatch):
    monkeypatch.setenv(live.HEADLESS, "1")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_a_log_gets_a_line_every_few_per_cent(headless, monkeypatch, capsys):
    monkeypatch.setattr(live, "SECONDS", 0.001)
    seen = [i for i in live.bar(range(1000), desc="counting", unit="frame") if not time.sleep(0.0002)]
    assert seen == list(range(1000))
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert 10 <= len(lines) <= live.SHARE and "\r" not in text
    assert lines[0].startswith("counting: 5% (50 of 1000 frames), 00:0")
    assert live.LINES.sub("", text + "a warning\n") == "a warning\n"


def test_what_takes_no_time_leaves_no_line(headless, capsys):
    before = len(tqdm._instances)
    assert list(live.bar(iter("abc"), desc="a", unit="frame")) == ["a", "b", "c"]
    steps = live.bar(total=3, desc="b", unit="step", initial=1)
    for _ in range(2):
        steps.update()
        steps.set_postfix(loss="0.1", refresh=False)
    steps.close()
    assert capsys.readouterr().err == "" and len(tqdm._instances) == before


def test_a_quiet_bar_is_quiet_everywhere(headless, monkeypatch, capsys):
    monkeypatch.setattr(live, "SECONDS", 0)
    assert list(live.bar(range(9), desc="a", unit="frame", quiet=True)) == list(range(9))
    assert capsys.readouterr().err == ""


def test_a_terminal_and_an_open_notebook_are_watched(monkeypatch):
    monkeypatch.delenv(live.HEADLESS, raising=False)
    assert not live.watched()  # pytest catches what is written
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert live.watched() and isinstance(live.bar(range(1), desc="a", unit="frame", quiet=True), drawn_in_place)
    monkeypatch.undo()
    monkeypatch.delenv(live.HEADLESS, raising=False)
    monkeypatch.setattr(live, "get_ipython", lambda: object())
    assert live.watched()
    monkeypatch.setenv(live.HEADLESS, "1")
    assert not live.watched()


def test_lines_of_a_killed_run_were_written_at_once():
    """A log is read while the work goes on."""
    code = "import os; del os.environ['TQDM_DISABLE']; from sarm_lib import live; live.SECONDS = 0\n[os._exit(1) for i in live.bar(range(40), desc='a', unit='frame') if i == 30]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a: 75% (30 of 40 frames)" in done.stderr
