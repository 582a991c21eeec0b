"""Draw the diagrams of transformer.md: python figures/draw.py transformer"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import draw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer  # noqa: E402

MEMORY = "#b45f06"  # what the decoder reads of the encoder


def text(axis, x, y, words, size=10, **options):
    axis.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": size,
                              "color": draw.INK, **options})


def line(axis, *points, **options):
    """A line through points, drawn below the boxes."""
    axis.plot(*zip(*points), **{"color": draw.INK, "linewidth": 1.2, "zorder": 0, **options})


def span(axis, left, right, bottom, top):
    """Make the picture at least this large: only boxes and lines do so by themselves."""
    axis.update_datalim([(left, bottom), (right, top)])


# ---------------------------------------------------------------- The model


def stack(axis, x, y, sublayers):
    """A layer from y upward; `sublayers` are (name, color). Returns the heights of the boxes."""
    bottom, heights = y, []
    for name, color in sublayers:
        # The branch: norm, sublayer, and back to the sum on the straight path.
        line(axis, (x, y), (x + 1.6, y))
        draw.arrow(axis, (x + 1.6, y), (x + 1.6, y + 0.2))
        draw.box(axis, x + 1.6, y + 0.4, 1.9, 0.38, "layer norm", draw.GRAY, 9)
        draw.arrow(axis, (x + 1.6, y + 0.6), (x + 1.6, y + 0.8))
        draw.box(axis, x + 1.6, y + 1.1, 1.9, 0.58, name, color, 9)
        line(axis, (x + 1.6, y + 1.4), (x + 1.6, y + 1.65))
        draw.arrow(axis, (x + 1.6, y + 1.65), (x + 0.15, y + 1.65))
        text(axis, x, y + 1.65, "+", 12, bbox={"boxstyle": "circle,pad=0.12", "fc": "white",
                                               "ec": draw.INK})
        heights.append(y + 1.1)
        y += 2.0
    draw.box(axis, x + 1.05, (bottom + y) / 2 - 0.12, 3.5, y - bottom + 0.05, "", "none")
    text(axis, x - 0.6, y + 0.1, "× 2", 11, ha="right")
    return heights, y


def block():
    """Encoder and decoder with residual connections and layer norm before each sublayer."""
    figure, axis = draw.new(8.3, 8.4)
    attention, cross, forward = draw.BLUE, draw.ORANGE, draw.GREEN
    encoder = [("self-attention", attention), ("feed-forward", forward)]
    decoder = [("causal\nself-attention", attention), ("cross-attention", cross),
               ("feed-forward", forward)]
    for x, sublayers, below in ((0, encoder, "source\nc a b <eos>"),
                                (6.3, decoder, "target so far\n<bos> b a c")):
        heights, top = stack(axis, x, 0, sublayers)
        text(axis, x, -2.05, below)
        draw.arrow(axis, (x, -1.7), (x, -1.4))
        draw.box(axis, x, -1.0, 2.6, 0.7, "embedding\n+ position", "#fff2cc", 9)
        draw.box(axis, x, top + 0.55, 2.0, 0.42, "layer norm", draw.GRAY, 9)
        line(axis, (x, -0.65), (x, top + 0.3), linewidth=3)
    draw.box(axis, x, top + 1.45, 2.6, 0.62, "same embedding\nas output layer", "#fff2cc", 9)
    draw.arrow(axis, (x, top + 0.77), (x, top + 1.12))
    draw.arrow(axis, (x, top + 1.77), (x, top + 2.1))
    text(axis, x, top + 2.4, "logits of the next tokens\nb a c <eos>")
    # The encoder's output crosses the decoder's straight path by a bridge.
    memory, y = {"color": MEMORY, "linewidth": 2.2}, heights[1] - 0.1
    bridge = [(6.3 - 0.22 * math.cos(turn), y + 0.22 * math.sin(turn))
              for turn in torch.linspace(0, math.pi, 31).tolist()]
    line(axis, (0, 4.77), (0, 5.3), (4.4, 5.3), (4.4, y), *bridge, (6.85, y), **memory)
    draw.arrow(axis, (6.7, y), (6.98, y), color=MEMORY)
    text(axis, 2.2, 5.55, "encoder output, for keys and values", 9, color=MEMORY)
    text(axis, 0, -2.75, "ENCODER", 11, weight="bold")
    text(axis, 6.3, -2.75, "DECODER", 11, weight="bold")
    span(axis, -1.4, 9.2, -2.9, top + 2.7)
    draw.save(figure, "transformer_block")


# ---------------------------------------------------------------- Attention


def head():
    """The worked example of attention, step by step: two decoder steps look at c a b <eos>."""
    query = torch.tensor([[2.0, 0], [0, 2]])
    key = torch.tensor([[-2.0, 0], [0, 2], [2, 0], [0, -2]])
    value = torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0]])
    everything = torch.ones(2, 4, dtype=torch.bool)
    answer, weights = transformer.attention(query, key, value, everything)
    scores = query @ key.T
    steps, source = ["<bos>", "b"], ["c", "a", "b", "<eos>"]
    figure, axis = draw.new(8.3, 5.1)

    def table(x, y, title, values, color, rows, columns=(), form="{:g}"):
        """Numbers below the letters of their columns and beside those of their rows."""
        text(axis, x + len(values[0]) / 2, y + (0.8 if columns else 0.35), title)
        draw.grid(axis, x, y, values.tolist(), 1, color, 10 if form == "{:g}" else 8, form)
        for place, letter in enumerate(rows):
            text(axis, x - 0.15, y - place - 0.5, letter, 9, ha="right")
        for place, letter in enumerate(columns):
            text(axis, x + place + 0.5, y + 0.25, letter, 9)
    strongest = [["#93c47d" if weight > 0.5 else draw.GREEN for weight in row]
                 for row in weights.tolist()]
    table(0, 8.6, "queries $Q$", query, draw.BLUE, steps)
    table(0, 5.0, "keys $K$", key, draw.ORANGE, source)
    table(4.2, 8.6, "scores $QK^T$", scores, "white", steps, source)
    table(10.4, 8.6, "$QK^T/\\sqrt{2}$", scores / math.sqrt(2), "white", steps, source, "{:.3f}")
    table(10.4, 5.0, "weights (softmax)", weights, strongest, steps, source, "{:.4f}")
    table(5.2, 5.0, "values $V$", value, draw.RED, source)
    table(10.4, 1.8, "weights · $V$", answer, draw.GRAY, steps, form="{:.4f}")
    for place, letter in enumerate("ba"):
        text(axis, 12.6, 1.3 - place, f"near {letter}'s value", 9, ha="left")
    draw.arrow(axis, (2.1, 7.6), (3.1, 7.6))
    draw.arrow(axis, (2.1, 4.0), (3.6, 6.5))
    draw.arrow(axis, (8.3, 7.6), (9.3, 7.6))
    draw.arrow(axis, (12.4, 6.5), (12.4, 6.1))
    draw.arrow(axis, (11.4, 2.9), (11.4, 2.5))
    draw.arrow(axis, (7.3, 2.2), (9.05, 1.4))
    span(axis, -1.1, 14.8, -0.3, 9.7)
    draw.save(figure, "transformer_head")


def heads():
    """Three vectors of four numbers, split into two heads and joined again."""
    figure, axis = draw.new(8.3, 3.4)
    x = torch.arange(1, 13).view(3, 4)
    two = [[draw.BLUE] * 2 + [draw.ORANGE] * 2] * 3
    draw.grid(axis, 0, 1.5, x.tolist(), 0.6, two)
    text(axis, 1.2, 1.8, "$Q$, $K$ or $V$: (N, 3, 4)")
    for y, part, color in ((2.7, x[:, :2], draw.BLUE), (0.3, x[:, 2:], draw.ORANGE)):
        draw.grid(axis, 4.0, y, part.tolist(), 0.6, color)
        draw.arrow(axis, (2.5, 0.6), (3.9, y - 0.9))
        draw.arrow(axis, (5.3, y - 0.9), (6.1, y - 0.9))
        draw.box(axis, 7.1, y - 0.9, 1.9, 0.9, "attention", color)
        draw.arrow(axis, (8.1, y - 0.9), (9.5, 0.6))
    text(axis, 4.6, 3.0, "two heads: (N, 2, 3, 2)")
    draw.grid(axis, 9.6, 1.5, [["", "", "", ""]] * 3, 0.6, two)
    text(axis, 10.8, 1.8, "joined: (N, 3, 4)")
    draw.arrow(axis, (12.1, 0.6), (12.6, 0.6))
    draw.box(axis, 13.1, 0.6, 0.9, 0.9, "$W^O$", draw.GREEN)
    text(axis, 3.1, 1.9, "split", 9)
    text(axis, 9.0, 1.9, "join", 9)
    draw.save(figure, "transformer_heads")


def mask():
    """The causal mask of the decoder for the target b a c."""
    figure, axis = draw.new(8.3, 3.3)
    read, predicted = ["<bos>", "b", "a", "c"], ["b", "a", "c", "<eos>"]
    allowed = torch.ones(4, 4).tril().bool()
    colors = [[draw.BLUE if may else "white" for may in row] for row in allowed.tolist()]
    marks = [["✓" if may else "−∞" for may in row] for row in allowed.tolist()]
    draw.grid(axis, 0, 2.8, marks, 0.7, colors)
    for place in range(4):
        text(axis, 0.7 * place + 0.35, 3.0, read[place])
        text(axis, -0.15, 2.45 - 0.7 * place, read[place], ha="right")
        draw.arrow(axis, (2.95, 2.45 - 0.7 * place), (3.9, 2.45 - 0.7 * place))
        text(axis, 4.05, 2.45 - 0.7 * place, predicted[place], ha="left")
    text(axis, 1.4, 3.4, "keys: the positions to look at", 9)
    text(axis, -1.15, 1.4, "queries", 9, rotation=90)
    text(axis, 4.3, 3.0, "predicts", 9)
    span(axis, -1.3, 4.9, 0, 3.5)
    draw.save(figure, "transformer_mask")


# ---------------------------------------------------------------- Positions


def positions():
    """Four columns of the positional encoding, and the products of its rows."""
    table = transformer.sinusoidal_positions(41, 64)
    figure = Figure((8.3, 3.5), constrained_layout=True)
    left, right = figure.subplots(1, 2)
    for column, style in ((0, "-"), (1, "--"), (16, "-"), (17, "--")):
        left.plot(table[:, column], style, label=f"column {column}", linewidth=1.8,
                  color="tab:blue" if column < 2 else "tab:orange")
    left.set(xlabel="position t", ylabel="value", ylim=(-1.1, 1.75))
    left.legend(ncol=2, fontsize=9, loc="upper center")
    left.grid(alpha=0.3)
    picture = right.imshow(table @ table.T, cmap="Blues")
    right.set(xlabel="position s", ylabel="position t", title="$P_t · P_s$")
    figure.colorbar(picture, ax=right)
    figure.savefig(draw.FOLDER / "transformer_positions.png", dpi=100)


# ---------------------------------------------------------------- Decoding


def cache():
    """Keys and values in the decoder's cache while it writes b a c."""
    figure, axis = draw.new(8.3, 3.6)
    read, written = ["<bos>", "b", "a", "c"], ["b", "a", "c", "<eos>"]
    for step in range(4):
        y = 2.4 - 0.8 * step
        text(axis, -0.3, y, f"step {step + 1}: reads {read[step]}", ha="right")
        for place in range(4):
            color = (draw.BLUE if place < step else draw.ORANGE if place == step else draw.GRAY)
            words = f"$k_{place},\\ v_{place}$" if place <= step else ""
            draw.box(axis, 0.8 + 1.5 * place, y, 1.35, 0.6, words, color)
        draw.arrow(axis, (6.15, y), (6.9, y))
        text(axis, 7.0, y, f"writes {written[step]}", ha="left")
    for place in range(4):
        text(axis, 0.8 + 1.5 * place, 3.0, f"{place}: {read[place]}", 9)
    text(axis, -0.3, 3.0, "position", 9, ha="right")
    span(axis, -2.6, 8.5, -0.4, 3.2)
    draw.save(figure, "transformer_cache")


def beam():
    """The example of two tokens in which greedy decoding misses the more probable target."""
    figure, axis = draw.new(8.3, 3.6)
    draw.box(axis, 0, 0, 1.3, 0.7, "<bos>", draw.GRAY)
    for y, name, first, best, other, color in ((1.1, "A", 0.6, 0.5, 0.3, draw.RED),
                                               (-1.1, "B", 0.4, 0.9, 0.1, draw.GREEN)):
        draw.arrow(axis, (0.65, 0), (2.6, y))
        text(axis, 1.4, 0.75 * y, f"{first}", 11)
        draw.box(axis, 3.1, y, 1.0, 0.7, name, draw.BLUE)
        for up, token, chance in ((0.5, "C", best), (-0.5, "D", other)):
            kept = token == "C"
            draw.arrow(axis, (3.6, y), (5.6, y + up))
            text(axis, 4.6, y + 1.0 * up, f"{chance}", 11)
            draw.box(axis, 6.1, y + up, 1.0, 0.7, token, color if kept else "white")
            result = f"{first} · {chance} = {first * chance:.2f}"
            if kept:
                result += ("   greedy decoding" if name == "A" else
                           "   beam of two")
            text(axis, 6.8, y + up, result, 10, ha="left")
    span(axis, -0.7, 11.2, -2, 2)
    draw.save(figure, "transformer_beam")


def main():
    for function in (block, head, heads, mask, positions, cache, beam):
        function()
