"""The one file of colours, and how every picture and page looks. Nothing heavy is imported."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ktverify.system.instruction_sets import ISA_FLAGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, RULE, EDGE = "#2b3036", "#6d757e", "#dfe3e7", "#c5cad0"
PURPLE, BLUE, GREEN, ORANGE, RED, BROWN = "#6d2f91", "#1f6fb2", "#2a9d7c", "#d9772b", "#b5495b", "#8a6f3e"
LILAC, SLATE, TEAL = "#8d6aa8", "#5b6770", "#3f7f93"
# backgrounds, from dark to light: time spent waiting, a band of rows, a panel
WAITING, BAND, WASH = "#d5d9dd", "#f1f2f4", "#f7f8f9"
PASS, FAIL, WARN, METER = "#2a7d4f", "#c62f2f", "#a86a10", "#8aa9c2"

# dark to light with the ISA's age, and of different hues for those who see colours differently
ISA_COLOURS = dict(zip(ISA_FLAGS, (PURPLE, BLUE, TEAL, ORANGE, "#7d8790"), strict=True))
OTHER_ISA_COLOURS = (GREEN, RED, BROWN)

# verdicts and warnings on the console, as rich writes styles
CONSOLE_STYLES = {
    "PASS": "green",
    **dict.fromkeys(("FAIL", "CRASH", "TIMEOUT", "OOM"), "bold red"),
    **dict.fromkeys(("MISTRUSTED", "WARNING"), "yellow"),
    **dict.fromkeys(("SKIP", "UNSUPPORTED"), "dim"),
}
# and on HTML pages, by the lower-case word as class
PAGE_COLOURS = {
    "pass": PASS,
    **dict.fromkeys(("fail", "crash", "timeout", "oom"), FAIL),
    **dict.fromkeys(("mistrusted", "warning"), WARN),
    **dict.fromkeys(("skip", "unsupported"), QUIET),
}

# the background of a text that is drawn over lines
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def isa_colour(isa: str) -> str:
    """The colour of an ISA in every plot and table, emulated or not."""
    known = ISA_COLOURS.get(isa.partition(" ")[0])
    return known if known is not None else OTHER_ISA_COLOURS[sum(isa.encode()) % len(OTHER_ISA_COLOURS)]


def bare(
    axes: Axes, title: str = "", grid: Literal["x", "y", "both"] | None = None, pad: float = 6.0, size: float = 10.0
) -> None:
    """No frame but the lower edge, a title on the left, thin lines for `grid`."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(EDGE)
    axes.tick_params(length=0, colors=QUIET, labelsize=8.5, pad=4)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=RULE, linewidth=0.7)
    axes.set_title(title, loc="left", color=INK, fontsize=size, fontweight="bold", pad=pad)


def label_x(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, color=QUIET, fontsize=9)


def beside(axes: Axes, text: str, place: tuple[float, float], **more: Any) -> None:
    """A text right of a point."""
    style: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    axes.annotate(text, place, **{**style, "color": INK, **more})


def legend(owner: Figure | Axes, handles: Sequence[Any], labels: Sequence[str] | None = None, **more: Any) -> None:
    """A legend without a frame, upper left unless `more` places it elsewhere."""
    style: dict[str, Any] = {"loc": "upper left", "frameon": False, "fontsize": 8.5, "labelcolor": INK}
    if labels is not None:
        style["labels"] = list(labels)
    owner.legend(**{**style, "handles": list(handles), "columnspacing": 1.4, **more})


def png(figure: Figure, warning: str = "") -> bytes:
    """The picture. warning: why its times mean little; it is written in a strip below the picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return _with_strip(buffer, warning, int(figure.dpi)) if warning else buffer.getvalue()


def _with_strip(picture: io.BytesIO, text: str, dpi: int) -> bytes:
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont

    with Image.open(picture) as drawn:
        strip = int(0.3 * dpi)
        whole = Image.new("RGB", (drawn.width, drawn.height + strip), "white")
        whole.paste(drawn.convert("RGB"), (0, 0))
        # 9 points, as the pictures' own texts
        font = ImageFont.truetype(findfont("DejaVu Sans"), int(9 * dpi / 72))
        ImageDraw.Draw(whole).text((int(0.13 * dpi), drawn.height), text, fill=WARN, font=font)
        result = io.BytesIO()
        whole.save(result, format="png")
    return result.getvalue()
