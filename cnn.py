"""Train a convolutional network to classify color images (CIFAR-10 by default).

  python cnn.py                    CIFAR-10, or synthetic shapes if it cannot be downloaded
  python cnn.py --data my_photos   your own images: my_photos/<class>/*.jpg
  python cnn.py --predict cat.jpg  classify image files with the trained model

Plots and checkpoints go to runs/cnn (--out). cnn.md explains every part.
"""

from __future__ import annotations

import re
import shlex
import time
import zlib
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# ---------------------------------------------------------------- Data


class ImageSet(NamedTuple):
    """The images and labels of one set, held in memory."""

    images: Tensor  # uint8 (N, size, size, 3)
    labels: Tensor  # int64 (N,)


class Dataset(NamedTuple):
    """The three sets, and the names of the classes; not PyTorch's class of that name."""

    name: str  # cifar10, synthetic or the folder
    classes: list
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    test_files: list  # of the images in the test set; empty if --data is not a folder


# Each shape is a star: the number of its tips, and the distance of its notches from the center,
# where the tips are at distance 1. Notches at cos(pi / tips) give a regular polygon, such as the
# square; notches at 1 give one with twice as many corners, here the disc.
SHAPES = {
    "triangle": (3, 0.5),
    "square": (4, 0.71),
    "hexagon": (6, 0.87),
    "disc": (20, 1.0),
    "needle": (2, 0.2),
    "rhombus": (2, 0.5),
    "3-pointed star": (3, 0.2),
    "4-pointed star": (4, 0.3),
    "5-pointed star": (5, 0.4),
    "8-pointed star": (8, 0.5),
}


def synthetic_shapes(count: int, size: int, seed: int) -> ImageSet:
    """Draw `count` images of the SHAPES, with random position, rotation, size, colors and noise."""
    from PIL import Image, ImageDraw
    rng = np.random.default_rng(seed)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = rng.permutation(count) % len(SHAPES)
    large = 4 * size  # drawn at four times the size and then reduced, for smooth edges
    for image, label in zip(images, labels):
        tips, notch = list(SHAPES.values())[label]
        rotation = rng.uniform(0, 2 * np.pi)
        angles = rotation + np.pi * np.arange(2 * tips) / tips
        radii = rng.uniform(0.2, 0.4) * np.tile([1, notch], tips)
        center = rng.uniform(0.35, 0.65, (2, 1))
        directions = np.stack([np.cos(angles), np.sin(angles)])  # (2, 2 * tips)
        corners = center + radii * directions
        background = tuple(rng.integers(0, 128, 3))
        canvas = Image.new("RGB", (large, large), background)
        color = tuple(rng.integers(100, 256, 3))
        ImageDraw.Draw(canvas).polygon(list(large * corners.T.ravel()), fill=color)
        noise = rng.normal(0, rng.uniform(5, 40), image.shape)
        reduced = np.asarray(canvas.resize((size, size), Image.BOX))
        # This writes into `images`, of which `image` is a view.
        image[:] = np.clip(reduced + noise, 0, 255)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels).long())


def subfolders(folder: Path) -> list:
    """Return the sorted names of the folders in a folder, without hidden ones."""
    return sorted(path.name for path in folder.iterdir()
                  if path.is_dir() and path.name[0] != ".")


# A folder with one of these words in its name may be a set.
SET_WORDS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def find_sets(root: Path) -> dict:
    """{"train": folder, "val": folder, "test": folder}, or {"train": root} if it is not split.

    Split: there is a folder train, perhaps val and test, and no other folder. Not split: no folder
    has one of the SET_WORDS in its name. Anything else is an error.
    """
    names = subfolders(root)
    if "train" in names and set(names) <= {"train", "val", "test"}:
        return {name: root / name for name in names}
    suspects = [name for name in names if SET_WORDS & set(re.split("[^a-z]+", name.lower()))]
    if suspects:
        raise common.UserError(f"--data {root}: sets or classes: {', '.join(suspects)}? Name sets "
                               "train, val and test, with no other folder beside them; or move all "
                               "classes into a folder train")
    return {"train": root}


def load_image_folder(args: Namespace) -> tuple:
    """Load `train/<class>/` with or without `val/` and `test/`, or just `<class>/`.

    Returns {"train": (images, labels, paths), ...}, uint8 (N, size, size, 3), int64 (N,) and an
    array of N strings, in random order; and the class names. Raises UserError if the folder has
    another structure.
    """
    root = Path(args.data)
    if not root.is_dir():
        raise common.UserError(f"--data {root}: neither a folder nor auto, cifar10 or synthetic")
    common.check_apart(args.data, args.out)
    folders = find_sets(root)
    classes = subfolders(folders["train"])
    if len(classes) < 2:
        raise common.UserError(f"--data {root}: {folders['train']} has {len(classes)} class "
                               "folder(s); at least two are needed")
    sets = {}
    for name, folder in folders.items():
        difference = set(classes) ^ set(subfolders(folder))
        if difference:
            raise common.UserError(f"--data {root}: {folder} and {folders['train']} must have the "
                                   "same class folders, some of which may be empty; one lacks "
                                   f"{', '.join(sorted(difference))}")
        files = []  # (path, label)
        for label, class_name in enumerate(classes):
            files += [(path, label) for path in common.image_files(folder / class_name)]
        if not files:
            raise common.UserError(f"--data {root}: there are no files in {folder}")
        np.random.default_rng(args.seed).shuffle(files)
        if name == "train":  # before reading, which takes long
            files = files[:args.limit]
        paths, labels = zip(*files)
        images, kept = common.read_images(paths, args.size)
        sets[name] = images, torch.tensor(labels)[kept], np.array(paths)[kept]
    return sets, classes


def load_data(args: Namespace) -> Dataset:
    """Load what `--data` names. Replace `auto` with `cifar10` or, if it cannot be loaded, with
    `synthetic`, so that a resumed run has the same data.
    """
    # Each branch sets `sets` and `classes`; `auto` ends in the first, or else in the last one.
    if args.data in ("auto", "cifar10"):
        if args.size != 32:
            raise common.UserError("--size: the images of CIFAR-10 have 32 x 32 pixels")
        try:
            sets, classes = common.load_torchvision("CIFAR10", args.data_dir)
            args.data = "cifar10"
        except common.UserError as error:
            if args.data == "cifar10":
                raise
            common.warn(f"{error}; training on synthetic shapes instead")
            args.data = "synthetic"  # so that the last branch below makes the sets
    elif args.data != "synthetic":
        sets, classes = load_image_folder(args)
    if args.data == "synthetic":  # asked for, or the fallback
        classes = list(SHAPES)
        sets = {"train": synthetic_shapes(args.synthetic_size, args.size, args.seed),
                "test": synthetic_shapes(args.synthetic_size // 5, args.size, args.seed + 10**9)}
    # Of a folder, no more than --limit images have been read anyway.
    sets["train"] = [part[:args.limit] for part in sets["train"]]
    # Takes "val" and "test", where missing, from "train". Of an image in two sets, the copy in the
    # test set stays, or else that in the validation set.
    common.make_disjoint_sets(sets, args.seed)
    image_sets = [ImageSet(*sets[name][:2]) for name in ("train", "val", "test")]
    test_files = []
    if len(sets["test"]) > 2:  # the third part, the paths, exists only for a folder's images
        test_files = sets["test"][2].tolist()
    return Dataset(args.data, classes, *image_sets, test_files)


def describe_classes(data: Dataset) -> None:
    """Print the number of training images of each class. Warn if those of a class are all the same.

    Raises UserError if a class has none.
    """
    counts = []
    for label, name in enumerate(data.classes):
        images = data.train.images[data.train.labels == label]
        counts.append(f"{name} {len(images):,}")
        if len(images) == 0:
            raise common.UserError(f"--data {data.name}: no readable training image of the class "
                                   f"{name} is left; add others, or raise --limit")
        if (images == images[0]).all():
            common.warn(f"the training images of {name} are all the same")
    print(", ".join(counts))


def reflect(positions: Tensor, length: int) -> Tensor:
    """Reflect positions beyond either edge back inside: for length 8, -2 -> 2 and 8 -> 6."""
    last = length - 1
    return last - (last - positions.abs()).abs()


def random_crop_flip(images: Tensor, indices: Tensor, max_shift: int, flip: bool) -> Tensor:
    """Pick images, shift each by up to `max_shift` pixels, and flip it with probability 1/2.

    Pixels shifted in are reflected (reflection padding). One indexing operation does all of it:
    `rows` and `columns` are the positions that the output pixels come from.

    images: uint8 (N, size, size, 3); indices: int64 (B,). Returns uint8 (B, size, size, 3).
    """
    batch, size, device = len(indices), images.shape[1], images.device
    shift = torch.randint(-max_shift, max_shift + 1, (2, batch, 1), device=device)
    positions = torch.arange(size, device=device)
    rows, columns = reflect(positions + shift, size)  # from (2, B, size): (B, size) each
    if flip:
        flipped = torch.rand(batch, 1, device=device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    # Three index tensors that broadcast to (B, size, size): which image, which row, which column.
    return images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]


# ---------------------------------------------------------------- Model


def conv_block(inputs: int, outputs: int, convs: int, batch_norm: bool) -> nn.Sequential:
    """`convs` times Conv2d + BatchNorm + ReLU, then MaxPool.

    float (N, inputs, H, W) -> float (N, outputs, H / 2, W / 2).
    """
    layers = []
    for _ in range(convs):
        # Batch norm adds a bias of its own, so the layer before it needs none.
        layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU(inplace=True))
        inputs = outputs
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class CNN(nn.Module):
    """Three blocks of Conv2d + BatchNorm + ReLU + MaxPool, then two fully connected layers.

    images: uint8 (N, size, size, 3), pixels 0 to 255 -> logits: float (N, classes).

    size: a multiple of 8; widths: channels of the blocks; convs: convolutions in each block;
    hidden: width of the fully connected layer; dropout: dropout probability before the last layer;
    batch_norm: whether it follows the convolutions and the first fully connected layer;
    mean, std: of each color channel in the training set, for pixels from 0 to 1.
    """

    def __init__(self, classes: int = 10, size: int = 32,
                 widths: Sequence = (32, 64, 128), convs: int = 1,
                 hidden: int = 256, dropout: float = 0.2, batch_norm: bool = True,
                 mean: Sequence = (0.5, 0.5, 0.5),
                 std: Sequence = (0.25, 0.25, 0.25)):
        super().__init__()
        # Scaled to pixels from 0 to 255; the shape broadcasts over (N, 3, size, size).
        self.register_buffer("mean", 255 * torch.as_tensor(mean)[:, None, None])
        self.register_buffer("std", 255 * torch.as_tensor(std)[:, None, None])
        # Sizes for images of 32 x 32 pixels and the default widths.
        self.features = nn.Sequential(
            conv_block(3, widths[0], convs, batch_norm),  # (N, 32, 16, 16)
            conv_block(widths[0], widths[1], convs, batch_norm),  # (N, 64, 8, 8)
            conv_block(widths[1], widths[2], convs, batch_norm),  # (N, 128, 4, 4)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),  # (N, 2048)
            nn.Linear(widths[2] * (size // 8)**2, hidden, bias=not batch_norm),  # (N, 256)
            nn.BatchNorm1d(hidden) if batch_norm else nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),  # (N, 10)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # Keeps the variance of activations from layer to layer. He et al., 2015.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # At first every class is equally likely, and the loss is log(classes).
        nn.init.zeros_(self.classifier[-1].weight)
        # Convolutions are fastest if the channels of a pixel are adjacent in memory. Those of the
        # images are: permute() in forward() changes the shape, not the memory.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.permute(0, 3, 1, 2) - self.mean) / self.std  # (N, 3, size, size)
        x = self.features(x)  # (N, widths[2], size / 8, size / 8)
        return self.classifier(x)  # (N, classes)


# ---------------------------------------------------------------- Training


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy with label smoothing (Szegedy et al., 2016).

    The target of each image is (1 - smoothing) * one_hot(label) + smoothing / classes. It is
    F.cross_entropy() with label_smoothing, which PyTorch has only from 1.10 on.

    logits: float (N, classes); labels: int64 (N,).
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    of_labels = F.nll_loss(log_probabilities, labels)
    of_all_classes = -log_probabilities.mean()
    return (1 - smoothing) * of_labels + smoothing * of_all_classes


def score(row: dict) -> tuple:
    """Return what epochs are compared by: validation accuracy. If it is equal, which is common with
    few images, the later epoch is the better one, since its learning rate is lower.
    """
    return row["validation_accuracy"], row["epoch"]


def train(args: Namespace, data: Dataset, folder: Path, device: torch.device) -> list:
    """Train a CNN; keep its last and its best epoch in `folder`. Returns the history."""
    torch.manual_seed(args.seed)
    # Every tenth image is enough for mean and std.
    pixels = data.train.images[::10].reshape(-1, 3).float() / 255  # (number of pixels, 3)
    options = {  # the arguments of CNN(), kept in best.pt for load_model()
        "classes": len(data.classes), "size": args.size, "widths": args.widths,
        "convs": args.convs, "hidden": args.hidden, "dropout": args.dropout,
        "batch_norm": not args.no_batch_norm}
    flip = not args.no_flip
    model = CNN(**options, mean=pixels.mean(0), std=pixels.std(0).clamp(min=1e-3)).to(device)
    # The training set is kept on the device, so a batch is one indexing operation. If it does not
    # fit into a GPU's memory, lower --size or --limit.
    images, labels = (tensor.to(device) for tensor in data.train)
    steps = len(common.shuffled_batches(len(labels), args.batch_size))  # the same in any epoch
    optimizer = torch.optim.SGD(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                momentum=0.9, nesterov=True)
    scheduler = common.make_scheduler(optimizer, args, steps)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = common.load_last(folder, args, state) if args.resume else []  # restores state, too
    # The training step calls `model`, or a wrapper that compiles it or averages gradients over
    # processes. They share their parameters.
    ddp_model = common.wrap_model(model, args, device)
    autocast = common.autocast(args.precision, device)

    for epoch in common.epochs_to_train(args, history, score):
        start = time.perf_counter()
        model.train()
        metrics = []
        batches = common.shuffled_batches(len(labels), args.batch_size, args.seed, epoch)
        for indices in common.progress_bar(batches.to(device), f"epoch {epoch}/{args.epochs}"):
            # The batch, augmented on the device.
            inputs = random_crop_flip(images, indices, args.crop, flip)
            targets = labels[indices]
            # Forward pass; the loss is always computed in float32.
            with autocast:
                logits = ddp_model(inputs)
            loss = cross_entropy(logits.float(), targets, args.label_smoothing)
            # Backward pass, and a step against the gradient.
            optimizer.zero_grad()
            loss.backward()
            norm = common.clip_gradients(model, args.clip)
            optimizer.step()
            scheduler.step()
            accuracy = (logits.argmax(1) == targets).float().mean()
            metrics.append({"train_loss": loss.detach(), "train_accuracy": accuracy,
                            "gradient_norm": norm, "clipped": norm > args.clip})

        # Measured in the first process, and sent to the others. With autocast, to save time.
        with autocast:
            validation = common.on_first_process(measure, model, data.validation, flip)
        row = {"epoch": epoch, **common.means(metrics),
               "validation_loss": validation["loss"],
               "validation_accuracy": validation["accuracy"],
               "seconds": time.perf_counter() - start}
        history.append(row)
        # One string on three lines, whose fields are columns of the history.
        print("epoch {epoch:2}/{epochs}  loss: training (smoothed) {train_loss:.3f}, validation "
              "{validation_loss:.3f}; accuracy: training {train_accuracy:.1%}, validation "
              "{validation_accuracy:.1%}  {seconds:.1f} s".format(epochs=args.epochs, **row),
              flush=True)
        # Saved if this epoch is the best so far, which the validation set alone decides.
        best = {"model": model.state_dict(), "options": options, "classes": data.classes,
                "flip": flip}
        common.save_epoch(folder, args, history, state, best, score)
    return history


# ---------------------------------------------------------------- Evaluation and plots


@torch.no_grad()
def predict_logits(model: CNN, images: Tensor, flip: bool) -> Tensor:
    """Return the logits, float (N, classes) on the CPU, of uint8 images (N, size, size, 3).

    With `flip`, the mean of the logits of each image and of its flipped copy (test-time flip
    augmentation): a model that has been trained on both is more accurate on the two together.
    """
    model.eval()  # batch norm uses its running statistics; no dropout
    logits = []
    # 500 images of 32 x 32, and fewer if they are larger, since each takes more memory.
    batch_size = max(1, 500 * 32**2 // images.shape[1]**2)
    for batch in images.split(batch_size):
        batch = batch.to(model.mean.device)
        batch_logits = model(batch)
        if flip:
            batch_logits = (batch_logits + model(batch.flip(2))) / 2  # axis 2 is the width
        logits.append(batch_logits.float().cpu())
    return torch.cat(logits)


def measure(model: CNN, data: ImageSet, flip: bool) -> dict:
    """Return the loss and the accuracy on a set of images."""
    logits = predict_logits(model, data.images, flip)
    accuracy = (logits.argmax(1) == data.labels).double().mean()
    return {"loss": cross_entropy(logits, data.labels).item(), "accuracy": accuracy.item()}


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al., 2017): the mean of |accuracy - mean
    confidence| over `bins` bins of confidence, each weighted by its number of images.

    logits: float (N, classes); labels: int64 (N,).
    """
    confidence, predicted = F.softmax(logits, dim=1).max(1)
    gaps = (predicted == labels).double() - confidence
    bin_of_each = (confidence * bins).long().clamp(max=bins - 1)
    # The sum of the gaps in a bin is its number of images * (accuracy - mean confidence).
    sums = torch.zeros(bins).double().index_add(0, bin_of_each, gaps)  # (bins,)
    return (sums.abs().sum() / len(labels)).item()


def evaluate(args: Namespace, data: Dataset, folder: Path, device: torch.device,
             history: list) -> None:
    """Measure the best model on the test set; write summary.json; draw the plots."""
    model, checkpoint = load_model(folder / "best.pt", device)
    # Until here, no choice has depended on the test set.
    logits = predict_logits(model, data.test.images, checkpoint["flip"])
    labels = data.test.labels
    test = common.classification_report(logits.argmax(1), labels, data.classes)
    test["loss"] = cross_entropy(logits, labels).item()
    test["calibration_error"] = calibration_error(logits, labels)
    test["best_epoch"] = checkpoint["metrics"]["epoch"]  # the row of the history
    common.write_summary(folder, args, history, test)
    title = f"CNN on {data.name}"
    figure, _ = common.plot_history(history, args, title, {
        "loss": {"training, with --label-smoothing": "train_loss", "validation": "validation_loss"},
        "fraction correct": {"training": "train_accuracy", "validation": "validation_accuracy"},
        "gradient norm": {"before clipping": "gradient_norm"}})
    figure.savefig(folder / "curves.png")
    draw_confusion(folder / "confusion.png", logits.argmax(1), labels, data.classes,
                   f"{title}: test accuracy {test['accuracy']:.2%}")
    draw_predictions(folder / "predictions.png", data, logits, title)
    print(f"\ntest on {data.name} with the weights of epoch {test['best_epoch']}:")
    common.print_report(test)
    if data.test_files:
        confidence, predicted = F.softmax(logits, dim=1).max(1)
        common.write_predictions(
            folder, data.test_files, [data.classes[label] for label in labels],
            [data.classes[label] for label in predicted], confidence.tolist())
    print(f"plots and checkpoints are in {args.out}; classify files of your own with:\n"
          f"python cnn.py --out {shlex.quote(args.out)} --predict FILE ...")


def draw_confusion(path: Path, predicted: Tensor, labels: Tensor, classes: list,
                   title: str) -> None:
    """Plot the confusion matrix: a row for each true class, a column for each predicted class."""
    count = len(classes)
    # Each pair (true, predicted) is one number, so that bincount() counts them all at once.
    confusion = (labels * count + predicted).bincount(minlength=count**2).view(count, count)
    fraction = confusion.float() / confusion.sum(1, keepdim=True).clamp(min=1)
    inches = 3 + 0.42 * min(count, 50)
    figure, ((axis,),) = common.new_figure(1, 1, (inches + 1, inches), title)
    colors = axis.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(colors, label="fraction of the true class")
    names = [common.escape_dollars(name) for name in classes]
    axis.set(xlabel="predicted", xticks=range(count),
             ylabel="true", yticks=range(count))
    axis.set_yticklabels(names)
    axis.set_xticklabels(names, rotation=45, ha="right")
    if count <= 20:  # else the numbers would overlap
        for (row, column), number in np.ndenumerate(confusion.numpy()):
            color = "white" if fraction[row, column] > 0.5 else "black"
            axis.text(column, row, number, color=color, fontsize=8, ha="center", va="center")
    figure.savefig(path)


def draw_predictions(path: Path, data: Dataset, logits: Tensor, title: str) -> None:
    """Plot two rows of correctly classified test images, and two rows of misclassified ones: first
    the most confident predictions, then some of the others.
    """
    columns = 8
    confidence, predicted = F.softmax(logits, dim=1).max(1)
    correct = predicted == data.test.labels
    font_size = 8 if max(map(len, data.classes)) < 11 else 6  # so that texts do not overlap
    figure, axes = common.new_figure(4, columns, (8.3, 6.2), title)
    for axis in axes.flat:
        axis.axis("off")
    order = confidence.argsort(descending=True)  # indices of images, most confident first
    for rows, mask, color in ((axes[:2], correct, "green"), (axes[2:], ~correct, "red")):
        chosen = order[mask[order]]  # of these, those in the mask
        surest, others = chosen[:columns], chosen[columns:]
        sample = others[::max(1, len(others) // columns)]  # zip() below stops after eight of them
        for axis, i in zip(rows.flat, [*surest, *sample]):
            axis.imshow(data.test.images[i])
            text = f"{data.classes[predicted[i]]} {confidence[i]:.0%}"
            if not correct[i]:
                text += f"\ntrue: {data.classes[data.test.labels[i]]}"
            axis.set_title(common.escape_dollars(text), fontsize=font_size, color=color)
    figure.savefig(path)


def load_model(path: Path, device: torch.device) -> tuple:
    """Return the model saved at `path`, and its checkpoint."""
    checkpoint = common.load_checkpoint(path, "cnn.py")
    model = CNN(**checkpoint["options"])  # mean and std come with the weights
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), checkpoint


def predict(args: Namespace, device: torch.device) -> None:
    """Print `file <tab> class <tab> probability` for each file of --predict that can be read."""
    model, checkpoint = load_model(Path(args.out, "best.pt"), device)
    files = common.prediction_inputs(args.predict)
    if not files:
        return
    images, kept = common.read_images(files, checkpoint["options"]["size"])
    logits = predict_logits(model, images, checkpoint["flip"])
    probabilities, labels = F.softmax(logits, dim=1).max(1)
    for i, label, probability in zip(kept, labels, probabilities):
        print(f"{files[i]}\t{checkpoint['classes'][label]}\t{probability:.4f}")


# ---------------------------------------------------------------- Command line


def build_parser() -> common.ArgumentParser:
    parser = common.option_parser("cnn.py", __doc__, out="runs/cnn", epochs=24, batch_size=128,
                                  lr=0.2, warmup=0.125, weight_decay=5e-4, clip=5.0, patience=10)
    count, fraction = common.number(int, 1), common.number(float, 0, 0.99)
    add = parser.add_argument_group("options of the CNN").add_argument
    add("--data", default="auto", help="auto, cifar10, synthetic, or a folder of class folders")
    add("--size", type=common.number(int, 8, 1024), default=32,
        help="resize to SIZE x SIZE pixels; multiple of 8")
    add("--limit", type=count,
        help="use LIMIT training images; missing val/test sets come from them")
    add("--synthetic-size", type=common.number(int, 100), default=12000,
        help="synthetic images to train and validate on")
    add("--widths", type=count, nargs=3, default=[32, 64, 128], help="channels of each block")
    add("--convs", type=count, default=1, help="convolutions in each block")
    add("--hidden", type=count, default=256, help="units in the hidden linear layer")
    add("--dropout", type=fraction, default=0.2, help="dropout probability")
    add("--label-smoothing", type=fraction, default=0.1, help="fraction spread over all classes")
    # Less than the smallest --size, since reflect() folds a position back only once.
    add("--crop", type=common.number(int, 0, 7), default=3, help="largest random shift, in pixels")
    add("--no-flip", action="store_true", help="do not flip images (for digits or text)")
    add("--no-batch-norm", action="store_true", help="do not use batch norm")
    add("--predict", nargs="+", metavar="FILE",
        help="classify image files; - reads their names from stdin")
    return parser


def main() -> None:
    args = common.parse_options(build_parser())
    if args.size % 8:  # each of three poolings halves it
        raise common.UserError("--size must be a multiple of 8")
    device = common.select_device(args)
    if args.predict:
        predict(args, device)
        return
    data = load_data(args)
    # It is saved with the options. When the run is resumed, load_last() refuses other data. The
    # second argument of crc32() is the value to start from: one checksum of all.
    args.checksum = 0
    for tensor in (*data.train, *data.validation, *data.test):
        args.checksum = zlib.crc32(tensor.numpy(), args.checksum)
    common.describe_sets(data.name, device, data.train.labels, data.validation.labels,
                         data.test.labels)
    describe_classes(data)
    with common.run_folder(args) as folder:
        history = train(args, data, folder, device)
        if common.RANK == 0:
            evaluate(args, data, folder, device, history)


if __name__ == "__main__":
    common.run_main(main)
