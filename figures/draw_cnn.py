"""Draw the diagrams of cnn.md: python figures/draw.py cnn [BEST.PT IMAGE]

With the two files, a checkpoint of cnn.py and an image, it also draws what the trained model
computes from that image.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

import draw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cnn  # noqa: E402
import common  # noqa: E402


def frame(axis, x, y, width, height, color="#d62728"):
    """A thick frame about part of a grid, its upper left corner at (x, y)."""
    axis.add_patch(Rectangle((x, y - height), width, height, fill=False, edgecolor=color,
                             linewidth=3))


def title(axis, x, y, text):
    axis.text(x, y, text, ha="center", va="bottom", fontsize=10, color=draw.INK)


def images_in_rows(rows, columns, height):
    """A figure for pictures, and its axes (rows, columns), without ticks."""
    figure = Figure((8.3, height), constrained_layout=True)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


# ---------------------------------------------------------------- Worked examples


def window():
    """The convolution worked out by hand: the input with its padding, the kernel, the output."""
    image = torch.tensor([[0, 0, 5, 5]] * 4)
    kernel = torch.tensor([[-1, 0, 1]] * 3)
    output = F.conv2d(image[None, None].float(), kernel[None, None].float(), padding=1)[0, 0]
    padded = F.pad(image, (1, 1, 1, 1))
    colors = [["white" if 0 < row < 5 and 0 < column < 5 else draw.GRAY for column in range(6)]
              for row in range(6)]
    figure, axis = draw.new(8.3, 3.4)
    draw.grid(axis, 0, 3, padded.tolist(), color=colors)
    draw.grid(axis, 4, 2.25, kernel.tolist(), color=draw.ORANGE)
    draw.grid(axis, 6.5, 2.5, output.int().tolist(), color=draw.BLUE)
    windows = [(0, 0, "#d62728"), (1, 1, "#2ca02c")]
    for row, column, color in windows:
        frame(axis, 0.5 * column, 3 - 0.5 * row, 1.5, 1.5, color)
        frame(axis, 6.5 + 0.5 * column, 2.5 - 0.5 * row, 0.5, 0.5, color)
    title(axis, 1.5, 3.08, "input $x$ (white), zero padding (gray)")
    title(axis, 4.75, 3.08, "kernel $w$")
    title(axis, 7.5, 3.08, "output $y$")
    axis.text(3.5, 1.5, "*", fontsize=20, ha="center", va="center")
    axis.text(6, 1.5, "=", fontsize=20, ha="center", va="center")
    draw.save(figure, "cnn_window")


def pooling():
    """Max pooling forward, and the way of the gradient back to the largest of each four."""
    values = torch.tensor([[1., 3, 0, 2], [4, 2, 1, 0], [0, 1, 5, 2], [2, 0, 3, 1]],
                          requires_grad=True)
    pooled = F.max_pool2d(values[None], 2)[0]
    gradient = torch.tensor([[1., -2], [3, 7]])
    pooled.backward(gradient)
    squares = [draw.BLUE, draw.ORANGE, draw.GREEN, draw.RED]
    small = [squares[:2], squares[2:]]
    large = [[small[row // 2][column // 2] for column in range(4)] for row in range(4)]
    returned = [[color if value else "white" for color, value in zip(colors, row)]
                for colors, row in zip(large, values.grad.tolist())]
    figure, axis = draw.new(8.3, 2.8)
    draw.grid(axis, 0, 2, values.int().tolist(), color=large)
    draw.grid(axis, 2.7, 1.5, pooled.int().tolist(), color=small)
    draw.grid(axis, 4.6, 1.5, gradient.int().tolist(), color=small)
    draw.grid(axis, 6.3, 2, values.grad.int().tolist(), color=returned)
    draw.arrow(axis, (2.05, 1), (2.65, 1))
    draw.arrow(axis, (5.65, 1), (6.25, 1))
    for x, text in ((1, "input"), (3.2, "output"), (5.1, "gradient at\nthe output"),
                    (7.3, "gradient at the input")):
        title(axis, x, 2.08, text)
    draw.save(figure, "cnn_pooling")


def batch_norm():
    """Which numbers share a mean: those of one channel, in all images, at all positions."""
    figure, axis = draw.new(8.3, 3.5)
    colors = [draw.ORANGE, draw.BLUE, draw.GREEN]
    blank = [[""] * 3] * 3
    for image in range(4):
        for channel in (2, 1, 0):
            x, y = 2 * image + 0.22 * channel, 3 - 0.55 * channel
            draw.grid(axis, x, y, blank, 0.45, colors[channel])
        title(axis, 2 * image + 0.75, 3.1, f"image {image + 1}")
    for channel, color in enumerate(("#b45f06", "#1f77b4", "#2ca02c")):
        y = 2.8 - 0.55 * channel - 0.9 * (channel > 0)
        axis.text(8.1, y, f"channel {channel + 1}: one mean,\none variance, one $\\gamma$ and $\\beta$",
                  fontsize=9, va="center", color=color)
    draw.save(figure, "cnn_batchnorm")


# ---------------------------------------------------------------- The model


def cuboid(axis, x, size, depth, color, text):
    """Feature maps as a block: its front is their size, its depth the number of channels."""
    low, high, slope = -size / 2, size / 2, 0.6 * depth
    corners = [[(x, low), (x + depth, low + slope), (x + depth, high + slope), (x, high)],
               [(x, high), (x + depth, high + slope), (x + depth + size / 2, high + slope),
                (x + size / 2, high)],
               [(x, low), (x + size / 2, low), (x + size / 2, high), (x, high)]]
    for points in corners:
        axis.add_patch(Polygon(points, facecolor=color, edgecolor=draw.INK))
    axis.text(x + size / 4, -1.35, text, ha="center", va="top", fontsize=9, color=draw.INK)


def model():
    """The CNN, from the image to the logits."""
    figure, axis = draw.new(8.3, 3.6)
    cuboid(axis, 0, 2, 0.1, "white", "image\n3 x 32 x 32")
    for x, size, depth, text in ((2.6, 1, 0.3, "32 x 16 x 16"), (4.8, 0.5, 0.6, "64 x 8 x 8"),
                                 (6.8, 0.25, 1.2, "128 x 4 x 4")):
        cuboid(axis, x, size, depth, draw.BLUE, text)
    draw.save(figure, "cnn_model")


# ---------------------------------------------------------------- Data and a trained model


def data():
    """A synthetic image of each class, and one image as random_crop_flip() returns it."""
    torch.manual_seed(1)
    shapes = cnn.synthetic_shapes(200, size=32, seed=1)
    figure, axes = images_in_rows(2, 10, 2.4)
    for label, (name, axis) in enumerate(zip(cnn.SHAPES, axes[0])):
        axis.imshow(shapes.images[shapes.labels == label][0])
        axis.set_title(name.replace(" star", "\nstar"), fontsize=9)
    one = int((shapes.labels == 8).nonzero()[0])
    crops = cnn.random_crop_flip(shapes.images, torch.tensor([one] * 9), 3, flip=True)
    for axis, image in zip(axes[1], [shapes.images[one], *crops]):
        axis.imshow(image)
    axes[1, 0].set_xlabel("original", fontsize=9)
    axes[1, 5].set_xlabel("as random_crop_flip() returns it", fontsize=9)
    draw.save(figure, "cnn_data")


def kernels_and_features(checkpoint, image):
    """The kernels of the first layer, and feature maps of an image after each block."""
    trained, _ = cnn.load_model(Path(checkpoint), torch.device("cpu"))
    trained.eval()
    size = trained.classifier[1].in_features // trained.features[2][0].out_channels
    pixels = torch.from_numpy(common.read_image(image, 8 * round(size**0.5), 3))
    x = (pixels.permute(2, 0, 1)[None].float() - trained.mean) / trained.std
    kernels = trained.features[0][0].weight.detach().permute(0, 2, 3, 1)
    # The channels that vary most from place to place, which show most.
    first = torch.relu(trained.features[0][1](trained.features[0][0](x)))[0]
    channels = first.std((1, 2)).argsort(descending=True)[:8]
    figure, axes = images_in_rows(5, 9, 5.4)
    return figure, axes, x, pixels, kernels, channels


def main():
    window()
    pooling()
    batch_norm()
    model()
    data()
    if len(sys.argv) == 4 and sys.argv[2].endswith(".pt"):
        kernels_and_features(*sys.argv[2:])
