"""Writes config.md, the reference of all keys, from the schemas: `python docs/make_config_reference.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from spectralvae.config.loading import resume_rules

COMMANDS: dict[str, type[CommandConfig]] = {
    "simulate": SimulateConfig,
    "download": DownloadConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "encode": EncodeConfig,
    "decode": DecodeConfig,
    "compress": CompressConfig,
    "decompress": DecompressConfig,
    "probe": ProbeConfig,
    "convert": ConvertConfig,
}

RESUMABLE = {command: resume_rules(config) for command, config in COMMANDS.items() if config.resumable}
KEYS_THAT_MAY_DIFFER = "\n".join(
    f"- `{command}`: " + ", ".join(f"`{key}`" + f" ({rule})" * (rule != "may change") for key, rule in rules.items())
    for command, rules in RESUMABLE.items()
    if rules
)

INTRODUCTION = f"""# Configs

<!-- Written by docs/make_config_reference.py from the schemas in spectralvae.config: change those, then run it. -->

Every command reads one YAML file and writes into one folder:

```
spectralvae COMMAND CONFIG.yaml [--set key.sub=value] [--overwrite] [--debug] [--print-config]
```

An example with every required key of `train`:

```yaml
output_dir: runs/first
data:
  store: stores/june
training:
  n_steps: 20000
```

**Keys.** A key that a command does not know is an error, never ignored; the message names the nearest known key.
Values are not converted: `"3"` is not a number, `2.5` not a whole one. Keys left out take the defaults below, and the
complete config is written beside the results as `config.yaml`. Relative paths are taken from the folder in which the
command is started, not from the folder of the YAML file.

**`--set key.sub=value`** changes one key and may be repeated. The value is YAML and wins over the file:
`--set training.n_steps=500 --set model.chs=[64,32] --set training.init_from=null`.

**`--debug`** (`train`) is for a quick look whether everything works. It stands between the file and `--set`:
{", ".join(f"`{key}` = {value}" for key, value in DEBUG_OVERRIDES.items())}.

**`--print-config`** prints the complete config, then as comments the keys that may differ when the run is resumed, and
stops; nothing is written.

**`--dry-run`** (`download`) lists names and bytes; nothing is written.

**`--overwrite`** starts afresh: it deletes what is in `output_dir`, but only if the same command made that folder, and
only once the config was checked and every input could be opened; an input that lies in the folder is refused.

**Resuming.** `output_dir` may be absent or empty. If it holds an unfinished run of the same command with the same
config, {", ".join(f"`{command}`" for command in RESUMABLE)} resume it; the other commands
ask for `--overwrite`. If the run is finished, the command says so and exits with 0. Anything else in the folder is
refused, and nothing is changed. Two commands never write into one folder at the same time: the second is refused.

When a run is resumed, these keys may differ from those it was started with, and `run.json` records it. Any other
difference is listed and refused. A larger number of steps resumes a finished training run, too. A store that was moved
must have the same content.

{KEYS_THAT_MAY_DIFFER}

**Exit codes.**

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | failure while running |
| 2 | wrong usage, config or input; one line on stderr says what and how to mend it |
| 75 | stopped by a signal after saving: start it again |
| 130 | Ctrl-C; a training run has been saved |

`run.json` in `output_dir` holds the `state`: running, stopped, finished or failed. Launchers may turn 75 into 1, so
requeue on the state.

**YAML**, with three mends: `1e-4` is a number (YAML 1.1 takes it for text), dates such as `2024-06-01` stay text, and a
key that stands twice in one mapping is an error.
"""

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """The whole of config.md."""
    parts = [INTRODUCTION]
    for command, config in COMMANDS.items():
        schema = config.model_json_schema()
        parts += [f"## {command}\n", *_tables(schema, schema, "")]
    return "\n".join(parts)


def _tables(section: dict[str, Any], root: dict[str, Any], path: str) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    if path:
        yield f"### `{path}`\n"
    yield section["description"].replace("\n", " ") + "\n"
    rows, inner = [], []
    for name, field in section["properties"].items():
        key = f"{path}.{name}" if path else name
        below = list(_sections(field, key))
        inner += [(root["$defs"][definition], where) for definition, where in below]
        if "description" not in field:  # nothing but a section, which has its own table
            assert below, f"{key} has no description"
            continue
        default = f"`{_value(field['default'])}`" if "default" in field else "required"
        meaning = field["description"] + (f"; *{field['on_resume']} on resume*" if "on_resume" in field else "")
        cells = f"`{key}`", _type(field), default, _limits(field), meaning
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    yield "\n".join(["| key | type | default | limits | meaning |", "| --- | --- | --- | --- | --- |", *rows]) + "\n"
    for definition, where in inner:
        yield from _tables(definition, root, where)


def _sections(field: dict[str, Any], key: str) -> Iterator[tuple[str, str]]:
    """(name in $defs, key path) of the sections that a field is or may hold."""
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2], key
    for option in field.get("anyOf", []):
        yield from _sections(option, key)
    if "items" in field:
        yield from _sections(field["items"], f"{key}[]")
    if "propertyNames" in field:  # a mapping from products to sections
        yield from _sections(field["additionalProperties"], f"{key}.PRODUCT")


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        return "mapping"
    if "enum" in field:
        return " or ".join(f"`{_value(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{_value(field['const'])}`"
    if field["type"] == "array":
        n = field.get("minItems") if field.get("minItems") == field.get("maxItems") else None
        items = _type(field["items"])
        return f"list of {n} × {items}" if n else f"list of {items}"
    if field.get("format") == "path":
        return "path"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return {**names, "object": "mapping", "null": "null"}[field["type"]]


def _limits(field: dict[str, Any]) -> str:
    limits = [f"{sign} {_bound(field[key])}" for key, sign in _BOUNDS.items() if key in field]
    if field.get("minItems") != field.get("maxItems"):
        limits.append("not empty")
    if "items" in field and (each := _limits(field["items"])):
        limits.append(f"each {each}")
    return ", ".join([*limits, *filter(None, map(_limits, field.get("anyOf", [])))])


def _bound(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(reference(), encoding="utf-8")
