"""Train a convolutional network to classify colour images (CIFAR-10 by default).

  python cnn.py                    CIFAR-10, or synthetic shapes without it
  python cnn.py --data my_photos   your own images: my_photos/<class>/*.jpg
  python cnn.py --predict cat.jpg  classify files with the trained network

Pictures and checkpoints go to runs/cnn (--out). cnn.md explains every part.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

SIZE = 32  # images are SIZE x SIZE pixels

# ---------------------------------------------------------------- Data


class Part(NamedTuple):
    """One part of a data set, whole in memory: the training, validation or test part."""

    images: Tensor  # uint8 (N, 32, 32, 3)
    labels: Tensor  # int64 (N,)


class Dataset(NamedTuple):
    name: str  # the data really used, as every log and picture calls it
    classes: list
    train: Part
    validation: Part
    test: Part


def box(u: Tensor, v: Tensor, half_width: float, half_height: float, centre: float = 0.0) -> Tensor:
    return torch.min(half_width - (u - centre).abs(), half_height - v.abs())


def star(u: Tensor, v: Tensor, points: int, inner: float) -> Tensor:
    """A star of `points` tips on the unit circle; its notches lie at radius `inner`."""
    radius, half = (u**2 + v**2).sqrt(), math.pi / points
    angle = (torch.remainder(torch.atan2(v, u) + half, 2 * half) - half).abs()  # fold to one edge
    edge_x, edge_y = inner * math.cos(half) - 1, inner * math.sin(half)
    inside = edge_y * (1 - radius * angle.cos()) + edge_x * radius * angle.sin()
    return inside / math.hypot(edge_x, edge_y)


# Signed distance to the outline, positive inside, at coordinates where the shape's radius is 1.
SHAPES = {
    "disc": lambda u, v: 1 - (u**2 + v**2).sqrt(),
    "ring": lambda u, v: 0.25 - ((u**2 + v**2).sqrt() - 0.75).abs(),
    "half-disc": lambda u, v: torch.min(1 - (u**2 + v**2).sqrt(), v + 0.1),
    "crescent": lambda u, v: torch.min(1 - (u**2 + v**2).sqrt(),
                                       ((u - 0.5)**2 + v**2).sqrt() - 0.8),
    "triangle": lambda u, v: star(u, v, 3, 0.5),
    "square": lambda u, v: box(u, v, 0.75, 0.75),
    "star": lambda u, v: star(u, v, 5, 0.45),
    "cross": lambda u, v: torch.max(box(u, v, 1, 0.28), box(u, v, 0.28, 1)),
    "bar": lambda u, v: box(u, v, 1, 0.25),
    "arrow": lambda u, v: torch.max(box(u, v, 0.55, 0.2, centre=-0.45),
                                    torch.min(0.9 * (1 - u) - v.abs(), u)),
}


def synthetic_shapes(count: int, seed: int) -> Part:
    """Draw `count` images of the ten SHAPES at random place, size, rotation, colours and noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(shape, generator=generator) * (high - low) + low
    pixels = torch.arange(SIZE) - (SIZE - 1) / 2
    images = []
    for i, distance in enumerate(SHAPES.values()):
        n = (count + i) // len(SHAPES)
        x = pixels - uniform(-6, 6, n, 1, 1)  # (n, 1, 32)
        y = pixels[:, None] - uniform(-6, 6, n, 1, 1)  # (n, 32, 1)
        radius, angle = uniform(6, 12, n, 1, 1), uniform(0, 2 * math.pi, n, 1, 1)
        u = (x * angle.cos() + y * angle.sin()) / radius
        v = (y * angle.cos() - x * angle.sin()) / radius
        mask = (distance(u, v) * radius + 0.5).clamp(0, 1)[..., None]  # (n, 32, 32, 1)
        corners = uniform(0, 0.6, n, 3, 3, 3)  # a dark background that changes over the image
        background = F.interpolate(corners, size=SIZE, mode="bilinear", align_corners=True)
        background = background.permute(0, 2, 3, 1)
        colour = uniform(0.4, 1, n, 1, 1, 3)
        noise = torch.randn(background.shape, generator=generator)
        noise *= uniform(0.02, 0.2, n, 1, 1, 1)
        # In place: of many images, each of these is half a gigabyte.
        image = (colour - background).mul_(mask).add_(background).add_(noise)
        images.append(image.clamp_(0, 1).mul_(255).byte())
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(images)])
    order = torch.randperm(count, generator=generator)
    return Part(torch.cat(images)[order], labels[order])


def load_data(args: argparse.Namespace) -> Dataset:
    """Load what `--data` names; `auto` falls back to synthetic shapes and says why."""
    parts, classes, name = None, list(SHAPES), args.data
    if args.data in ("auto", "cifar10"):
        try:
            (parts, classes), name = common.load_torchvision("CIFAR10", args.data_dir), "cifar10"
        except common.UserError as error:
            if args.data == "cifar10":
                raise
            common.warn(f"{error}\n         training on synthetic shapes instead")
            name = "synthetic"
    elif args.data != "synthetic":
        parts, classes = common.load_image_folder(args.data, SIZE, 3)
    if parts is None:
        parts = {"train": synthetic_shapes(args.synthetic_size, args.seed),
                 "test": synthetic_shapes(args.synthetic_size // 5, args.seed + 2**32)}
    common.hold_out_missing(parts, args.seed)
    if not len(parts["val"][1]) or not len(parts["test"][1]):
        raise common.UserError(f"--data {args.data}: no class has an image to spare to validate or "
                               "test on; provide more of them")
    return Dataset(name, classes, Part(*parts["train"]), Part(*parts["val"]), Part(*parts["test"]))


def random_crop_flip(images: Tensor, indices: Tensor, padding: int, flip: bool) -> Tensor:
    """Pick, shift by up to `padding` pixels and mirror images, all in one gather.

    What a shift brings in from outside is the image's own reflection.

    images: uint8 (N, H, W, C); indices: int64 (B,). Returns uint8 (B, H, W, C).
    """
    batch, (height, width) = len(indices), images.shape[1:3]

    def shifted(length):  # (B, length): the pixel that each output row or column is taken from
        shift = torch.randint(-padding, padding + 1, (batch, 1), device=images.device)
        position = (torch.arange(length, device=images.device) + shift).abs()
        return length - 1 - (length - 1 - position).abs()
    rows, columns = shifted(height), shifted(width)
    if flip:
        mirrored = torch.rand(batch, 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


# ---------------------------------------------------------------- Model


class CNN(nn.Module):
    """Three blocks of Conv2d + BatchNorm + ReLU + MaxPool, then two fully connected layers.

    images: uint8 (N, 32, 32, 3), pixels 0 to 255 -> logits: float (N, classes).

    widths: channels of the three blocks; units: Conv2d + BatchNorm + ReLU before each pooling;
    hidden: width of the fully connected layer; dropout: share of it zeroed in training;
    mean, std: of each colour channel in the training part, in units of full brightness.
    """

    def __init__(self, classes: int = 10, widths: Sequence[int] = (32, 64, 128), units: int = 1,
                 hidden: int = 256, dropout: float = 0.2, batch_norm: bool = True,
                 mean: Sequence[float] = (0.5, 0.5, 0.5),
                 std: Sequence[float] = (0.25, 0.25, 0.25)):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        layers, channels = [], 3
        for width in widths:
            for unit in range(units):
                # Batch norm has a shift of its own, so the convolution needs no bias.
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)]
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                # The largest of four is the same before ReLU or after it: pool first, and
                # ReLU has a quarter of the numbers to go through.
                layers += [nn.MaxPool2d(2)] if unit == units - 1 else []
                layers += [nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * (SIZE // 8)**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # He et al., 2015: keeps the variance of activations from layer to layer.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # At first every class is equally likely: the loss starts at log(classes), no higher.
        nn.init.zeros_(self.classifier[-1].weight)
        self.to(memory_format=torch.channels_last)  # the layout that convolutions run fastest in

    def forward(self, images: Tensor) -> Tensor:
        # (N, 3, 32, 32), and in memory still (N, 32, 32, 3)
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        x = (x - self.mean) / self.std
        x = self.features(x)  # (N, widths[2], 4, 4)
        return self.classifier(x)  # (N, classes)


# ---------------------------------------------------------------- Training


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy against targets of 1 - smoothing for the label, the rest for all alike.

    logits: float (N, classes); labels: int64 (N,). Label smoothing: Szegedy et al., 2016.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    return ((1 - smoothing) * F.nll_loss(log_probabilities, labels)
            - smoothing * log_probabilities.mean())


def train(args: argparse.Namespace, data: Dataset, folder: Path, device: torch.device) -> list:
    """Train a CNN; keep its last and its best epoch in `folder`. Returns the history."""
    common.seed_everything(args.seed)
    pixels = data.train.images[::10].reshape(-1, 3).float() / 255
    options = {"classes": len(data.classes), "widths": args.widths, "units": args.units,
               "hidden": args.hidden, "dropout": args.dropout, "batch_norm": not args.no_batch_norm,
               "mean": pixels.mean(0).tolist(), "std": pixels.std(0).clamp(min=1e-3).tolist()}
    model = CNN(**options).to(device)
    images, labels = (tensor.to(device) for tensor in data.train)
    steps = math.ceil(len(labels) / args.batch_size)
    optimizer = torch.optim.SGD(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                momentum=0.9, nesterov=True)
    decay = args.epochs * steps if args.schedule == "cosine" else math.inf
    schedule = common.warmup_cosine(optimizer, args.epochs * steps // 8, decay)
    dtype = common.select_dtype(args.precision, device)
    scaler = common.gradient_scaler(dtype)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    path, checksum, history = folder / "last.pt", common.checksum(data), []
    if args.resume:
        checkpoint = common.load_checkpoint(path, "cnn.py")
        history = common.restore(path, checkpoint, state, checksum)
    parallel = common.parallel(common.compile_model(model, args.compile), device)

    for epoch in range(len(history) + 1, args.epochs + 1):
        if history and common.epochs_since_best(history, "validation_accuracy") >= args.patience:
            print(f"no better validation accuracy for {args.patience} epochs: stopping early")
            break
        start = time.perf_counter()
        common.seed_everything(args.seed, epoch)
        model.train()
        totals = torch.zeros(2, device=device)  # loss, right ones
        order = torch.randperm(len(labels)).to(device)
        bar = common.progress(common.shares(order.split(args.batch_size)),
                              f"epoch {epoch}/{args.epochs}")
        for step, (indices, weight, count) in enumerate(bar):
            batch = random_crop_flip(images, indices, args.crop, not args.no_flip)
            with common.autocast(device, dtype):
                logits = parallel(batch)
            loss = cross_entropy(logits.float(), labels[indices], args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(weight * loss).backward()
            scaler.unscale_(optimizer)
            common.clip_gradients(model, args.clip, (epoch - 1) * steps + step + 1, scaler)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            right = (logits.argmax(1) == labels[indices]).float().mean()
            totals += weight * count * torch.stack([loss.detach(), right])
            if step % 10 == 9:
                loss, right = totals / (step * args.batch_size + count)
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {right:.1%}", refresh=False)
        common.average_buffers(model)
        train_loss, train_accuracy = (common.mean_of_processes(totals) / len(labels)).tolist()
        logits = predict_logits(model, data.validation.images, not args.no_flip, device)
        history.append({
            "epoch": epoch, "learning_rate": schedule.get_last_lr()[0],
            "train_loss": train_loss, "train_accuracy": train_accuracy,
            "validation_loss": cross_entropy(logits, data.validation.labels).item(),
            "validation_accuracy": accuracy(logits, data.validation.labels),
            "seconds": time.perf_counter() - start})
        row = history[-1]
        print(f"epoch {epoch:2}/{args.epochs}  train {row['train_loss']:.3f}, "
              f"{row['train_accuracy']:.1%}  validation {row['validation_loss']:.3f}, "
              f"{row['validation_accuracy']:.1%}  {common.pace(history, args.epochs)}", flush=True)
        best = common.epochs_since_best(history, "validation_accuracy") == 0 and {
            "script": "cnn.py", "model": model.state_dict(), "model_options": options,
            "classes": data.classes, "mirror": not args.no_flip, "metrics": row}
        common.save_epoch(folder, history, best, {
            "script": "cnn.py", "options": vars(args), "data": checksum, "history": history,
            **{name: part.state_dict() for name, part in state.items()}})
    return history


# ---------------------------------------------------------------- Evaluation and pictures


def predict_logits(model: CNN, images: Tensor, mirror: bool, device: torch.device) -> Tensor:
    """Logits (N, classes), on the CPU, for uint8 images (N, 32, 32, 3) on any device.

    With `mirror`, the mean of those of each image and of its mirror image: a network that was
    trained on both is right more often about the two together.
    """
    model.eval()  # batch norm by its running averages, no dropout
    logits = []
    with torch.no_grad():
        for batch in common.mine(images.split(500)):
            batch = batch.to(device)
            views = [batch, batch.flip(2)] if mirror else [batch]
            logits.append((sum(model(view) for view in views) / len(views)).cpu())
    return torch.cat(common.gather(logits))


def accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    """The share of images whose label is among the `top` most probable classes."""
    best = logits.topk(min(top, logits.shape[1])).indices
    return (best == labels[:, None]).any(1).double().mean().item()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap of confidence and accuracy. Guo et al., 2017."""
    confidence, predicted = F.softmax(logits, dim=1).max(1)
    gap = (predicted == labels).double() - confidence.double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    return (torch.zeros(bins).double().index_add(0, index, gap).abs().sum() / len(labels)).item()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes): row the true class, column the predicted one."""
    return (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)


def evaluate(args: argparse.Namespace, data: Dataset, folder: Path, device: torch.device,
             history: list) -> None:
    """Measure the best network on the test part; draw the pictures; write summary.json."""
    model, checkpoint = load_model(folder / "best.pt", device)
    logits = predict_logits(model, data.test.images, not args.no_flip, device)
    labels = data.test.labels
    confusion = confusion_matrix(logits.argmax(1), labels, len(data.classes))
    by_class = confusion.diag().double() / confusion.sum(1).clamp(min=1)
    test = {"accuracy": accuracy(logits, labels), "top3": accuracy(logits, labels, top=3),
            "loss": cross_entropy(logits, labels).item(),
            "calibration_error": calibration_error(logits, labels),
            "per_class": dict(zip(data.classes, by_class.tolist())),
            "best_epoch": checkpoint["metrics"]["epoch"]}
    seconds = sum(row["seconds"] for row in history)
    common.write_summary(folder / "summary.json", script="cnn.py", data=data.name,
                         options=vars(args), test=test, seconds=seconds)
    title = f"CNN on {data.name}"
    common.plot_history(folder / "curves.png", history, title, {
        "loss": {"training, smoothed": "train_loss", "validation": "validation_loss"},
        "accuracy": {"training": "train_accuracy", "validation": "validation_accuracy"},
        "learning rate": {"learning rate": "learning_rate"}})
    draw_confusion(folder / "confusion.png", confusion, data.classes,
                   f"{title}: test accuracy {test['accuracy']:.2%}")
    draw_predictions(folder / "predictions.png", data, logits, title)
    draw_filters(folder / "filters.png", model, title)
    print(f"\ntest on {data.name}, {len(labels)} images, weights of epoch {test['best_epoch']}:\n"
          f"accuracy {test['accuracy']:.2%}, top-3 {test['top3']:.2%}, "
          f"calibration error {test['calibration_error']:.3f}")
    for name, value in test["per_class"].items():
        print(f"  {name:<16.16} {value:7.2%}")
    print(f"training took {seconds:.0f} s; pictures and checkpoints are in {args.out}\n"
          f"classify your own files with: python cnn.py --out {args.out} --predict FILE ...")


def draw_confusion(path: Path, confusion: Tensor, classes: list, title: str) -> None:
    size, classes = 3 + 0.42 * len(classes), list(map(common.plain, classes))
    figure, ((axis,),) = common.new_figure(1, 1, (size + 1, size), title)
    share = confusion.float() / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    ticks = range(len(classes))
    axis.set(xlabel="predicted", ylabel="true", xticks=ticks, yticks=ticks, yticklabels=classes)
    axis.set_xticklabels(classes, rotation=45, ha="right", rotation_mode="anchor")
    for row in ticks if len(classes) <= 20 else ():
        for column in ticks:
            axis.text(column, row, int(confusion[row, column]), ha="center", va="center",
                      fontsize=8, color="white" if share[row, column] > 0.5 else "black")
    common.save_figure(path, figure)


def draw_predictions(path: Path, data: Dataset, logits: Tensor, title: str,
                     columns: int = 8) -> None:
    """Two rows of test images that are right, two that are wrong: the surest, then a sample."""
    confidence, predicted = F.softmax(logits, dim=1).max(1)
    right = predicted == data.test.labels
    figure, axes = common.new_figure(4, columns, (1.55 * columns, 7.6), title)
    for rows, mask, colour in ((axes[:2], right, "green"), (axes[2:], ~right, "firebrick")):
        chosen = torch.where(mask)[0]
        surest = chosen[confidence[chosen].argsort(descending=True)]
        shown = torch.cat([surest[:columns], surest[columns:][::max(1, len(surest) // columns)]])
        for axis in rows.flat:
            axis.axis("off")
        for axis, i in zip(rows.flat, shown.tolist()):
            axis.imshow(data.test.images[i])
            text = f"{data.classes[predicted[i]]} {confidence[i]:.0%}"
            if not right[i]:
                text += f"\nis {data.classes[data.test.labels[i]]}"
            axis.set_title(common.plain(text), fontsize=9, color=colour)
    common.save_figure(path, figure)


def draw_filters(path: Path, model: CNN, title: str, columns: int = 16) -> None:
    """The kernels of the first layer, as the colours to which each responds most."""
    kernels = model.features[0].weight.detach().cpu().permute(0, 2, 3, 1)  # (widths[0], 3, 3, 3)
    rows = math.ceil(len(kernels) / columns)
    wall = torch.ones(4 * rows + 1, 4 * columns + 1, 3)
    for i, kernel in enumerate(kernels):
        y, x = 4 * (i // columns) + 1, 4 * (i % columns) + 1
        wall[y:y + 3, x:x + 3] = 0.5 + 0.5 * kernel / kernel.abs().max()
    figure, ((axis,),) = common.new_figure(1, 1, (8, 0.5 * rows + 0.6),
                                           f"{title}: the {len(kernels)} kernels of layer 1")
    axis.imshow(wall)
    axis.axis("off")
    common.save_figure(path, figure)


def load_model(path: Path, device: torch.device) -> tuple[CNN, dict]:
    """The network saved in a best.pt, and the checkpoint itself."""
    checkpoint = common.load_checkpoint(path, "cnn.py", "mirror", "metrics")
    with common.using(path):
        model = CNN(**checkpoint["model_options"])
        model.load_state_dict(checkpoint["model"])
        if len(checkpoint["classes"]) != model.classifier[-1].out_features:
            raise ValueError(f"{len(checkpoint['classes'])} names of classes")
    return model.to(device), checkpoint


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Print `file <tab> class <tab> probability` for each file of --predict."""
    model, checkpoint = load_model(Path(args.out, "best.pt"), device)
    files = sys.stdin.read().split("\n") if args.predict == ["-"] else args.predict
    files = [file for file in files if file]
    if not files:
        return
    images = torch.from_numpy(np.stack([common.read_image(file, SIZE, 3) for file in files]))
    logits = predict_logits(model, images, checkpoint["mirror"], device)
    probabilities = F.softmax(logits, dim=1)
    for file, probability, index in zip(files, *(t.tolist() for t in probabilities.max(1))):
        print(f"{file}\t{checkpoint['classes'][index]}\t{probability:.4f}")


# ---------------------------------------------------------------- Command line


def build_parser() -> argparse.ArgumentParser:
    parser = common.option_parser(
        "cnn.py", __doc__, "auto, cifar10, synthetic, or a folder of images in class sub-folders",
        data="auto", out="runs/cnn", epochs=24, batch_size=128, lr=0.2, weight_decay=5e-4,
        clip=5.0, patience=10)
    group = parser.add_argument_group("options of the CNN")
    whole, share = common.number(int, 1), common.number(float, 0, 0.99)
    group.add_argument("--widths", type=whole, nargs=3, metavar="N", default=[32, 64, 128],
                       help="channels of the three blocks [32 64 128]")
    group.add_argument("--units", type=whole, default=1, metavar="N",
                       help="Conv2d + BatchNorm + ReLU before each pooling [%(default)s]")
    group.add_argument("--hidden", type=whole, default=256, metavar="N",
                       help="width of the fully connected layer [%(default)s]")
    group.add_argument("--dropout", type=share, default=0.2, metavar="SHARE",
                       help="share of the hidden layer zeroed in training [%(default)s]")
    group.add_argument("--label-smoothing", type=share, default=0.1, metavar="SHARE",
                       help="share of each target spread over all classes [%(default)s]")
    group.add_argument("--crop", type=common.number(int, 0, SIZE - 1), default=3, metavar="PIXELS",
                       help="largest random shift of a training image [%(default)s]")
    group.add_argument("--schedule", choices=("cosine", "constant"), default="cosine",
                       help="learning rate after the warm-up [%(default)s]")
    group.add_argument("--no-flip", action="store_true",
                       help="do not mirror training images (digits, text)")
    group.add_argument("--no-batch-norm", action="store_true", help="leave batch norm out")
    group.add_argument("--synthetic-size", type=common.number(int, 100), default=12000, metavar="N",
                       help="images of the synthetic set to train and validate on [%(default)s]")
    group.add_argument("--predict", nargs="+", metavar="FILE",
                       help="classify image files by best.pt in --out; - reads names from stdin")
    return parser


def main() -> None:
    args = common.parse_options(build_parser(), fixed=(
        "data", "seed", "widths", "units", "hidden", "dropout", "no_batch_norm", "synthetic_size"))
    device = common.select_device(args.device)
    if args.predict:
        predict(args, device)
        return
    data = load_data(args)
    args.data = data.name  # so that a resumed run cannot end up on another set
    print(f"{data.name}, {len(data.classes)} classes, on {device}: images to train "
          f"{len(data.train.labels)}, validate {len(data.validation.labels)}, test "
          f"{len(data.test.labels)}")
    with common.run_folder(args.out, args.resume) as folder:
        history = train(args, data, folder, device)
        evaluate(args, data, folder, device, history)


if __name__ == "__main__":
    common.run_main(main)
