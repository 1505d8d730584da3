"""From a YAML file and ``--set`` to a checked config, and back to YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

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
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", mark)
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


def parse_yaml(text: str) -> Any:
    """Read YAML with the three mends of `_Loader`.

    Raises:
        ConfigError: it is not YAML; the problem names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{line}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not readable as YAML: {' '.join(str(error).split())}") from error


C = TypeVar("C", bound=CommandConfig)


def load_config(schema: type[C], path: Path, settings: Sequence[str] = (), *, debug: bool = False) -> C:
    """Read a command's config.

    Args:
        schema: the command's config class.
        path: YAML file.
        settings: ``key.sub=value`` each, values in YAML; they win over the file.
        debug: put DEBUG_OVERRIDES between the file and ``settings``.

    Raises:
        ConfigError: its path is the file, its key the first offending key; the line names up to five.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the config: {reason}", path=path) from error
    except ConfigError as error:
        raise error.with_parts(path=path) from error
    if not isinstance(data, dict):
        raise ConfigError(f"a config is a mapping of keys to values, not {type(data).__name__}", path=path)
    for key, value in (DEBUG_OVERRIDES if debug else {}).items():
        _set(data, key, value, "--debug")
    set_keys = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError("is not key.sub=value", key=f"--set {setting}")
        try:
            _set(data, key, parse_yaml(value), f"--set {setting}")
        except ConfigError as error:
            raise error.with_parts(key=f"--set {setting}") from error
        set_keys.append(key)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first, *others = describe_errors(schema, error)
        # the key that is wrong may be the one that was set, or inside it, or around it
        by_set = any(f"{first.key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{first.key}.") for key in set_keys)
        more = f"and {len(others) - 4} more errors" if len(others) > 4 else None
        remedies = [
            remedy
            for remedy in (first.remedy, "given by --set" if by_set else None, *map(str, others[:4]), more)
            if remedy
        ]
        raise first.with_parts(path=path, remedy="; ".join(remedies) or None) from error


def _set(data: dict[str, Any], key: str, value: Any, name: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"{parent} holds no keys", key=name)
    data[last] = value


def describe_errors(schema: type[BaseModel], error: ValidationError) -> list[ConfigError]:
    """Each error of a validation by its key and the other parts, without the path."""
    found = {}
    for details in error.errors(include_url=False):
        # a union reports under the names of its members, which are no keys of the user's
        location = tuple(
            part
            for part in details["loc"]
            if isinstance(part, int) or ("[" not in part and part not in ("Wavelengths", "list"))
        )
        if details["type"] == "extra_forbidden" and location[-1:] != details["loc"][-1:]:
            location += details["loc"][-1:]  # an unknown key may look like such a name
        found[location] = _describe(schema, location, details)
    # a union also reports that its other members do not fit: only the deepest complaint helps
    return [
        described
        for location, described in found.items()
        if not any(other != location and other[: len(location)] == location for other in found)
    ]


def _describe(schema: type[BaseModel], location: tuple[str | int, ...], details: ErrorDetails) -> ConfigError:
    key = ".".join(map(str, location)) if location else None
    value = None if isinstance(details["input"], (dict, BaseModel)) else details["input"]
    if details["type"] == "missing":
        return ConfigError("this key is required", key=key)
    if details["type"] == "extra_forbidden":
        return ConfigError("unknown key", key=key, remedy=_place_of(schema, location))
    if details["type"] == "refused":  # by a validator of ours
        parts = dict(details["ctx"]["parts"])
        if parts["key"] is not None:  # a check of several keys names one of them
            return ConfigError(**{**parts, "key": ".".join(map(str, (*location, parts["key"])))})
        return ConfigError(**{**parts, "key": key, "value": value})
    message = details["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub(r"^List should have (.*), not \d+$", r"Input should be a list of \1", message)
    if message.startswith("Input should be "):
        limit = message.removeprefix("Input should be ").replace("a valid list", "a list: [...]")
        limit = re.sub(r"a valid dictionary or .*", "a mapping of keys to values", limit).replace("True", "true")
        return ConfigError("is null" if details["input"] is None else "", key=key, value=value, limit=limit)
    return ConfigError(f"{message[0].lower()}{message[1:]}", key=key, value=value)


def _place_of(schema: type[BaseModel], location: tuple[str | int, ...]) -> str:
    """Where an unknown key belongs: its section, a similar key beside it, or the keys there are."""
    name = str(location[-1])
    if places := [*(["at the top level"] if name in schema.model_fields else []), *_places_with(schema, name)]:
        return f"it belongs {' or '.join(places)}"
    section = schema
    for part in location[:-1]:
        if part in section.model_fields:  # else it is the number or name of an entry
            section = next(_sections(section.model_fields[str(part)].annotation), section)
    known = list(section.model_fields)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"


def _places_with(schema: type[BaseModel], name: str, place: str = "") -> Iterator[str]:
    """All sections that have a key: "inside data", "inside an entry of inputs"."""
    for key, field in schema.model_fields.items():
        for section in _sections(field.annotation):
            here, several = f"{place}{key}", get_origin(field.annotation) in (list, dict)
            if name in section.model_fields:
                yield f"inside an entry of {here}" if several else f"inside {here}"
            yield from _places_with(section, name, f"{here}[]." if several else f"{here}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a type holds, in lists and unions, too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for member in get_args(annotation):
        yield from _sections(member)


def resume_rules(schema: type[BaseModel]) -> dict[str, str]:
    """What the schema says of the keys that may differ when a run is resumed: "may change", "may grow" or "may move".

    Returns:
        Path of the key -> its rule; a key that is not among them must stay as it is.
    """
    rules = {}
    for key, field in schema.model_fields.items():
        if isinstance(field.json_schema_extra, dict):
            rules[key] = str(field.json_schema_extra["on_resume"])
        for section in _sections(field.annotation):
            rules |= {f"{key}.{below}": rule for below, rule in resume_rules(section).items()}
    return rules


def dump_config(config: BaseModel) -> dict[str, Any]:
    """The resolved config as plain JSON/YAML values."""
    return config.model_dump(mode="json")


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain values, in their order."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
