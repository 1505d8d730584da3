"""From a YAML file and ``--set`` to a checked config, and back to YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spectralvae.config import DEBUG_OVERRIDES, CommandConfig
from spectralvae.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """safe_load with three mends: `1e-4` is a number, dates stay strings, a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        key_nodes = [key for key, _ in node.value if not key.tag.endswith(":merge")]  # `<<: *anchor`
        keys = [self.construct_object(key, deep=True) for key in key_nodes]
        for i, (key, key_node) in enumerate(zip(keys, key_nodes, strict=True)):
            if key in keys[:i]:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """safe_dump, with quotes where `_Loader` would take a string for a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*)?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, name: str) -> Any:
    """Read YAML with the three mends of `_Loader`; ``name`` stands in the messages.

    Raises:
        ConfigError: where it is not YAML, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{name}: {line}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not readable as YAML: {' '.join(str(error).split())}") from error


C = TypeVar("C", bound=CommandConfig)


def load_config(schema: type[C], path: Path, settings: Sequence[str] = (), *, debug: bool = False) -> C:
    """Read a command's config.

    Args:
        schema: the command's config class.
        path: YAML file.
        settings: ``key.sub=value`` each, values in YAML; they win over the file.
        debug: put DEBUG_OVERRIDES between the file and ``settings``.

    Raises:
        ConfigError: one line with the file and every offending key's path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the config: {reason}") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, not {type(data).__name__}")
    for key, value in (DEBUG_OVERRIDES if debug else {}).items():
        _set(data, key, value, f"{path}: --debug")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: give it as key.sub=value")
        _set(data, key, parse_yaml(value, f"--set {setting}"), f"--set {setting}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        source = f"{path} with {' '.join(f'--set {s}' for s in settings)}" if settings else str(path)
        raise ConfigError(f"{source}: {describe_errors(schema, error)}") from error


def _set(data: dict[str, Any], key: str, value: Any, name: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"{name}: {parent} holds no keys")
    data[last] = value


def describe_errors(schema: type[BaseModel], error: ValidationError) -> str:
    """One line for all that is wrong: ``key.path: what, and the limit; ...``"""
    found = {}
    for details in error.errors(include_url=False):
        # a union reports under the names of its members, which are no keys of the user's
        location = tuple(part for part in details["loc"] if isinstance(part, int) or _is_key(part))
        if details["type"] == "extra_forbidden" and location[-1:] != details["loc"][-1:]:
            location += details["loc"][-1:]  # an unknown key may look like such a name
        found[location] = _describe(schema, location, details)
    # a union also reports that its other members do not fit: only the deepest complaint helps
    lines = [
        line
        for location, line in found.items()
        if not any(other != location and other[: len(location)] == location for other in found)
    ]
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def _is_key(part: str) -> bool:
    return "[" not in part and part not in ("Wavelengths", "list")


def _describe(schema: type[BaseModel], location: tuple[str | int, ...], details: ErrorDetails) -> str:
    key = ".".join(map(str, location))
    if details["type"] == "missing":
        return f"{key}: this key is required"
    if details["type"] == "extra_forbidden":
        known = _known_keys(schema, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = re.sub(r"a valid dictionary or .*", "a mapping of keys to values", message)
    message = message.replace(" after validation", "").replace("a valid list", "a list: [...]")
    value = details["input"]
    shown = "" if isinstance(value, (dict, BaseModel)) else f"{value!r} is not allowed: "
    text = f"{shown}{message[0].lower()}{message[1:]}"
    return f"{key}: {text}" if key else text  # a check of several keys together names them itself


def _known_keys(schema: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys of the section at ``location``."""
    section: Any = schema
    for part in location:
        if isinstance(part, str):
            if part not in getattr(section, "model_fields", {}):
                continue  # a key of a mapping whose values are all of one section
            section = section.model_fields[part].annotation
            members = [section, *get_args(section)]
            section = next(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))
    return list(section.model_fields)


def dump_config(config: BaseModel) -> dict[str, Any]:
    """The resolved config as plain JSON/YAML values."""
    return config.model_dump(mode="json")


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain values, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
