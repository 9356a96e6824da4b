"""How a figure looks: a colour and marker per method, type that reads at 900 pixels, saving without side effects."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agwm_jax.errors import AgwmError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches; at 900 pixels a point of type is 1.4 pixels
INK, FAINT = "#222222", "#8a8a8a"
# Okabe and Ito's palette, which the common colour blindnesses keep apart (its yellow is too pale for lines).
_BASELINE = ("#555555", "o")
_OTHERS = (
    ("#0072B2", "D"),
    ("#E69F00", "s"),
    ("#D55E00", "^"),
    ("#009E73", "v"),
    ("#CC79A7", "P"),
    ("#56B4E9", "X"),
    ("#6A3D9A", "<"),
    ("#8C510A", ">"),
    ("#01665E", "h"),
)
_RC: dict[str, Any] = {
    "font.size": 11.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 180,
    "savefig.dpi": 180,
}


class Look(NamedTuple):
    """Colour and marker of a method, the same in every figure of a report."""

    color: str
    marker: str


def looks(methods: Sequence[str], *, baseline: str) -> dict[str, Look]:
    """A look for each method: grey for the baseline, colours for the others in their order."""
    others = [method for method in methods if method != baseline]
    return {baseline: Look(*_BASELINE)} | {name: Look(*_OTHERS[i % len(_OTHERS)]) for i, name in enumerate(others)}


def save(path: Path, height: float, draw: "Callable[[Figure], None]", *, width: float = WIDTH) -> Path:
    """Draws a figure of `width` x `height` inches and writes it as PNG.

    Raises:
        AgwmError: the file cannot be written.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    # From the defaults, not from the user's matplotlibrc: the same runs give the same picture everywhere.
    with matplotlib.style.context(_RC, after_reset=True):
        figure = Figure(figsize=(width, height))
        draw(figure)
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise AgwmError(f"{path} cannot be written ({error.strerror}): choose another output folder.") from error
    return path


def headline(figure: "Figure", text: str, *, size: float = 13.0) -> None:
    """The point of a figure, over all its panels."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=size, fontweight="bold", color=INK)


def note(axes: "Axes", text: str, x: float, y: float, **settings: Any) -> None:
    """A small remark inside a panel, at axes coordinates."""
    axes.text(x, y, text, transform=axes.transAxes, fontsize=9.5, color=FAINT, **settings)
