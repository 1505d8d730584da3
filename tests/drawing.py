"""Whether what is drawn can be read."""

from __future__ import annotations

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def texts(figure: Figure) -> list[Text]:
    """All that are seen. Ticks exist beyond the ends of their axis, too, and are not drawn there."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in (*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)):
        found += [axes.title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
            labels = [text for tick in ticks if low <= tick.get_loc() <= high for text in (tick.label1, tick.label2)]
            found += [axis.label, *labels]
    return [text for text in found if text.get_visible() and text.get_text()]


def assert_readable(figure: Figure) -> None:
    """No text lies on another, no title or tick on a panel, nothing beyond the page."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # of an annotation without its leader
    boxes = {text: Text.get_window_extent(text, canvas.get_renderer()) for text in texts(figure)}
    assert len(boxes) > 2
    page, panels = figure.bbox.padded(1), [axes.get_window_extent() for axes in figure.axes if axes.axison]
    for box in (*boxes.values(), *(axes.get_tightbbox() for axes in figure.axes)):
        assert page.x0 <= box.x0 and page.y0 <= box.y0 and box.x1 <= page.x1 and box.y1 <= page.y1, box
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.shrunk(0.98, 0.7).overlaps(b.shrunk(0.98, 0.7)), (one, other)
    for text in boxes.keys() - {text for axes in figure.axes for text in axes.texts}:
        assert not any(boxes[text].shrunk(0.98, 0.7).overlaps(panel) for panel in panels), text
