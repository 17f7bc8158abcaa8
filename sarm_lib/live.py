"""What is different while a person watches: bars that redraw themselves instead of lines in a log, and charts that answer
the mouse instead of pictures. A notebook that runs as a stage has nobody in front of it."""

import os
import re
import sys
from collections.abc import Iterable

from IPython import get_ipython
from tqdm import tqdm
from tqdm.auto import tqdm as drawn_in_place

HEADLESS = "SARM_HEADLESS"  # set for the kernels of stages
SECONDS, SHARE = 10, 20  # lines of a log are at least so far apart, and one is written for every 1/20 of the work
LINES = re.compile(r"^.*: \d+% \(.* of .*\), .* passed, .* left.*\n?", re.MULTILINE)
LINE = "{desc}: {percentage:.0f}% ({n_fmt} of {total_fmt} {unit}s), {elapsed} passed, {remaining} left, {rate_fmt}{postfix}"


def watched() -> bool:
    """Whether output goes to a notebook that somebody has open, or to a terminal."""
    return HEADLESS not in os.environ and (get_ipython() is not None or sys.stderr.isatty())


def bar(
    things: Iterable | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    quiet: bool = False,
) -> tqdm:
    """tqdm's bar over `things`, or to be updated by hand; one that is `quiet` says nothing, and what is done within
    seconds leaves no line in a log."""
    quiet = quiet or os.environ.get("TQDM_DISABLE") == "1"  # tqdm itself reads it once, when it is imported
    how = {"desc": desc, "unit": unit, "total": total, "initial": initial, "disable": quiet}
    if watched():
        return drawn_in_place(things, **how)
    length = total if total is not None else len(things) if hasattr(things, "__len__") else 0
    return _Lines(things, mininterval=SECONDS, delay=SECONDS, miniters=max(1, length // SHARE), bar_format=LINE, **how)


class _Lines(tqdm):
    monitor_interval = 0  # no thread that redraws what has stood still

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write(f"{self}\n")
        self.fp.flush()
        return True

    def close(self) -> None:
        """Without a last line, as tqdm does where nothing was drawn: whoever asked for the work says what came of it."""
        self.last_print_t = float("-inf")
        super().close()
