"""The training run: what is set up, the loop, and what is left behind."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spectralvae.config import TrainConfig
from spectralvae.data.cache import SceneCache, load_scenes, scene_bytes
from spectralvae.data.loader import Batch, TargetReader, TileStream, make_sampler
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, RunError
from spectralvae.runtime.console import warn
from spectralvae.runtime.device import choose_device, peak_memory
from spectralvae.runtime.ranks import Ranks
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import EXIT_CODES, Stopped, StopSignal, stop_signal
from spectralvae.training import failure, record
from spectralvae.training.engine import Engine, check_shares, out_of_memory
from spectralvae.training.memory import check_batch_fits, check_cache, report_first_step
from spectralvae.training.network import check_forward, network_settings, start_from
from spectralvae.training.objective import means
from spectralvae.training.supervision import build_supervision
from spectralvae.training.terminal import Stopwatch, summarize, terminal
from spectralvae.training.validation import Validated, Validation
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
from spectralvae.weights.settings import build_model

STOP_CODES = sorted(set(EXIT_CODES.values()))


def train(config: TrainConfig, run: RunDir | None, ranks: Ranks, console: Console) -> None:
    """Train as ``config`` says in ``run``'s directory, or go on there.

    Everything that the config can be wrong about is found out before the directory is touched.

    Args:
        config: of the run.
        run: its directory; None in all processes but the first.
        ranks: the processes.
        console: where to print.

    Raises:
        ConfigError, InputError: config, store or initial weights will not do.
        RunError: a loss or gradient is not finite, memory or disk is full, or another process is gone.
        Stopped: a signal came, and the run was saved.
    """
    with ranks.together():
        trainer = admit(config, ranks, console)
        store = trainer.store
        if run and run.resuming and run.record.get("store_hash", store.hash) != store.hash:
            raise ConfigError("is not the store of this run: its hash differs", key="data.store", path=store.path)
    initial = config.training.init_from
    goes_on = ranks.share(bool(run and run.resuming and list_checkpoints(run.path)))
    begun_with: dict[str, Any] = {}
    with ranks.together():
        if run:
            run.refuse_inside("data.store", store.path)
            if initial is not None:
                run.refuse_inside("training.init_from", initial)
        if initial is not None and not goes_on:
            source = start_from(trainer.model, trainer.settings, initial)
            console.print(f"initial weights: {source.path}")
            ancestors = source.provenance.lineage() if source.provenance else None
            begun_with = {"initial_weights": weights_sha256(trainer.model), "ancestors": ancestors}
    here = {
        "versions": record.versions(),
        "git_revision": record.git_revision(),
        "n_processes": ranks.world_size,
        "devices": ranks.gather(record.describe_device(trainer.device)),
    }
    with stop_signal() as signals, ExitStack() as stack:
        with ranks.together():
            if run:
                stack.enter_context(run)
                changes = record.rounding_changes(run.record, here) if run.resuming else []
                if changes:
                    warn(console, f"results will round otherwise than before ({'; '.join(changes)})")
                run.note(
                    **here,
                    **begun_with,
                    config_hash=record.hash_of(run.config),
                    store_hash=store.hash,
                    n_parameters=trainer.n_parameters,
                    seed=config.seed,
                )
                run.note_start(**here)
        trainer.fit(run, signals)


def admit(config: TrainConfig, ranks: Ranks, console: Console) -> Trainer:
    """Set up a run as far as that touches nothing.

    Raises:
        ConfigError, InputError: config or store will not do.
    """
    store = Store(config.data.store)
    settings = network_settings(config, store)
    at_a_time = check_shares(config, ranks)
    check_forward(settings, at_a_time)
    device = choose_device(config.training.device, ranks, console)
    check_batch_fits(at_a_time, settings["shape"], device)
    if config.data.cache:
        sizes = scene_bytes(store, store.indices("train")[: config.data.max_scenes])
        n_tiles = config.data.n_val_tiles
        check_cache(sizes, at_a_time, settings["shape"], device, ranks.world_size, n_val_tiles=n_tiles)
    return Trainer(config, settings, store, device, ranks, console)


class Trainer:
    """Network, data and optimizer of one run.

    Args:
        config: of the run.
        settings: the complete `model:` section.
        store: the data.
        device: where to compute.
        ranks: the processes.
        console: where to print.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: dict[str, Any],
        store: Store,
        device: torch.device,
        ranks: Ranks,
        console: Console,
    ) -> None:
        data = config.data
        self.config, self.settings, self.store = config, settings, store
        self.device, self.ranks, self.console = device, ranks, console
        self.path: Path = config.output_dir
        self.sampler = make_sampler(
            store,
            store.indices("train")[: data.max_scenes],
            seed=config.seed,
            tile_size=data.tile_size,
            max_invalid_fraction=data.max_invalid_fraction,
        )
        torch.manual_seed(config.seed)
        self.model = build_model(settings)
        self.n_parameters = sum(p.numel() for p in self.model.parameters())
        self.supervision = build_supervision(config)
        products = self.supervision.products if self.supervision is not None else []
        scenes = [*self.sampler.scenes, *store.indices("val")]
        self.targets = TargetReader(store, products, scenes, self.model.scale) if products else None
        latent_size = data.tile_size // self.model.scale
        self.noise_shape = (settings["embed_dim"], latent_size, latent_size)
        self.validation = Validation(
            store,
            self.sampler,
            tile_size=data.tile_size,
            batch_size=check_shares(config, ranks),
            max_invalid_fraction=data.max_invalid_fraction,
            at_most=data.n_val_tiles,
            noise_shape=self.noise_shape,
            targets=self.targets,
        )
        self.step = 0
        self.cache: SceneCache | None = None
        self.watch: Watch | None = None  # of the first process
        self.clock = Stopwatch()

    # --- the run --------------------------------------------------------------------------------

    def fit(self, run: RunDir | None, signals: StopSignal) -> None:
        """Run to the last step, or to a signal.

        Args:
            run: the directory, entered; None in all processes but the first.
            signals: that came to this process.
        """
        self.run = run
        try:
            self._set_up()
            self._run(signals)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = out_of_memory(self.config, self.device)
            if self.watch:
                self.watch.failed(self.step, error)
            raise error
        finally:
            if self.run and self.watch:
                self.watch.log.close()
                # written when the directory is left
                self.run.record["starts"][-1] |= {"to_step": self.step, "seconds": self.clock.seconds()}

    def _run(self, signals: StopSignal) -> None:
        ranks, engine, n_steps = self.ranks, self.engine, self.config.training.n_steps
        if self.step == 0:
            self._begin()
        first_step, batches = self.step, iter(self._stream(self.config.data.num_workers))
        following: Batch | None = None
        with ranks.together():
            if self.run and self.watch:
                # a kill after the newest checkpoint may have cost what was to follow
                self._tidy_up(self.run, self.watch)
                self.watch.draw(self.step, "running" if self.step < n_steps else "finished")
            if self.step < n_steps:
                following = next(batches)
        self.clock = Stopwatch()
        with terminal(self.step, n_steps, self.console) as shown:
            while self.step < n_steps:
                batch, following, lost = following, None, None
                assert batch is not None, "it was lost, and all have heard of it"
                if self.step == first_step:
                    engine.settle(batch)
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
                    report_first_step(self.device, self.console)
                self._follow_up(metrics, exit_code is not None)
                if self.watch:
                    shown.show(self.step, metrics, self.watch.steps_per_second)
                if exit_code is not None and self.step < n_steps:
                    self.console.print(f"stopped by a signal, saved at step {self.step}; start it again to resume")
                    raise Stopped(exit_code)
                if any_lost:
                    with ranks.together():
                        if lost is not None:
                            raise lost
        if self.watch:
            summarize(self.watch, self.step, self.clock.seconds(), self.console)

    def _set_up(self) -> None:
        """Device, optimizer, and the newest checkpoint if there is one."""
        training = self.config.training
        newest = self.ranks.share(self.ranks.lead(newest_valid, self.path, self.console))
        if newest is None and self.ranks.share(bool(self.run and list_checkpoints(self.path))):
            raise RunError(
                "all checkpoints are corrupt",
                path=self.path / "checkpoints",
                remedy="restore a good one, or start afresh with --overwrite",
            )
        self.engine = Engine(self.model, self.config, self.device, self.ranks, self.supervision)
        if newest is None and self.ranks.share(self.run.record.get("newest_checkpoint") if self.run else None):
            raise RunError(
                "every checkpoint of this run is gone",
                path=self.path / "checkpoints",
                remedy="restore one, or start afresh with --overwrite",
            )
        state: dict[str, Any] = {}
        with self.ranks.together():
            if newest is not None:
                state = restore(newest, self.model, self.engine.optimizer, self.supervision)
                self.step = state["step"]
                self.console.print(f"going on from {newest}")
                if text := record.other_tiles(state, self.validation.crops):
                    warn(self.console, text)
            if self.run:
                self.run.note_start(from_step=self.step)
                self.watch = Watch(
                    self.path,
                    self.step,
                    n_steps=training.n_steps,
                    batch_size=self.config.data.batch_size,
                    facts=record.facts(
                        self.config, self.store, self.run.record, self.n_parameters, self.step, self.supervision
                    ),
                    spikes=state["spikes"] if state else {},
                )
                if state and state["rows"] != self.watch.log.n_rows:
                    raise RunError(
                        f"has {self.watch.log.n_rows} rows up to step {self.step}, but {state['rows']} were written",
                        path=self.path / "metrics.jsonl",
                        remedy="restore it, or start afresh with --overwrite",
                    )
        self.console.print(f"parameters: {self.n_parameters:,}")
        if self.supervision is not None:
            self.console.print(f"supervision: {self.supervision.described}")
        self.console.print(f"output directory: {self.path.resolve()}")
        with self.ranks.together():
            if self.config.data.cache and self.step < training.n_steps:
                self.cache = load_scenes(self.store, self.sampler.scenes, self.device, self.console)
                self.validation.keep_on = self.device

    def _begin(self) -> None:
        """Before the first update: what comes in, what to compare with, and how the untrained network does."""
        with self.ranks.together():
            batch = next(iter(self._stream(num_workers=0)))
            z = batch.tiles.cpu().float()
            z = z[torch.isfinite(z)]
            self.console.print(
                f"first batch: {len(batch.tiles)} tiles, {z.numel() / batch.tiles.numel():.2%} of the samples valid; "
                f"z: mean {z.mean():.3f}, std {z.std():.3f}, from {z.min():.2f} to {z.max():.2f}"
            )
            if self.watch and self.validation.crops:
                self.watch.referred(self.validation.reference_errors())
            elif self.watch:
                self.console.print("no validation scenes: no validation, and no comparison with PCA")
            sums = self.engine.measure(batch)
        row = means(self.ranks.add(sums))
        failure.check_finite(self.engine, self.store, batch, row)
        if validated := self._validate():
            row |= validated.metrics
        with self.ranks.together():
            if self.watch:
                self._log(self.watch, row)

    def _stream(self, num_workers: int) -> TileStream:
        data = self.config.data
        return TileStream(
            self.store,
            self.sampler,
            batch_size=data.batch_size,
            tile_size=data.tile_size,
            noise_shape=self.noise_shape,
            first_step=self.step,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            targets=self.targets,
            cache=self.cache,
        )

    # --- what is left behind --------------------------------------------------------------------

    def _follow_up(self, metrics: dict[str, float], stopping: bool) -> None:
        """All that is due after an update."""
        training = self.config.training
        last = self.step == training.n_steps
        due = last or self.step % training.save_every == 0  # one for a signal must not wait for a validation
        validated = self._validate() if due or self.step % training.val_every == 0 else None
        logged = bool(validated) or last or self.step % training.log_every == 0
        saved = due or stopping
        drawn = saved or self.step % training.plot_every == 0
        with self.ranks.together():
            if self.run and self.watch:
                for event in self.watch.take(self.step, metrics):
                    warn(self.console, f"step {event.step}: spike: {event.text}")
                if logged:
                    self._log(self.watch, metrics | (validated.metrics if validated else {}))
                if saved:
                    with self.clock.of("saving"):
                        self._save(self.run, self.watch, validated)
                if drawn:
                    with self.clock.of("drawing"):
                        self.watch.draw(self.step, "finished" if last else "stopped" if stopping else "running")

    def _log(self, watch: Watch, row: dict[str, float]) -> None:
        watch.log.log({"step": self.step, **row}, peak_memory(self.device) / 1e9)

    def _validate(self) -> Validated | None:
        """Judge the network on the validation tiles; None if there are none."""
        if not self.validation.crops:
            return None
        with self.clock.of("validation"):
            validated = self.validation.run(self.engine)
        with self.ranks.together():
            if self.watch:
                self.watch.validated(self.step, validated.description)
        return validated

    def _save(self, run: RunDir, watch: Watch, validated: Validated | None) -> None:
        state = {
            "spectralvae": __version__,
            "seed": self.config.seed,
            "store_hash": self.store.hash,
            "rows": watch.log.n_rows,
            "spikes": watch.spike_state,
            "validation_tiles": record.tiles_digest(self.validation.crops),
        }
        # the picture first: a run that dies in between draws it again
        watch.reconstructions(self.validation.draw(self.engine, self.step), self.step)
        watch.log.sync()
        normalization, optimizer, head = self.store.normalization, self.engine.optimizer, self.supervision
        latents = validated.latents if validated else None
        provenance = record.provenance(
            self.config,
            self.store,
            self.sampler.scenes,
            initial_weights=run.record.get("initial_weights"),
            ancestors=run.record.get("ancestors"),
            n_val_tiles=len(self.validation.crops),
            metrics=validated.metrics if validated else None,
            baselines=watch.baselines,
        )
        save_checkpoint(
            self.path, self.step, self.model, self.settings, normalization, optimizer, state, latents, provenance, head
        )
        run.note(newest_checkpoint=self.step)
        watch.log.saved(self.step)
        self._tidy_up(run, watch)

    def _tidy_up(self, run: RunDir, watch: Watch) -> None:
        """Old checkpoints go, the best one is noted."""
        training = self.config.training
        best = best_of(self.path, losses := watch.log.val_losses)
        thin_out(self.path, training.keep_last, training.keep_every, best)
        if best is not None:
            where = str(checkpoint_path(self.path, best).relative_to(self.path))
            run.note(best={"step": best, "val_loss": losses[best], "checkpoint": where})
