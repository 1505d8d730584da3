"""The training run: set up, restore, loop, finish."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from spectralvae.config import TrainConfig
from spectralvae.data.cache import SceneCache, load_scenes
from spectralvae.runtime.console import warn
from spectralvae.runtime.device import peak_memory
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import EXIT_CODES, Stopped, StopSignal, stop_signal
from spectralvae.training import failure, record
from spectralvae.training.engine import Engine, out_of_memory
from spectralvae.training.memory import report_first_step
from spectralvae.training.network import start_from
from spectralvae.training.objective import means
from spectralvae.training.setup import Setup, set_up
from spectralvae.training.terminal import Stopwatch, summarize, terminal
from spectralvae.training.validation import Validated
from spectralvae.training.watch import Watch
from spectralvae.version import __version__
from spectralvae.weights.artifact import weights_sha256
from spectralvae.weights.checkpoint import (
    best_of,
    checkpoint_path,
    list_checkpoints,
    newest_valid,
    restore,
    save_checkpoint,
    thin_out,
)

STOP_CODES = sorted(set(EXIT_CODES.values()))


def train(config: TrainConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Train as ``config`` says in ``run``'s directory, or resume there.

    Everything that the config can be wrong about is found out before the directory is touched.

    Args:
        config: of the run.
        run: its directory; None in all processes but the main one.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError, InputError: config, store or initial weights will not do.
        RunError: a loss or gradient is not finite, memory or disk is full, or another process is gone.
        Stopped: a signal came, and the run was saved.
    """
    initial, started_from = config.training.init_from, {}
    has_checkpoint = ranks.broadcast(bool(run and run.opens_as == "resumable" and list_checkpoints(run.path)))
    with ranks.together():
        setup = set_up(config, ranks, console)
        if run:
            record.check_store(run.record, setup.store)
            run.refuse_inside("data.store", setup.store.path)
            if initial is not None:
                run.refuse_inside("training.init_from", initial)
        if initial is not None and not has_checkpoint:
            source = start_from(setup.model, setup.settings, initial)
            console.print(f"initial weights: {source.path}")
            ancestors = source.provenance.lineage() if source.provenance else None
            started_from = {"initial_weights": weights_sha256(setup.model), "ancestors": ancestors}
    environment = record.environment(setup)
    with stop_signal() as signals, ExitStack() as stack:
        with ranks.together():
            if run:
                stack.enter_context(run)
                if run.opens_as == "resumable" and (changes := record.rounding_changes(run.record, environment)):
                    warn(
                        console,
                        f"results will round differently from the earlier part of the run ({'; '.join(changes)})",
                    )
                facts = {"store_hash": setup.store.hash, "n_parameters": setup.n_parameters, "seed": config.seed}
                run.note(**environment, **started_from, config_hash=record.hash_of(run.config), **facts)
                run.note_start(**environment)
        trainer = None
        try:
            engine = Engine(setup.model, config, setup.device, ranks, setup.supervision)
            state = restore_newest(run, engine, console)
            console.print(f"parameters: {setup.n_parameters:,}")
            if setup.supervision is not None:
                console.print(f"supervision: {setup.supervision.described}")
            console.print(f"output directory: {config.output_dir.resolve()}")
            with ranks.together():
                trainer = Trainer(setup, engine, run, state, console)
            trainer.load_cache()
            if trainer.step == 0:
                trainer.measure_start()
            trainer.loop(signals)
            trainer.finish()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = out_of_memory(config, setup.device)
            if trainer and trainer.watch:
                trainer.watch.failed(trainer.step, error)
            raise error
        finally:
            if trainer:
                trainer.close()


def restore_newest(run: RunDir | None, engine: Engine, console: Console) -> dict[str, Any]:
    """Put the newest valid checkpoint of a run into the network and its optimizer.

    Args:
        run: its directory; None in all processes but the main one.
        engine: takes weights and moments.
        console: where to print which one it is.

    Returns:
        What was saved with it; empty at the start of a run.

    Raises:
        RunError: the run has made checkpoints, but none is left that is valid.
    """
    folder, ranks = engine.config.output_dir, engine.ranks
    newest = ranks.broadcast(ranks.on_main(newest_valid, folder, console))
    with ranks.together():
        if newest is not None:
            console.print(f"resuming from {newest}")
            return restore(newest, engine.model, engine.optimizer, engine.supervision)
        if run:
            record.check_never_saved(folder, run.record)
    return {}


class Trainer:
    """The loop of a run, and what it leaves behind.

    Args:
        setup: of the run.
        engine: the network and its optimizer, restored.
        run: the directory, entered; None in all processes but the main one.
        state: what the restored checkpoint keeps beside them; empty at the start of a run.
        console: where to print.

    Attributes:
        step: updates of the weights so far.
        watch: the record of the run; None in all processes but the main one.

    Raises:
        RunError: the record does not belong to the checkpoint.
    """

    def __init__(
        self, setup: Setup, engine: Engine, run: RunDir | None, state: dict[str, Any], console: Console
    ) -> None:
        self.setup, self.engine, self.run, self.console = setup, engine, run, console
        self.config, self.ranks, self.store = setup.config, setup.ranks, setup.store
        self.step: int = state.get("step", 0)
        self.clock = Stopwatch()
        self.watch: Watch | None = None
        if run:
            run.note_start(from_step=self.step)
            self.watch = Watch(
                run.path,
                self.step,
                n_steps=self.config.training.n_steps,
                batch_size=self.config.data.batch_size,
                grad_clip=self.config.training.grad_clip,
                facts=record.facts(setup, run.record, self.step),
                spikes=state.get("spikes", {}),
                n_rows=state.get("rows"),
            )
        if state and (text := record.other_tiles(state, setup.validation.crops)):
            warn(console, text)
        self.cache: SceneCache | None = None

    def load_cache(self) -> None:
        """Keep the training scenes on the device, where the config asks for it and there are steps left."""
        with self.ranks.together():
            if self.config.data.cache and self.step < self.config.training.n_steps:
                self.cache = load_scenes(self.store, self.setup.sampler.scenes, self.setup.device, self.console)

    def measure_start(self) -> None:
        """Log the first batch, the errors of the baselines, and the metrics of the untrained network."""
        with self.ranks.together():
            batch = next(iter(self.setup.stream(0, num_workers=0, cache=self.cache)))
            z = batch.tiles.cpu().float()
            z = z[torch.isfinite(z)]
            self.console.print(
                f"first batch: {len(batch.tiles)} tiles, {z.numel() / batch.tiles.numel():.2%} of the samples valid; "
                f"z: mean {z.mean():.3f}, std {z.std():.3f}, from {z.min():.2f} to {z.max():.2f}"
            )
            if self.watch and self.setup.validation.crops:
                self.watch.keep_baselines(self.setup.validation.reference_errors())
            elif self.watch:
                self.console.print("no validation scenes: no validation, and no comparison with PCA")
            sums = self.engine.measure(batch)
        row = means(self.ranks.add(sums))
        failure.check_finite(self.engine, self.store, batch, row)
        validated = self._validate()
        with self.ranks.together():
            self._log(row, validated)

    def loop(self, signals: StopSignal) -> None:
        """Update the weights until the last step.

        Args:
            signals: that came to this process.

        Raises:
            RunError: a loss or gradient is not finite.
            Stopped: a signal came to one of the processes; the run was saved.
        """
        ranks, engine, n_steps = self.ranks, self.engine, self.config.training.n_steps
        first_step, following = self.step, None
        batches = iter(self.setup.stream(first_step, self.config.data.num_workers, self.cache))
        with ranks.together():
            if self.run and self.watch:
                # a run killed right after saving may have left old checkpoints and outdated plots
                self._thin_out(self.run, self.watch)
                self.watch.draw(self.step, "running" if self.step < n_steps else "finished")
            if self.step < n_steps:
                following = next(batches)
        self.clock = Stopwatch()
        with terminal(self.step, n_steps, self.console) as shown:
            while self.step < n_steps:
                batch, following, lost = following, None, None
                assert batch is not None, "a lost batch has ended the loop"
                if self.step == first_step:
                    engine.order_buckets(batch)
                sums, norm = engine.gradients(batch)
                if self.step + 1 < n_steps:
                    try:
                        with self.clock.of("waiting for data"):
                            following = next(batches)
                    except Exception as error:  # raised below, once all processes know of it
                        lost = error
                stops = {f"exit_{code}": float(signals.exit_code == code) for code in STOP_CODES}
                totals = ranks.add({**sums, **stops, "lost": float(lost is not None)})  # the only reduction of a step
                exit_code = max((code for code in STOP_CODES if totals.pop(f"exit_{code}")), default=None)
                any_lost = bool(totals.pop("lost"))
                metrics = means(totals)
                failure.check_finite(engine, self.store, batch, metrics)
                engine.update(norm, self.step)
                self.step += 1
                if self.step == first_step + 1:
                    report_first_step(self.setup.device, self.console)
                self._follow_up(metrics, stopping=exit_code is not None)
                if self.watch:
                    shown.show(self.step, metrics, self.watch.steps_per_second)
                if exit_code is not None and self.step < n_steps:
                    self.console.print(f"stopped by a signal, saved at step {self.step}; start it again to resume")
                    raise Stopped(exit_code)
                if any_lost:
                    with ranks.together():
                        if lost is not None:
                            raise lost

    def finish(self) -> None:
        """Say how well the network does, what took the time, and where to look."""
        if self.watch:
            summarize(self.watch, self.step, self.clock.seconds(), self.console)

    def close(self) -> None:
        """Close the record, and note how far this start came."""
        if self.run and self.watch:
            self.watch.log.close()
            # written when the directory is left
            self.run.record["starts"][-1] |= {"to_step": self.step, "seconds": self.clock.seconds()}

    # --- after an update ------------------------------------------------------------------------

    def _follow_up(self, metrics: dict[str, float], *, stopping: bool) -> None:
        """Validate, log, save and draw if due."""
        training = self.config.training
        last = self.step == training.n_steps
        due = last or self.step % training.save_every == 0  # a stop must not wait for a validation
        validated = self._validate() if due or self.step % training.val_every == 0 else None
        saved = due or stopping
        with self.ranks.together():
            if self.run and self.watch:
                for spike in self.watch.note_spikes(self.step, metrics):
                    warn(self.console, f"step {spike.step}: spike: {spike.text}")
                if validated or last or self.step % training.log_every == 0:
                    self._log(metrics, validated)
                if saved:
                    with self.clock.of("saving"):
                        self._save(self.run, self.watch, validated)
                if saved or self.step % training.plot_every == 0:
                    with self.clock.of("drawing"):
                        self.watch.draw(self.step, "finished" if last else "stopped" if stopping else "running")

    def _validate(self) -> Validated | None:
        """Judge the network on the validation tiles; None if there are none."""
        if not self.setup.validation.crops:
            return None
        with self.clock.of("validation"):
            validated = self.setup.validation.run(self.engine)
        with self.ranks.together():
            if self.watch:
                self.watch.keep_validation(self.step, validated.description)
        return validated

    def _log(self, metrics: dict[str, float], validated: Validated | None) -> None:
        if self.watch:
            row = {"step": self.step, **metrics, **(validated.metrics if validated else {})}
            self.watch.log.log(row, peak_memory(self.setup.device) / 1e9)

    def _save(self, run: RunDir, watch: Watch, validated: Validated | None) -> None:
        setup, crops = self.setup, self.setup.validation.crops
        # the figure first: a run that dies in between draws it again
        watch.reconstructions(setup.validation.draw(self.engine, self.step), self.step)
        watch.log.sync()
        state = {
            "spectralvae": __version__,
            "seed": self.config.seed,
            "store_hash": self.store.hash,
            "rows": watch.log.n_rows,
            "spikes": watch.spike_state,
            "validation_tiles": record.tiles_digest(crops),
        }
        provenance = record.provenance(
            setup, run.record, metrics=validated.metrics if validated else None, baselines=watch.baselines
        )
        save_checkpoint(
            run.path,
            self.step,
            setup.model,
            setup.settings,
            self.store.normalization,
            self.engine.optimizer,
            state,
            latents=validated.latents if validated else None,
            provenance=provenance,
            supervision=setup.supervision,
        )
        run.note(newest_checkpoint=self.step)
        watch.log.saved(self.step)
        self._thin_out(run, watch)

    def _thin_out(self, run: RunDir, watch: Watch) -> None:
        """Delete old checkpoints, and note the best one."""
        losses = watch.log.val_losses
        best = best_of(run.path, losses)
        thin_out(run.path, self.config.training.keep_last, self.config.training.keep_every, best)
        if best is not None:
            where = str(checkpoint_path(run.path, best).relative_to(run.path))
            run.note(best={"step": best, "val_loss": losses[best], "checkpoint": where})
