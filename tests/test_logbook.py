"""What a run writes down: byte-equal after a kill at any byte, and nothing lost without a word."""

import json
import math
import os
import resource
import threading
from contextlib import contextmanager, suppress
from unittest.mock import MagicMock

import pytest
from refusals import refused

from spectralvae.errors import RunError
from spectralvae.training import logbook
from spectralvae.training.logbook import N_EVENTS, Event, Logbook


@pytest.fixture
def quiet(monkeypatch):
    """No TensorBoard, where it does not matter; returns what stands in its stead."""
    writer = MagicMock()
    monkeypatch.setattr(logbook, "SummaryWriter", writer)
    return writer


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


def test_files_hold_what_was_given_at_once(tmp_path, quiet):
    """Nothing waits in a buffer that a kill would take along."""
    book = Logbook(tmp_path, 0)
    go_on(book, range(6))
    assert lines(tmp_path / "metrics.jsonl") == [row_of(step) for step in range(6)]
    events = [{"step": step, "kind": "spike", "text": f"größer at {step}"} for step in (0, 3)]
    assert lines(tmp_path / "events.jsonl") == events
    timing = lines(tmp_path / "timing.jsonl")
    assert [(r["start"], r["step"], r["memory_gb"]) for r in timing] == [(1, step, 0.5 * step) for step in range(6)]
    seconds = [r["seconds"] for r in timing]
    assert seconds == sorted(seconds)
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
    again = record(tmp_path, range(9))  # without a checkpoint
    assert (files(tmp_path), points(again.curves), again.n_events) == (expected, points(whole.curves), whole.n_events)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("bad", [b'{"step": 3, "lo', b"[3]", b'{"loss": 1.0}', b"", b"\x00\x00\x00", b'{"step": null}'])
def test_corrupt_line_in_the_middle_is_named(tmp_path, quiet, name, bad):
    """Only a last line can be torn by a kill; what follows a corrupt one is not thrown away."""
    record(tmp_path, range(9))
    content = (tmp_path / name).read_bytes().splitlines()
    content[1] = bad
    corrupt = b"\n".join(content) + b"\n"
    (tmp_path / name).write_bytes(corrupt)
    with refused(RunError, "line 2", path=tmp_path / name):
        Logbook(tmp_path, 8)
    assert (tmp_path / name).read_bytes() == corrupt


def test_missing_files_and_rows_out_of_order_are_refused(tmp_path, quiet):
    record(tmp_path, range(3))
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).rename(tmp_path / "aside")
        with refused(RunError, "step 2", path=tmp_path / name):
            Logbook(tmp_path, 2)
        assert not (tmp_path / name).exists()
        (tmp_path / "aside").rename(tmp_path / name)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row_of(1)) + "\n")
    with refused(RunError, "step 1", "step 2", path=tmp_path / "metrics.jsonl"):
        Logbook(tmp_path, 8)


def test_timing_keeps_all_that_was_spent(tmp_path, quiet):
    """Three starts, the first of which died while it wrote a row; the curves show each step's last time."""
    record(tmp_path, range(8))
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"start": 1, "st')
    record(tmp_path, [4, 5, 6], start=3)
    third = record(tmp_path, [6, 7, 8], start=5)
    expected = [*((1, step) for step in range(8)), (2, 4), (2, 5), (2, 6), (3, 6), (3, 7), (3, 8)]
    assert [(r["start"], r["step"]) for r in lines(tmp_path / "timing.jsonl")] == expected
    assert third.timing["memory_gb"].points().step.tolist() == list(range(9))
    assert third.timing["steps_per_second"].points().step.tolist() == [1, 2, 3, 5, 7, 8]  # 4 and 6 begin a start


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
    for known in (book, Logbook(tmp_path, N_EVENTS + 100)):
        known.close()
        assert [event.step for event in known.events] == list(range(50, N_EVENTS + 50))
        assert known.n_events == N_EVENTS + 50


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


def test_error_of_closing_does_not_hide_an_earlier_one(tmp_path, quiet):
    def raise_the_first():
        yield 0
        raise RunError("the first")

    quiet.return_value.close.side_effect = OSError(28, "No space left on device")
    with pytest.raises(RunError, match="the first"):
        go_on_and_close(Logbook(tmp_path, 0), raise_the_first())
    with pytest.raises(OSError, match="tensorboard"):
        Logbook(tmp_path, 0).close()


def test_sync_reaches_the_disk(tmp_path, quiet, monkeypatch):
    synced = []
    monkeypatch.setattr(logbook.os, "fsync", synced.append)
    book = Logbook(tmp_path, 0)
    book.sync()
    book.close()
    assert len(set(synced)) == 3


def test_tensorboard_hides_what_was_undone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = threading.active_count()
    record(tmp_path, range(9))
    record(tmp_path, range(6, 8), start=5)
    assert threading.active_count() == before
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = {step: row_of(step)["loss"] for step in range(8)}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    assert [e.step for e in events.Scalars("val/loss")] == [0, 4]
