"""The training run: what is set up, the loop, and what is left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from spectralvae import __version__
from spectralvae.config import TrainConfig
from spectralvae.console import new_progress
from spectralvae.data.loader import Batch, TileStream, make_sampler
from spectralvae.data.store import Store
from spectralvae.errors import ConfigError, RunError
from spectralvae.rundir import RunDir, Stopped, write_atomic
from spectralvae.settings import build_model
from spectralvae.signals import stop_signal
from spectralvae.training import plots
from spectralvae.training.checkpoint import list_checkpoints, newest_valid, restore, save_checkpoint, thin_out
from spectralvae.training.device import check_batch_fits, choose_device, report_first_step
from spectralvae.training.logbook import Logbook
from spectralvae.training.network import check_forward, network_settings, start_from
from spectralvae.training.validation import METRICS, REFERENCE_LABELS, Validation

LOG_LINE_SECONDS = 30.0  # between lines where there is no terminal for a progress bar


def train(config: TrainConfig, run: RunDir, console: Console) -> None:
    """Train as ``config`` says in ``run``'s directory, or go on there.

    Everything that the config can be wrong about is found out before the directory is touched.

    Raises:
        ConfigError, InputError: config, store or initial weights will not do.
        RunError: a loss or gradient is not finite, or memory runs out.
        Stopped: a signal came, and the run was saved.
    """
    store = Store(config.data.store)
    if run.resuming and run.record.get("store_hash", store.hash) != store.hash:
        raise ConfigError(f"data.store: {store.path} is not the store of this run (its hash differs)")
    settings = network_settings(config, store)
    check_forward(settings, config.data.batch_size)
    device = choose_device(config.training.device, console)
    check_batch_fits(config.data.batch_size, settings["shape"], device)
    trainer = Trainer(config, settings, store, device, run.path, console)
    initial = config.training.init_from
    run.refuse_inside("data.store", store.path)
    if initial is not None:
        run.refuse_inside("training.init_from", initial)
        if not (run.resuming and list_checkpoints(run.path)):
            console.print(f"initial weights: {start_from(trainer.model, settings, initial)}")
    with run:
        run.note(
            store_hash=store.hash,
            n_parameters=trainer.n_parameters,
            device=str(device),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
        )
        trainer.fit()


class Trainer:
    """Network, data and optimizer of one run.

    Args:
        config: of the run.
        settings: the complete `model:` section.
        store: the data.
        device: where to compute.
        path: the run's directory.
        console: where to print.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: dict[str, Any],
        store: Store,
        device: torch.device,
        path: Path,
        console: Console,
    ) -> None:
        data = config.data
        self.config, self.settings, self.store = config, settings, store
        self.device, self.path, self.console = device, path, console
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
        latent_size = data.tile_size // self.model.scale
        self.noise_shape = (settings["embed_dim"], latent_size, latent_size)
        self.validation = Validation(
            store,
            self.sampler,
            tile_size=data.tile_size,
            batch_size=data.batch_size,
            max_invalid_fraction=data.max_invalid_fraction,
            at_most=data.n_val_tiles,
            noise_shape=self.noise_shape,
        )
        self.step = 0

    # --- the run --------------------------------------------------------------------------------

    def fit(self) -> None:
        """Run to the last step, or to a signal."""
        training = self.config.training
        self._set_up()
        with stop_signal() as stop, self._progress() as (progress, task):
            if self.step == 0:
                self._begin()
            stream = self._stream(self.config.data.num_workers)
            for _, batch in zip(range(self.step, training.n_steps), stream, strict=False):
                first = self.step == self.first_step
                metrics = self._optimize(batch)
                self.step += 1
                if first:
                    report_first_step(self.device, self.console)
                last, stopping = self.step == training.n_steps, stop.exit_code
                validated = bool(self.validation.crops) and (last or self.step % training.val_every == 0)
                if validated or last or self.step % training.log_every == 0:
                    self.log.log({"step": self.step, **metrics, **(self._validate() if validated else {})})
                if last or self.step % training.plot_every == 0:
                    self._plot()
                if last or stopping is not None or self.step % training.save_every == 0:
                    self._save()
                self._show(progress, task, metrics)
                if stopping is not None and not last:
                    self._plot()
                    self.log.close()
                    self.console.print(f"stopped by a signal, saved at step {self.step}; start it again to go on")
                    raise Stopped(stopping)
        self.log.close()
        self._summarize()

    def _set_up(self) -> None:
        """Device, optimizer, and the newest checkpoint if there is one."""
        optimizer = self.config.optimizer
        torch.backends.cudnn.allow_tf32 = False  # "32-true" says float32; cuDNN's default is less
        # channels_last is what the batches are; on CPUs it was measured no faster than NCHW
        self.memory_format = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.model.to(self.device, memory_format=self.memory_format).train()  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.get_loss = torch.compile(self.model.get_loss) if self.config.training.compile else self.model.get_loss
        newest = newest_valid(self.path, self.console)
        if newest is not None:
            self.step = restore(newest, self.model, self.optimizer)["step"]
            self.console.print(f"going on from {newest}")
        elif list_checkpoints(self.path):
            raise RunError(f"{self.path / 'checkpoints'}: all checkpoints are damaged; start afresh with --overwrite")
        self.first_step = self.step
        self.log = Logbook(self.path, self.step)
        self.console.print(f"parameters: {self.n_parameters:,}")
        self.console.print(f"output directory: {self.path.resolve()}")

    def _begin(self) -> None:
        """Before the first update: what comes in, what to compare with, and how the untrained network does."""
        batch = next(iter(self._stream(num_workers=0)))
        z = batch.tiles.float()
        z = z[torch.isfinite(z)]
        self.console.print(
            f"first batch: {len(batch.tiles)} tiles, {z.numel() / batch.tiles.numel():.2%} of the samples valid; "
            f"z: mean {z.mean():.3f}, std {z.std():.3f}, from {z.min():.2f} to {z.max():.2f}"
        )
        if self.validation.crops:
            errors = self.validation.reference_errors()
            write_atomic(self.path / "baselines.json", json.dumps(errors, indent=2) + "\n")
        else:
            self.console.print("no validation scenes: no validation, and no comparison with PCA")
        self.model.eval()
        with torch.no_grad(), self._autocast():
            _, metrics = self.model.get_loss(*self._to_device(batch.tiles, batch.noise))
        self.model.train()
        row = {"step": 0, **{key: float(metrics[key]) for key in METRICS}}
        self.log.log({**row, **(self._validate() if self.validation.crops else {})})

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
        )

    def _to_device(self, tiles: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, y, x, C) with NaN -> x (B, C, y, x) float32, mask, noise, on the device."""
        x = tiles.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # a view, and channels_last
        x = x.to(torch.float32, memory_format=self.memory_format)
        return x, ~torch.isnan(x), noise.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.precision == "bf16-mixed")

    def _optimize(self, batch: Batch) -> dict[str, float]:
        """One update from one forward pass.

        Raises:
            RunError: loss or gradient is not finite (the weights are still those before the step), or memory ran out.
        """
        try:
            with self._autocast():
                loss, metrics = self.get_loss(*self._to_device(batch.tiles, batch.noise))
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {self.step + 1}: batches of {self.config.data.batch_size} tiles do not fit on {self.device}: "
                "lower data.batch_size"
            ) from error
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.grad_clip)
        if not torch.isfinite(loss.detach() + norm):
            tiles = ", ".join(f"{self.store.scenes[c.scene].id} at ({c.y}, {c.x})" for c in batch.crops[:4])
            raise RunError(
                f"step {self.step + 1}: loss {float(loss.detach())}, gradient norm {float(norm)}: not finite; stopped "
                f"before the update; tiles: {tiles}{', ...' if len(batch.crops) > 4 else ''}"
            )
        self.optimizer.step()
        return {key: float(metrics[key]) for key in METRICS}

    # --- what is left behind --------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        return self.validation.run(self.model, self._to_device, self._autocast())

    def _references(self) -> dict[str, float]:
        path = self.path / "baselines.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _plot(self) -> None:
        references = {REFERENCE_LABELS[key]: value for key, value in self._references().items()}
        plots.draw_curves(self.log.rows, self.path / "summary", references)

    def _save(self) -> None:
        training = self.config.training
        normalization = self.store.normalization
        state = {"spectralvae": __version__, "seed": self.config.seed, "store_hash": self.store.hash}
        # the picture first: a run that dies in between draws it again
        figure = self.validation.draw(self.model, self._to_device, self._autocast(), self.step)
        self.log.picture("reconstructions", plots.save_figure(figure, self._figure_path()), self.step)
        save_checkpoint(self.path, self.step, self.model, self.settings, normalization, self.optimizer, state)
        thin_out(self.path, training.keep_last, training.keep_every)

    def _figure_path(self) -> Path:
        return self.path / "figures" / f"reconstructions_step={self.step:06d}.png"

    # --- what the terminal shows ----------------------------------------------------------------

    @contextmanager
    def _progress(self) -> Iterator[tuple[Progress, TaskID]]:
        fields = ("loss {task.fields[loss]}", "pixel MSE {task.fields[mse]}", "{task.fields[speed]}")
        with new_progress(*fields) as progress:
            task = progress.add_task(
                "training", total=self.config.training.n_steps, completed=self.step, loss="-", mse="-", speed=""
            )
            self._shown = self._started = time.monotonic()
            yield progress, task

    def _show(self, progress: Progress, task: TaskID, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        speed = f"{(self.step - self.first_step) / max(now - self._started, 1e-9):.2f} steps/s"
        loss, mse = f"{metrics['loss']:.4g}", f"{metrics['pixel_mse']:.4g}"
        progress.update(task, completed=self.step, loss=loss, mse=mse, speed=speed)
        if not progress.console.is_terminal and now - self._shown > LOG_LINE_SECONDS:
            self._shown = now
            n_steps = self.config.training.n_steps
            self.console.print(f"step {self.step}/{n_steps}: loss {loss}, pixel MSE {mse}, {speed}")

    def _summarize(self) -> None:
        first, last = self.log.first("val_pixel_mse"), self.log.last("val_pixel_mse")
        if last is not None:
            errors = {"before training": first, f"at step {self.step}": last}
            errors |= {REFERENCE_LABELS[key]: value for key, value in self._references().items()}
            self.console.print("validation pixel MSE (in z):")
            for label, value in errors.items():
                self.console.print(f"  {label:22s} {value:.4g}")
        self.console.print("pictures to look at:")
        for name, _, _ in plots.CURVES:
            self.console.print(f"  {self.path / 'summary' / name}.png")
        self.console.print(f"  {self._figure_path()}")
