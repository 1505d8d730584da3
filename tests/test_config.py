"""Configs: from YAML and --set to checked values, and back; and their reference in docs/config.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refused

from spectralvae import cli
from spectralvae.config import (
    DEBUG_OVERRIDES,
    CommandConfig,
    CompressConfig,
    ConvertConfig,
    DecodeConfig,
    DecompressConfig,
    DownloadConfig,
    EncodeConfig,
    EvaluateConfig,
    PrepareConfig,
    ProbeConfig,
    SimulateConfig,
    TrainConfig,
)
from spectralvae.config.loading import dump_config, load_config, parse_yaml, resume_rules, to_yaml
from spectralvae.errors import ConfigError

DOCS = Path(__file__).parents[1] / "docs"
MINIMAL: dict[type[CommandConfig], str] = {
    SimulateConfig: "output_dir: granules\n",
    DownloadConfig: "output_dir: tempo\nbox: [-80, 35, -70, 45]\nstart: 2024-06-01\nend: 2024-06-02\n",
    PrepareConfig: "output_dir: store\ninputs: ['granules/*.nc']\n",
    TrainConfig: "output_dir: run\ndata: {store: store}\n",
    CompressConfig: "output_dir: small\nmodel: run\ninputs: [a.nc]\nbound: {z: 0.1}\n",
    ConvertConfig: "output_dir: export\nsource: run\n",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.fixture
def read(path: Path) -> Any:
    """Reads the smallest config of a command with some more text, or with settings as of --set."""

    def reader(schema: type[CommandConfig], extra: str = "", *settings: str, debug: bool = False) -> Any:
        path.write_text(MINIMAL[schema] + extra)
        return load_config(schema, path, settings, debug=debug)

    return reader


# --- YAML -------------------------------------------------------------------------------------


def test_yaml_is_safe_load_with_mends() -> None:
    for text in ("1e-4", "1E5", "-2e+3", "1.5e3", ".5"):
        assert parse_yaml(text) == float(text)
    for text in ("2024-06-01", "2024-06-01T12:00:00Z", "20240601T150000Z", "e5", "1e"):
        assert parse_yaml(text) == text
    assert (parse_yaml("'1e-4'"), parse_yaml("[1e-6, null, true, 3]")) == ("1e-4", [1e-6, None, True, 3])
    assert parse_yaml("{a: &x {b: 1}, c: {<<: *x, d: 2}}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    assert parse_yaml("{a: &x {b: 1}, c: {<<: *x, b: 2}}") == {"a": {"b": 1}, "c": {"b": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output_dir: a\nseed: 1\nseed: 2\n", ["line 3", "'seed'"]),
        ("output_dir: a\nseed: [1\n", ["line 3"]),
        ("output_dir: a\n\tseed: 1\n", ["line 2"]),
        ("!!python/object/apply:os.system ['true']", ["line 1"]),
        (b"output_dir: \xff\xfe\n", ["UTF-8"]),
        ("output_dir: a\x00\n", ["YAML"]),
        ("", ["mapping"]),
        ("- output_dir: a\n", ["mapping", "list"]),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(path: Path, text: str | bytes, words: list[str]) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(ConfigError, *words, path=path, key=None):
        load_config(SimulateConfig, path)


def test_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with refused(ConfigError, path=path):
            load_config(SimulateConfig, path)


# --- keys and values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "extra", "key", "words"),
    [
        (SimulateConfig, "n_granule: 3", "n_granule", ["n_granules?"]),
        (SimulateConfig, "'x[0]': 3", "x[0]", []),
        (SimulateConfig, "7: 3", "7", []),
        (TrainConfig, "optimizer: {learning: 1}", "optimizer.learning", ["weight_decay"]),
        (TrainConfig, "training: {n_step: 5}", "training.n_step", ["n_steps?"]),
        (SimulateConfig, "seed: true", "seed", ["true", "integer"]),
        (SimulateConfig, 'n_granules: "3\\n4"', "n_granules", ["integer"]),
        (SimulateConfig, "n_granules: 2.0", "n_granules", ["2.0", "integer"]),
        (SimulateConfig, "version: V05", "version", ["'V05'", "V03"]),
        (SimulateConfig, "shape: [40, 0]", "shape.1", ["0"]),
        (SimulateConfig, "shape: 40", "shape", ["40", "list"]),
        (SimulateConfig, "products: [NO3]", "products.0", ["'NO3'", "'NO2'"]),
        (SimulateConfig, "plant: {nan: 1}", "plant.nan", ["less than 1"]),
        (SimulateConfig, "plant: {nan: 0.5, fill: 0.5}", "plant", ["fill + nan", "below 1"]),
        (SimulateConfig, "plant: {night: [2]}", "plant.night", ["2", "n_granules"]),
        (SimulateConfig, "plant: {night: [-1]}", "plant.night.0", ["-1"]),
        (TrainConfig, "training: 5", "training", ["5", "mapping"]),
        (TrainConfig, "training: {device: gpu}", "training.device", ["'gpu'"]),
        (TrainConfig, "training: {grad_clip: .inf}", "training.grad_clip", ["inf"]),
        (TrainConfig, "optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1", ["1.0", "less than 1"]),
        (TrainConfig, "optimizer: {decay_steps: 99}", "training.n_steps", ["200000", "optimizer.decay_steps (99)"]),
        (TrainConfig, "model: {double_z: false}", "model.double_z", ["false"]),
        (TrainConfig, "model: {dropout_prob: 1}", "model.dropout_prob", ["1"]),
        (TrainConfig, "model: {logvar_init: 31}", "model.logvar_init", ["31", "30"]),
        (PrepareConfig, "split: {train: [a]}", "split.train", ["val"]),
        (PrepareConfig, "normalization: {transform: zscore, min_radiance: 1.0}", "normalization.min_radiance", ["1.0"]),
    ],
)
def test_wrong_keys_and_values_are_named(
    read: Any, path: Path, schema: type[CommandConfig], extra: str, key: str, words: list[str]
) -> None:
    with refused(ConfigError, *words, path=path, key=key):
        read(schema, extra + "\n")


@pytest.mark.parametrize(
    ("schema", "setting", "key", "words"),
    [
        (SimulateConfig, "seed", "--set seed", ["key.sub=value"]),
        (SimulateConfig, "=3", "--set =3", ["key.sub=value"]),
        (SimulateConfig, "seed=[1", "--set seed=[1", []),
        (SimulateConfig, "output_dir.x=1", "--set output_dir.x=1", ["output_dir"]),
        (SimulateConfig, "seed={a: 1, a: 2}", "--set seed={a: 1, a: 2}", ["'a'"]),
        (SimulateConfig, "seed=!!timestamp 2020-99-99", "--set seed=!!timestamp 2020-99-99", []),
        (SimulateConfig, f"seed={2000 * '['}", f"--set seed={2000 * '['}", []),
        (SimulateConfig, "output_dir=~nobody-of-this-name/x", "output_dir", ["~nobody"]),
        (SimulateConfig, 'output_dir="a\\0b"', "output_dir", ["path"]),
        (SimulateConfig, "output_dir=''", "output_dir", ["''", "path"]),
        (TrainConfig, "trainng.n_steps=5", "trainng", ["training?"]),
        (TrainConfig, "training.n_steps='5'", "training.n_steps", ["'5'", "--set"]),
        (TrainConfig, "data.tile_size=63", "data.tile_size", ["63", "multiple of 4", "64"]),
        (PrepareConfig, "inputs=[]", "inputs", []),
        (PrepareConfig, "inputs=[{variable: Y}]", "inputs.0.path", ["required"]),
        (PrepareConfig, "inputs=[a.nc, {path: b.mat, varable: Y}]", "inputs.1.varable", ["variable?"]),
        (PrepareConfig, "inputs=[{path: a, region: [0, 1, 2, -3]}]", "inputs.0.region.3", ["-3"]),
        (PrepareConfig, "inputs=[{path: a, wavelength: [401, x]}]", "inputs.0.wavelength.1", ["'x'", "number"]),
        (PrepareConfig, "inputs=[{path: a, wavelength: {first: 1, last: -1}}]", "inputs.0.wavelength.last", ["-1"]),
        (PrepareConfig, "inputs=[{path: a, wavelength: {first: 1, lst: 9}}]", "inputs.0.wavelength.last", ["lst"]),
        (CompressConfig, "bound.relative=0.1", "bound", ["z", "relative"]),
        (CompressConfig, "rate={step: 1, mse: 1}", "rate", ["step", "bytes", "mse"]),
        (CompressConfig, "rate.step=1", "rate", ["bound"]),
        (CompressConfig, "bound=null", "bound", ["rate"]),
        (DownloadConfig, "box=[-80, 35, -70]", "box", ["must be", "4 items"]),
        (DownloadConfig, "box=[-80, 45, -70, 35]", "box", ["south < north"]),
        (DownloadConfig, "box=[-181, 35, -70, 45]", "box", ["-180"]),
        (DownloadConfig, "box=[-80, 35, 181, 45]", "box", ["180"]),
        (DownloadConfig, "box=[-80, -91, -70, 45]", "box", ["-90"]),
        (DownloadConfig, "box=[-80, 35, -70, 91]", "box", ["90"]),
        (DownloadConfig, "box=[-80, 35, -80, 45]", "box", ["west < east"]),
        (DownloadConfig, "start=June", "start", ["'June'", "2024-06-01"]),
        (DownloadConfig, "start=0001-01-01T00:00+01:00", "start", ["0001-01-01"]),
        (DownloadConfig, "end=2024-05-31", "end", ["'2024-05-31'", "start (2024-06-01)"]),
        (DownloadConfig, "products=[NO2, RAD]", "products", ["RAD or RADT"]),
        (DownloadConfig, "products=[RAD, RADT]", "products", ["only one"]),
    ],
)
def test_bad_settings_are_named(
    read: Any, path: Path, schema: type[CommandConfig], setting: str, key: str, words: list[str]
) -> None:
    where = {} if key.startswith("--set") else {"path": path}
    with refused(ConfigError, *words, key=key, **where) as caught:
        read(schema, "", setting)
    assert "Wavelengths" not in str(caught.value) and "InputSpec" not in str(caught.value), "no names of our classes"


def test_a_misplaced_key_is_told_where_it_belongs(read: Any, path: Path) -> None:
    for schema, key, place in ((PrepareConfig, "variable", "inputs"), (TrainConfig, "tile_size", "data")):
        with refused(ConfigError, path=path, key=key) as caught:
            read(schema, f"{key}: 8")
        assert caught.value.remedy.endswith(f" {place}")


def test_several_errors_stand_in_one_line(path: Path) -> None:
    path.write_text("data: {batch_size: 0, tile: 3}\nmodle: {}\n")
    with refused(ConfigError, "data.store", "data.batch_size = 0", "modle", "model?", path=path, key="output_dir"):
        load_config(TrainConfig, path)
    path.write_text("output_dir: a\n" + "".join(f"key{i}: 1\n" for i in range(8)))
    with refused(ConfigError, "and 3 more", "key4", path=path, key="key0") as caught:
        load_config(SimulateConfig, path)
    assert "key5" not in str(caught.value)


def test_limits_that_depend_on_other_keys(read: Any) -> None:
    for text, expected in (("{}", 1.0), ("{min_radiance: 5}", 5.0), ("{transform: zscore}", None)):
        assert read(PrepareConfig, f"normalization: {text}").normalization.min_radiance == expected
    read(TrainConfig, "", "data.tile_size=63", "model.chs=[8]")
    read(TrainConfig, "", "training.n_steps=100", "optimizer={warmup_steps: 99, decay_steps: 100}")
    read(TrainConfig, "", "training.n_steps=100", "optimizer={warmup_steps: 500}")
    with refused(ConfigError, "100", key="optimizer.decay_steps"):
        read(TrainConfig, "", "training.n_steps=100", "optimizer={warmup_steps: 100, decay_steps: 100}")
    read(DownloadConfig, "", "box=[-180, -90, 180, 90]", "start=2024-06-01T12:00", "end=2024-06-01")
    read(DownloadConfig, "", "end=9999-12-31")


# --- --set and --debug ------------------------------------------------------------------------


def test_settings_win_over_the_file_and_make_sections(read: Any) -> None:
    config = read(
        TrainConfig,
        "optimizer:\nseed: 4\n",
        "seed=3",
        "data.batch_size=8",
        "model.chs=[64, 32]",
        "optimizer.lr=1e-3",
        "training.init_from=null",
        "training.n_steps=5",
        "training.n_steps=6",
        "output_dir=a=b",
    )
    assert (config.seed, config.data.batch_size, config.model.chs, config.optimizer.lr) == (3, 8, [64, 32], 1e-3)
    assert (config.training.init_from, config.training.n_steps) == (None, 6)
    assert config.output_dir == Path("a=b")
    assert config.data.store == Path("store")


def test_debug_stands_between_file_and_settings(read: Any) -> None:
    text = "training: {n_steps: 7, save_every: 3, log_every: 4}\n"
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


def test_default_model_is_the_published_one(read: Any) -> None:
    import torch

    from spectralvae.weights.mltools import build_model

    settings = dump_config(read(TrainConfig))
    with torch.device("meta"):
        model = build_model({**settings["model"], "shape": [1028, settings["data"]["tile_size"], 64]})
    assert sum(p.numel() for p in model.parameters()) == 27_289_893


@pytest.mark.parametrize("schema", MINIMAL)
def test_written_config_reads_back_the_same(read: Any, path: Path, schema: type[CommandConfig]) -> None:
    config = read(schema)
    path.write_text(to_yaml(dump_config(config)))
    assert load_config(schema, path) == config


def test_what_is_written_reads_back() -> None:
    values = {"a": 1e-6, "b": 1e-4, "c": 1e22, "d": -2.5e-12, "e": 3, "f": [0.1, None]}
    assert parse_yaml(to_yaml(values)) == values
    for name in ("1e-4", "2024-06-01", "12", "null", "true", "1e5", ".5", "a: b", "über", "~x"):
        assert parse_yaml(to_yaml({"name": name})) == {"name": name}
        assert yaml.safe_load(to_yaml({"name": name})) == {"name": name}, "other tools read it, too"


# --- what may change on resume ----------------------------------------------------------------

MAY_CHANGE = {f"training.{key}" for key in ("save_every", "val_every", "log_every", "plot_every", "keep_last")}
MAY_CHANGE |= {"training.keep_every", "training.device", "training.peer_timeout", "data.num_workers", "data.cache"}
FREE = dict.fromkeys(MAY_CHANGE, "may change")
BY_FILE = {"batch_size": "may change", "device": "may change"}


@pytest.mark.parametrize(
    ("schema", "rules"),
    [
        (
            TrainConfig,
            {"training.n_steps": "may grow", "data.store": "may move"} | dict.fromkeys(MAY_CHANGE, "may change"),
        ),
        (PrepareConfig, {"cluster": "may change", "n_workers": "may change"}),
        (DownloadConfig, {}),
        (EncodeConfig, {**BY_FILE, "all_invalid": "may change"}),
        (CompressConfig, {**BY_FILE, "all_invalid": "may change"}),
        (DecodeConfig, BY_FILE),
        (DecompressConfig, BY_FILE),
    ],
)
def test_exactly_the_keys_of_the_contract_may_differ_on_resume(
    schema: type[CommandConfig], rules: dict[str, str]
) -> None:
    assert schema.resumable
    assert resume_rules(schema) == rules


def test_other_commands_do_not_resume() -> None:
    for schema in (SimulateConfig, EvaluateConfig, ProbeConfig, ConvertConfig):
        assert not schema.resumable and not resume_rules(schema)


# --- docs/config.md ---------------------------------------------------------------------------


def test_reference_is_up_to_date_and_complete() -> None:
    script = runpy.run_path(str(DOCS / "make_config_reference.py"))
    written = (DOCS / "config.md").read_text(encoding="utf-8")
    assert script["reference"]() == written, "run `python docs/make_config_reference.py`"
    for schema in script["COMMANDS"].values():
        for key in resume_rules(schema):
            assert re.search(rf"^\| `{re.escape(key)}` \|.*on resume\* \|$", written, re.MULTILINE), key
    commands = {str(command.callback.__name__) for command in cli.app.registered_commands}
    assert commands - {"inspect", "doctor"} == set(script["COMMANDS"])
