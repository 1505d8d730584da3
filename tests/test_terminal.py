"""What the terminal shows of a run."""

import io
import re
import sys
import time

import pytest

from spectralvae.runtime.console import new_console
from spectralvae.training.terminal import terminal


class Tty(io.StringIO):
    """A terminal, as far as it is asked."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("columns", "bar"), [(120, 40), (80, 15), (60, 0)])
def test_progress_fits_the_terminal_and_its_bar_gives_way(monkeypatch, columns, bar):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Tty())
    with terminal(199_000, 200_000, new_console()) as shown:
        for step in (199_500, 199_999):
            time.sleep(0.01)  # or nothing tells how long the last step will take
            shown.show(step, {"loss": -1234567.8, "pixel_mse": 1.2345e-5}, 12.345)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", sys.stderr.getvalue())
    line = re.split(r"[\r\n]+", text.strip())[-1]
    assert len(line) <= columns
    assert re.findall(r"\S*\d\S*", line) == ["199999/200000", "-1.235e+06", "1.234e-05", "12.35/s", "0:00:01"]
    assert bar <= len(re.findall("[━╸╺]", line)) <= (40 if bar else 0)
