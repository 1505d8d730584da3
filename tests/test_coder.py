"""Scenes through a network tile by tile: with networks whose result is known for the whole scene at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spectralvae.errors import ConfigError, InputError
from spectralvae.inference import coder as coder_module
from spectralvae.inference.coder import Coder, default_overlap
from spectralvae.weights.artifact import Artifact
from spectralvae.weights.normalization import Normalization

CHANNELS, SCALE, TILE = 3, 4, 16
ONES = np.ones((4, 4, CHANNELS), np.float32)


class Pooling(torch.nn.Module):
    """Latents are block means, and a scene is its latents, each s x s times: what a tile gives knows no border."""

    embed_dim, scale = CHANNELS, SCALE

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def encode(self, x: Tensor) -> Any:
        self.sizes.append(tuple(x.shape))
        mean = functional.avg_pool2d(x, SCALE)
        return SimpleNamespace(mean=mean, logvar=-mean)

    def decode(self, z: Tensor) -> Tensor:
        self.sizes.append(tuple(z.shape))
        return functional.interpolate(z, scale_factor=SCALE, mode="nearest")


def artifact(model: Any = None, shape: list[int | None] | None = None, **changes: Any) -> Artifact:
    ones = np.ones(CHANNELS)
    normalization = Normalization("zscore", ones, ones, 10.0, None, None, np.arange(1.0, CHANNELS + 1))
    settings = {"shape": shape or [CHANNELS, TILE, TILE]}
    return Artifact(
        model or Pooling(),
        settings,
        **{"normalization": normalization, "step": None, "path": Path("somewhere"), **changes},
    )


def make(overlap: int, **options: Any) -> Coder:
    return Coder(artifact(**options), torch.device("cpu"), overlap=overlap, batch_size=3)


def put_together(pieces: Any, shape: tuple[int, ...], seen_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The whole result, and the whole of what was seen; each part must come once."""
    result, seen = np.full(shape, np.nan, np.float32), np.full(seen_shape, -99.0, np.float32)
    times = np.zeros(shape[:2], int)
    decodes = seen_shape[0] < shape[0] or seen_shape[1] < shape[1]
    for piece in pieces:
        result[piece.rows, piece.columns] = piece.result
        times[piece.rows, piece.columns] += 1
        if not decodes:
            rows, columns = (slice(part.start * SCALE, part.stop * SCALE) for part in (piece.rows, piece.columns))
            seen[rows, columns] = piece.seen
    assert (times == 1).all()
    return result, seen


SHAPES = [(16, 16), (1, 50), (50, 1), (1, 1), (37, 41), (64, 48), (5, 131), (16, 17), (131, 16)]


@pytest.mark.parametrize("overlap", [0, 4, 8, 12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_latents_of_a_scene_of_any_shape(
    shape: tuple[int, int], overlap: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if narrow:  # panels of two tiles at most
        monkeypatch.setattr(coder_module, "STRIP_SAMPLES", 2 * TILE * TILE * CHANNELS)
    z = np.random.default_rng(0).normal(size=(*shape, CHANNELS)).astype(np.float32)
    z[z > 1.5] = np.nan
    ny, nx = shape
    height, width = -(-ny // SCALE), -(-nx // SCALE)
    coder = make(overlap)

    pieces = coder.encode(lambda rows, columns: z[rows, columns].copy(), shape, log_variance=True)
    latents, seen = put_together(pieces, (height, width, 2 * CHANNELS), z.shape)

    whole = np.nan_to_num(np.pad(z, ((0, height * SCALE - ny), (0, width * SCALE - nx), (0, 0)), mode="symmetric"))
    expected = whole.reshape(height, SCALE, width, SCALE, CHANNELS).mean(axis=(1, 3))
    np.testing.assert_allclose(latents[..., :CHANNELS], expected, atol=1e-5)
    np.testing.assert_allclose(latents[..., CHANNELS:], -expected, atol=1e-5)
    np.testing.assert_array_equal(seen, z)
    assert {size[1:] for size in coder.model.sizes} == {(CHANNELS, TILE, TILE)}  # as in training, whatever the scene
    assert max(size[0] for size in coder.model.sizes) <= 3


@pytest.mark.parametrize("overlap", [0, 8, 12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_a_scene_of_any_shape_from_its_latents(
    shape: tuple[int, int], overlap: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if narrow:
        monkeypatch.setattr(coder_module, "STRIP_SAMPLES", 2 * TILE * TILE * CHANNELS)
    ny, nx = shape
    latents = np.random.default_rng(1).normal(size=(-(-ny // SCALE), -(-nx // SCALE), CHANNELS)).astype(np.float32)
    coder = make(overlap)

    pieces = coder.decode(lambda rows, columns: latents[rows, columns].copy(), shape)
    scene, _ = put_together(pieces, (ny, nx, CHANNELS), latents.shape)

    expected = latents.repeat(SCALE, axis=0).repeat(SCALE, axis=1)[:ny, :nx]
    np.testing.assert_allclose(scene, expected, atol=1e-5)
    assert {size[1:] for size in coder.model.sizes} == {(CHANNELS, TILE // SCALE, TILE // SCALE)}


def test_no_more_than_a_strip_is_read_at_a_time_and_nothing_twice() -> None:
    asked: list[tuple[slice, slice]] = []

    def read(rows: slice, columns: slice) -> Any:
        asked.append((rows, columns))
        return np.zeros((rows.stop - rows.start, columns.stop - columns.start, CHANNELS), np.float32)

    for _ in make(8).encode(read, (200, 40)):
        pass

    assert max(rows.stop - rows.start for rows, _ in asked) <= TILE // 4  # beside the strip
    assert [row for rows, _ in asked for row in range(200)[rows]] == list(range(200))


def test_what_the_network_sees_at_a_tiles_border_is_blended() -> None:
    class Border(Pooling):
        """1 in the outermost cells of a tile, 0 inside: what the border spoils."""

        def encode(self, x: Tensor) -> Any:
            spoiled = torch.ones(len(x), CHANNELS, TILE // SCALE, TILE // SCALE)
            spoiled[:, :, 1:-1, 1:-1] = 0
            return SimpleNamespace(mean=spoiled, logvar=spoiled)

    def spoiled(overlap: int) -> Any:
        z = np.zeros((16, 200, CHANNELS), np.float32)
        pieces = make(overlap, model=Border()).encode(lambda rows, columns: z[rows, columns], (16, 200))
        found, _ = put_together(pieces, (4, 50, CHANNELS), z.shape)
        return found[1, 4:-4, 0]  # away from the scene's own borders

    assert spoiled(0).mean() == pytest.approx(0.5, abs=0.05)  # two cells of four
    assert spoiled(8).max() < 0.2


def test_weights_that_give_no_numbers_are_told() -> None:
    class Spoiled(Pooling):
        def decode(self, z: Tensor) -> Tensor:
            return functional.interpolate(z, scale_factor=SCALE) / 0.0

    pieces = make(0, model=Spoiled()).decode(lambda rows, columns: ONES[rows, columns], (16, 16))

    with pytest.raises(InputError, match="not finite"):
        next(pieces)


class _CallCounter(TorchFunctionMode):
    def __init__(self) -> None:
        self.found_grad = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            self.found_grad = True
        return result


def test_nothing_is_kept_for_gradients() -> None:
    class Learning(Pooling):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))

        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z * self.factor)

    coder = make(0, model=Learning())
    with _CallCounter() as counter:
        next(coder.decode(lambda rows, columns: ONES[rows, columns], (16, 16)))

    assert not counter.found_grad


PRECISIONS = """
import os, sys, torch
for before in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        break
    assert os.waitpid(child, 0)[1] == 0, before
else:
    sys.exit()
exec(before)
from tests.test_coder import ONES, Pooling, functional, make

backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
states = lambda: [b.fp32_precision for b in backends] + [torch.get_float32_matmul_precision()]
seen, before = [], states()

class Looking(Pooling):
    def decode(self, z):
        seen.extend(b.fp32_precision for b in backends)
        return super().decode(z)

next(make(0, model=Looking()).decode(lambda rows, columns: ONES[rows, columns], (16, 16)))
assert seen == ["ieee", "ieee"], seen
assert states() == before, (before, states())
"""


def test_float32_is_float32_and_settings_come_back() -> None:
    """In processes of their own: torch's settings are of a whole process, and old and new ones do not mix."""
    before = (
        "",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.set_float32_matmul_precision('high')",
    )
    command = [sys.executable, "-c", PRECISIONS, *before]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_panel_is_no_wider_than_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder_module, "STRIP_SAMPLES", 3 * TILE * TILE * CHANNELS)
    widths = []

    def read(rows: slice, columns: slice) -> Any:
        widths.append(columns.stop - columns.start)
        return np.zeros((rows.stop - rows.start, columns.stop - columns.start, CHANNELS), np.float32)

    for _ in make(4).encode(read, (16, 500)):
        pass

    assert TILE < max(widths) <= 3 * TILE


def test_dropout_is_off() -> None:
    class Dropping(Pooling):
        def encode(self, x: Tensor) -> Any:
            return super().encode(functional.dropout(x, 0.5, training=self.training))

    pieces = make(0, model=Dropping()).encode(
        lambda rows, columns: np.ones((16, 16, 3), np.float32)[rows, columns], (16, 16)
    )
    np.testing.assert_array_equal(next(pieces).result, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": None}, r"holds no normalisation.*convert it again with"),
        ({"shape": [CHANNELS, None, None]}, r"size of its training tiles is \[None, None\].*shape: \[channels, y, x\]"),
        ({"shape": [CHANNELS, 16, 32]}, r"must be known and square"),
        ({"shape": [CHANNELS, 16, 16, 16]}, r"volumes of 3 axes"),
    ],
)
def test_models_that_cannot_be_used_on_scenes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(0, **changes)


def test_a_model_without_wavelengths_is_not_used_on_scenes() -> None:
    ones = np.ones(CHANNELS)
    with pytest.raises(InputError, match=r"somewhere: its normalisation has no wavelengths.*convert it again"):
        make(0, normalization=Normalization("zscore", ones, ones, 10.0, None, None, None))


@pytest.mark.parametrize("overlap", [-4, 3, 16, 20])
def test_an_overlap_fits_the_tiles(overlap: int) -> None:
    with pytest.raises(ConfigError, match=rf"overlap: {overlap} must be a multiple of 4.*from 0 and below 16"):
        make(overlap)


@pytest.mark.parametrize(("tile", "scale", "overlap"), [(64, 4, 16), (32, 2, 8), (8, 4, 0), (4, 4, 0), (48, 4, 12)])
def test_a_quarter_of_a_tile_in_whole_cells(tile: int, scale: int, overlap: int) -> None:
    assert default_overlap(tile, scale) == overlap
