"""Runs that are killed, stopped by signals, or started twice: each ends as though nothing had happened.

All but a few draw small pictures (`running.small_pictures`); what is compared is `running.left_behind`.
"""

import re
import shutil
import signal

import numpy as np
import pytest
from running import (
    Trace,
    differing,
    newest_checkpoint,
    record,
    rows,
    sleep_until,
    train_ranks,
    write_config,
)

N_STEPS = 14
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store):
    random = np.random.default_rng(0)
    scenes = {name: random.normal(size=(24, 24, 6)) for name in ("a", "b", "v")}
    for z in scenes.values():
        z[random.random(z.shape) < 0.1] = np.nan
    return make_store(tmp_path_factory.mktemp("data") / "store", scenes, val=("v",)).path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


class Uninterrupted:
    """A run to compare with, and how long its parts took."""

    def __init__(self, starter, folder, store, *put, pictures=False, **changes):
        self.starter, self.folder, self.store = starter, folder, store
        self.put, self.pictures, self.changes = (("many_spikes",), *put), pictures, changes
        self.n = 0
        child, self.run, self.trace = self.start("whole")
        assert child.wait() == 0, child.errors
        self.begun = self.trace.notes()[0][0]
        self.seconds = self.trace.notes()[-1][0] - self.begun

    def start(self, name, *put):
        """Start a run, or start it again; returns the child, the run's directory, and the trace of this start."""
        config, run = write_config(self.folder, name, self.store, **self.changes)
        self.n += 1
        trace = Trace(self.folder / f"{name}-{self.n}.trace")
        put = (*self.put, ("traced", trace.path), *put)
        return self.starter.train(config, *put, pictures=self.pictures), run, trace

    def finish(self, name):
        """Start a run again, to its end, and compare."""
        child, run, _ = self.start(name)
        assert child.wait() == 0, child.errors
        assert record(run)["state"] == "finished"
        assert differing(run, self.run) == []
        shutil.rmtree(run)


@pytest.fixture(scope="module")
def whole(starter, store, tmp_path_factory):
    """Dropout, spikes, two readers; a checkpoint every third step, the last two are kept."""
    training = {"save_every": 3, "keep_last": 2, "plot_every": 4}
    model = {"chs": [32, 16]}  # files large enough to be caught in the middle
    whole = Uninterrupted(starter, tmp_path_factory.mktemp("runs"), store, model=model, training=training)
    assert len((whole.run / "events.jsonl").read_text().splitlines()) > 2
    return whole


def moment_in(random, trace, child, part, whole):
    """A random moment in a random one of the ``part``s of a run; None if it ended before."""
    n = int(random.integers(len(whole.trace.times(part, "begins"))))
    begun = trace.await_note(part, "begins", n, child)
    return None if begun is None else begun + random.uniform(0, whole.trace.seconds(part))


def moment_of(random, trace, child, whole):
    """A random moment of a run, from its first sign of life to its end."""
    begun = trace.await_note("process", "begins", 0, child)
    return None if begun is None else begun + random.uniform(0, whole.seconds)


# --- SIGKILL ----------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(amount, whole):
    """Half of the moments are drawn from the whole run, half from its saving; a run may die several times."""
    n_runs, n_inside = amount(4, 50), amount(1, 20)
    runs = inside = kills = 0
    while runs < n_runs or inside < n_inside:
        assert runs < 2 * n_runs, f"only {inside} of {runs} runs were killed inside saving"
        random = np.random.default_rng([1, runs])
        name, hit = f"killed{runs}", False
        for _ in range(int(random.integers(1, 4))):
            child, _, trace = whole.start(name)
            moment = (
                moment_in(random, trace, child, "saving", whole) if runs % 2 else moment_of(random, trace, child, whole)
            )
            if moment is not None:
                sleep_until(moment)
            child.send(signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
            hit |= trace.inside("saving")
        whole.finish(name)
        runs, inside = runs + 1, inside + hit
    print(f"{runs} runs, killed {kills} times, {inside} runs inside saving: all end byte-equal")


def test_killed_with_all_pictures(amount, starter, store, tmp_path):
    """The plots and reconstructions as users see them, too."""
    n = amount(1, 5)
    training = {"save_every": 2, "n_steps": 4}
    whole = Uninterrupted(starter, tmp_path, store, pictures=True, training=training)
    for i in range(n):
        random = np.random.default_rng([2, i])
        child, _, trace = whole.start(f"killed{i}")
        part = ("saving", "drawing")[i % 2]
        moment = moment_in(random, trace, child, part, whole)
        if moment is not None:
            sleep_until(moment)
        child.send(signal.SIGKILL)
        child.wait()
        whole.finish(f"killed{i}")


@pytest.mark.parametrize("name", ["thin_out", "draw"])
def test_killed_after_the_last_checkpoint(whole, name):
    """Nothing is left to learn; what was to follow must not be missing."""
    child, run, _ = whole.start(name, ("killed_before", name, N_STEPS))
    assert child.wait() == -signal.SIGKILL
    child, _, _ = whole.start(name)
    assert child.wait() == 0, child.errors
    assert differing(run, whole.run) == []
    assert names_in(run / "checkpoints") == names_in(whole.run / "checkpoints")
    assert record(run)["best"] == record(whole.run)["best"]
    assert '<span class="state finished">' in (run / "summary/index.html").read_text()


def test_killed_while_the_directory_is_made(amount, whole):
    """Before every single change of a file, from the first on: whatever is left, the same command goes on."""
    few = (5, 8)  # in the middle of writing run.json and config.yaml
    for n in few if amount(1, 0) else range(1, 40):
        child, _, _ = whole.start(f"early{n}", ("killed_at_file", whole.folder / f"early{n}/", n))
        assert child.wait() == -signal.SIGKILL
        whole.finish(f"early{n}")


# --- signals ----------------------------------------------------------------------------------------------------


def stop(whole, name, random, *numbers, part=None):
    """Send a run signals at a random moment after it began to listen; returns how often it was really stopped."""
    child, run, trace = whole.start(name)
    listening = trace.await_note("loop", "ends", 0, child)
    if part:
        moment = moment_in(random, trace, child, part, whole)
    else:
        moment = listening + random.uniform(0, whole.trace.notes()[-1][0] - whole.trace.times("loop", "ends")[0])
    if moment is not None:
        sleep_until(moment)
    for number in numbers:
        child.send(number)
    code = child.wait()
    last_step_begun = len(trace.times("update", "begins")) == N_STEPS
    if code == 0:  # the last step was being done, or done
        assert last_step_begun and record(run)["state"] == "finished"
    else:
        assert code in {EXIT_CODES[number] for number in numbers}, child.errors
        assert record(run)["state"] == "stopped"
        assert rows(run)[-1]["step"] <= int(newest_checkpoint(run).name.removeprefix("step="))
        assert not trace.inside("saving") and not trace.inside("drawing")
    child, _, _ = whole.start(name)
    assert child.wait() == 0, child.errors
    assert differing(run, whole.run) == []
    shutil.rmtree(run)
    return code != 0


def test_signals_at_random_moments(amount, whole):
    """Of each signal some in saving, validation and drawing, the others anywhere."""
    parts = (None, "saving", "validating", "drawing")
    for number, n in ((signal.SIGTERM, amount(2, 20)), (signal.SIGUSR1, amount(2, 20)), (signal.SIGINT, amount(0, 8))):
        stopped = runs = 0
        while stopped < n:
            assert runs < 2 * n + 2
            random = np.random.default_rng([3, number, runs])
            stopped += stop(whole, f"stopped{number}_{runs}", random, number, part=parts[(runs + number) % len(parts)])
            runs += 1
        print(f"{signal.Signals(number).name}: {stopped} of {runs} runs stopped, the others were done: all byte-equal")


def test_two_signals_in_a_row(amount, whole):
    for i in range(amount(1, 8)):
        random = np.random.default_rng([4, i])
        numbers = random.choice(list(EXIT_CODES), 2).tolist()
        stop(whole, f"twice{i}", random, *numbers)


# --- two processes ----------------------------------------------------------------------------------------------


def test_one_of_two_processes_at_random_moments(amount, starter, store, tmp_path):
    """Killed, or told to stop, whenever: both end by themselves, and two that are started again end as the others."""
    n_cases = amount(1, 12)
    config, whole = write_config(tmp_path, "whole", store)
    trace = Trace(tmp_path / "whole.trace")
    children = train_ranks(starter, config, 2, ("traced", trace.path))
    assert [child.wait() for child in children] == [0, 0]
    seconds = trace.notes()[-1][0] - trace.notes()[0][0]
    for i in range(n_cases):
        random = np.random.default_rng([5, i])
        number = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1][i % 3]
        victim = int(random.integers(2))
        config, run = write_config(tmp_path, f"run{i}", store, training={"peer_timeout": 20})
        trace = Trace(tmp_path / f"run{i}.trace")
        children = train_ranks(starter, config, 2, ("traced", trace.path), to_the_end=True)
        begun = trace.await_note("process", "begins", 0, children[0])
        sleep_until(begun + random.uniform(0, seconds))
        children[victim].send(number)
        codes = [child.wait() for child in children]
        assert None not in codes, "one waits for ever"
        assert codes[victim] in (0, 75, -number)
        all_done = len(trace.times("update", "ends")) == 2 * N_STEPS
        if codes[victim] != -number:
            assert codes[1 - victim] == codes[victim]
        else:
            assert codes[1 - victim] == 1 or (all_done and codes[1 - victim] == 0)
        children = train_ranks(starter, config, 2)
        assert [child.wait() for child in children] == [0, 0]
        assert differing(run, whole) == []


# --- all that decides about the bits ----------------------------------------------------------------------------

VARIANTS = {
    "channels_last": ([("channels_last",)], {}),
    "gradient_accumulation": ([], {"gradient_accumulation": 2}),
    "bf16-mixed": ([], {"precision": "bf16-mixed"}),
    "compiled": ([], {"compile": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_go_on_exactly(variant, amount, starter, store, tmp_path):
    """Killed before update 8 (goes on from 5), then stopped before update 12."""
    put, training = VARIANTS[variant]
    if variant == "compiled":
        if shutil.which("g++") is None:
            pytest.skip("torch.compile needs a C++ compiler on the CPU: g++ is not there")
        if not amount(0, 1):
            pytest.skip("takes long: under --torture only")
    whole = Uninterrupted(starter, tmp_path, store, *put, training=training)
    child, run, _ = whole.start("cut", ("at_update", 8, signal.SIGKILL))
    assert child.wait() == -signal.SIGKILL
    child, run, _ = whole.start("cut", ("at_update", 12, signal.SIGTERM))
    assert child.wait() == 75, child.errors
    assert [start["from_step"] for start in record(run)["starts"]] == [0, 5]
    whole.finish("cut")


# --- a second run -----------------------------------------------------------------------------------------------


def test_second_run_in_a_directory_in_use(whole):
    child, run, trace = whole.start("one", ("at_update", 8, signal.SIGSTOP))
    trace.await_note("update", "begins", 6, child)
    before = record(run)
    second, _, _ = whole.start("one")
    assert second.wait() == 2
    (line,) = second.errors
    assert re.search(r"output_dir: .*one is in use by another running `train`", line)
    assert record(run) == before
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    whole.finish("one")  # free at once
