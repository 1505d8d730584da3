"""How tests look at an error: by its class and parts, not by its wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spectralvae.errors import ConfigError, SpectralvaeError


@contextmanager
def refused(kind: type[SpectralvaeError] = ConfigError, *words: str, **parts: Any) -> Iterator[pytest.ExceptionInfo]:
    """Expect an error of exactly this class, whose text is one line, with these parts; a word or two may be asked for.

    Args:
        kind: its class.
        words: names and numbers that its line holds.
        parts: key, path, value, limit, remedy.
    """
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind
    assert "\n" not in str(error)
    for name, expected in parts.items():
        found = getattr(error, name)
        assert found == (Path(expected) if name == "path" else expected), f"{name}: {found!r} ({error})"
    assert all(word in str(error) for word in words), str(error)
