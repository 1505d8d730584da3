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
from refusals import refused
from torch import Tensor
from torch.nn import functional

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


def put_together(pieces: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """(rows, columns, n) of the whole result, and what was seen of it; each part must come once."""
    result, times = np.full(shape, np.nan, np.float32), np.zeros(shape[:2], int)
    seen: dict[int, list[Any]] = {}
    for piece in pieces:
        result[piece.rows, piece.columns] = piece.result
        times[piece.rows, piece.columns] += 1
        seen.setdefault(piece.columns.start, []).append(piece.seen.copy())
    assert (times == 1).all()
    return result, np.concatenate([np.concatenate(panel) for _, panel in sorted(seen.items())], axis=1)


SHAPES = [(16, 16), (1, 50), (50, 1), (1, 1), (37, 41), (64, 48), (5, 131), (16, 17), (131, 16)]


@pytest.mark.parametrize("overlap", [0, 4, 8, 12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_scenes_of_any_shape(
    shape: tuple[int, int], overlap: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To latents, and from latents to the scene."""
    if narrow:  # panels of two tiles at most
        monkeypatch.setattr(coder_module, "STRIP_SAMPLES", 2 * TILE * TILE * CHANNELS)
    z = np.random.default_rng(0).normal(size=(*shape, CHANNELS)).astype(np.float32)
    z[z > 1.5] = np.nan
    ny, nx = shape
    height, width = -(-ny // SCALE), -(-nx // SCALE)
    coder = make(overlap)

    pieces = coder.encode(lambda rows, columns: z[rows, columns].copy(), shape, log_variance=True)
    latents, seen = put_together(pieces, (height, width, 2 * CHANNELS))

    whole = np.nan_to_num(np.pad(z, ((0, height * SCALE - ny), (0, width * SCALE - nx), (0, 0)), mode="symmetric"))
    expected = whole.reshape(height, SCALE, width, SCALE, CHANNELS).mean(axis=(1, 3))
    np.testing.assert_allclose(latents[..., :CHANNELS], expected, atol=1e-5)
    np.testing.assert_allclose(latents[..., CHANNELS:], -expected, atol=1e-5)
    np.testing.assert_array_equal(seen, z)
    assert {size[1:] for size in coder.model.sizes} == {(CHANNELS, TILE, TILE)}  # as in training, whatever the scene
    assert max(size[0] for size in coder.model.sizes) <= 3

    coder.model.sizes.clear()
    pieces = coder.decode(lambda rows, columns: expected[rows, columns].copy(), shape)
    scene, seen = put_together(pieces, (ny, nx, CHANNELS))

    np.testing.assert_allclose(scene, expected.repeat(SCALE, axis=0).repeat(SCALE, axis=1)[:ny, :nx], atol=1e-5)
    np.testing.assert_array_equal(seen, expected)
    assert {size[1:] for size in coder.model.sizes} == {(CHANNELS, TILE // SCALE, TILE // SCALE)}


@pytest.mark.parametrize(("shape", "overlap"), [((200, 40), 8), ((16, 500), 4)], ids=str)
def test_no_more_than_a_strip_is_read_at_a_time_and_nothing_twice(
    shape: tuple[int, int], overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a panel wider than a strip may be."""
    monkeypatch.setattr(coder_module, "STRIP_SAMPLES", 3 * TILE * TILE * CHANNELS)
    asked: list[tuple[slice, slice]] = []

    def read(rows: slice, columns: slice) -> Any:
        asked.append((rows, columns))
        return np.zeros((rows.stop - rows.start, columns.stop - columns.start, CHANNELS), np.float32)

    for _ in make(overlap).encode(read, shape):
        pass

    assert max(rows.stop - rows.start for rows, _ in asked) <= TILE // 4  # beside the strip
    assert TILE < max(columns.stop - columns.start for _, columns in asked) <= 3 * TILE
    for panel in {columns.start for _, columns in asked}:
        read_rows = [row for rows, columns in asked if columns.start == panel for row in range(shape[0])[rows]]
        assert read_rows == list(range(shape[0]))


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
        found, _ = put_together(pieces, (4, 50, CHANNELS))
        return found[1, 4:-4, 0]  # away from the scene's own borders

    assert spoiled(0).mean() == pytest.approx(0.5, abs=0.05)  # two cells of four
    assert spoiled(8).max() < 0.2


def test_dropout_and_gradients_are_off() -> None:
    class Learning(Pooling):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))
            self.kept: list[bool] = []

        def encode(self, x: Tensor) -> Any:
            x = functional.dropout(x * self.factor, 0.5, training=self.training)
            self.kept.append(x.requires_grad)
            return super().encode(x)

    coder = make(0, model=Learning())
    piece = next(coder.encode(lambda rows, columns: np.ones((16, 16, 3), np.float32)[rows, columns], (16, 16)))
    np.testing.assert_array_equal(piece.result, 1.0)
    assert coder.model.kept == [False]


PRECISIONS = """
import os, sys, torch
from test_coder import ONES, Pooling, functional, make
for before in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        break
    assert os.waitpid(child, 0)[1] == 0, before
else:
    sys.exit()
exec(before)
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
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization": None}, ("normalization",)),
        ({"normalization": Normalization("zscore", *np.ones((2, CHANNELS)), 10.0, None, None, None)}, ("wavelengths",)),
        ({"shape": [CHANNELS, None, None]}, ("[None, None]", "shape")),
        ({"shape": [CHANNELS, 16, 32]}, ("[16, 32]", "shape")),
        ({"shape": [CHANNELS, 16, 16, 16]}, ("3 axes",)),
    ],
)
def test_models_that_cannot_be_used_on_scenes(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(InputError, *words, path="somewhere"):
        make(0, **changes)


@pytest.mark.parametrize("overlap", [-4, 3, 16, 20])
def test_an_overlap_fits_the_tiles(overlap: int) -> None:
    with refused(ConfigError, "4", "16", key="overlap", value=overlap):
        make(overlap)


@pytest.mark.parametrize(("tile", "scale", "overlap"), [(64, 4, 16), (32, 2, 8), (8, 4, 0), (4, 4, 0), (48, 4, 12)])
def test_a_quarter_of_a_tile_in_whole_cells(tile: int, scale: int, overlap: int) -> None:
    assert default_overlap(tile, scale) == overlap
