"""How every picture looks: colours, bare axes, PNG bytes. Nothing heavy is imported."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, RULE, EDGE = "#2b3036", "#747d86", "#dfe3e7", "#c5cad0"
PURPLE, BLUE, GREEN, ORANGE, RED, BROWN = "#6d2f91", "#1f6fb2", "#2a9d7c", "#d9772b", "#b5495b", "#8a6f3e"

# behind a text that stands on lines: they must not strike it through
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def bare(axes: Axes, title: str, grid: Literal["x", "y", "both"] | None = None, pad: float = 6.0) -> None:
    """No frame but the lower edge, a title on the left, thin lines for `grid`."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(EDGE)
    axes.tick_params(length=0, colors=QUIET, labelsize=8.5, pad=4)
    if grid is not None:
        axes.grid(axis=grid, color=RULE, linewidth=0.7)
        axes.set_axisbelow(True)
    axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold", pad=pad)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
