"""Pages that need no server and no network.

A page is one file: templates/page.html around the page's own template, with style, script, data and pictures inside.
Its content security policy lets the browser load nothing and run no other script, whatever a name contains.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import ArrayLike

from spectralvae.runtime.atomic import write_atomic

DIGITS = 6  # significant ones, of numbers in a page: more than a screen can show
Json = dict[str, Any]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("spectralvae.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["whole"] = "{:,}".format
    # NaN is no JSON: it would break the whole page
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


@cache
def _inlined(*names: str) -> tuple[Markup, Markup]:
    """Files of templates/ as one text, and its hash for the content security policy."""
    loader = _environment().loader
    assert loader is not None
    text = "".join(loader.get_source(_environment(), name)[0] for name in names)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), Markup(f"'sha256-{digest}'")


def write_page(
    path: Path, template: str, scripts: Sequence[str], data: Json, styles: Sequence[str] = (), **context: Any
) -> None:
    """Write a page that is either whole or not there.

    Args:
        path: of the page.
        template: in templates/, extending page.html.
        scripts: files of templates/, to run in this order.
        data: what the scripts read; JSON, no NaN.
        styles: files of templates/, beside page.css.
        context: for the template, escaped there.
    """
    style, style_hash = _inlined("page.css", *styles)
    script, script_hash = _inlined(*scripts)
    page = _environment().get_template(template)
    inlined = {"style": style, "style_hash": style_hash, "script": script, "script_hash": script_hash}
    write_atomic(path, page.render(data=data, **inlined, **context))


def inline_picture(png: bytes) -> Markup:
    """A PNG as text, for the address of an image."""
    assert png.startswith(b"\x89PNG\r\n")
    return Markup(base64.b64encode(png).decode())


def numbers_of(values: ArrayLike) -> list[float | None]:
    """Numbers for JSON: rounded to DIGITS significant digits; what is not finite is null, a gap in a plot."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    known = np.where(finite, array, 0.0)
    # the least size keeps the powers finite, for zero and for what is as good as zero
    places = DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(known), 1e-290)))
    # whole powers of ten are exact: no digits are left over
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)
    rounded: list[float | None] = (np.round(known * up / down) * down / up).tolist()
    for i in np.flatnonzero(~finite):
        rounded[i] = None
    return rounded


def series_of(label: str, color: str, draw: str, x: ArrayLike, y: ArrayLike, *range_: ArrayLike) -> Json:
    """A series of a chart.

    Args:
        label: in the legend and beside the values.
        color: a class of the page's style that has a colour.
        draw: "curve" (a line with dots), "line", "dots" or "bars".
        x, y: as many each; what is not finite is a gap.
        range_: low and high of each, if there is a range.
    """
    series = {"label": label, "short": label, "color": color, "draw": draw, "x": numbers_of(x), "y": numbers_of(y)}
    assert len(series["x"]) == len(series["y"])
    return series | dict(zip(("low", "high"), map(numbers_of, range_), strict=False))


def chart_of(
    name: str,
    group: str,
    title: str,
    label: str,
    y: str,
    series: list[Json],
    references: Mapping[str, float] | None = None,
) -> Json:
    """A chart whose group and section have one name.

    Args:
        name: of the chart, among those of the page.
        group: of the charts that share its x axis.
        title: over it.
        label: of the y axis.
        y: its scale: "switch" (as the reader likes), "log", "linear" or "zero" (linear, from zero).
        series: as `series_of` makes them.
        references: values to compare with, by label; those that are not finite have no line.
    """
    return {
        "id": f"chart-{name}",
        "group": group,
        "section": group,
        "title": title,
        "label": label,
        "y": y,
        "series": series,
        "references": _references(references or {}),
        "spikes": [],
    }


def _references(references: Mapping[str, float]) -> list[Json]:
    """Those that are not finite have no line."""
    rounded = zip(references, numbers_of(list(references.values())), strict=True)
    return [{"label": label, "value": value} for label, value in rounded if value is not None]
