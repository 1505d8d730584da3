"""Configs: from YAML and --set to checked values, and back; and their reference in docs/config.md."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectralvae.config import (
    DEBUG_OVERRIDES,
    CommandConfig,
    ConvertConfig,
    PrepareConfig,
    SimulateConfig,
    TrainConfig,
    may_change_on_resume,
)
from spectralvae.config.loading import dump_config, load_config, parse_yaml, to_yaml
from spectralvae.errors import ConfigError

DOCS = Path(__file__).parents[1] / "docs"
MINIMAL: dict[type[CommandConfig], str] = {
    SimulateConfig: "output_dir: granules\n",
    PrepareConfig: "output_dir: store\ninputs: ['granules/*.nc']\n",
    TrainConfig: "output_dir: run\ndata: {store: store}\n",
    ConvertConfig: "output_dir: export\nsource: run\n",
}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Reads the text of a config."""

    def reader(schema: type[CommandConfig], text: str | bytes, *settings: str, debug: bool = False) -> Any:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(schema, path, settings, debug=debug)

    return reader


@pytest.fixture
def refusal(read: Any) -> Any:
    """The message with which a config is refused: always one line that names the file."""

    def message(schema: type[CommandConfig], text: str | bytes, *settings: str, debug: bool = False) -> str:
        with pytest.raises(ConfigError) as caught:
            read(schema, text, *settings, debug=debug)
        text = str(caught.value)
        assert "\n" not in text
        assert "config.yaml" in text or "--set" in text
        return text

    return message


# --- YAML -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2e+3", -2e3),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("3", 3),
        ("2024-06-01", "2024-06-01"),
        ("2024-06-01T12:00:00Z", "2024-06-01T12:00:00Z"),
        ("'1e-4'", "1e-4"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("20240601T150000Z", "20240601T150000Z"),
        ("[1e-6, null, true]", [1e-6, None, True]),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("{a: &x {b: 1}, c: {<<: *x, b: 2}}", {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_yaml_is_safe_load_with_mends(text: str, value: object) -> None:
    found = parse_yaml(text, "text")
    assert found == value
    assert type(found) is type(value)


def test_yaml_runs_no_code() -> None:
    with pytest.raises(ConfigError, match="line 1"):
        parse_yaml("!!python/object/apply:os.system ['true']", "text")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("output_dir: a\nseed: 1\nseed: 2\n", ["line 3", "'seed'"]),
        ("output_dir: a\nseed: [1\n", ["line 3"]),
        ("output_dir: a\n\tseed: 1\n", ["line 2"]),
        (b"output_dir: \xff\xfe\n", ["not UTF-8"]),
        ("output_dir: a\x00\n", ["YAML"]),
        ("", ["mapping of keys"]),
        ("# only a comment\n", ["mapping of keys"]),
        ("- output_dir: a\n", ["mapping of keys", "list"]),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(refusal: Any, text: str | bytes, parts: list[str]) -> None:
    message = refusal(SimulateConfig, text)
    assert all(part in message for part in parts), message


def test_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load_config(SimulateConfig, path)


# --- keys and values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "extra", "parts"),
    [
        (SimulateConfig, "n_granule: 3", ["n_granule: unknown key", "did you mean n_granules?"]),
        (SimulateConfig, "zzz: 3", ["zzz: unknown key", "n_granules, shape, n_channels"]),
        (SimulateConfig, "'x[0]': 3", ["x[0]: unknown key"]),
        (SimulateConfig, "list: 3", ["list: unknown key"]),
        (SimulateConfig, "7: 3", ["7"]),
        (TrainConfig, "optimizer: {learning: 1, weight_decai: 2}", ["optimizer.weight_decai", "weight_decay?"]),
        (TrainConfig, "training: {n_step: 5}", ["training.n_step: unknown key, did you mean n_steps?"]),
        (SimulateConfig, "seed: true", ["seed: True", "integer"]),
        (SimulateConfig, 'n_granules: "3"', ["n_granules: '3'", "integer"]),
        (SimulateConfig, "n_granules: 2.5", ["n_granules: 2.5", "integer"]),
        (SimulateConfig, "n_granules: 2.0", ["n_granules: 2.0", "integer"]),
        (SimulateConfig, "n_granules:", ["n_granules: None", "integer"]),
        (SimulateConfig, "invalid_fraction: .nan", ["invalid_fraction: nan"]),
        (SimulateConfig, "invalid_fraction: true", ["invalid_fraction: True", "number"]),
        (SimulateConfig, "invalid_fraction: 1", ["invalid_fraction: 1", "less than 1"]),
        (SimulateConfig, "n_granules: 0", ["n_granules: 0", "greater than or equal to 1"]),
        (SimulateConfig, "seed: -1", ["seed: -1", "greater than or equal to 0"]),
        (SimulateConfig, "shape: [40, 0]", ["shape.1: 0"]),
        (SimulateConfig, "shape: [40]", ["shape: [40]", "2 items"]),
        (SimulateConfig, "shape: 40", ["shape: 40", "list"]),
        (SimulateConfig, "products: [NO3]", ["products.0: 'NO3'", "'NO2'"]),
        (TrainConfig, "training: 5", ["training: 5", "mapping"]),
        (TrainConfig, "training: {device: gpu}", ["training.device: 'gpu'"]),
        (TrainConfig, "training: {grad_clip: .inf}", ["training.grad_clip: inf"]),
        (TrainConfig, "optimizer: {betas: [0.9, 1.0]}", ["optimizer.betas.1: 1.0", "less than 1"]),
        (TrainConfig, "model: {double_z: false}", ["model.double_z: False"]),
    ],
)
def test_wrong_keys_and_values_are_named(
    refusal: Any, schema: type[CommandConfig], extra: str, parts: list[str]
) -> None:
    message = refusal(schema, MINIMAL[schema] + extra)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ("[]", ["inputs"]),
        ("[{variable: Y}]", ["inputs.0.path: this key is required"]),
        ("[a.nc, {path: b.mat, varable: Y}]", ["inputs.1.varable: unknown key, did you mean variable?"]),
        ("[a.nc, 3]", ["inputs.1: 3"]),
        ("[{path: a, region: [0, 1, 2, -3]}]", ["inputs.0.region.3: -3"]),
        ("[{path: a, wavelength: {first: 401, lst: 889}}]", ["wavelength.lst: unknown key, did you mean last?"]),
        ("[{path: a, wavelength: [401, x]}]", ["inputs.0.wavelength.1: 'x'", "number"]),
        ("[{path: a, wavelength: {first: 401, last: -1}}]", ["inputs.0.wavelength.last: -1", "greater than 0"]),
    ],
)
def test_key_paths_reach_into_lists_and_unions(refusal: Any, inputs: str, parts: list[str]) -> None:
    message = refusal(PrepareConfig, f"output_dir: store\ninputs: {inputs}\n")
    assert all(part in message for part in parts), message
    assert "Wavelengths" not in message
    assert "InputSpec" not in message


def test_several_errors_stand_in_one_line(refusal: Any) -> None:
    message = refusal(TrainConfig, "data: {batch_size: 0, tile: 3}\nmodle: {}\n")
    for part in ("output_dir: this key is required", "data.store: this key", "data.batch_size: 0", "modle", "model?"):
        assert part in message


def test_many_errors_are_counted(refusal: Any) -> None:
    message = refusal(SimulateConfig, "output_dir: a\n" + "".join(f"key{i}: 1\n" for i in range(8)))
    assert "and 3 more" in message
    assert "key4" in message
    assert "key5" not in message


def test_value_with_line_breaks_gives_one_line(refusal: Any) -> None:
    refusal(SimulateConfig, 'output_dir: a\nn_granules: "3\\n4"\n')


def test_min_radiance_belongs_to_log_zscore(read: Any, refusal: Any) -> None:
    text = MINIMAL[PrepareConfig] + "normalization: "
    assert read(PrepareConfig, text + "{}").normalization.min_radiance == 1.0
    assert read(PrepareConfig, text + "{min_radiance: 5}").normalization.min_radiance == 5.0
    assert read(PrepareConfig, text + "{transform: zscore}").normalization.min_radiance is None
    message = refusal(PrepareConfig, text + "{transform: zscore, min_radiance: 1.0}")
    assert "normalization: min_radiance" in message


def test_split_lists_come_in_pairs(refusal: Any) -> None:
    assert "train and val" in refusal(PrepareConfig, MINIMAL[PrepareConfig] + "split: {train: [a]}")


def test_the_learning_rate_stays_above_zero_to_the_last_step(read: Any, refusal: Any) -> None:
    text = "output_dir: run\ndata: {store: s}\ntraining: {n_steps: 100}\noptimizer: "
    read(TrainConfig, text + "{warmup_steps: 99, decay_steps: 100}")
    read(TrainConfig, text + "{warmup_steps: 500}")
    message = refusal(TrainConfig, text + "{decay_steps: 99}")
    assert "training.n_steps: 100 goes beyond optimizer.decay_steps (99)" in message
    message = refusal(TrainConfig, text + "{warmup_steps: 100, decay_steps: 100}")
    assert "optimizer.decay_steps: 100 must be larger than optimizer.warmup_steps (100)" in message


def test_tile_size_must_fit_the_levels(read: Any, refusal: Any) -> None:
    message = refusal(TrainConfig, "output_dir: run\ndata: {store: s, tile_size: 63}\n")
    assert "data.tile_size: 63" in message
    assert "multiple of 4" in message
    assert "nearest: 64" in message
    read(TrainConfig, "output_dir: run\ndata: {store: s, tile_size: 63}\nmodel: {chs: [8]}\n")


@pytest.mark.parametrize("value", ["5", "''", "null", "[a]"])
def test_output_dir_is_a_path(refusal: Any, value: str) -> None:
    assert "output_dir: " in refusal(SimulateConfig, f"output_dir: {value}\n")


# --- --set and --debug ------------------------------------------------------------------------


def test_settings_win_over_the_file_and_make_sections(read: Any) -> None:
    config = read(
        TrainConfig,
        "output_dir: run\ndata: {store: store, batch_size: 4}\noptimizer:\n",
        "data.batch_size=8",
        "model.chs=[64, 32]",
        "optimizer.lr=1e-3",
        "training.init_from=null",
        "training.n_steps=5",
        "training.n_steps=6",
        "output_dir=a=b",
    )
    assert (config.data.batch_size, config.model.chs, config.optimizer.lr) == (8, [64, 32], 1e-3)
    assert (config.training.init_from, config.training.n_steps) == (None, 6)
    assert config.output_dir == Path("a=b")
    assert config.data.store == Path("store")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("seed", ["--set seed", "key.sub=value"]),
        ("=3", ["--set =3", "key.sub=value"]),
        ("seed=[1", ["--set seed=[1"]),
        ("seed.x=1", ["--set seed.x=1", "seed holds no keys"]),
        ("trainng.n_steps=5", ["trainng: unknown key, did you mean training?"]),
        ("training.n_step=5", ["training.n_step: unknown key", "n_steps"]),
        ("training.n_steps='5'", ["training.n_steps: '5'"]),
        ("seed={a: 1, a: 2}", ["'a'", "twice"]),
    ],
)
def test_bad_settings_are_named(refusal: Any, setting: str, parts: list[str]) -> None:
    message = refusal(TrainConfig, MINIMAL[TrainConfig] + "seed: 1\n", setting)
    assert all(part in message for part in parts), message


def test_debug_stands_between_file_and_settings(read: Any) -> None:
    text = MINIMAL[TrainConfig] + "training: {n_steps: 7, save_every: 3, log_every: 4}\n"
    config = dump_config(read(TrainConfig, text, "training.save_every=9", debug=True))
    assert config["training"]["n_steps"] == DEBUG_OVERRIDES["training.n_steps"] == 200
    assert config["training"]["save_every"] == 9
    assert config["training"]["log_every"] == 4
    plain = dump_config(read(TrainConfig, text))
    for key, value in DEBUG_OVERRIDES.items():
        section, name = key.split(".")
        assert config[section][name] == (9 if key == "training.save_every" else value)
        assert plain[section][name] != value


# --- defaults, and what is written ------------------------------------------------------------


def test_defaults_are_those_of_the_contract(read: Any) -> None:
    config = dump_config(read(TrainConfig, MINIMAL[TrainConfig]))
    constant = {"warmup_steps": 0, "decay_steps": None}
    assert config["optimizer"] == {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.05, **constant}
    expected = {
        "n_steps": 200000,
        "save_every": 5000,
        "val_every": 50,
        "log_every": 10,
        "plot_every": 50,
        "grad_clip": 1.0,
    }
    assert {key: config["training"][key] for key in expected} == expected
    assert config["data"]["batch_size"] == 32
    assert set(config["training"]) >= {"precision", "compile", "device", "init_from", "keep_last", "keep_every"}
    prepare = dump_config(read(PrepareConfig, MINIMAL[PrepareConfig]))
    assert prepare["normalization"] == {
        "transform": "log_zscore",
        "min_radiance": 1.0,
        "clip": 10.0,
        "statistics": None,
    }


def test_default_model_is_the_published_one(read: Any) -> None:
    import torch

    from spectralvae.weights.mltools import build_model

    settings = dump_config(read(TrainConfig, MINIMAL[TrainConfig]))
    with torch.device("meta"):
        model = build_model({**settings["model"], "shape": [1028, settings["data"]["tile_size"], 64]})
    assert sum(p.numel() for p in model.parameters()) == 27_289_893


@pytest.mark.parametrize("schema", MINIMAL)
def test_written_config_reads_back_the_same(read: Any, schema: type[CommandConfig]) -> None:
    config = read(schema, MINIMAL[schema])
    assert read(schema, to_yaml(dump_config(config))) == config


@pytest.mark.parametrize("name", ["1e-4", "2024-06-01", "12", "null", "true", "1e5", ".5", "a: b", "über", "~x"])
def test_text_that_looks_like_something_else_reads_back(read: Any, name: str) -> None:
    assert parse_yaml(to_yaml({"name": name}), "text") == {"name": name}
    assert yaml.safe_load(to_yaml({"name": name})) == {"name": name}, "other tools read it, too"


def test_small_numbers_read_back() -> None:
    values = {"a": 1e-6, "b": 1e-4, "c": 1e22, "d": -2.5e-12, "e": 3, "f": [0.1, None]}
    assert parse_yaml(to_yaml(values), "text") == values


# --- what may change on resume ----------------------------------------------------------------

MAY_CHANGE = {
    "training.save_every",
    "training.val_every",
    "training.log_every",
    "training.plot_every",
    "training.keep_last",
    "training.keep_every",
    "training.device",
    "training.peer_timeout",
    "data.num_workers",
    "data.cache",
    "data.store",
}


def test_exactly_the_keys_of_the_contract_may_change_on_resume() -> None:
    keys = {"output_dir", "seed"}
    for name in ("data", "model", "optimizer", "training"):
        keys |= {f"{name}.{key}" for key in TrainConfig.model_fields[name].annotation.model_fields}  # type: ignore[union-attr]
    assert keys >= MAY_CHANGE
    assert {key for key in keys - {"training.n_steps"} if may_change_on_resume(key, 1, 2)} == MAY_CHANGE
    assert may_change_on_resume("training.n_steps", 100, 200)
    assert not may_change_on_resume("training.n_steps", 200, 100)


# --- docs/config.md ---------------------------------------------------------------------------


def test_reference_is_up_to_date_and_complete() -> None:
    script = runpy.run_path(str(DOCS / "make_config_reference.py"))
    written = (DOCS / "config.md").read_text(encoding="utf-8")
    assert script["reference"]() == written, "run `python docs/make_config_reference.py`"
    assert set(script["COMMANDS"].values()) == leaves(CommandConfig)


def leaves(schema: type[CommandConfig]) -> set[type[CommandConfig]]:
    """The classes below one that have none below them: those of commands, not what commands share."""
    below = schema.__subclasses__()
    return set().union(*map(leaves, below)) if below else {schema}


@pytest.mark.parametrize(
    "setting",
    [
        "seed=!!int abc",
        "seed=!!timestamp 2020-99-99",
        "seed=" + 2000 * "[",
        "output_dir=._",
        "output_dir=~nobody-of-this-name/x",
        'output_dir="a\\0b"',
        "products=[NO2, NO2]",
    ],
)
def test_odd_values_are_one_line(tmp_path, setting):
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(SimulateConfig, path, [setting])
    assert "\n" not in str(caught.value)
    assert setting.split("=")[0] in str(caught.value)
