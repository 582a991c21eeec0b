"""Draw the diagrams of the four guides: python figures/draw.py [cnn] [rnn] [gan] [transformer]

Each guide has a file of its own here, draw_cnn.py and so on; this one holds the style that they
share. Plots of measurements are not drawn here: the scripts write those themselves.
"""

import importlib
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, RED, GRAY = "#cfe2f3", "#fce5cd", "#d9ead3", "#f4cccc", "#eeeeee"
INK = "#333333"


def new(width, height, columns=1):
    """A figure of width x height inches (8.3 inches are the 830 pixels of a page) and its axis, or
    a list of axes side by side, in which a unit is the same length in both directions.
    """
    figure = Figure((width, height), constrained_layout=True)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_aspect("equal")
        axis.axis("off")
    return figure, axes[0] if columns == 1 else list(axes)


def box(axis, x, y, width, height, text="", color=BLUE, size=10):
    """A rounded box about the point (x, y), with text in it."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    axis.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=color, edgecolor=INK))
    axis.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axis, start, end, text="", color=INK, dashed=False, curve=0.0):
    """An arrow from one point to another, with text beside its middle."""
    style = {"arrowstyle": "-|>", "color": color, "linestyle": "--" if dashed else "-",
             "connectionstyle": f"arc3,rad={curve}", "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style)
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axis.text(middle[0] + 0.06, middle[1] + 0.06, text, fontsize=9, color=color)


def grid(axis, x, y, values, cell=0.5, color="white", size=10, form="{}"):
    """A table of numbers, its upper left corner at (x, y); `color` is one, or one for each cell."""
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            place = x + column * cell, y - (row + 1) * cell
            face = color if isinstance(color, str) else color[row][column]
            axis.add_patch(FancyBboxPatch(place, cell, cell, "square,pad=0", facecolor=face,
                                          edgecolor=INK, linewidth=0.6))
            axis.text(place[0] + cell / 2, place[1] + cell / 2, form.format(value), ha="center",
                      va="center", fontsize=size, color=INK)


def save(figure, name, axes=None):
    """Write figures/NAME.png, with limits that hold all that was drawn."""
    for axis in figure.axes:
        axis.autoscale_view()
    figure.savefig(FOLDER / f"{name}.png", dpi=100)


def main():
    sys.path.insert(0, str(FOLDER))
    names = ("cnn", "rnn", "gan", "transformer")
    for name in [word for word in sys.argv[1:] if word in names] or names:
        importlib.import_module(f"draw_{name}").main()


if __name__ == "__main__":
    main()
