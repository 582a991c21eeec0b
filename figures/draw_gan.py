"""Draw the diagrams of gan.md: python figures/draw.py gan [IMAGES]

With a run's folder of images, it also cuts the strip of samples over the epochs from them.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn

import draw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan  # noqa: E402

BACKWARD = "#d62728"  # the gradient


def text(axis, x, y, words, size=10, align="center", color=draw.INK):
    axis.text(x, y, words, fontsize=size, ha=align, va="center", color=color)


def plots(columns, height):
    """A figure of 830 pixels for plots, and its axes."""
    figure = Figure((8.3, height), constrained_layout=True)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes


# ---------------------------------------------------------------- The two networks


def stack(axis, x, size, sheets, color, words):
    """Feature maps as a stack of squares about the height 0, more of them for more channels."""
    for sheet in reversed(range(sheets)):
        corner = (x + 0.05 * sheet, 0.05 * sheet - size / 2)
        axis.add_patch(Rectangle(corner, size, size, facecolor=color, edgecolor=draw.INK,
                                 linewidth=0.7))
    text(axis, x + size / 2, -0.85, words)


def model():
    """From a latent vector to an image, and from an image to a logit."""
    figure, axis = draw.new(8.3, 2.3)
    draw.box(axis, 0.1, 0, 0.5, 0.4, "z", draw.GRAY)
    text(axis, 0.1, -0.85, "latent\n32")
    stack(axis, 1.0, 0.14, 9, draw.BLUE, "256 ×\n3 × 3")
    stack(axis, 2.1, 0.28, 6, draw.BLUE, "128 ×\n7 × 7")
    stack(axis, 3.2, 0.5, 3, draw.BLUE, "64 ×\n14 × 14")
    stack(axis, 4.45, 1.0, 1, "white", "image\n1 × 28 × 28")
    stack(axis, 6.2, 0.5, 3, draw.ORANGE, "64 ×\n14 × 14")
    stack(axis, 7.4, 0.28, 6, draw.ORANGE, "128 ×\n7 × 7")
    stack(axis, 8.6, 0.14, 9, draw.ORANGE, "256 ×\n3 × 3")
    draw.box(axis, 9.85, 0, 0.65, 0.4, "logit", draw.GRAY)
    text(axis, 9.85, -0.85, "1")
    for start, end in ((0.4, 0.95), (1.6, 2.05), (2.7, 3.15), (3.85, 4.4), (5.5, 6.15),
                       (6.85, 7.35), (8.0, 8.55), (9.2, 9.5)):
        draw.arrow(axis, (start, 0), (end, 0))
    text(axis, 2.4, 0.85, "generator: the side grows", 11)
    text(axis, 7.9, 0.85, "discriminator: the side shrinks", 11)
    draw.save(figure, "gan_model")


def steps():
    """The two halves of a training step: values forward, gradients backward."""
    figure, axis = draw.new(8.3, 4.3)
    for y, title in ((2.7, "(1) discriminator step"), (0.0, "(2) generator step")):
        text(axis, -0.25, y + 1.15, title, 11, "left")
        draw.box(axis, 0, y, 0.5, 0.5, "z", draw.GRAY)
        draw.box(axis, 1.7, y, 1.3, 0.7, "generator", draw.BLUE)
        draw.box(axis, 4.0, y, 0.9, 0.5, "fake", "white")
        for start, end in ((0.3, 1.0), (2.4, 3.5), (6.92, 7.75)):
            draw.arrow(axis, (start, y + 0.12), (end, y + 0.12))
    draw.arrow(axis, (4.5, 0.12), (5.5, 0.12))
    draw.box(axis, 6.2, 0, 1.4, 0.9, "", draw.GRAY)
    text(axis, 6.2, 0.1, "discriminator\n(fixed)", 9)
    # The last gradient passes through the discriminator.
    for start, end in ((7.75, 6.92), (6.9, 5.5), (5.5, 4.5), (3.5, 2.4)):
        draw.arrow(axis, (start, -0.22), (end, -0.22), color=BACKWARD, dashed=True)
    draw.box(axis, 8.65, 0, 1.7, 0.8, "loss_g\n−log D(G(z))", draw.RED, 9)
    text(axis, 2.0, -0.62, "its weights change", 9, color=BACKWARD)
    # The first step: real images too, and no gradient past fake.detach().
    draw.box(axis, 4.0, 3.65, 0.9, 0.5, "real", "white")
    draw.arrow(axis, (4.5, 3.65), (5.5, 3.1))
    draw.arrow(axis, (4.5, 2.82), (5.5, 2.82))
    draw.box(axis, 6.2, 2.8, 1.4, 0.9, "discriminator", draw.ORANGE, 9)
    draw.box(axis, 8.65, 2.7, 1.7, 1.0, "loss_d\n−log D(x)\n−log(1 − D(G(z)))", draw.RED, 9)
    draw.arrow(axis, (7.75, 2.55), (6.92, 2.55), color=BACKWARD, dashed=True)
    draw.arrow(axis, (5.5, 2.55), (4.85, 2.55), color=BACKWARD, dashed=True)
    axis.plot([4.78, 4.78], [2.3, 2.72], color=BACKWARD, linewidth=3)
    text(axis, 4.8, 2.08, "fake.detach(): the gradient stops", 9, color=BACKWARD)
    text(axis, 6.4, 3.48, "its weights change", 9, "left", BACKWARD)
    draw.save(figure, "gan_steps")


# ---------------------------------------------------------------- Transposed convolution


def transposed():
    """Three patches in one dimension, and their sum."""
    kernel, inputs = (1, 2, 3, 4), (10, 20, 30)
    colors = (draw.BLUE, draw.ORANGE, draw.GREEN)
    total = [0] * 8
    figure, axis = draw.new(8.3, 4.0)
    cell = 0.62
    for row, (value, color) in enumerate(zip(inputs, colors)):
        patch = [weight * value for weight in kernel]
        y = 2.6 - 0.72 * row
        draw.grid(axis, 2 * row * cell, y, [patch], cell, color)
        text(axis, -0.2, y - cell / 2, f"{value} × (1, 2, 3, 4)", align="right")
        for place, number in enumerate(patch):
            total[2 * row + place] += number
    face = [draw.GRAY] + 6 * ["white"] + [draw.RED]
    draw.grid(axis, 0, 0.2, [total], cell, [face])
    text(axis, -0.2, 0.2 - cell / 2, "sum", align="right")
    text(axis, cell / 2, -0.65, "cut off\n(padding 1)", 9)
    text(axis, 4 * cell, -0.65, "output for 3 inputs: 6 numbers", 10)
    text(axis, 7.5 * cell, -0.65, "the 7th: only with\noutput_padding = 1", 9, color=BACKWARD)
    draw.save(figure, "gan_transposed")


def sizes():
    """A convolution with kernel 4, stride 2 and padding 1 turns both 6 and 7 numbers into 3."""
    colors = (draw.BLUE, draw.ORANGE, draw.GREEN)
    figure, axis = draw.new(8.3, 2.5)
    cell = 0.42
    for count, x in ((6, 0), (7, 4.7)):
        padded = [["0", *(f"$x_{i}$" for i in range(1, count + 1)), "0"]]
        face = [[draw.GRAY] + count * ["white"] + [draw.GRAY]]
        draw.grid(axis, x, 1.6, padded, cell, face)
        for window, color in enumerate(colors):
            left = x + 2 * window * cell
            y = 1.02 - 0.2 * window
            axis.add_patch(Rectangle((left + 0.03, y - 0.12), 4 * cell - 0.06, 0.12,
                                     facecolor=color, edgecolor=draw.INK, linewidth=0.7))
        start = x + (count + 2) * cell / 2 - 1.5 * cell
        draw.grid(axis, start, 0.2, [["$y_1$", "$y_2$", "$y_3$"]], cell, [colors])
        text(axis, x + (count + 2) * cell / 2, 1.85, f"{count} inputs", 11)
    text(axis, 4.7 + 8.5 * cell, 0.85, "not\nreached", 9, color=BACKWARD)
    draw.save(figure, "gan_sizes")


def checkerboard():
    """How many patches reach each output, for kernels of 3 and of 4, in both dimensions."""
    figure, axis = draw.new(8.3, 3.2)
    for x, kernel, row in ((0, 3, [1, 2, 1, 2, 1, 2]), (4.4, 4, [2, 2, 2, 2, 2, 2])):
        counts = [[a * b for b in row] for a in row]
        face = {1: "white", 2: draw.BLUE, 4: "#6fa8dc"}
        draw.grid(axis, x, 0, counts, 0.42, [[face[n] for n in line] for line in counts])
        text(axis, x + 1.26, 0.25, f"kernel {kernel}, stride 2", 11)
    draw.save(figure, "gan_checkerboard")


# ---------------------------------------------------------------- The game


def best_discriminator():
    """Two densities, and the best answer of a discriminator to each point."""
    x = torch.linspace(-4, 6, 400)
    normal = torch.distributions.Normal
    real = normal(0, 1).log_prob(x).exp()
    fake = normal(2, 1).log_prob(x).exp()
    figure, (left, right) = plots(2, 3.0)
    for axis in (left, right):
        axis.axvline(0, color="0.6", linewidth=1, linestyle=":")
        axis.axvline(1, color="0.6", linewidth=1, linestyle=":")
        axis.grid(alpha=0.3)
        axis.set_xlabel("x")
    left.fill_between(x, real, alpha=0.3)
    left.fill_between(x, fake, alpha=0.3)
    left.plot(x, real, label="p, real")
    left.plot(x, fake, "--", label="q, generated")
    left.set(ylabel="density", ylim=(0, 0.55))
    left.legend(frameon=False, ncol=2)
    right.plot(x, real / (real + fake), color="black", label="p / (p + q)")
    right.plot([0, 1], [0.8808, 0.5], "o", color=BACKWARD)
    right.annotate("0.88", (0.15, 0.9), color=BACKWARD)
    right.annotate("0.5 where p = q", (1.2, 0.49), color=BACKWARD)
    right.set_ylabel("best D(x)")
    draw.save(figure, "gan_best_discriminator")


def losses():
    """The two losses of a generator, and the gradients that they give."""
    logits = torch.linspace(-6, 6, 200, requires_grad=True)
    figure, (left, right) = plots(2, 3.2)
    for name, style, values in (
            ("non-saturating, −log D", "-", F.softplus(-logits)),
            ("minimax, log(1 − D)", "--", -F.softplus(logits))):
        gradient, = torch.autograd.grad(values.sum(), logits)
        left.plot(logits.detach(), values.detach(), style, label=name)
        right.plot(logits.detach(), gradient.abs(), style, label=name)
    left.set(xlabel="logit of a generated image", ylabel="loss")
    right.set(xlabel="logit of a generated image", ylabel="size of the gradient")
    for axis in (left, right):
        axis.axvspan(-6, -2, color="0.92", zorder=0)
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    right.text(-4, 0.5, "judged\ngenerated", ha="center", va="center")
    draw.save(figure, "gan_losses")


def ring(count):
    """Eight groups of points around the origin, which stand for real images."""
    angle = torch.randint(8, (count,)) * math.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(count, 2)


def play(lr=0.001, beta1=0.5, r1=0.0):
    """Play 1,500 steps with the losses of gan.py. Return 500 generated points and the fraction of
    points that the discriminator told apart in the last 300 steps.

    lr is the generator's learning rate; the discriminator's is 0.001.
    """
    def network(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                             nn.Linear(64, outputs))
    torch.manual_seed(0)
    generator, discriminator = network(8, 2), network(2, 1)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr, (beta1, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 0.001, (beta1, 0.999))
    right = []
    for _ in range(1500):
        real = ring(128).requires_grad_()
        fake = generator(torch.randn(128, 8)).detach()
        real_logits, fake_logits = discriminator(real), discriminator(fake)
        loss = gan.discriminator_loss(real_logits, fake_logits)
        if r1:
            gradient, = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
            loss = loss + r1 / 2 * gradient.pow(2).sum(1).mean()
        optimizer_d.zero_grad()
        loss.backward()
        optimizer_d.step()
        right.append(torch.cat([real_logits > 0, fake_logits < 0]).float().mean().item())
        loss = gan.generator_loss(discriminator(generator(torch.randn(128, 8))))
        optimizer_g.zero_grad()
        loss.backward()
        optimizer_g.step()
    with torch.no_grad():
        return generator(torch.randn(500, 8)), sum(right[-300:]) / 300


def modes():
    """Games with points instead of images: a good generator, mode collapse, a lost game."""
    games = {"good": {"r1": 0.2}, "mode collapse": {"beta1": 0.9}, "lost game": {"lr": 3e-6}}
    figure, axes = plots(3, 3.3)
    for axis, (title, options) in zip(axes, games.items()):
        fake, told_apart = play(**options)
        torch.manual_seed(9)
        real = ring(500)
        metrics = gan.density_coverage(real, fake)
        metrics["frechet"] = gan.frechet_distance(real, fake)
        metrics["told_apart"] = told_apart
        print(title, metrics)
        axis.plot(*real.T, ".", markersize=3, color="0.65", label="real")
        axis.plot(*fake.T, ".", markersize=2, color="#d95f02", label="generated")
        axis.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal",
                 anchor="S")
        axis.set_title("{}\ndensity {density:.2f}, coverage {coverage:.2f},\nFréchet distance "
                       "{frechet:.3f}, told apart {told_apart:.0%}".format(title, **metrics),
                       fontsize=9)
    axes[0].legend(loc="upper center", ncol=2, markerscale=4, fontsize=10, frameon=False)
    draw.save(figure, "gan_modes")


# ---------------------------------------------------------------- A run


def strip(folder, epochs=(1, 2, 5, 10, 20, 30)):
    """The first eight samples of some epochs, a row each: a column is one latent vector."""
    paths = {epoch: Path(folder, f"epoch_{epoch:03}.png") for epoch in epochs}
    found = [(epoch, path) for epoch, path in paths.items() if path.exists()]
    figure = Figure((8.3, 0.95 * len(found)), constrained_layout=True)
    axes = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axis, (epoch, path) in zip(axes, found):
        grid = Image.open(path)
        axis.imshow(grid.crop((0, 0, grid.width, grid.width // 8 + 2)))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(f"epoch {epoch}", rotation=0, ha="right", va="center", fontsize=10)
        axis.set_frame_on(False)
    draw.save(figure, "gan_epochs")


def main():
    model()
    steps()
    transposed()
    sizes()
    checkerboard()
    best_discriminator()
    losses()
    modes()
    for folder in sys.argv[1:]:
        if Path(folder, "epoch_001.png").exists():
            strip(folder)


if __name__ == "__main__":
    main()
