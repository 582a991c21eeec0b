"""Draw the diagrams of rnn.md: python figures/draw.py rnn"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Arc

import draw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rnn  # noqa: E402

STRONG = "#d62728"  # what the caption calls red
YELLOW = "#fff2cc"


def text(axis, x, y, words, size=10, color=draw.INK, align="center"):
    axis.text(x, y, words, fontsize=size, ha=align, va="center", color=color)


def line(axis, *points, width=1.2):
    axis.plot(*zip(*points), color=draw.INK, linewidth=width, zorder=1)


def operation(axis, x, y, sign):
    """An element-wise operation."""
    draw.box(axis, x, y, 0.36, 0.36, sign, YELLOW, size=12)


def gate(axis, x, function, name, color=draw.BLUE):
    """A layer of the input and the old state, with its name above."""
    draw.box(axis, x, 1.15, 0.62, 0.42, function, color)
    text(axis, x - 0.16, 1.62, name, 12)


# ---------------------------------------------------------------- Unrolling, and the two cells


def unrolled():
    """The plain network as a loop, and as one layer per step."""
    figure, axis = draw.new(8.3, 3.3)
    draw.box(axis, 0.6, 1.5, 0.9, 0.6, "tanh", draw.GREEN)
    draw.arrow(axis, (0.6, 0.55), (0.6, 1.2))
    text(axis, 0.6, 0.35, "$x_t$", 13)
    text(axis, 0.22, 0.85, "$W_{ih}$", 11)
    draw.arrow(axis, (0.6, 1.8), (0.6, 2.45))
    text(axis, 0.6, 2.65, "$h_t$", 13)
    line(axis, (0.6, 2.1), (1.4, 2.1), (1.4, 1.5))
    draw.arrow(axis, (1.4, 1.5), (1.05, 1.5))
    text(axis, 1.48, 1.75, "$W_{hh}$", 11, align="left")
    text(axis, 2.35, 1.5, "=", 20)
    places = (3.7, 5.1, 6.5, 7.9)
    text(axis, 2.75, 1.5, "$h_0$", 13)
    draw.arrow(axis, (2.92, 1.5), (3.25, 1.5))
    for step, x in enumerate(places, 1):
        draw.box(axis, x, 1.5, 0.9, 0.6, "tanh", draw.GREEN)
        draw.arrow(axis, (x, 0.55), (x, 1.2))
        text(axis, x, 0.35, f"$x_{step}$", 13)
        text(axis, x - 0.38, 0.85, "$W_{ih}$", 11)
        draw.arrow(axis, (x, 1.8), (x, 2.45))
        text(axis, x, 2.65, f"$h_{step}$", 13)
        if step < 4:
            draw.arrow(axis, (x + 0.45, 1.5), (x + 0.95, 1.5))
            text(axis, x + 0.7, 1.72, "$W_{hh}$", 11)
            draw.arrow(axis, (x + 0.95, 1.3), (x + 0.45, 1.3), color=STRONG, dashed=True)
    text(axis, 5.8, -0.05, "dashed: the gradient on its way back", 10, STRONG)
    axis.set(xlim=(-0.1, 8.6), ylim=(-0.2, 2.85))
    draw.save(figure, "rnn_unrolled")


def memory():
    """One unit that writes at X, keeps through noise, and shows at Y."""
    figure, axis = draw.new(8.3, 3.7)
    steps = (("X", "write", ("0.98", "0.98", "0.96", "0.02"), "0.947", "0.013"),
             ("a", "keep", ("0.02", "0.98", "0", "0.02"), "0.930", "0.013"),
             ("Y", "show", ("0.02", "0.98", "0", "0.98"), "0.913", "0.710"))
    line(axis, (0.6, 2.6), (7.9, 2.6), width=3)
    text(axis, 0.25, 2.6, "$c_0=0$", 13, align="right")
    for row, name in enumerate(("input gate i", "forget gate f", "candidate g", "output gate o")):
        text(axis, 0.25, 1.75 - 0.36 * row, name, 11, align="right")
    text(axis, 0.25, -0.15, "letter", 11, align="right")
    text(axis, 0.25, 3.4, "shown", 11, align="right")
    for (letter, what, values, cell, hidden), x in zip(steps, (1.8, 4.3, 6.8)):
        opened = [draw.BLUE if float(value) > 0.5 else "white" for value in values]
        opened[2] = draw.GREEN if values[2] != "0" else "white"
        for row, value in enumerate(values):
            draw.box(axis, x, 1.75 - 0.36 * row, 0.9, 0.3, value, opened[row])
        text(axis, x, -0.15, letter, 14)
        draw.arrow(axis, (x, 0.05), (x, 0.42))
        draw.box(axis, x, 2.6, 1.2, 0.42, f"c = {cell}", draw.ORANGE, 11)
        draw.arrow(axis, (x, 2.81), (x, 3.22))
        text(axis, x, 3.4, f"h = {hidden}", 12)
        text(axis, x + 0.45, 3.0, what, 12, STRONG)
    axis.set(xlim=(-1.3, 8.1), ylim=(-0.4, 3.6))
    draw.save(figure, "rnn_memory")


def lstm():
    figure, axis = draw.new(8.3, 4.1)
    draw.box(axis, 4.05, 2.0, 6.7, 3.8, color="#fafafa")
    # The cell state.
    line(axis, (0, 3.4), (7.9, 3.4), width=3)
    draw.arrow(axis, (7.6, 3.4), (8.1, 3.4))
    text(axis, -0.05, 3.4, "$c_{t-1}$", 13, align="right")
    text(axis, 8.15, 3.4, "$c_t$", 13, align="left")
    # What the gates read.
    line(axis, (0, 0.55), (5.4, 0.55))
    draw.arrow(axis, (1.0, -0.45), (1.0, 0.55))
    text(axis, -0.05, 0.55, "$h_{t-1}$", 13, align="right")
    text(axis, 1.0, -0.62, "$x_t$", 13)
    gates = ((1.8, "σ", "f", draw.BLUE), (3.0, "σ", "i", draw.BLUE), (4.2, "tanh", "g", draw.GREEN),
             (5.4, "σ", "o", draw.BLUE))
    for x, function, name, color in gates:
        draw.arrow(axis, (x, 0.55), (x, 0.94))
        gate(axis, x, function, name, color)
    draw.arrow(axis, (1.8, 1.36), (1.8, 3.22))  # forget
    line(axis, (3.0, 1.36), (3.0, 2.3))
    draw.arrow(axis, (3.0, 2.3), (3.42, 2.3))  # input gate times candidate
    line(axis, (4.2, 1.36), (4.2, 2.3))
    draw.arrow(axis, (4.2, 2.3), (3.78, 2.3))
    draw.arrow(axis, (3.6, 2.48), (3.6, 3.22))
    draw.arrow(axis, (6.4, 3.4), (6.4, 2.71))
    draw.box(axis, 6.4, 2.5, 0.62, 0.42, "tanh", draw.GREEN)
    draw.arrow(axis, (6.4, 2.29), (6.4, 1.83))
    line(axis, (5.4, 1.36), (5.4, 1.65))
    draw.arrow(axis, (5.4, 1.65), (6.22, 1.65))  # output gate
    line(axis, (6.4, 1.47), (6.4, 0.55))
    draw.arrow(axis, (6.4, 0.55), (8.1, 0.55))
    text(axis, 8.15, 0.55, "$h_t$", 13, align="left")
    for x, y, sign in ((1.8, 3.4, "×"), (3.6, 3.4, "+"), (3.6, 2.3, "×"), (6.4, 1.65, "×")):
        operation(axis, x, y, sign)
    for x, y, words in ((1.35, 2.6, "1 keep"), (3.15, 2.8, "2 write"), (5.8, 1.85, "3 show")):
        text(axis, x, y, words, 11, STRONG)
    text(axis, 5.15, 3.66, "cell state: only scaled and added to", 10, STRONG)
    legend(axis, -0.62)
    axis.set(xlim=(-0.65, 8.65), ylim=(-0.85, 4.0))
    draw.save(figure, "rnn_lstm")


def legend(axis, y):
    draw.box(axis, 2.2, y, 0.4, 0.3, color=draw.BLUE)
    text(axis, 2.5, y, "gate, 0 to 1", 9, align="left")
    draw.box(axis, 3.9, y, 0.4, 0.3, color=draw.GREEN)
    text(axis, 4.2, y, "content, -1 to 1", 9, align="left")
    draw.box(axis, 5.9, y, 0.4, 0.3, color=YELLOW)
    text(axis, 6.2, y, "element by element", 9, align="left")


def hop(axis, x, y):
    """A small arc where a line crosses another one without joining it."""
    axis.add_patch(Arc((x, y), 0.2, 0.2, theta1=0, theta2=180, color=draw.INK, linewidth=1.2))


def gru():
    figure, axis = draw.new(8.3, 3.9)
    draw.box(axis, 4.05, 1.95, 6.7, 3.7, color="#fafafa")
    line(axis, (0, 3.3), (7.9, 3.3), width=3)
    draw.arrow(axis, (7.6, 3.3), (8.1, 3.3))
    text(axis, -0.05, 3.3, "$h_{t-1}$", 13, align="right")
    text(axis, 8.15, 3.3, "$h_t$", 13, align="left")
    # What the gates read: the old state and the input.
    line(axis, (1.0, 3.3), (1.0, 0.6))
    line(axis, (1.0, 0.6), (3.6, 0.6))
    hop(axis, 3.7, 0.6)
    line(axis, (3.8, 0.6), (5.5, 0.6))
    for x, name in ((2.0, "r"), (5.5, "z")):
        draw.arrow(axis, (x, 0.6), (x, 0.94))
        gate(axis, x, "σ", name)
    # What the candidate reads directly: the input alone, on a line of its own.
    draw.arrow(axis, (1.5, -0.45), (1.5, 0.6))
    text(axis, 1.5, -0.62, "$x_t$", 13)
    line(axis, (1.5, 0.28), (3.7, 0.28))
    draw.arrow(axis, (3.7, 0.28), (3.7, 0.94))
    text(axis, 2.75, 0.43, "$x_t$ alone", 10)
    text(axis, 4.6, 0.75, "$h_{t-1}$ and $x_t$", 10)
    draw.box(axis, 3.7, 1.15, 0.62, 0.42, "tanh", draw.GREEN)
    text(axis, 3.54, 1.62, "n", 12)
    # The reset gate times the old state's part of the candidate.
    draw.arrow(axis, (2.0, 1.36), (2.0, 2.02))
    draw.arrow(axis, (1.0, 2.2), (1.82, 2.2))
    text(axis, 1.06, 2.5, "$W_{hn}h_{t-1}+b_{hn}$", 10, align="left")
    line(axis, (2.18, 2.2), (2.9, 2.2))
    line(axis, (2.9, 2.2), (2.9, 1.15))
    draw.arrow(axis, (2.9, 1.15), (3.39, 1.15))
    # Keep z of the old state, and take 1 - z of the candidate.
    line(axis, (3.7, 1.36), (3.7, 2.2))
    draw.arrow(axis, (3.7, 2.2), (4.42, 2.2))
    line(axis, (5.5, 1.36), (5.5, 2.2))
    draw.arrow(axis, (5.5, 2.2), (4.78, 2.2))
    text(axis, 5.15, 2.0, "1 - z", 10)
    line(axis, (5.5, 2.2), (5.5, 2.75), (4.7, 2.75))
    hop(axis, 4.6, 2.75)
    line(axis, (4.5, 2.75), (3.3, 2.75))
    draw.arrow(axis, (3.3, 2.75), (3.3, 3.12))
    draw.arrow(axis, (4.6, 2.38), (4.6, 3.12))
    for x, y, sign in ((2.0, 2.2, "×"), (4.6, 2.2, "×"), (3.3, 3.3, "×"), (4.6, 3.3, "+")):
        operation(axis, x, y, sign)
    for x, y, words in ((3.0, 2.95, "keep"), (4.9, 2.93, "write"), (2.42, 1.85, "reset")):
        text(axis, x, y, words, 11, STRONG)
    legend(axis, -0.62)
    axis.set(xlim=(-0.65, 8.65), ylim=(-0.85, 3.9))
    draw.save(figure, "rnn_gru")


# ---------------------------------------------------------------- Networks


def stacked():
    figure, axis = draw.new(8.3, 4.6)
    rows = ((0.9, "embedding", draw.GRAY), (1.9, "layer 1", draw.BLUE), (2.9, "layer 2", draw.BLUE))
    for y, name, color in rows:
        text(axis, -0.2, y, name, 11, align="right")
        for step, x in enumerate((0.8, 2.8, 4.8), 1):
            draw.box(axis, x, y, 1.1, 0.5, "vector" if color == draw.GRAY else "LSTM", color)
            if color == draw.BLUE:
                draw.arrow(axis, (x, y - 0.75), (x, y - 0.25), color=STRONG)
                if x < 4.8:
                    draw.arrow(axis, (x + 0.55, y), (x + 1.45, y))
                    index = f"^{{({name[-1]})}}_{step}"
                    text(axis, x + 1.0, y + 0.2, f"$h{index},c{index}$", 10)
    for letter, x in zip("aXb", (0.8, 2.8, 4.8)):
        text(axis, x, 0.1, letter, 12)
        draw.arrow(axis, (x, 0.25), (x, 0.65))
    draw.arrow(axis, (5.35, 2.9), (5.9, 2.9))
    text(axis, 5.6, 3.12, "$h^{(2)}_3$", 11)
    draw.box(axis, 6.5, 2.9, 1.2, 0.5, "batch norm", draw.ORANGE)
    draw.arrow(axis, (6.5, 3.15), (6.5, 3.65), color=STRONG)
    draw.box(axis, 6.5, 3.9, 1.2, 0.5, "linear", draw.GREEN)
    draw.arrow(axis, (7.1, 3.9), (7.5, 3.9))
    text(axis, 7.55, 3.9, "logits", 11, align="left")
    draw.arrow(axis, (0.4, 3.75), (0.4, 4.15), color=STRONG)
    text(axis, 0.55, 3.95, "dropout: up, never to the right", 11, STRONG, "left")
    axis.set(xlim=(-1.4, 8.2), ylim=(-0.1, 4.3))
    draw.save(figure, "rnn_stacked")


def padding():
    figure, axis = draw.new(8.3, 2.9)
    text(axis, 1.75, 1.85, "tokens", 11)
    text(axis, 5.75, 1.85, "states of the last layer", 11)
    for row, word in enumerate(("bXadY", "aXb", "Yc")):
        y = 1.4 - 0.6 * row
        text(axis, -0.15, y, f"length {len(word)}", 10, align="right")
        for step in range(5):
            valid, last = step < len(word), step == len(word) - 1
            draw.box(axis, 0.35 + 0.7 * step, y, 0.6, 0.45, word[step] if valid else "PAD",
                     draw.BLUE if valid else draw.GRAY, 12 if valid else 9)
            color = draw.ORANGE if last else draw.BLUE if valid else draw.GRAY
            draw.box(axis, 4.35 + 0.7 * step, y, 0.6, 0.45, f"$h_{step + 1}$", color, 12)
    for side in (0, 4):
        for step in range(5):
            text(axis, side + 0.35 + 0.7 * step, -0.25, str(step), 9)
    text(axis, -0.15, -0.25, "index", 9, align="right")
    text(axis, 5.75, -0.6, "orange: states[length - 1]", 10, STRONG)
    axis.set(xlim=(-1.0, 8.0), ylim=(-0.8, 2.05))
    draw.save(figure, "rnn_padding")


def decode(axis, y, name, fed, predicted):
    """Encoder and decoder over their steps; in `fed` and `predicted` a "!" marks an error."""
    text(axis, 3.6, y + 1.35, name, 11)
    for step, token in enumerate("312"):
        x = 0.3 + 0.9 * step
        draw.box(axis, x, y, 0.6, 0.5, color=draw.BLUE)
        text(axis, x, y - 0.75, token, 12)
        draw.arrow(axis, (x, y - 0.6), (x, y - 0.25))
        if step < 2:
            draw.arrow(axis, (x + 0.3, y), (x + 0.6, y))
    text(axis, 1.2, y + 0.45, "encoder", 10)
    draw.arrow(axis, (2.4, y), (3.3, y))
    text(axis, 2.8, y + 0.15, "state", 9)
    for step, (token, answer) in enumerate(zip(fed, predicted)):
        x = 3.65 + 1.2 * step
        draw.box(axis, x, y, 0.7, 0.5, color=draw.GRAY if "END!" in fed[:step + 1] else draw.GREEN)
        text(axis, x, y - 0.75, token.strip("!"), 12, STRONG if "!" in token else draw.INK)
        draw.arrow(axis, (x, y - 0.6), (x, y - 0.25))
        draw.arrow(axis, (x, y + 0.25), (x, y + 0.6))
        text(axis, x, y + 0.8, answer.strip("!"), 12, STRONG if "!" in answer else draw.INK)
        if step < len(fed) - 1:
            draw.arrow(axis, (x + 0.35, y), (x + 0.85, y))
    text(axis, 7.75, y + 0.8, "predicted", 9, align="left")
    text(axis, 7.75, y - 0.75, "read", 9, align="left")


def seq2seq():
    figure, axis = draw.new(8.3, 5.2)
    decode(axis, 3.0, "teacher forcing: reads END and the true answer 1 2 3",
           ("END", "1", "2", "3"), ("1", "3!", "3", "END"))
    decode(axis, 0.0, "free running: reads END and its own predictions",
           ("END", "1", "3!", "END!"), ("1", "3!", "END!", "END"))
    for step in range(3):  # a prediction is the next input
        x = 3.65 + 1.2 * step
        draw.arrow(axis, (x + 0.15, 0.68), (x + 1.0, -0.65), color="#999999", dashed=True)
    axis.plot((6.62, 6.62), (1.0, -0.85), ":", color=STRONG)
    text(axis, 6.75, 1.15, "decoding stops here", 10, STRONG)
    axis.set(xlim=(-0.3, 8.6), ylim=(-1.0, 4.65))
    draw.save(figure, "rnn_seq2seq")


# ---------------------------------------------------------------- Gates held open


def held_open():
    """The gradients of untrained networks, with the bias that holds a gate open and without it."""
    torch.manual_seed(0)
    inputs = torch.randint(3, 9, (30, 100))
    targets = torch.randint(0, 8, (30, 1))
    batch = rnn.SequenceSet(inputs, torch.full((30,), 100), targets)
    figure = Figure((8.3, 3.6), constrained_layout=True)
    axis = figure.subplots()
    for cell, chrono, style, width, name in (
            ("lstm", 100, "C0-", 3.5, "LSTM, gates held open (default)"),
            ("gru", 100, "C1-", 1.5, "GRU, gates held open (default)"),
            ("lstm", 1, "C0--", 3.5, "LSTM, --chrono-max 1"),
            ("gru", 1, "C1--", 1.5, "GRU, --chrono-max 1"),
            ("rnn", 1, "C2:", 2, "plain RNN")):
        torch.manual_seed(0)
        model = rnn.RNNClassifier(9, 8, cell=cell, backend="scratch", chrono_max=chrono)
        norms = rnn.gradient_norms(model.double().eval(), batch)
        axis.plot(range(1, 100), norms, style, linewidth=width, label=name)
    axis.set(xlabel="steps before the end", ylabel="gradient norm / that at the end", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    draw.save(figure, "rnn_open")


def main():
    unrolled()
    lstm()
    memory()
    gru()
    stacked()
    padding()
    seq2seq()
    held_open()


if __name__ == "__main__":
    main()
