"""The one line that an error's parts make, and that no part is lost on the way to the user."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from spectralvae.errors import ConfigError, DamagedError, InputError, RunError, SpectralvaeError, show

# the only sentences that tests hold: how the parts are joined
LINES = [
    (ConfigError("no scene is left for training", key="split"), "split: no scene is left for training"),
    (
        ConfigError(key="data.tile_size", value=15, limit="a multiple of 4", remedy="the nearest is 16"),
        "data.tile_size = 15 must be a multiple of 4; the nearest is 16",
    ),
    (
        ConfigError("needs log_zscore", key="bound.relative", value=np.float64(0.1), remedy="give bound.z"),
        "bound.relative = 0.1: needs log_zscore; give bound.z",
    ),
    (DamagedError("is corrupt: its digest differs", path="a/b.svae"), "a/b.svae: is corrupt: its digest differs"),
    (
        InputError("holds int8", path=Path("a.nc"), key="variable", value="flags", limit="of floats"),
        "a.nc: variable = 'flags': holds int8; must be of floats",
    ),
    (ConfigError(key="overlap", limit="from 0 to 8"), "overlap: must be from 0 to 8"),
    (RunError("memory ran out"), "memory ran out"),
    (RunError(value=3, limit="odd"), "3 must be odd"),
]


@pytest.mark.parametrize(("error", "line"), LINES)
def test_the_parts_make_one_line_and_survive_a_copy(error: SpectralvaeError, line: str) -> None:
    assert str(error) == line
    for copy in (pickle.loads(pickle.dumps(error)), type(error)(**error.parts())):  # workers send errors by pickle
        assert type(copy) is type(error)
        assert copy.parts() == error.parts()
        assert str(copy) == line


def test_parts_are_replaced_and_the_others_kept() -> None:
    error = InputError("is empty", key="inputs").with_parts(path="a.nc", key="inputs.0")
    assert type(error) is InputError
    assert error.parts() == InputError("is empty", key="inputs.0", path="a.nc").parts()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.float32(0.5), "0.5"),
        (np.arange(3), "[0, 1, 2]"),
        ("a", "'a'"),
        (Path("a/b"), "a/b"),
        ([True, None, Path("a")], "[true, null, a]"),
        (np.bool_(True), "true"),
        (0, "0"),
    ],
)
def test_values_look_as_in_a_config(value: object, shown: str) -> None:
    assert show(value) == shown
    assert str(ConfigError(key="k", value=value, limit="x")) == f"k = {shown} must be x"
