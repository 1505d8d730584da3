"""The errors that users see, each with its parts: what is wrong, where, the limit and the remedy.

``assert`` is for our own invariants; these classes are for users.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Self


class SpectralvaeError(Exception):
    """Base class of all errors raised on purpose. Its text is one line made of its parts.

    Args:
        problem: what is wrong, without the file and the key: "is corrupt: its SHA-256 differs".
        key: path of the config key, "data.tile_size", or name of the argument at fault.
        path: the file or folder at fault.
        value: the value that is refused.
        limit: what the value must be, "a multiple of 4".
        remedy: what to do, "give the output_dir of a `spectralvae prepare`".
    """

    def __init__(
        self,
        problem: str = "",
        *,
        key: str | None = None,
        path: str | PathLike[str] | None = None,
        value: Any = None,
        limit: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.key = key
        self.path = None if path is None else Path(path)
        self.value = value
        self.limit = limit
        self.remedy = remedy

    def __str__(self) -> str:
        """``path: key = value: problem; must be limit; remedy``, without the parts that are absent."""
        subject = ": ".join(str(part) for part in (self.path, self.key) if part is not None)
        if self.value is not None:
            subject = f"{subject} = {show(self.value)}" if subject else show(self.value)
        limit = "" if self.limit is None else f"must be {self.limit}"
        joint = " " if self.value is not None and not self.problem else ": "  # "tile_size = 15 must be ..."
        said = "; ".join(part for part in (self.problem, limit, self.remedy) if part)
        return joint.join(part for part in (subject, said) if part)

    def parts(self) -> dict[str, Any]:
        """The arguments that make this error again, with paths as text."""
        return {name: str(part) if isinstance(part, Path) else part for name, part in self._parts().items()}

    def with_parts(self, **parts: Any) -> Self:
        """The same error with other parts; ``raise error.with_parts(path=path) from error``."""
        return type(self)(**{**self._parts(), **parts})

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("problem", "key", "path", "value", "limit", "remedy")}


def show(value: Any) -> str:
    """A value as a config would hold it: numpy's numbers as numbers, texts in quotes, paths as they are."""
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(value) if isinstance(value, Path) else repr(value)


def printable(text: str) -> str:
    """Text with its control characters escaped: names may hold anything, and an escape sequence acts on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(SpectralvaeError):
    """The user can mend it; exit code 2."""


class ConfigError(UserError):
    """A key of the config is missing, unknown, or has a value outside its limits."""


class InputError(UserError):
    """A file is missing, corrupt, or not what its place in the config asks for."""


class DamagedError(InputError):
    """A file is not what this tool once wrote."""


class RunError(SpectralvaeError):
    """Work that had begun cannot go on (a loss that is not finite, a full disk); exit code 1."""


class PeerError(RunError):
    """Another process of the run failed, and says why on its own stderr."""


class LostPeerError(RunError):
    """Another process of the run is gone, or does not answer: no verdict on the run, which can be started again."""


class NoRoomError(RunError):
    """A disk is full, a quota used up, or a file larger than files may be."""
