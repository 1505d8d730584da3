"""Runs that are killed or stopped by signals: each ends as though nothing had happened.

All but a few draw small pictures (`running.small_pictures`); what is compared is `running.left_behind`.
"""

import shutil
import signal
import time

import numpy as np
import pytest
from browsing import Reader
from running import differing, newest_checkpoint, noise_store, record, rows, train_ranks, write_config

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store):
    return noise_store(make_store, tmp_path_factory.mktemp("data") / "store")


class Uninterrupted:
    """A run to compare with, how many seconds it took, and which files it changed, in order."""

    def __init__(self, starter, folder, store, *put, pictures=False, **settings):
        self.starter, self.folder, self.store = starter, folder, store
        self.put, self.pictures, self.settings = (("many_spikes",), *put), pictures, settings
        log = folder / "changes"
        child, self.run = self.start("whole", ("at_change", f"{folder}/whole/", 0, 0, log))
        began = time.monotonic()
        assert child.wait() == 0, child.errors
        self.seconds, self.changes = time.monotonic() - began, log.read_text().splitlines()

    def start(self, name, *put):
        """Start a run, or start it again."""
        config, run = write_config(self.folder, name, self.store, **self.settings)
        return self.starter.train(config, *self.put, *put, pictures=self.pictures), run

    def place_of(self, *words):
        """The number, from 1, of the first change whose line has all words."""
        return 1 + next(i for i, line in enumerate(self.changes) if all(word in line for word in words))

    def finish(self, name):
        """Start a run again, to its end, and compare."""
        child, run = self.start(name)
        assert child.wait() == 0, child.errors
        assert record(run)["state"] == Reader(run / "summary/index.html").data["state"] == "finished"
        assert differing(run, self.run) == []


@pytest.fixture(scope="module")
def whole(starter, store, tmp_path_factory):
    """Dropout, spikes, two readers; a checkpoint every third step, the last two are kept."""
    training = {"save_every": 3, "keep_last": 2, "plot_every": 4}
    model = {"chs": [32, 16]}  # files large enough to be caught in the middle
    whole = Uninterrupted(starter, tmp_path_factory.mktemp("runs"), store, model=model, training=training)
    assert len(rows(whole.run)) > 8
    assert len((whole.run / "events.jsonl").read_text().splitlines()) > 2
    return whole


def test_killed_at_random_moments(amount, whole):
    """A run may die several times."""
    kills = 0
    for i in range(amount(3, 50)):
        random = np.random.default_rng([1, i])
        for _ in range(int(random.integers(1, 4))):
            child, _ = whole.start(f"killed{i}")
            time.sleep(random.uniform(0, whole.seconds))
            child.send(signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
        whole.finish(f"killed{i}")
    assert kills > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, *EXIT_CODES])
def test_cut_off_before_a_change_of_a_file(amount, whole, number):
    """While the directory is made, in saving, in drawing, and after the last checkpoint, with nothing left to learn."""
    first, saving = whole.place_of("os.rename", "run.json"), whole.place_of("step=000009")
    after = whole.place_of("os.rename", "step=000014") + 1
    if number == signal.SIGKILL:
        drawing = after + next(i for i, line in enumerate(whole.changes[after:]) if "summary/" in line) + 1
        places = amount([5, 8, saving, after, drawing], range(1, len(whole.changes) + 1))
    else:
        places = amount([first + 1, saving], range(first + 1, whole.place_of("step=000012"), 8))
    for n in places:
        name = f"at{n}_{number}"
        # another signal soon after the first changes nothing
        put = [("at_change", f"{whole.folder / name}/", n + more, number) for more in (0, 3)]
        child, run = whole.start(name, *put)
        assert child.wait() == EXIT_CODES.get(number, -number), child.errors
        if number != signal.SIGKILL:
            assert record(run)["state"] == "stopped"
            assert rows(run)[-1]["step"] <= int(newest_checkpoint(run).name.removeprefix("step="))
        whole.finish(name)
        if number == signal.SIGKILL:
            assert record(run)["best"] == record(whole.run)["best"]
            assert {p.name for p in run.glob("checkpoints/*")} == {p.name for p in whole.run.glob("checkpoints/*")}
        shutil.rmtree(run)


def test_killed_with_all_pictures(amount, starter, store, tmp_path):
    """The plots and reconstructions as users see them, too."""
    training = {"save_every": 2, "n_steps": 4}
    whole = Uninterrupted(starter, tmp_path, store, pictures=True, training=training)
    start = whole.place_of("step=000002")
    for n in np.random.default_rng(2).integers(start, len(whole.changes), amount(1, 5)).tolist():
        child, _ = whole.start(f"at{n}", ("at_change", f"{whole.folder / f'at{n}'}/", n))
        assert child.wait() == -signal.SIGKILL, child.errors
        whole.finish(f"at{n}")


def test_one_of_two_processes_at_random_moments(amount, starter, store, tmp_path):
    """Killed, or told to stop, whenever: both end by themselves, and two that are started again end as the others."""
    config, whole = write_config(tmp_path, "whole", store)
    children = train_ranks(starter, config, 2)
    began = time.monotonic()
    assert [child.wait() for child in children] == [0, 0]
    seconds = time.monotonic() - began
    for i in range(amount(1, 12)):
        random = np.random.default_rng([5, i])
        number = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1][i % 3]
        victim = int(random.integers(2))
        config, run = write_config(tmp_path, f"run{i}", store, training={"peer_timeout": 20})
        children = train_ranks(starter, config, 2, to_the_end=True)
        time.sleep(random.uniform(0, seconds))
        children[victim].send(number)
        codes = [child.wait() for child in children]
        assert None not in codes, "one waits for ever"
        assert codes[victim] in (0, 75, -number)
        if codes[victim] != -number:
            assert codes[1 - victim] == codes[victim]
        elif codes[1 - victim] == 0:
            assert newest_checkpoint(run).name == "step=000014"
        else:
            assert codes[1 - victim] == 1
        assert [child.wait() for child in train_ranks(starter, config, 2)] == [0, 0]
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
    if variant == "compiled" and (not amount(0, 1) or shutil.which("g++") is None):
        pytest.skip("takes long and needs a C++ compiler: under --torture only")
    whole = Uninterrupted(starter, tmp_path, store, *put, training=training)
    for step, number, code in ((8, signal.SIGKILL, -signal.SIGKILL), (12, signal.SIGTERM, 75)):
        child, run = whole.start("cut", ("at_update", step, number))
        assert child.wait() == code, child.errors
    assert [start["from_step"] for start in record(run)["starts"]] == [0, 5]
    whole.finish("cut")
