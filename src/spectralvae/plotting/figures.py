"""Figures as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from spectralvae.runtime.atomic import write_atomic


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write a PNG that is either whole or not there; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
    return buffer.getvalue()
