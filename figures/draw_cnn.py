"""Draw the diagrams of cnn.md: python figures/draw.py cnn [BEST.PT IMAGE]

With the two files, a checkpoint of cnn.py and an image, it also draws what the trained model
computes from that image.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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


def channels():
    """Two output channels at one position: a kernel for every pair of channels, then a sum."""
    patches = torch.tensor([[[0, 0, 5]] * 3, [[1] * 3, [2] * 3, [3] * 3]])
    kernels = torch.tensor([[[[-1, 0, 1]] * 3, [[0, 0, 0], [0, -1, 0], [0, 0, 0]]],
                            [[[0, 0, 0], [0, 0, 1], [0, 0, 0]], [[-1] * 3, [0] * 3, [1] * 3]]])
    bias = torch.tensor([1, 0])
    output = F.conv2d(patches[None].float(), kernels.float(), bias.float()).flatten().int()
    figure, axis = draw.new(8.3, 4.4)
    tops = (4.0, 2.1)  # of the two input channels
    for m, top in enumerate(tops):
        draw.grid(axis, 0, top, patches[m].tolist())
        axis.text(-0.15, top - 0.75, f"$m={m + 1}$", fontsize=11, ha="right", va="center")
    title(axis, 0.75, 4.1, "window of $x$")
    for k, left in enumerate((2.3, 5.5)):
        color = (draw.ORANGE, draw.GREEN)[k]
        title(axis, left + 0.75, 4.1, f"kernels of output {k + 1}")
        for m, top in enumerate(tops):
            draw.grid(axis, left, top, kernels[k, m].tolist(), color=color)
            product = (patches[m] * kernels[k, m]).sum().item()
            draw.arrow(axis, (left + 1.55, top - 0.75), (left + 1.95, top - 0.75))
            axis.text(left + 2.3, top - 0.75, product, fontsize=12, ha="center", va="center")
        axis.text(left + 2.3, 2.3, "+", fontsize=12, ha="center", va="center")
        axis.text(left + 2.3, 0.7, f"+ {bias[k]} (bias)", fontsize=10, ha="center", va="center")
        draw.box(axis, left + 2.3, 0.15, 1.3, 0.5, f"$y_{k + 1}={output[k]}$", draw.BLUE, 12)
        draw.arrow(axis, (left + 2.3, 0.58), (left + 2.3, 0.41))
    axis.set(xlim=(-0.7, 8.5), ylim=(-0.2, 4.5))
    draw.save(figure, "cnn_channels")


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
    """The numbers of the worked example, which share one mean and one variance; another channel."""
    first = torch.tensor([[[1., 3], [3, 3]], [[8, 6], [4, 4]]])  # channel 1: (images, rows, columns)
    normalized = (first - first.mean()) / first.var(unbiased=False).sqrt()
    blank = [["", ""]] * 2
    figure, axis = draw.new(8.3, 3.1)
    for image in range(2):
        x = 2.1 * image
        title(axis, x + 0.6, 2.75, f"image {image + 1}")
        draw.grid(axis, x, 2.55, first[image].tolist(), 0.6, draw.ORANGE, form="{:.0f}")
        draw.grid(axis, x, 1.0, blank, 0.6, draw.BLUE)
        draw.grid(axis, 6 + 1.6 * image, 2.55, normalized[image].tolist(), 0.6, draw.ORANGE)
        title(axis, 6.6 + 1.6 * image, 2.75, f"image {image + 1}")
    for y, channel in ((2.55, 1), (1.0, 2)):
        frame(axis, -0.12, y + 0.08, 3.54, 1.36)
        axis.text(-0.3, y - 0.6, f"channel {channel}", fontsize=10, ha="right", va="center")
    draw.arrow(axis, (3.5, 1.95), (5.85, 1.95))
    axis.text(4.65, 2.05, "mean 4, variance 4", fontsize=10, ha="center", va="bottom")
    axis.text(3.6, 0.4, "has a mean and a variance of its own", fontsize=10, va="center")
    draw.save(figure, "cnn_batchnorm")


def receptive():
    """The pixels along one side that each of the four numbers of the last block depends on."""
    figure, axis = draw.new(8.3, 2.3)
    for pixel in range(-7, 39):
        color = "white" if 0 <= pixel < 32 else draw.GRAY
        axis.add_patch(Rectangle((pixel, 0), 1, 1, facecolor=color, edgecolor=draw.INK,
                                 linewidth=0.6))
    for number in range(4):
        first = last = number
        for _ in range(3):  # back through a pooling and a convolution
            first = 2 * first - 1
            last = 2 * last + 2
        inside = min(31, last) - max(0, first) + 1
        axis.add_patch(Rectangle((first, -2.4 * number - 2.7), last - first + 1, 1.7,
                                 facecolor=draw.BLUE, edgecolor=draw.INK, linewidth=0.7))
        axis.text((first + last + 1) / 2, -2.4 * number - 1.85,
                  f"value {number + 1}: {inside} pixels of the image", fontsize=10, ha="center",
                  va="center")
    title(axis, 16, 1.4, "one row of the image: 32 pixels (white), and padding (gray)")
    draw.save(figure, "cnn_receptive")


# ---------------------------------------------------------------- The model


def block(axis, x, size, sheets, color, text):
    """Feature maps as a stack of squares, more of them for more channels."""
    for sheet in reversed(range(sheets)):
        corner = (x + 0.07 * sheet, 0.07 * sheet - size / 2)
        axis.add_patch(Rectangle(corner, size, size, facecolor=color, edgecolor=draw.INK,
                                 linewidth=0.7))
    axis.text(x + size / 2, -size / 2 - 0.12, text, ha="center", va="top", fontsize=10)


def model():
    """The CNN, from the image to the logits, with sizes."""
    figure, axis = draw.new(8.3, 3.9)
    block(axis, 0, 1.6, 3, "white", "image\n3 × 32 × 32")
    block(axis, 3.0, 0.8, 5, draw.BLUE, "32 × 16 × 16")
    block(axis, 5.3, 0.4, 9, draw.BLUE, "64 × 8 × 8")
    block(axis, 7.5, 0.2, 17, draw.BLUE, "128 × 4 × 4")
    for start, end, name in ((1.85, 2.9, "block 1"), (4.2, 5.2, "block 2"), (6.4, 7.4, "block 3")):
        draw.arrow(axis, (start, 0), (end, 0))
        axis.text((start + end) / 2, 0.08, name, ha="center", va="bottom", fontsize=10)
    draw.box(axis, 1.7, -2.05, 3.4, 0.8, "one block: Conv2d 3 × 3,\n"
             "BatchNorm2d, ReLU, MaxPool2d 2 × 2", draw.ORANGE)
    draw.box(axis, 4.3, -2.05, 0.9, 0.8, "Flatten\n2048", draw.GRAY)
    draw.box(axis, 6.25, -2.05, 2.1, 0.8, "Linear, BatchNorm1d,\nReLU: 256 units", draw.GREEN)
    draw.box(axis, 8.3, -2.05, 1.1, 0.8, "Linear:\n10 logits", draw.GREEN)
    draw.arrow(axis, (7.6, -0.5), (4.3, -1.6))
    draw.arrow(axis, (4.77, -2.05), (5.18, -2.05))
    draw.arrow(axis, (7.32, -2.05), (7.73, -2.05))
    draw.save(figure, "cnn_model")


def residual():
    """A residual block: what its layers compute is added to its input."""
    figure, axis = draw.new(8.3, 1.9)
    draw.box(axis, 2.2, 0, 2.2, 0.7, "Conv2d 3 × 3,\nBatchNorm2d, ReLU", draw.ORANGE)
    draw.box(axis, 5.0, 0, 2.2, 0.7, "Conv2d 3 × 3,\nBatchNorm2d", draw.ORANGE)
    draw.box(axis, 7.0, 0, 0.5, 0.5, "+", draw.GRAY, size=14)
    draw.box(axis, 8.2, 0, 0.8, 0.5, "ReLU", draw.ORANGE)
    for start, end in ((0.35, 1.07), (3.32, 3.87), (6.12, 6.72), (7.27, 7.77), (8.62, 9.2)):
        draw.arrow(axis, (start, 0), (end, 0))
    axis.plot([0.7, 0.7, 7.0], [0, 0.85, 0.85], color=draw.INK, linewidth=1)
    draw.arrow(axis, (7.0, 0.85), (7.0, 0.27))
    axis.text(0.22, 0, "$x$", fontsize=12, ha="center", va="center")
    axis.text(6.4, 0.08, "$F(x)$", fontsize=10, ha="center", va="bottom")
    axis.text(3.6, 0.9, "skip connection: $x$ unchanged", fontsize=10, ha="center", va="bottom")
    axis.text(9.3, 0, "$y$", fontsize=12, ha="center", va="center")
    axis.set(xlim=(0, 9.5), ylim=(-0.5, 1.2))  # arrows beyond the limits are not drawn
    draw.save(figure, "cnn_residual")


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
        axis.axvline(15.5, color="white", linewidth=0.8, linestyle=":")
        axis.axhline(15.5, color="white", linewidth=0.8, linestyle=":")
    axes[1, 0].set_xlabel("original", fontsize=9)
    axes[1, 5].set_xlabel("as random_crop_flip() returns it", fontsize=9)
    draw.save(figure, "cnn_data")


def features(checkpoint, file, count=8):
    """An image, the kernels of the first layer, and feature maps of the image after each block."""
    trained, saved = cnn.load_model(Path(checkpoint), torch.device("cpu"))
    image = torch.from_numpy(common.read_image(file, saved["options"]["size"]))
    x = (image.permute(2, 0, 1)[None].float() - trained.mean) / trained.std
    kernels = trained.features[0][0].weight.detach().permute(0, 2, 3, 1)  # (32, 3, 3, 3)
    kernels = 0.5 + 0.5 * kernels / kernels.abs().amax((1, 2, 3), keepdim=True)
    figure, axes = images_in_rows(4, count + 1, 4.4)
    for row, conv_block in enumerate(trained.features, start=1):
        x = conv_block(x).detach()
        # The channels whose values vary most from place to place.
        channels = x[0].flatten(1).std(1).argsort(descending=True)[:count]
        if row == 1:
            for axis, kernel in zip(axes[0, 1:], kernels[channels]):
                axis.imshow(kernel)
        for axis, channel in zip(axes[row, 1:], channels):
            axis.imshow(x[0, channel], cmap="gray", vmin=0)
        axes[row, 0].axis("off")
        axes[row, 0].text(0.5, 0.5, f"block {row}:\n{count} of {x.shape[1]}\nmaps, each\n"
                          f"{x.shape[2]} × {x.shape[3]}", fontsize=10, ha="center", va="center",
                          transform=axes[row, 0].transAxes)
    axes[0, 0].imshow(image)
    axes[0, 0].set_title("image", fontsize=10)
    text = axes[0, 1].text(0, 1.1, "kernels of the first layer, each above its map", fontsize=10,
                           transform=axes[0, 1].transAxes)
    text.set_in_layout(False)  # wider than its column
    draw.save(figure, "cnn_features")


def main():
    window()
    channels()
    pooling()
    batch_norm()
    receptive()
    model()
    residual()
    data()
    if len(sys.argv) == 4 and sys.argv[2].endswith(".pt"):
        features(*sys.argv[2:])
