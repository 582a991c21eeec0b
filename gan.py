"""Train a DCGAN to generate images like those of a data set (by default, MNIST digits).

  python gan.py                    MNIST, or synthetic digits if it cannot be downloaded
  python gan.py --data my_images   your own images, in a folder of any layout
  python gan.py --sample 100       generate 100 images with the trained model

Plots and checkpoints go to runs/gan, generated images to images/, where a later run overwrites
those of the same name. With another --out, all of it goes there, the images to its subfolder
images. The default of --epochs is 60, or fewer with more than about 4,500 training images. gan.md
explains every part.
"""

from __future__ import annotations

import copy
import math
import shlex
import time
import zlib
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import common

# ---------------------------------------------------------------- Data

# --data: the name of the data set's class in torchvision.
TORCHVISION = {"auto": "MNIST", "mnist": "MNIST", "fashion-mnist": "FashionMNIST",
               "cifar10": "CIFAR10"}
# Fonts that come with Matplotlib.
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic",
         "STIXGeneral", "cmr10", "cmss10"]


class Dataset(NamedTuple):
    """Three sets of images, uint8 (N, size, size, channels); not PyTorch's class of that name. No
    image is in two of them.
    """

    train: Tensor
    validation: Tensor
    test: Tensor


def synthetic_digits(count: int, seed: int) -> tuple:
    """Typeset digits, randomly shifted and rotated, uint8 (count, 28, 28, 1), and their labels."""
    import matplotlib
    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 26) for name in FONTS]
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count)
    images = np.empty((count, 28, 28, 1), np.uint8)
    for image, label in zip(images, labels):
        canvas = Image.new("L", (28, 28))
        font = fonts[rng.integers(len(fonts))]
        center = tuple(14 + rng.uniform(-2, 2, 2))
        ImageDraw.Draw(canvas).text(center, str(label), fill=255, font=font, anchor="mm")
        image[..., 0] = canvas.rotate(rng.uniform(-15, 15), Image.BILINEAR)
    return torch.from_numpy(images), torch.from_numpy(labels)


def load_folder(args: Namespace) -> tuple:
    """Return the images in a folder and its subfolders, uint8 (N, size, size, channels), in random
    order, and labels that are all 0. At most --limit files are read. If all are gray, there is one
    channel, else three.
    """
    if not Path(args.data).is_dir():
        raise common.UserError(f"--data {args.data}: neither a folder nor a data set (see --help)")
    common.check_apart(args.data, args.out, image_folder(args))
    paths = common.image_files(args.data)
    np.random.default_rng(args.seed).shuffle(paths)  # they are sorted, often by class
    images, _ = common.read_images(paths[:args.limit], args.size)
    if (images == images[..., :1]).all():  # a gray image has three equal channels
        images = images[..., :1].contiguous()
    return images, torch.zeros(len(images))


def random_sample(images: Tensor) -> Tensor:
    """Return at most 5,000 of the images, in random order: a test set may be sorted."""
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[:5000]]


def load_data(args: Namespace) -> Dataset:
    """Load what `--data` names. Replace `auto` with `mnist` or, if it cannot be loaded, with
    `synthetic`, so that a resumed run has the same data.
    """
    if args.data in TORCHVISION:
        try:
            sets, _ = common.load_torchvision(TORCHVISION[args.data], args.data_dir)
            sets["train"] = [tensor[:args.limit] for tensor in sets["train"]]
            if args.data == "auto":
                args.data = "mnist"
        except common.UserError as error:
            if args.data != "auto":
                raise
            common.warn(f"{error}; training on synthetic digits instead")
            args.data = "synthetic"  # they are made below
    elif args.data != "synthetic":  # a folder
        sets = {"train": load_folder(args)}
    if args.data == "synthetic":  # asked for, or the fallback
        count = args.limit or 10000
        sets = {"train": synthetic_digits(count, args.seed),
                "test": synthetic_digits(count // 5, args.seed + 10**9)}
    # The labels serve only to spread each class evenly over the sets.
    common.make_disjoint_sets(sets, args.seed)
    return Dataset(sets["train"][0], random_sample(sets["val"][0]),
                   random_sample(sets["test"][0]))


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 (N, size, size, channels) to float (N, channels, size, size) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- Model


def initialize(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02^2). Radford et al., 2016."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)


class Generator(nn.Module):
    """Map latent vectors to images with transposed convolutions. Radford et al., 2016 (DCGAN).

    z: float (N, latent), from N(0, 1) -> images: float (N, channels, size, size) in [-1, 1].

    size: a multiple of 4; width: the number of channels at half the image's size.
    """

    def __init__(self, size: int = 28, channels: int = 1, latent: int = 32, width: int = 64):
        super().__init__()
        self.latent = latent
        self.size = size
        side = size // 8
        # Transposed convolutions with kernel 4, stride 2 and padding 1 double the size. Batch norm
        # adds a bias of its own, so the layer before it needs none. Shapes on the right are for
        # 28 x 28 images with one channel and the default width.
        self.layers = nn.Sequential(
            nn.Linear(latent, 4 * width * side**2, bias=False),  # (N, 2304)
            nn.Unflatten(1, (4 * width, side, side)),  # (N, 256, 3, 3)
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            # The next side is size // 4. If it is odd, doubling size // 8 falls one short of it (6,
            # not 7), and output_padding adds a row and a column.
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, output_padding=size // 4 % 2,
                               bias=False),  # (N, 128, 7, 7)
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),  # (N, 64, 14, 14)
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),  # (N, 1, 28, 28)
            nn.Tanh(),
        )
        self.apply(initialize)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Discriminator(nn.Module):
    """Map images to one logit each, positive for real ones, with strided convolutions.

    Radford et al., 2016. images: float (N, channels, size, size) in [-1, 1] -> logits: float (N,).
    """

    def __init__(self, size: int = 28, channels: int = 1, width: int = 64):
        super().__init__()
        # Convolutions with kernel 4, stride 2 and padding 1 halve the size, rounded down.
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),  # (N, 64, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),  # (N, 128, 7, 7)
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),  # (N, 256, 3, 3)
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),  # (N, 2304)
            nn.Linear(4 * width * (size // 8)**2, 1),  # (N, 1)
        )
        self.apply(initialize)
        # Convolutions are faster in the memory format channels_last. In PyTorch 1.12, some with one
        # channel are wrong in it (issue 82060), so only later versions use it. The generator keeps
        # the default format: transposed convolutions are not faster in channels_last, and PyTorch
        # 2.0 computes them wrongly (issue 99519).
        if common.VERSION >= (1, 13):
            self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).squeeze(1)


# ---------------------------------------------------------------- Training

VALIDATION_SAMPLES = 2000  # generated images, compared with the validation set after each epoch
# The gradient penalty changes slowly and costs more than half as much as the rest of a step, so it
# is computed every 16th step, with 16 times the weight (lazy regularization; Karras et al., 2020).
PENALTY_EVERY = 16


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the mean of -log D(x) - log(1 - D(G(z))), where D is the sigmoid of the logits (N,).

    -log sigmoid(l) = softplus(-l), and -log(1 - sigmoid(l)) = softplus(l).
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the mean of -log D(G(z)), the non-saturating loss. Goodfellow et al., 2014."""
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Return R1 (Mescheder et al., 2018): the squared norm of the gradient of a real image's logit
    with respect to the image, averaged over the images.

    It keeps the discriminator flat around real images, which helps the training to converge.
    With batch norm, an image also changes the logits of the others a little; this is included,
    since the gradient is that of the sum of all logits.
    """
    real = real.detach().requires_grad_()
    gradient, = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.pow(2).sum((1, 2, 3)).mean()


@torch.no_grad()
def update_ema(generator_ema: nn.Module, generator: nn.Module, decay: float) -> None:
    """Set average = decay * average + (1 - decay) * value, for each weight and each of batch norm's
    running statistics. Yazici et al., 2019.
    """
    for average, value in zip(generator_ema.state_dict().values(),
                              generator.state_dict().values()):
        if value.is_floating_point():  # num_batches_tracked is an integer
            average.lerp_(value, 1 - decay)


def make_optimizer(network: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter, 2019)."""
    return torch.optim.AdamW(common.parameter_groups(network, args.weight_decay), lr=args.lr,
                             betas=(args.beta1, 0.999), **common.FUSED)


def score(row: dict) -> float:
    """Return the score of an epoch, higher is better: the negated Fréchet distance."""
    return -row["frechet"]


def train(args: Namespace, data: Dataset, folder: Path, device: torch.device) -> list:
    """Train both networks, and save them after each epoch; of the best epoch, save the averaged
    generator. Return the history.
    """
    image_folder(args).mkdir(parents=True, exist_ok=True)  # an error now, not after an epoch
    torch.manual_seed(args.seed)
    size, channels = data.train.shape[2:]  # of (N, size, size, channels)
    shape = {"size": size, "channels": channels, "width": args.width}
    options = {**shape, "latent": args.latent}  # of the generator
    discriminator = Discriminator(**shape).to(device)
    generator = Generator(**options).to(device)
    generator_ema = copy.deepcopy(generator)  # exponential moving average of the weights
    images = data.train.to(device)
    # Only their number is needed here; it is the same in each epoch.
    steps = len(common.shuffled_batches(len(images), args.batch_size))
    optimizer_d = make_optimizer(discriminator, args)
    optimizer_g = make_optimizer(generator, args)
    # A GAN needs more steps than the other models: with fewer than 2,000, there is a warning.
    scheduler_d = common.make_scheduler(optimizer_d, args, steps, few=2000)
    scheduler_g = common.make_scheduler(optimizer_g, args, steps, few=2000)
    state = {"generator": generator, "discriminator": discriminator, "optimizer_g": optimizer_g,
             "optimizer_d": optimizer_d, "scheduler_g": scheduler_g, "scheduler_d": scheduler_d,
             "generator_ema": generator_ema}
    history = common.load_last(folder, args, state) if args.resume else []
    ddp_generator = common.wrap_model(generator, args, device)
    ddp_discriminator = common.wrap_model(discriminator, args, device)
    autocast = common.autocast(args.precision, device)
    real_features = random_features(data.validation)
    fixed_z = latent_vectors(VALIDATION_SAMPLES, args.latent, args.seed)

    for epoch in common.epochs_to_train(args, history, score):
        start = time.perf_counter()
        metrics = []
        batches = common.shuffled_batches(len(images), args.batch_size, args.seed, epoch)
        bar = common.progress_bar(batches.to(device), f"epoch {epoch}/{args.epochs}")
        # step counts from the start of the training, over all epochs.
        for step, indices in enumerate(bar, start=(epoch - 1) * steps):
            real = to_float(images[indices])
            z = torch.randn(len(real), args.latent, device=device)

            # (1) Discriminator: maximize log D(x) + log(1 - D(G(z))).
            with autocast:
                fake = ddp_generator(z)
                # Two calls, so that batch norm does not mix real and generated images.
                real_logits = ddp_discriminator(real)
                fake_logits = ddp_discriminator(fake.detach())  # no gradient for the generator
            loss_d = discriminator_loss(real_logits.float(), fake_logits.float())
            total_d, limit = loss_d, args.clip
            if args.r1 and step % PENALTY_EVERY == 0:
                # Without autocast, and never compiled: torch.compile() has no second derivatives.
                weight = PENALTY_EVERY * args.r1 / 2
                total_d = loss_d + weight * gradient_penalty(discriminator, real)
                limit = PENALTY_EVERY * args.clip  # or clipping would weaken the penalty
            optimizer_d.zero_grad()
            total_d.backward()
            norm_d = common.clip_gradients(discriminator, limit)
            optimizer_d.step()

            # (2) Generator: maximize log D(G(z)), with the discriminator as it is now.
            # The gradient passes through the discriminator to the generator. The discriminator's
            # own weights need none, which saves time. So it is called without its wrapper, which
            # would average their gradients over processes.
            discriminator.requires_grad_(False)
            with autocast:
                logits = discriminator(fake)
            loss_g = generator_loss(logits.float())
            optimizer_g.zero_grad()
            loss_g.backward()
            discriminator.requires_grad_(True)
            norm_g = common.clip_gradients(generator, args.clip)
            optimizer_g.step()

            scheduler_d.step()
            scheduler_g.step()
            # The decay rises from 0 to --ema, so that the initial weights are soon forgotten.
            update_ema(generator_ema, generator, min(args.ema, step / (step + 10)))
            metrics.append({
                "discriminator_loss": loss_d.detach(),
                "generator_loss": loss_g.detach(),
                "real_accuracy": (real_logits > 0).float().mean(),
                "fake_accuracy": (fake_logits < 0).float().mean(),
                "discriminator_gradient_norm": norm_d,
                "generator_gradient_norm": norm_g,
                "discriminator_clipped": norm_d > limit,
                "generator_clipped": norm_g > args.clip})

        def validate():
            samples = generate(generator_ema, fixed_z)
            save_grid(image_folder(args) / f"epoch_{epoch:03}.png", samples[:64], 8)
            return measure(real_features, samples)
        quality = common.on_first_process(validate)
        row = {"epoch": epoch, **common.means(metrics), **quality,
               "seconds": time.perf_counter() - start}
        history.append(row)
        print(f"epoch {epoch:2}/{args.epochs}  losses: D {row['discriminator_loss']:.2f}, "
              f"G {row['generator_loss']:.2f}  Fréchet {row['frechet']:.3f}, "
              f"coverage {row['coverage']:.1%}  {row['seconds']:.1f} s", flush=True)
        # Saved if this epoch is the best so far.
        best = {"model": generator_ema.state_dict(), "options": options}
        common.save_epoch(folder, args, history, state, best, score)
    return history


# ---------------------------------------------------------------- Evaluation and plots

# The pixels of a batch, which limit the memory: 500 MNIST images, or fewer large ones.
EVALUATION_PIXELS = 500 * 28**2


def latent_vectors(count: int, latent: int, seed: int) -> Tensor:
    """Return z: float (count, latent), from N(0, 1), the same on every device.

    torch.Generator is a random number generator, not the network.
    """
    return torch.randn(count, latent, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(generator: Generator, z: Tensor) -> Tensor:
    """Return uint8 images (N, size, size, channels) for z, (N, latent); both are on the CPU.

    Sets the generator to evaluation mode: batch norm uses its running statistics.
    """
    generator.eval()
    device = generator.layers[0].weight.device
    images = torch.cat([(generator(batch.to(device)) * 127.5 + 127.5).round().byte().cpu()
                        for batch in z.split(max(1, EVALUATION_PIXELS // generator.size**2))])
    return images.permute(0, 2, 3, 1)  # undoes to_float()


def random_features(images: Tensor) -> Tensor:
    """Return features (N, 224) of uint8 images (N, size, size, channels): the mean of each channel
    in each layer of a convolutional network with fixed random weights (whose use for such measures
    is from Naeem et al., 2020).
    """
    rng = torch.Generator().manual_seed(0)
    weights = []
    for inputs, outputs in ((images.shape[3], 32), (32, 64), (64, 128)):
        weight = torch.randn(outputs, inputs, 4, 4, generator=rng)
        # Keeps the variance. He et al., 2015.
        weights.append(weight * math.sqrt(2 / weight[0].numel()))
    features = []
    for batch in images.split(max(1, EVALUATION_PIXELS // images.shape[1]**2)):
        x = to_float(batch)
        means = []
        for weight in weights:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            means.append(x.mean((2, 3)))  # (N, outputs)
        features.append(torch.cat(means, 1))
    # In double precision: the Fréchet distance is a small difference of large numbers.
    return torch.cat(features).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance, squared as in FID, of normal distributions fitted to features.

    a: (N, d), b: (M, d).

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)), where A and B are the covariances. Dowson
    and Landau, 1982; for generated images Heusel et al., 2017.
    """
    cov_a = np.cov(a.T)  # NumPy takes tensors
    cov_b = np.cov(b.T)
    # The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of A B. They are
    # real and not negative, but for rounding.
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0))
    trace = np.trace(cov_a + cov_b) - 2 * roots.sum()
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + trace)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> dict:
    """Return density and coverage of generated features (M, d) for real ones (N, d).

    The ball around each real feature reaches to its k-th nearest real neighbor. Density: the mean
    number of balls that a generated feature is in, divided by k. Coverage: the fraction of balls
    that have a generated feature in them, which is near 0 after mode collapse. Naeem et al., 2020.
    """
    k = min(k, len(real) - 1)
    # The k-th neighbor is the (k + 1)-th nearest, since the nearest of all is the image itself.
    radius = torch.cdist(real, real).kthvalue(k + 1).values
    inside = torch.cdist(real, fake) < radius[:, None]  # (N, M)
    return {"density": inside.sum().item() / (k * len(fake)),
            "coverage": inside.any(1).double().mean().item()}


def measure(real_features: Tensor, images: Tensor) -> dict:
    """Return the metrics of uint8 images (N, size, size, channels) against real features."""
    features = random_features(images)
    return {"frechet": frechet_distance(real_features, features),
            **density_coverage(real_features, features)}


def evaluate(args: Namespace, data: Dataset, folder: Path, device: torch.device,
             history: list) -> None:
    """Measure the best generator on the test set; draw plots and images; write summary.json."""
    generator = load_generator(folder / "best.pt", device)
    # At least as many as there are test images: random_sample() keeps at most 5,000.
    samples = generate(generator, latent_vectors(5000, generator.latent, args.seed + 1))
    # The metrics depend on the number of images, so it is the same for the test images, the
    # generated ones and, below, the training images.
    real = data.test[:len(data.train)]
    real_features = random_features(real)
    test = measure(real_features, samples[:len(real)])
    # The metrics of training images, called the floor, are about the best to expect: a generator's
    # distance is larger and its coverage smaller. Only its density may be larger or smaller.
    floor = measure(real_features, data.train[:len(real)])
    test.update({f"{name}_floor": value for name, value in floor.items()})
    test["best_epoch"] = max(history, key=score)["epoch"]
    common.write_summary(folder, args, history, test)
    draw_curves(args, data, folder, history)
    image_dir = image_folder(args)
    save_grid(image_dir / "final.png", samples[:200], 20)
    save_grid(image_dir / "interpolation.png", interpolate(generator, args.seed), 10)
    save_grid(image_dir / "nearest.png", nearest_images(samples[:10], data.train), 9)
    save_animation(image_dir, history)
    print(f"\ntest set of {args.data}, weights of epoch {test['best_epoch']} (training images in "
          f"parentheses):\nFréchet distance {test['frechet']:.3f} ({test['frechet_floor']:.3f}), "
          f"density {test['density']:.2f} ({test['density_floor']:.2f}), "
          f"coverage {test['coverage']:.1%} ({test['coverage_floor']:.1%})")
    print(f"images are in {image_dir}, plots and checkpoints in {args.out}; generate more with:\n"
          f"python gan.py --out {shlex.quote(args.out)} --sample 100")


def draw_curves(args: Namespace, data: Dataset, folder: Path, history: list) -> None:
    """Plot the history to curves.png, with the floor of the Fréchet distance."""
    figure, axes = common.plot_history(history, args, f"DCGAN on {args.data}", {
        "loss": {"discriminator": "discriminator_loss", "generator": "generator_loss"},
        "fraction told apart": {"real images": "real_accuracy",
                                "generated images": "fake_accuracy"},
        "Fréchet distance": {"generated to validation": "frechet"},
        "density, coverage": {"density": "density", "coverage": "coverage"},
        "gradient norm": {"discriminator": "discriminator_gradient_norm",
                          "generator": "generator_gradient_norm"}})
    axis = axes["Fréchet distance"]
    axis.set_yscale("log")
    # The distance depends on the number of images, so the floor needs as many as are generated.
    if len(data.train) >= VALIDATION_SAMPLES:
        floor = frechet_distance(random_features(data.validation),
                                 random_features(data.train[:VALIDATION_SAMPLES]))
        axis.axhline(floor, color="black", linewidth=1, label="training to validation images")
        axis.legend(**common.LEGEND)
    figure.savefig(folder / "curves.png")


def interpolate(generator: Generator, seed: int) -> Tensor:
    """Return six rows of ten images, each row from one latent vector to the next.

    The points cos(t) a + sin(t) b, t from 0 to pi / 2, lie on an arc and are distributed like
    latent vectors; points on the straight line are closer to the origin. White, 2016.
    """
    ends = latent_vectors(7, generator.latent, seed)
    t = torch.linspace(0, math.pi / 2, 10)[:, None]
    z = t.cos() * ends[:-1, None] + t.sin() * ends[1:, None]  # (6, 10, latent)
    return generate(generator, z.flatten(0, 1))


def nearest_images(samples: Tensor, train: Tensor) -> Tensor:
    """Return, for each sample, itself, a blank image, and the seven training images nearest to it
    in pixels: uint8 (9 N, size, size, channels).
    """
    # In parts: as floats, all training images might not fit into memory.
    distances = torch.cat([torch.cdist(samples.flatten(1).float(), part.flatten(1).float())
                           for part in train.split(500)], 1)
    nearest = train[distances.topk(7, largest=False).indices]  # (N, 7, size, size, channels)
    blank = torch.full_like(samples, 255)
    return torch.cat([samples[:, None], blank[:, None], nearest], 1).flatten(0, 1)


def image_folder(args: Namespace) -> Path:
    """Return images/ for the default --out; for another, its subfolder images."""
    out = Path(args.out)
    return Path("images") if out == Path("runs/gan") else out / "images"


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Save uint8 images (N, size, size, channels) as one image, row by row, at twice their size."""
    from torchvision.utils import save_image
    images = F.interpolate(images.permute(0, 3, 1, 2) / 255, scale_factor=2)
    save_image(images, path, nrow=columns, pad_value=1)


def save_animation(image_dir: Path, history: list) -> None:
    """Write progress.gif, an animation of the grids of all epochs."""
    paths = [image_dir / f"epoch_{row['epoch']:03}.png" for row in history]
    # The files are opened one after the other. Some may be missing, for example because runs/gan
    # was renamed before the run was resumed: the images did not move with it.
    frames = (Image.open(path) for path in paths if path.exists())
    first = next(frames, None)  # and frames are the others
    if first:
        first.save(image_dir / "progress.gif", save_all=True, append_images=frames, duration=200,
                   loop=0)


def load_generator(path: Path, device: torch.device) -> Generator:
    """Load the generator in a best.pt, which has the averaged weights."""
    checkpoint = common.load_checkpoint(path, "gan.py")
    generator = Generator(**checkpoint["options"])
    generator.load_state_dict(checkpoint["model"])
    return generator.to(device)


def write_samples(args: Namespace, device: torch.device) -> None:
    """Write --sample generated images to samples/ in image_folder(), and print their paths. Images
    of an earlier call are overwritten, or left if there were more.
    """
    generator = load_generator(Path(args.out, "best.pt"), device)
    folder = image_folder(args) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    # A seed far from those of training and evaluation, so these images are new ones.
    z = latent_vectors(args.sample, generator.latent, args.seed + 2 * 10**9)
    images = generate(generator, z)
    paths = [folder / f"{i:05}.png" for i in range(args.sample)]
    for path, image in zip(paths, images.numpy()):
        Image.fromarray(image.squeeze()).save(path)
    print(*paths, sep="\n")  # last: the reader may close the pipe early, as `head` does


# ---------------------------------------------------------------- Command line


def build_parser() -> common.ArgumentParser:
    parser = common.option_parser("gan.py", __doc__, out="runs/gan", epochs=None, batch_size=16,
                                  lr=5e-4, warmup=0.0, weight_decay=0.0, clip=10.0, patience=30)
    count = common.number(int, 1)
    decay = common.number(float, 0, 0.9999)
    add = parser.add_argument_group("options of the GAN").add_argument
    add("--data", default="auto",
        help="auto, mnist, fashion-mnist, cifar10, synthetic, or a folder of images")
    add("--size", type=common.number(int, 8), default=32,
        help="resize a folder's images to SIZE x SIZE pixels; multiple of 4")
    add("--limit", type=common.number(int, 100),
        help="use LIMIT training images (of a folder: files); missing val/test sets come from "
             "them")
    add("--latent", type=count, default=32, help="length of the latent vector")
    add("--width", type=count, default=64, help="channels at half the image's size")
    add("--beta1", type=decay, default=0.5, help="AdamW's beta1: decay of the mean gradient")
    add("--r1", type=common.number(float, 0), default=0.2,
        help="weight of the R1 gradient penalty (gamma); 0: none")
    add("--ema", type=decay, default=0.998, help="decay of the generator's weight average (EMA)")
    add("--sample", type=count, help="generate SAMPLE images with best.pt")
    return parser


def main() -> None:
    args = common.parse_options(build_parser())
    if args.size % 4:
        raise common.UserError("--size must be a multiple of 4")
    device = common.select_device(args)
    if args.sample:
        common.on_first_process(write_samples, args, device)
        return
    data = load_data(args)
    args.checksum = zlib.crc32(torch.cat(data).numpy())  # load_last() refuses other data
    # As many epochs as it takes to see about 270,000 images, but at most 60.
    args.epochs = args.epochs or min(60, max(1, round(270_000 / len(data.train))))
    common.describe_sets(args.data, device, *data)
    with common.run_folder(args) as folder:
        history = train(args, data, folder, device)
        if common.RANK == 0:
            evaluate(args, data, folder, device, history)


if __name__ == "__main__":
    common.run_main(main)
