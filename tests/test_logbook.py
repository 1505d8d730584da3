"""What a run writes down: byte-equal after a kill at any byte, and nothing lost without a word."""

import json
import math
import os
import resource
import threading
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from spectralvae.errors import RunError
from spectralvae.training import logbook
from spectralvae.training.curves import Curve
from spectralvae.training.logbook import N_EVENTS, Event, Logbook


class NoWriter:
    """In TensorBoard's stead, where it does not matter."""

    def __init__(self, folder, purge_step=None):
        self.closed = False

    def add_scalar(self, *_):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(logbook, "SummaryWriter", NoWriter)


def row_of(step):
    row = {"step": step, "loss": math.exp(-step / 7) - 0.5, "grad_norm": 1 / (step + 3)}
    return row | ({"val_loss": step / 3} if step % 4 == 0 else {})


def go_on(book, steps):
    for step in steps:
        if step % 3 == 0:
            book.event(Event(step, "spike", f"größer at {step}"))
        book.log(row_of(step), 0.5 * step)


def go_on_and_close(book, steps):
    try:
        go_on(book, steps)
    finally:
        book.close()


def record(run, steps, start=0):
    book = Logbook(run, start)
    go_on_and_close(book, steps)
    return book


def points(curves):
    return {key: [column.tolist() for column in curve.points()] for key, curve in curves.items()}


def files(run):
    return {name: (run / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def full_disk(size):
    """No file can grow past so many bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_files_hold_what_was_given(tmp_path, quiet):
    record(tmp_path, range(6))
    assert lines(tmp_path / "metrics.jsonl") == [row_of(step) for step in range(6)]
    assert lines(tmp_path / "events.jsonl") == [
        {"step": step, "kind": "spike", "text": f"größer at {step}"} for step in (0, 3)
    ]
    timing = lines(tmp_path / "timing.jsonl")
    assert [(r["start"], r["step"], r["memory_gb"]) for r in timing] == [(1, step, 0.5 * step) for step in range(6)]
    seconds = [r["seconds"] for r in timing]
    assert seconds == sorted(seconds)
    assert set(timing[0]) == {"start", "step", "seconds", "memory_gb"}


def test_rows_are_in_the_file_at_once(tmp_path, quiet):
    """Nothing waits in a buffer that a kill would take along."""
    book = Logbook(tmp_path, 0)
    go_on(book, range(4))
    assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "timing.jsonl")) == 4
    assert len(lines(tmp_path / "events.jsonl")) == 2
    book.close()


def test_kill_at_any_byte(tmp_path, quiet):
    """Checkpoint at step 5; whatever the kill left of the rows after it, the files become those of one whole run."""
    whole = record(tmp_path, range(9))
    expected = files(tmp_path)
    for name, content in expected.items():
        kept = [line for line in content.splitlines(keepends=True) if json.loads(line)["step"] <= 5]
        for size in range(sum(map(len, kept)) - 1, len(content) + 1):  # without the last newline, too
            for other, full in expected.items():
                (tmp_path / other).write_bytes(full[:size] if other == name else full)
            (tmp_path / "timing.jsonl").unlink()
            resumed = record(tmp_path, range(6, 9), start=5)
            assert files(tmp_path) == expected
            assert points(resumed.curves) == points(whole.curves)
            assert (list(resumed.events), resumed.n_events) == (list(whole.events), whole.n_events)
            assert resumed.last_row == whole.last_row


def test_fresh_start_forgets_a_run_without_a_checkpoint(tmp_path, quiet):
    whole = record(tmp_path, range(9))
    expected = files(tmp_path)
    again = record(tmp_path, range(9))
    assert files(tmp_path) == expected
    assert points(again.curves) == points(whole.curves)
    assert again.n_events == whole.n_events
    assert [r["start"] for r in lines(tmp_path / "timing.jsonl")] == [1] * 9 + [2] * 9
    assert again.timing["memory_gb"].points().step.tolist() == list(range(9))


def test_nothing_is_rewritten_without_need(tmp_path, quiet):
    record(tmp_path, range(6))
    before = {name: (tmp_path / name).stat() for name in files(tmp_path)}
    Logbook(tmp_path, 5).close()
    for name, stat in before.items():
        after = (tmp_path / name).stat()
        assert (after.st_mtime_ns, after.st_ino, after.st_size) == (stat.st_mtime_ns, stat.st_ino, stat.st_size)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("bad", [b'{"step": 3, "lo', b"[3]", b'{"loss": 1.0}', b"", b"\x00\x00\x00", b'{"step": null}'])
def test_damaged_line_in_the_middle_is_named(tmp_path, quiet, name, bad):
    """Only a last line can be torn by a kill; what follows a damaged one is not thrown away."""
    record(tmp_path, range(9))
    content = (tmp_path / name).read_bytes().splitlines()
    content[1] = bad
    damaged = b"\n".join(content) + b"\n"
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(RunError, match=rf"{name}: line 2 is damaged.*--overwrite"):
        Logbook(tmp_path, 8)
    assert (tmp_path / name).read_bytes() == damaged


def test_rows_out_of_order_are_refused(tmp_path, quiet):
    record(tmp_path, range(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row_of(1)) + "\n")
    with pytest.raises(RunError, match=r"metrics.jsonl: step 1 comes after step 2"):
        Logbook(tmp_path, 8)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_missing_file_is_refused(tmp_path, quiet, name):
    record(tmp_path, range(3))
    (tmp_path / name).unlink()
    with pytest.raises(RunError, match=rf"{name}: is not there.*step 2"):
        Logbook(tmp_path, 2)
    assert not (tmp_path / name).exists()


def test_timing_keeps_all_that_was_spent(tmp_path, quiet):
    """Three starts, the first of which died while it wrote a row; the curves show each step's last time."""
    record(tmp_path, range(8))
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"start": 1, "st')
    record(tmp_path, [4, 5, 6], start=3)
    third = record(tmp_path, [6, 7, 8], start=5)
    rows = lines(tmp_path / "timing.jsonl")
    assert [(r["start"], r["step"]) for r in rows] == [
        *((1, step) for step in range(8)),
        *((2, step) for step in (4, 5, 6)),
        *((3, step) for step in (6, 7, 8)),
    ]
    last = {r["step"]: i for i, r in enumerate(rows)}  # the newest row of each step
    speeds = {
        step: 1 / (rows[i]["seconds"] - rows[i - 1]["seconds"])
        for step, i in last.items()
        if i and rows[i]["start"] == rows[i - 1]["start"]
    }
    for book in (third, Logbook(tmp_path, 8)):
        assert book.timing["memory_gb"].points().step.tolist() == list(range(9))
        shown = book.timing["steps_per_second"].points()
        assert dict(zip(shown.step.tolist(), shown.mean.tolist(), strict=True)) == pytest.approx(speeds)
        book.close()


def test_speed_is_within_a_start(tmp_path, quiet):
    """By hand: 10 steps in 5 s, then in 4 s; what lies between two starts, or takes no time, is no speed."""
    rows = [(1, 10, 7.0), (1, 20, 12.0), (1, 25, 12.0), (1, 30, 13.0), (2, 30, 50.0), (2, 40, 54.0)]
    keys = ("start", "step", "seconds", "memory_gb")
    text = "".join(json.dumps(dict(zip(keys, (*row, 1.5), strict=True))) + "\n" for row in rows)
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "timing.jsonl").write_text(text)
    book = Logbook(tmp_path, 40)
    shown = book.timing["steps_per_second"].points()
    assert (shown.step.tolist(), shown.mean.tolist()) == ([20, 40], [2.0, 2.5])
    assert book.timing["memory_gb"].points().step.tolist() == [10, 20, 25, 30, 40]
    book.close()
    assert (tmp_path / "timing.jsonl").read_text() == text


def test_events_kept_in_memory_are_few(tmp_path, quiet):
    book = Logbook(tmp_path, 0)
    for step in range(N_EVENTS + 50):
        book.event(Event(step, "spike", ""))
    book.close()
    resumed = Logbook(tmp_path, N_EVENTS + 100)
    for known in (book, resumed):
        assert [event.step for event in known.events] == list(range(50, N_EVENTS + 50))
        assert known.n_events == N_EVENTS + 50
    resumed.close()


def test_val_losses_are_those_of_checkpoints(tmp_path, quiet):
    record(tmp_path, range(17))
    book = Logbook(tmp_path, 13, checkpoints=(4, 5, 12, 16))
    assert book.val_losses == {4: 4 / 3, 12: 4.0}  # 5 was not validated, 16 is undone
    assert book.last_row == row_of(13)
    go_on(book, range(14, 17))
    assert book.val_losses == {4: 4 / 3, 12: 4.0}
    book.saved(16)
    go_on(book, range(17, 18))
    book.saved(17)  # was not validated
    book.saved(16)  # is not the newest row any more
    assert book.val_losses == {4: 4 / 3, 12: 4.0, 16: 16 / 3}
    assert book.last_row == row_of(17)
    book.close()


def test_curves_of_a_replay_are_those_of_the_run(tmp_path, quiet):
    """Over many bins with several rows each, against curves of the rows themselves."""
    steps = range(0, 40_001, 10)
    values = np.random.default_rng(0).lognormal(size=len(steps)).tolist()
    rows = [{"step": step, "loss": value} for step, value in zip(steps, values, strict=True)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "events.jsonl").touch()
    expected = Curve()
    for row in rows:
        expected.add(row["step"], row["loss"])
    book = Logbook(tmp_path, 40_000)
    assert points(book.curves) == points({"loss": expected})
    assert len(book.curves["loss"].points().step) < 1900
    assert (book.curves["loss"].first, book.curves["loss"].last) == (values[0], values[-1])
    book.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "timing.jsonl"])
def test_full_disk_names_the_file_once(tmp_path, quiet, name):
    """The row is refused where it is written; closing says nothing more, and the torn row is cut off on resuming."""
    book = Logbook(tmp_path, 0)
    go_on(book, range(3))
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.jsonl")}
    others = [path for path in tmp_path.glob("*.jsonl") if path.name != name]
    for path in others:  # the limit holds for all files: these begin anew
        os.truncate(path, 0)
    with pytest.raises(OSError, match=name) as raised, full_disk(sizes[name] + 20):
        go_on_and_close(book, [3])
    assert raised.value.filename == str(tmp_path / name)
    assert raised.value.__cause__.filename is None  # the system's own does not say it
    torn = (tmp_path / name).read_bytes()
    assert len(torn) > sizes[name] and not torn.endswith(b"\n")


def test_full_disk_while_logging_then_going_on(tmp_path, quiet):
    """metrics.jsonl is the longest file and so the first to stop growing."""
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
    record(tmp_path / "whole", range(60))
    expected = files(tmp_path / "whole")
    book = Logbook(tmp_path / "full", 0)
    with pytest.raises(OSError, match=r"metrics\.jsonl") as raised, full_disk(4001):
        go_on_and_close(book, range(60))
    assert raised.value.filename == str(tmp_path / "full/metrics.jsonl")
    reached = book.last_row["step"]
    assert (tmp_path / "full/metrics.jsonl").stat().st_size == 4001
    record(tmp_path / "full", range(reached + 1, 60), start=reached)
    assert files(tmp_path / "full") == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_full_disk_under_tensorboard(tmp_path):
    """Its file is written by a thread and at the end: the error comes out all the same, with its folder's name."""
    book = Logbook(tmp_path, 0)
    book.log(row_of(0), 0.0)
    with full_disk(100), pytest.raises(OSError, match=r"tensorboard") as raised:
        book.close()
    assert raised.value.filename == str(tmp_path / "tensorboard")
    with suppress(OSError):  # ends the thread
        book._writer.file_writer.event_writer.close()


def test_error_of_closing_does_not_hide_an_earlier_one(tmp_path, quiet, monkeypatch):
    def fail(self):
        raise OSError(28, "No space left on device")

    def raise_the_first():
        yield 0
        raise RunError("the first")

    monkeypatch.setattr(NoWriter, "close", fail)
    book = Logbook(tmp_path, 0)
    with pytest.raises(RunError, match="the first"):
        go_on_and_close(book, raise_the_first())
    book = Logbook(tmp_path, 0)
    with pytest.raises(OSError, match="tensorboard"):
        book.close()


def test_sync_reaches_the_disk(tmp_path, quiet, monkeypatch):
    synced = []
    book = Logbook(tmp_path, 0)
    monkeypatch.setattr(logbook.os, "fsync", synced.append)
    book.sync()
    assert len(set(synced)) == 3
    book.close()


def test_tensorboard_hides_what_was_undone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = threading.active_count()
    record(tmp_path, range(9))
    record(tmp_path, range(6, 8), start=5)
    assert threading.active_count() == before
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(
        {step: row_of(step)["loss"] for step in range(8)}, rel=1e-6
    )
    assert [e.step for e in events.Scalars("val/loss")] == [0, 4]
