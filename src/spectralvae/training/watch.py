"""What people see of a run while it goes: rows, curves, figures, and one page with all of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spectralvae.data.pca import REFERENCE_LABELS
from spectralvae.errors import RunError
from spectralvae.plotting.figures import save_figure
from spectralvae.runtime.atomic import write_atomic
from spectralvae.runtime.rundir import State, state_after
from spectralvae.training import plots
from spectralvae.training.dashboard import Dashboard, write_dashboard
from spectralvae.training.logbook import Event, Logbook
from spectralvae.training.spikes import SpikeDetector
from spectralvae.weights.checkpoint import list_checkpoints, step_of

WATCHED = ("loss", "grad_norm")  # for spikes, on every step
DRAWING_SHARE = 0.02  # of the time, at most


class Watch:
    """The record of a run and its pictures.

    Args:
        path: the run's directory.
        step: where the run resumes; 0 for a fresh one.
        n_steps: where it ends.
        batch_size: tiles a step.
        grad_clip: training.grad_clip of the config.
        facts: for the page, by their label.
        spikes: ``spike_state`` at that step.
        n_rows: how many rows of metrics had been written by then; None for a fresh run.

    Raises:
        RunError: the files of the record are missing, corrupt or incomplete.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        n_steps: int,
        batch_size: int,
        grad_clip: float,
        facts: Mapping[str, str],
        spikes: Mapping[str, Mapping[str, float]],
        n_rows: int | None = None,
    ) -> None:
        self.path, self.n_steps, self.batch_size, self.facts = path, n_steps, batch_size, facts
        self.grad_clip = grad_clip
        self.log = Logbook(path, step, [step_of(checkpoint) for checkpoint in list_checkpoints(path)], n_rows)
        self._detectors = {key: SpikeDetector(spikes.get(key)) for key in WATCHED}
        self._first = self._step = step
        self._started = time.monotonic()
        self._next_drawing = 0.0

    @property
    def spike_state(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps, so that a resumed run sees the same spikes."""
        return {key: detector.state for key, detector in self._detectors.items()}

    @property
    def steps_per_second(self) -> float:
        """Mean since this start."""
        return (self._step - self._first) / max(time.monotonic() - self._started, 1e-9)

    # --- what happens -----------------------------------------------------------------------------

    def note_spikes(self, step: int, metrics: Mapping[str, float]) -> list[Event]:
        """Look for spikes in the metrics of a step, logged or not; they are noted as events."""
        self._step = step
        found = []
        for key, detector in self._detectors.items():
            usual = detector.state["mean"]
            above = detector.look(metrics[key])
            if above is not None:
                text = f"{key} {metrics[key]:.4g}, {above:.0f} typical deviations above its mean of {usual:.4g}"
                found.append(Event(step, "spike", text))
        for event in found:
            self.log.event(event)
        return found

    def keep_validation(self, step: int, description: Mapping[str, Any]) -> None:
        """Keep what the newest validation found beyond its metrics, for the page."""
        self._folder("summary")
        write_atomic(self._validation, json.dumps({"step": step, **description}) + "\n")

    def keep_baselines(self, errors: Mapping[str, float]) -> None:
        """Keep the errors of the baselines."""
        write_atomic(self.path / "baselines.json", json.dumps(errors, indent=2) + "\n")

    @property
    def baselines(self) -> dict[str, float] | None:
        """The errors of the baselines by their key, where there are any."""
        path = self.path / "baselines.json"
        errors: dict[str, float] | None = json.loads(path.read_text()) if path.is_file() else None
        return errors

    @property
    def references(self) -> dict[str, float]:
        """The errors of the baselines by their label."""
        return {REFERENCE_LABELS[key]: value for key, value in (self.baselines or {}).items()}

    @property
    def _validation(self) -> Path:
        return self.path / "summary" / "validation.json"

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    # --- what is drawn ----------------------------------------------------------------------------

    def figure_path(self, step: int) -> Path:
        """Where the reconstructions of a step are."""
        return self.path / "figures" / f"reconstructions_step={step:06d}.png"

    def reconstructions(self, figure: Figure, step: int) -> None:
        """Keep a figure of reconstructions."""
        self.log.picture("reconstructions", save_figure(figure, self.figure_path(step)), step)

    def draw(self, step: int, state: State) -> None:
        """Redraw the curves and the page; while the run goes on, not so often that this takes more than
        `DRAWING_SHARE` of the time.
        """
        began = time.monotonic()
        if state == "running" and began < self._next_drawing:
            return
        spikes = [event.step for event in self.log.events if event.kind == "spike"]
        plots.draw_curves(self.log.curves, self._folder("summary"), self.references, spikes)
        self._write_page(step, state)
        self._next_drawing = began + (time.monotonic() - began) / DRAWING_SHARE

    def failed(self, step: int, error: Exception) -> None:
        """Show on the page that the run failed, and why."""
        self.log.events.append(Event(step, "failed", str(error)))
        with suppress(RunError, OSError):  # on a full disk: the first error is the one to hear of
            self._write_page(step, state_after(error))

    def _write_page(self, step: int, state: State) -> None:
        figures = sorted((self.path / "figures").glob("reconstructions_step=*.png"), key=step_of)
        figures = [figure for figure in figures if step_of(figure) <= step]  # a kill may have undone the others
        validation = json.loads(self._validation.read_text()) if self._validation.is_file() else None
        if validation and validation["step"] > step:
            validation = None
        speed = self.log.timing["steps_per_second"].newest_smooth
        page = Dashboard(
            title="/".join(self.path.resolve().parts[-2:]),  # the last one is often just "train"
            state=state,
            step=step,
            n_steps=self.n_steps,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds_left=(self.n_steps - step) / speed if speed and state == "running" else None,
            tiles_per_second=speed * self.batch_size if speed else None,
            grad_clip=self.grad_clip,
            curves={key: curve.points() for key, curve in (self.log.curves | self.log.timing).items()},
            references=self.references,
            events=list(self.log.events),
            n_events=self.log.n_events,
            validation=validation,
            picture=figures[-1].read_bytes() if figures else None,
            picture_step=step_of(figures[-1]) if figures else None,
            facts=self.facts,
        )
        write_dashboard(self._folder("summary") / "index.html", page)
