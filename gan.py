"""Train a DCGAN to draw images like those it is shown (MNIST digits by default).

  python gan.py                    MNIST, or typeset digits if it cannot be had
  python gan.py --data my_images   your own images, in a folder of any layout
  python gan.py --sample 100       draw 100 images with the trained generator

Generated images go to images/ (--images), checkpoints and curves to runs/gan
(--out). gan.md explains every part.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common

# ---------------------------------------------------------------- Data

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
         "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
         "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")
NEIGHBOURS = 5  # of a real image, that tell how far it reaches: k of Naeem et al., 2020
IMAGES_SHOWN = 540_000  # in a run of the default length: 60 epochs of 9,000 images, 10 of 54,000
PENALTY_EVERY = 16  # steps: it changes slowly, and costs as much as a step (Karras et al., 2020)


class Dataset(NamedTuple):
    name: str  # the data really used, as every log and picture calls it
    train: Tensor  # uint8 (N, size, size, channels), as are the other two
    validation: Tensor
    test: Tensor


def glyphs(side: int = 56) -> Tensor:
    """The digits in each of the FONTS: float (fonts, 10, side, side), ink 1 on paper 0."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure((10, len(FONTS)), dpi=side)  # inches: a square inch for each digit
    for row, font in enumerate(reversed(FONTS)):  # from the bottom up
        file = Path(matplotlib.get_data_path(), "fonts", "ttf", font + ".ttf")
        for digit in range(10):
            figure.text((digit + 0.5) * side, (row + 0.5) * side, str(digit), ha="center",
                        va="center", font=file, fontsize=54, transform=None)  # None: in pixels
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ink = 255 - torch.tensor(np.asarray(canvas.buffer_rgba())[..., 0])
    return ink.view(len(FONTS), side, 10, side).transpose(1, 2) / 255


def synthetic_digits(count: int, seed: int) -> Tensor:
    """Draw `count` typeset digits, randomly rotated, scaled, sheared, shifted and blurred."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, n):
        return torch.rand(n, generator=generator) * (high - low) + low
    font, images = glyphs(), []
    for batch in torch.arange(count).split(5000):
        n = len(batch)
        angle, scale = uniform(-0.25, 0.25, n), uniform(0.95, 1.35, n)
        shear, blur = uniform(-0.25, 0.25, n), uniform(0, 1, n)[:, None, None, None]
        cos, sin = scale * angle.cos(), scale * angle.sin()
        theta = torch.stack([cos, shear * cos - sin, uniform(-0.1, 0.1, n),
                             sin, shear * sin + cos, uniform(-0.1, 0.1, n)], 1).view(n, 2, 3)
        kind = torch.randint(len(FONTS), (n,), generator=generator)
        ink = font[kind, batch % 10].unsqueeze(1)  # (n, 1, 56, 56)
        grid = F.affine_grid(theta, ink.shape, align_corners=False)
        ink = F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2)  # (n, 1, 28, 28)
        ink = ink + blur * (F.avg_pool2d(ink, 3, stride=1, padding=1) - ink)
        images.append((ink * 255).round().byte().view(n, 28, 28, 1))
    return torch.cat(images)[torch.randperm(count, generator=generator)]


def folder_format(folder: str) -> tuple[int, int]:
    """Size and channels for the images of a folder: those of most of them, at most 64 pixels."""
    sides, colours = [], 0
    paths = Path(folder).rglob("*") if os.path.isdir(folder) else []
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # skipped when it is read
    for path in sorted(path for path in paths if path.is_file())[:1000]:
        with contextlib.suppress(Exception), Image.open(path) as image:
            sides.append(min(image.size))
            colours += image.mode not in ("1", "L", "LA", "I", "I;16", "F")
    if not sides:
        raise common.UserError(f"--data {folder}: no folder with images, nor the name of a set")
    side = sorted(sides)[len(sides) // 2] // 4 * 4
    return max(16, min(64, side)), 3 if 2 * colours > len(sides) else 1


def load_data(args: argparse.Namespace) -> Dataset:
    """Load what `--data` names; `auto` falls back to typeset digits and says why."""
    name, parts = "mnist" if args.data == "auto" else args.data, None
    if name in TORCHVISION:
        try:
            parts, _ = common.load_torchvision(TORCHVISION[name], args.data_dir)
        except common.UserError as error:
            if args.data != "auto":
                raise
            common.warn(f"{error}\n         training on typeset digits instead")
            name = "synthetic"
    if name == "synthetic":
        parts = {part: (synthetic_digits(count, args.seed + seed), torch.zeros(count))
                 for part, count, seed in (("train", args.synthetic_size, 0),
                                           ("test", args.synthetic_size // 5, 2**32))}
    elif parts is None:
        parts, _ = common.load_image_folder(name, *folder_format(name), labelled=False)
        if len(parts["train"][0]) < 100:
            raise common.UserError(f"--data {name}: {len(parts['train'][0])} images are too few "
                                   "to learn from; provide at least 100")
    common.hold_out_missing(parts, args.seed)
    for part in ("val", "test"):
        if len(parts[part][0]) <= NEIGHBOURS:
            raise common.UserError(f"--data {name}: {len(parts[part][0])} images in {part} are too "
                                   f"few to measure by; provide at least {NEIGHBOURS + 1}")
    return Dataset(name, *(parts[part][0] for part in ("train", "val", "test")))


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, size, size, channels) -> float (N, channels, size, size) from -1 to 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- Model


def halvings(size: int) -> list:
    """The side lengths of a network's layers, from the image inwards: 28, 14, 7, 3."""
    sides = [size]
    while sides[-1] > 4:
        sides.append(sides[-1] // 2)
    return sides


def initialise(network: nn.Module) -> nn.Module:
    """Weights from N(0, 0.02^2), scales of batch norm from N(1, 0.02^2). Radford et al., 2016."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network.to(memory_format=torch.channels_last)  # what convolutions run fastest in


class Generator(nn.Module):
    """Latent vectors to images, by transposed convolutions. Radford et al., 2016 (DCGAN).

    latent: float (N, latent), from N(0, 1) -> images: float (N, channels, size, size), -1 to 1.

    size: a multiple of 4; width: channels at half the size, twice that at a quarter, and so on.
    """

    def __init__(self, size: int = 28, channels: int = 1, latent: int = 100, width: int = 64,
                 batch_norm: bool = True):
        super().__init__()
        *sides, self.side = halvings(size)
        widths = [width * 2**k for k in range(len(sides))][::-1]  # 256, 128, 64
        # Batch norm has a shift of its own, so what comes before it needs no bias.
        self.project = nn.Linear(latent, widths[0] * self.side**2, bias=not batch_norm)
        layers = []
        for inputs, outputs, side in zip(widths, widths[1:] + [channels], sides[::-1]):
            layers += [nn.BatchNorm2d(inputs)] if batch_norm else []
            layers += [nn.ReLU(inplace=True),
                       nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1,
                                          output_padding=side % 2,  # 3 to 7, not to 6
                                          bias=side == size or not batch_norm)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        initialise(self)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.project(latent)  # (N, 3 * 3 * 256)
        x = x.view(len(x), self.side, self.side, -1).permute(0, 3, 1, 2)  # (N, 256, 3, 3)
        return self.layers(x)  # (N, 128, 7, 7), (N, 64, 14, 14), (N, 1, 28, 28)


class Discriminator(nn.Module):
    """Images to one logit each, above 0 for real, by strided convolutions. Radford et al., 2016.

    images: float (N, channels, size, size), -1 to 1 -> logits: float (N,).
    """

    def __init__(self, size: int = 28, channels: int = 1, width: int = 64,
                 batch_norm: bool = True):
        super().__init__()
        *sides, side = halvings(size)
        widths = [channels] + [width * 2**k for k in range(len(sides))]  # 1, 64, 128, 256
        layers = []
        for inputs, outputs in zip(widths, widths[1:]):
            norm = batch_norm and layers != []  # none on the images themselves
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(outputs)] if norm else []
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1] * side**2, 1)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(images)  # (N, 64, 14, 14), (N, 128, 7, 7), (N, 256, 3, 3)
        return self.classifier(x.permute(0, 2, 3, 1).flatten(1)).squeeze(1)  # as it lies in memory


# ---------------------------------------------------------------- Training


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Mean of -log D(real) - log(1 - D(fake)), D the sigmoid of the logits (N,)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Mean of -log D(fake), the non-saturating loss. Goodfellow et al., 2014."""
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator: Discriminator, real: Tensor) -> Tensor:
    """Mean squared norm of the gradient of real images' logits, R1. Mescheder et al., 2018.

    A discriminator that is flat about the real images cannot learn them by heart.
    """
    real = real.detach().requires_grad_()
    gradient, = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.pow(2).sum((1, 2, 3)).mean()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights, and running statistics, a step of 1 - decay to the model's."""
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values()):
        ours.copy_(ours.lerp(theirs, 1 - decay) if ours.is_floating_point() else theirs)


def train(args: argparse.Namespace, data: Dataset, folder: Path, images_folder: Path,
          device: torch.device) -> list:
    """Train both networks; keep their last and best epoch in `folder`. Returns the history."""
    common.seed_everything(args.seed)
    size, channels = data.train.shape[2:]
    options = {"size": size, "channels": channels, "width": args.width,
               "batch_norm": not args.no_batch_norm}
    generator = Generator(latent=args.latent, **options).to(device)
    discriminator = Discriminator(**options).to(device)
    average = copy.deepcopy(generator).requires_grad_(False)
    images = data.train.to(device)
    steps = math.ceil(len(images) / args.batch_size)
    networks = discriminator, generator
    optimizers = [torch.optim.AdamW(common.parameter_groups(network, args.weight_decay), lr=args.lr,
                                    betas=(args.beta1, 0.999), **common.FUSED_ADAM)
                  for network in networks]
    schedules = [common.warmup_cosine(each, 0, args.epochs * steps) for each in optimizers]
    dtype = common.select_dtype(args.precision, device)
    scaler = common.gradient_scaler(dtype)
    state = {"discriminator": discriminator, "generator": generator, "average": average,
             "discriminator_optimizer": optimizers[0], "generator_optimizer": optimizers[1],
             "discriminator_schedule": schedules[0], "generator_schedule": schedules[1],
             "scaler": scaler}
    path, checksum, history = folder / "last.pt", common.checksum(data), []
    if args.resume:
        checkpoint = common.load_checkpoint(path, "gan.py")
        history = common.restore(path, checkpoint, state, checksum)
    compiled = [common.compile_model(network, args.compile) for network in networks]
    parallel_discriminator, parallel_generator = (common.parallel(network, device)
                                                  for network in compiled)
    real_features = random_features(data.validation)
    fixed = latent_vectors(2000, args.latent, args.seed)

    for epoch in range(len(history) + 1, args.epochs + 1):
        if history and common.epochs_since_best(history, "frechet", min) >= args.patience:
            print(f"no better Fréchet distance for {args.patience} epochs: stopping early")
            break
        start = time.perf_counter()
        common.seed_everything(args.seed, epoch)
        sums = torch.zeros(4, device=device)  # both losses, both accuracies
        order = torch.randperm(len(images)).to(device)
        bar = common.progress(common.shares(order.split(args.batch_size)),
                              f"epoch {epoch}/{args.epochs}")
        for step, (indices, weight, count) in enumerate(bar, (epoch - 1) * steps + 1):
            real = to_float(images[indices])
            latent = torch.randn(len(indices), args.latent, device=device)

            # The discriminator learns to tell real images from generated ones ...
            optimizers[0].zero_grad()
            if args.r1 and step % PENALTY_EVERY == 0:
                penalty = gradient_penalty(discriminator, real)
                scaler.scale(weight * PENALTY_EVERY * args.r1 / 2 * penalty).backward()
            with common.autocast(device, dtype):
                fake = parallel_generator(latent)
                real_logits = parallel_discriminator(real)
                fake_logits = parallel_discriminator(fake.detach())
            loss = discriminator_loss(real_logits.float(), fake_logits.float())
            scaler.scale(weight * loss).backward()
            scaler.unscale_(optimizers[0])
            common.clip_gradients(discriminator, args.clip, step, scaler)
            scaler.step(optimizers[0])

            # ... and the generator learns to be taken for real by the discriminator as it is now,
            discriminator.requires_grad_(False)  # whose weights need no gradient from this loss.
            with common.autocast(device, dtype):
                logits = compiled[0](fake)
            fooling = generator_loss(logits.float())
            optimizers[1].zero_grad()
            scaler.scale(weight * fooling).backward()
            scaler.unscale_(optimizers[1])
            common.clip_gradients(generator, args.clip, step, scaler)
            scaler.step(optimizers[1])
            discriminator.requires_grad_(True)

            scaler.update()
            for schedule in schedules:
                schedule.step()
            update_average(average, generator, min(args.average, step / (step + 10)))
            right = (real_logits > 0).float().mean(), (fake_logits < 0).float().mean()
            sums += weight * count * torch.stack([loss.detach(), fooling.detach(), *right])
            if step % 10 == 0:
                bar.set_postfix_str(f"losses {loss:.2f}, {fooling:.2f}", refresh=False)
        common.average_buffers(*networks, average)
        samples = generate(average, fixed, device)
        features = random_features(samples)
        row = {"epoch": epoch, "learning_rate": schedules[0].get_last_lr()[0]}
        row.update(zip(("discriminator_loss", "generator_loss", "real_accuracy", "fake_accuracy"),
                       (common.mean_of_processes(sums) / len(images)).tolist()))
        row["frechet"] = frechet_distance(real_features, features)
        row["density"], row["coverage"] = density_coverage(real_features, features)
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        print("epoch {epoch:2}/{}  losses {discriminator_loss:.2f}, {generator_loss:.2f}  Fréchet "
              "{frechet:.3f}, coverage {coverage:.0%}  {}".format(
                  args.epochs, common.pace(history, args.epochs), **row), flush=True)
        won = [min(r["real_accuracy"], r["fake_accuracy"]) > 0.997 for r in history]
        if won[-3:] == [True] * 3 and won[-4:-3] != [True]:
            common.warn("the discriminator has told everything apart for 3 epochs, so the "
                        "generator learns little; try a lower --lr, or more images")
        draw_grid(images_folder / f"epoch_{epoch:03}.png", samples[:64], 8,
                  f"DCGAN on {data.name}, epoch {epoch}")
        best = common.epochs_since_best(history, "frechet", min) == 0 and {
            "script": "gan.py", "model": average.state_dict(), "data": data.name, "metrics": row,
            "model_options": {"latent": args.latent, **options}}
        common.save_epoch(folder, history, best, {
            "script": "gan.py", "options": vars(args), "data": checksum, "history": history,
            **{name: part.state_dict() for name, part in state.items()}})
    return history


# ---------------------------------------------------------------- Evaluation and pictures


def latent_vectors(count: int, latent: int, seed: int) -> Tensor:
    """(count, latent), from N(0, 1); the same for the same seed on every device."""
    return torch.randn(count, latent, generator=torch.Generator().manual_seed(seed))


def generate(generator: Generator, latent: Tensor, device: torch.device) -> Tensor:
    """uint8 images (N, size, size, channels), on the CPU, for latent vectors (N, latent)."""
    generator.eval()  # batch norm by its running averages
    with torch.no_grad():
        parts = [generator(part.to(device)).cpu() for part in common.mine(latent.split(500))]
    images = torch.cat(common.gather(parts))
    return (images.permute(0, 2, 3, 1) * 127.5 + 127.5).round().byte()


def random_features(images: Tensor) -> np.ndarray:
    """Features (N, 224) of uint8 images (N, size, size, channels): every channel's mean in every
    layer of a convolutional network with fixed random weights, which knows no data set and needs
    no download. Naeem et al., 2020.
    """
    generator, widths = torch.Generator().manual_seed(0), (images.shape[3], 32, 64, 128)
    weights = [torch.randn(outputs, inputs, 4, 4, generator=generator) * math.sqrt(2 / inputs / 16)
               for inputs, outputs in zip(widths, widths[1:])]  # He et al., 2015
    features = []
    for part in common.mine(images.split(500)):
        x, means = to_float(part), []
        for weight in weights:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            means.append(x.mean((2, 3)))
        features.append(torch.cat(means, 1))
    return torch.cat(common.gather(features)).numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the normal distributions fitted to features (N, d) and (M, d).

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)), A and B the covariances. Dowson and Landau,
    1982; for generated images Heusel et al., 2017.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # A B and root B root have the same eigenvalues, and the latter is symmetric.
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> tuple:
    """How typical the generated features are, and the share of real ones that they reach.

    Around each real feature lies a ball that holds its k nearest real neighbours. Density: in how
    many balls a generated one lies, over k; coverage: the share of balls with a generated one in
    them, near 0 after mode collapse. Naeem et al., 2020.
    """
    real, fake = torch.from_numpy(real), torch.from_numpy(fake)
    radius = torch.cdist(real, real).kthvalue(k + 1).values  # the nearest of all is itself
    inside = torch.cdist(real, fake) < radius[:, None]
    return inside.sum().item() / (k * len(fake)), inside.any(1).double().mean().item()


def evaluate(args: argparse.Namespace, data: Dataset, folder: Path, images_folder: Path,
             device: torch.device, history: list) -> None:
    """Measure the best generator against the test part; draw the pictures; write summary.json."""
    generator, checkpoint = load_generator(folder / "best.pt", device)
    count = min(len(data.test), 5000)
    fake = generate(generator, latent_vectors(max(200, count), args.latent, args.seed + 1), device)
    real, train, generated = (random_features(x[:count]) for x in (data.test, data.train, fake))
    test = {"best_epoch": checkpoint["metrics"]["epoch"]}
    for suffix, features in ("", generated), ("_floor", train):  # real images set the floor
        test["frechet" + suffix] = frechet_distance(real, features)
        test["density" + suffix], test["coverage" + suffix] = density_coverage(real, features)
    seconds = sum(row["seconds"] for row in history)
    common.write_summary(folder / "summary.json", script="gan.py", data=data.name,
                         options=vars(args), test=test, seconds=seconds)
    title = f"DCGAN on {data.name}"
    common.plot_history(folder / "curves.png", history, title, {
        "loss": {"discriminator": "discriminator_loss", "generator": "generator_loss"},
        "discriminator's accuracy": {"on real": "real_accuracy", "on generated": "fake_accuracy"},
        "Fréchet distance to validation": {"averaged generator": "frechet"},
        "density and coverage": {"density": "density", "coverage": "coverage"}})
    ends = latent_vectors(7, args.latent, args.seed)[:, None]
    share = torch.linspace(0, 1, 10)[:, None]
    # Along an arc: points on the line between two latent vectors are shorter than any drawn.
    walk = torch.cat([(1 - share).sqrt() * a + share.sqrt() * b for a, b in zip(ends, ends[1:])])
    walk = generate(generator, walk, device)
    if common.RANK:
        return
    draw_grid(images_folder / "final.png", fake[:200], 20, title)
    draw_grid(images_folder / "interpolation.png", walk, 10,
              f"{title}: in each row from one latent vector to the next")
    distances = torch.cdist(fake[:10].flatten(1).float(), data.train.flatten(1).float())
    nearest = data.train[distances.topk(7, largest=False).indices]
    draw_grid(images_folder / "nearest.png", torch.cat([fake[:10, None], nearest], 1).flatten(0, 1),
              8, f"{title}: generated, and nearest in training")
    frames = [Image.open(path) for path in sorted(images_folder.glob("epoch_*.png"))]
    if frames:  # the user may have taken them away before --resume
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[min(500, 10000 // len(frames))] * (len(frames) - 1) + [2000])
        common.write_file(images_folder / "progress.gif", buffer.getvalue())
    print("\ntest on {}, {} images, weights of epoch {best_epoch} (in brackets, real images):\n"
          "Fréchet distance {frechet:.3f} ({frechet_floor:.3f}), density {density:.2f} "
          "({density_floor:.2f}), coverage {coverage:.1%} ({coverage_floor:.1%})".format(
              data.name, count, **test))
    print(f"training took {seconds:.0f} s; generated images are in {args.images},\ncheckpoints and "
          f"curves in {args.out}; draw more with:\npython gan.py --out {args.out} --images "
          f"{args.images} --sample 100")


def draw_grid(path: Path, images: Tensor, columns: int, title: str) -> None:
    """Draw uint8 images (N, size, size, channels) as a wall, row by row."""
    images = F.pad(images, (0, 0, 1, 1, 1, 1, 0, -len(images) % columns), value=255)  # whole rows
    wall = torch.cat([torch.cat(tuple(row), 1) for row in images.split(columns)]).expand(-1, -1, 3)
    scale = max(2, 60 // images.shape[1]) / 120  # whole pixels at 120 to the inch: no blur
    height, width = scale * wall.shape[0], scale * wall.shape[1]
    figure, ((axis,),) = common.new_figure(1, 1, (width, height + 0.35), title)
    figure.texts[0].set_fontsize(min(12, 120 * width / len(title)))  # so that a long one fits
    axis.set_position((0, 0, 1, height / (height + 0.35)))
    axis.imshow(wall.numpy(), interpolation="nearest")
    axis.axis("off")
    common.save_figure(path, figure)


def load_generator(path: Path, device: torch.device) -> tuple[Generator, dict]:
    """The averaged generator saved in a best.pt, and the checkpoint itself."""
    checkpoint = common.load_checkpoint(path, "gan.py", "data", "metrics")
    with common.using(path):
        generator = Generator(**checkpoint["model_options"])
        generator.load_state_dict(checkpoint["model"])
    return generator.to(device), checkpoint


def make_folder(folder: Path, stale: str) -> None:
    """Create the folder, or take the files that match `stale` out of it."""
    if common.RANK:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(stale):
            file.unlink()
    except OSError as error:
        raise common.UserError(f"--images {folder}: {error.strerror}; choose a folder to write to"
                               ) from None


def draw_samples(args: argparse.Namespace, device: torch.device) -> None:
    """Write --sample N images to images/samples/, a file each, and beside it a grid of them."""
    generator, checkpoint = load_generator(Path(args.out, "best.pt"), device)
    folder = Path(args.images, "samples")
    make_folder(folder, "[0-9]*.png")
    latent = latent_vectors(args.sample, generator.project.in_features, args.seed)
    images = generate(generator, latent, device)
    for i, image in enumerate(images.numpy()):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, "PNG")
        common.write_file(folder / f"{i:05}.png", buffer.getvalue())
        print(folder / f"{i:05}.png")
    draw_grid(Path(args.images, "samples.png"), images[:200], 20,
              f"DCGAN on {checkpoint['data']}, seed {args.seed}")


# ---------------------------------------------------------------- Command line


def build_parser() -> argparse.ArgumentParser:
    parser = common.option_parser(
        "gan.py", __doc__, "auto, mnist, fashion-mnist, cifar10, synthetic, or a folder of images",
        "60; fewer of more than 9,000 images", data="auto", out="runs/gan", epochs=None,
        batch_size=64, lr=5e-4, weight_decay=0.0, clip=10.0, patience=30)
    group = parser.add_argument_group("options of the GAN")
    whole, share, weight = (common.number(int, 1), common.number(float, 0, 0.9999),
                            common.number(float, 0))
    for flag, kind, default, metavar, meaning in (
            ("--latent", whole, 100, "N", "length of the latent vector"),
            ("--width", whole, 64, "N", "channels at half the image's size, doubled at a quarter"),
            ("--beta1", share, 0.5, "SHARE", "Adam's decay of the mean gradient"),
            ("--r1", weight, 0.2, "WEIGHT", "weight of real images' gradient penalty; 0: none"),
            ("--average", share, 0.998, "SHARE", "decay of the averaged weights; 0: no average"),
            ("--synthetic-size", common.number(int, 500), 10000, "N",
             "typeset digits to train and validate on"),
            ("--images", str, "images", "DIR", "folder for generated images")):
        group.add_argument(flag, type=kind, default=default, metavar=metavar,
                           help=meaning + " [%(default)s]")
    group.add_argument("--no-batch-norm", action="store_true", help="leave batch norm out")
    group.add_argument("--sample", type=whole, metavar="N",
                       help="draw N images by best.pt in --out, into samples/ in --images")
    return parser


def default_epochs(images: int) -> int:
    """So many that the run takes as long on a large data set as on a small one."""
    return min(60, max(1, round(IMAGES_SHOWN / images)))


def main() -> None:
    args = common.parse_options(build_parser(), fixed=(
        "data", "seed", "latent", "width", "no_batch_norm", "synthetic_size", "images"))
    device = common.select_device(args.device)
    if args.sample:
        draw_samples(args, device)
        return
    data = load_data(args)
    args.data = data.name  # so that a resumed run cannot end up on another set
    args.epochs = args.epochs or default_epochs(len(data.train))
    size = "x".join(map(str, data.train.shape[1:]))
    print(f"{data.name}, {size}, on {device}: images to train {len(data.train)}, validate "
          f"{len(data.validation)}, test {len(data.test)}")
    with common.run_folder(args.out, args.resume) as folder:
        images_folder = Path(args.images)
        if not args.resume and common.RANK == 0 and any(images_folder.glob("epoch_*.png")):
            common.set_aside(images_folder, args.images)
        make_folder(images_folder, ".*.tmp")
        history = train(args, data, folder, images_folder, device)
        evaluate(args, data, folder, images_folder, device, history)


if __name__ == "__main__":
    common.run_main(main)
