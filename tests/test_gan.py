"""gan.py: its data, its models, its metrics, and its command line from end to end."""

import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import nn

import common
import gan

CPU = torch.device("cpu")
SMALL = ["--data", "synthetic", "--limit", 500, "--width", 4, "--latent", 8, "--device", "cpu"]


def parse(*options):
    return gan.build_parser().parse_args([str(option) for option in options])


def write_images(folder, count):
    """Images of noise and of several sizes, 0.png and so on, no two of them the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16 + i % 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


# ---------------------------------------------------------------- Data


def test_synthetic_digits_depend_on_the_seed_alone():
    images, labels = gan.synthetic_digits(300, seed=1)
    assert images.shape == (300, 28, 28, 1) and images.dtype == torch.uint8
    assert gan.synthetic_digits(300, seed=1)[0].equal(images)
    assert not gan.synthetic_digits(300, seed=2)[0].equal(images)
    assert images.flatten(1).max(1).values.min() > 100  # none is empty
    assert labels.unique().tolist() == list(range(10))


def test_bytes_become_floats_and_floats_bytes():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    floats = gan.to_float(images)
    assert floats.shape == (1, 1, 16, 16)
    assert [floats.min(), floats.max()] == [-1, 1]
    generator = nn.Identity()
    generator.size = 16
    generator.layers = [nn.Linear(1, 1)]  # generate() asks for the device of its weights
    assert gan.generate(generator, floats).equal(images)


def test_large_images_are_generated_a_few_at_a_time():
    batches = []
    generator = gan.Generator(size=280, latent=2, width=1)
    generator.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    assert gan.generate(generator, torch.randn(12, 2)).shape == (12, 280, 280, 1)
    assert batches == [5, 5, 2]
    assert not generator.training  # batch norm uses its running statistics


def test_a_folder_of_any_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 60)
    write_images(tmp_path / "photos" / "deep" / "deeper", 130)
    write_images(tmp_path / "photos" / ".hidden", 3)
    (tmp_path / "photos" / "broken.png").write_text("no image")
    with pytest.warns(UserWarning, match="skipped: photos/broken.png"):
        data = gan.load_data(parse("--data", "photos", "--size", 12))
    assert data.train[0].shape == (12, 12, 3)
    assert len(data.train.unique(dim=0)) == 104  # of 130 different ones
    data = gan.load_data(parse("--data", "photos/deep", "--limit", 110))
    assert data.train.shape == (88, 32, 32, 3)


def test_gray_images_have_one_channel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gray").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):  # some stored as gray images, some in color
        pixels = Image.fromarray(rng.integers(0, 256, (16, 16)).astype(np.uint8))
        pixels.convert("L" if i % 2 else "RGB").save(str(tmp_path / "gray" / f"{i}.png"))
    assert gan.load_data(parse("--data", "gray", "--size", 16)).train.shape == (24, 16, 16, 1)
    write_images(tmp_path / "gray" / "color", 1)
    assert gan.load_data(parse("--data", "gray", "--size", 16)).train.shape[3] == 3


def test_copies_of_an_image_are_in_one_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_images(tmp_path / "photos" / name, 100)
    data = gan.load_data(parse("--data", "photos", "--size", 8))
    different = [len(images.unique(dim=0)) for images in data]
    assert different == [80, 10, 10]
    assert len(torch.cat(data).unique(dim=0)) == 100


def test_an_official_test_set_is_kept(monkeypatch):
    digits = gan.synthetic_digits(300, seed=0)
    test = gan.synthetic_digits(50, seed=1)
    monkeypatch.setattr(common, "load_torchvision",
                        lambda *arguments: ({"train": digits, "test": test}, []))
    data = gan.load_data(parse("--data", "fashion-mnist", "--limit", 200))
    assert data.test.double().sum() == test[0].double().sum()
    assert [len(data.train), len(data.validation)] == [180, 20]
    first = digits[0][:200].double().sum()
    assert data.train.double().sum() + data.validation.double().sum() == first


def test_only_auto_falls_back_to_synthetic_digits(monkeypatch):
    def fail(*arguments):
        raise common.UserError("MNIST is not there")
    monkeypatch.setattr(common, "load_torchvision", fail)
    with pytest.warns(UserWarning, match="MNIST is not there; training on synthetic digits"):
        args = parse("--limit", 100)
        gan.load_data(args)
    assert args.data == "synthetic"
    with pytest.raises(common.UserError, match="MNIST is not there"):
        gan.load_data(parse("--data", "mnist"))


# ---------------------------------------------------------------- Models


@pytest.mark.parametrize("size, channels", [(28, 1), (32, 3), (64, 3), (8, 1), (36, 3), (44, 1)])
def test_shapes_for_every_size(size, channels):
    images = gan.Generator(size, channels, latent=10, width=4)(torch.randn(3, 10))
    assert images.shape == (3, channels, size, size) and images.abs().max() <= 1
    assert gan.Discriminator(size, channels, width=4)(images).shape == (3,)


def test_layers_are_where_dcgan_has_them():
    def kinds(model):
        return [type(layer).__name__ for layer in model.layers]
    assert kinds(gan.Discriminator()) == [
        "Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2, "Flatten", "Linear"]
    assert kinds(gan.Generator()) == [
        "Linear", "Unflatten", *["BatchNorm2d", "ReLU", "ConvTranspose2d"] * 3, "Tanh"]


def test_gradients_are_those_of_double_precision():
    """In PyTorch 2.0 transposed convolutions in channels-last memory have wrong gradients."""
    model = nn.Sequential(gan.Generator(channels=3, width=16), gan.Discriminator(28, 3, 16))
    reference = copy.deepcopy(model).double()
    latent = torch.randn(32, 32)
    gan.generator_loss(model(latent)).backward()
    gan.generator_loss(reference(latent.double())).backward()
    for single, double in zip(model.parameters(), reference.parameters()):
        assert (single.grad - double.grad).norm() < 0.05 * double.grad.norm() + 1e-6


def test_losses_are_binary_cross_entropy():
    real = torch.randn(7)
    fake = torch.randn(7)
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = cross_entropy(real, torch.ones(7)) + cross_entropy(fake, torch.zeros(7))
    assert torch.allclose(gan.discriminator_loss(real, fake), expected)
    assert torch.allclose(gan.generator_loss(fake), cross_entropy(fake, torch.ones(7)))


def test_the_gradient_penalty_of_a_linear_discriminator_is_its_squared_norm():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(9, 1, bias=False))
    weight = linear[1].weight
    penalty = gan.gradient_penalty(linear, torch.randn(4, 1, 3, 3))
    assert torch.allclose(penalty, weight.pow(2).sum())
    penalty.backward()
    assert torch.allclose(weight.grad, 2 * weight)


@pytest.mark.filterwarnings("ignore:with .* training steps")
def test_the_penalty_and_the_limit_of_its_step_are_16_times_as_high(tmp_path, monkeypatch):
    limits = []
    slopes = []
    clip = common.clip_gradients

    def record(model, max_norm):
        if isinstance(model, gan.Discriminator):
            limits.append(max_norm)
            slopes.append(model.layers[-1].bias.grad.item())
        return clip(model, max_norm)
    monkeypatch.setattr(common, "clip_gradients", record)
    # A penalty whose gradient dwarfs that of the loss, which is 1 at most.
    monkeypatch.setattr(gan, "gradient_penalty", lambda netd, real: 1000 * netd.layers[-1].bias)
    args = parse(*SMALL, "--epochs", 1, "--batch-size", 16, "--out", tmp_path)
    args.checksum = 0
    images, _ = gan.synthetic_digits(300, seed=0)
    gan.train(args, gan.Dataset(images, images[:50], images[:50]), tmp_path, CPU)
    assert limits == [160, *[10] * 15, 160, 10]
    first = 16 * args.r1 / 2 * 1000
    assert slopes == pytest.approx([first, *[0] * 15, first, 0], abs=1.01)


def test_the_average_moves_by_one_minus_decay():
    average = nn.BatchNorm2d(3)
    model = nn.BatchNorm2d(3)
    model(1 + torch.randn(4, 3, 5, 5))  # changes the running statistics
    gan.update_ema(average, model, 0.75)
    assert torch.allclose(average.running_mean, 0.25 * model.running_mean)


# ---------------------------------------------------------------- Metrics and images


def test_frechet_distance_is_the_formula():
    a = torch.randn(500, 3).double()
    b = a @ torch.randn(3, 3).double() + 1  # with another covariance
    # The eigenvalues of A B are the squares of the singular values of L_a^T L_b.
    factor_a, factor_b = np.linalg.cholesky(np.cov(a.T)), np.linalg.cholesky(np.cov(b.T))
    roots = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum()
    variances = a.var(0).sum() + b.var(0).sum()
    expected = (a.mean(0) - b.mean(0)).pow(2).sum() + variances - 2 * roots
    assert gan.frechet_distance(a, b) == pytest.approx(expected.item())
    assert gan.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_density_and_coverage_on_a_case_worked_out_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [6.0]])  # radii at k = 1: 1, 1, 2, 3
    fake = torch.tensor([[0.5], [0.6], [7.0]])  # in the balls of 0 and 1, twice; of 6, once
    result = gan.density_coverage(real, fake, k=1)
    assert result == {"density": pytest.approx(5 / 3), "coverage": 0.75}
    # Two real images have one neighbor each, so k is 1: radii 1 and 1.
    assert gan.density_coverage(real[:2], fake[:1])["density"] == 2


def test_metrics_tell_real_images_from_noise_and_see_collapse():
    real_features = gan.random_features(gan.synthetic_digits(1000, 1)[0])
    digits, _ = gan.synthetic_digits(1000, 2)
    real = gan.measure(real_features, digits)
    collapse = gan.measure(real_features, digits[:1].expand_as(digits))
    noise = gan.measure(real_features, torch.randint_like(digits, 256))
    assert 10 * real["frechet"] < collapse["frechet"] < noise["frechet"]
    assert real["coverage"] > 0.9 and collapse["coverage"] < 0.05


def test_a_grid_shows_each_pixel_as_a_square(tmp_path):
    images = torch.randint(0, 256, (6, 28, 28, 1), dtype=torch.uint8)
    gan.save_grid(tmp_path / "grid.png", images, columns=3)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 58 + 2, 3 * 58 + 2, 3)
    expected = images[4, ..., 0].numpy().repeat(2, 0).repeat(2, 1)
    assert np.array_equal(grid[60:116, 60:116, 0], expected)  # the second of the second row


def test_the_nearest_images_are_the_nearest():
    train, _ = gan.synthetic_digits(600, seed=0)  # more than it compares at a time
    shown = gan.nearest_images(train[[5, 590]], train).view(2, 9, 28, 28, 1)
    assert shown[:, 0].equal(shown[:, 2])
    assert (shown[:, 1] == 255).all()


def test_a_large_set_is_sampled_at_random():
    chosen = gan.random_sample(torch.arange(6000))
    assert len(chosen.unique()) == 5000 and chosen.max() >= 5000


def test_images_are_where_the_readme_says():
    assert gan.image_folder(parse("--out", "./runs/gan/")) == Path("images")
    assert gan.image_folder(parse("--out", "mine")) == Path("mine/images")


def test_an_animation_of_many_epochs_of_this_run(tmp_path):
    """In order beyond 999, with few files open, and without the epochs of other runs."""
    resource = pytest.importorskip("resource")
    for epoch in range(900, 1050):
        Image.new("L", (8, 8), epoch - 900).save(tmp_path / f"epoch_{epoch}.png")
    (tmp_path / "epoch_950.png").unlink()  # by the user
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        gan.save_animation(tmp_path, [{"epoch": epoch} for epoch in range(900, 1040)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    shades = []
    for frame in ImageSequence.Iterator(Image.open(tmp_path / "progress.gif")):
        shades.append(frame.convert("L").getpixel((0, 0)))
    assert shades == [shade for shade in range(140) if shade != 50]


# ---------------------------------------------------------------- Command line


def test_it_learns_writes_everything_and_samples(run, tmp_path, monkeypatch):
    images = tmp_path / "images"
    write_images(images / "samples", 3)  # the user's own
    done = run("gan.py", "--data", "synthetic", "--limit", 1000, "--epochs", 6, "--width", 8,
               "--batch-size", 32, "--lr", 0.002, "--ema", 0.9, "--device", "cpu")
    assert done.stdout.endswith("python gan.py --out runs/gan --sample 100\n")
    assert done.stderr.startswith("warning: with 168 training steps the model may learn little")
    assert done.stderr.count("\n") == 1
    out = tmp_path / "runs" / "gan"
    frechet = [float(row["frechet"]) for row in csv.DictReader((out / "history.csv").open())]
    assert len(frechet) == 6 and min(frechet) < 0.5 * frechet[0]
    test = json.loads((out / "summary.json").read_text())["test"]
    assert test["best_epoch"] == 1 + frechet.index(min(frechet))
    assert test["frechet"] > 2 * test["frechet_floor"] > 0
    # The generator of best.pt, and images that no choice depended on.
    generator = gan.load_generator(out / "best.pt", CPU)
    data = gan.load_data(parse("--data", "synthetic", "--limit", 1000))
    samples = gan.generate(generator, gan.latent_vectors(5000, 32, seed=1))[:len(data.test)]
    measured = gan.measure(gan.random_features(data.test), samples)
    assert test["frechet"] == pytest.approx(measured["frechet"])
    for name in ("final.png", "interpolation.png", "nearest.png", "epoch_006.png"):
        assert min(Image.open(images / name).size) > 100
    assert (out / "curves.png").exists() and (images / "progress.gif").exists()

    printed = run("gan.py", "--sample", 4).stdout.splitlines()
    assert printed == [f"images/samples/0000{i}.png" for i in range(4)]
    drawn = [np.array(Image.open(tmp_path / name)) for name in printed]
    expected = gan.generate(generator, gan.latent_vectors(4, 32, seed=2 * 10**9))
    assert np.array_equal(drawn, expected[..., 0])
    assert len(list((images / "samples").iterdir())) == 4 + 3

    def go_away(*paths, sep):
        raise BrokenPipeError
    monkeypatch.setattr("builtins.print", go_away)
    monkeypatch.setattr("sys.argv", ["gan.py", "--sample", "20", "--device", "cpu"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BrokenPipeError):
        gan.main()
    assert len(list((images / "samples").iterdir())) == 20 + 3  # although nobody reads their names


def test_images_that_cannot_be_written_end_the_run_before_training(tmp_path, monkeypatch):
    (tmp_path / "images").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gan.py", "--data", "synthetic", "--device", "cpu"])
    monkeypatch.setattr(gan, "Discriminator", None)
    with pytest.raises(FileExistsError):
        gan.main()


def test_cifar10_as_torchvision_keeps_it(cifar10, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gan.py", "--data", "cifar10", "--data-dir", str(cifar10),
                                     "--epochs", "1", "--width", "4", "--device", "cpu"])
    gan.main()
    assert json.loads(Path("runs/gan/summary.json").read_text())["data"] == "cifar10"


def test_resume_refuses_other_images_to_evaluate_on(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gray").mkdir()
    for i in range(120):
        Image.new("L", (8, 8), 2 * i).save(tmp_path / "gray" / f"{i}.png")
    options = ["--data", "gray", "--size", "8", "--width", "2", "--batch-size", "32"]
    run("gan.py", *options, "--epochs", 1, "--device", "cpu")
    data = gan.load_data(gan.build_parser().parse_args(options))
    for images in (data.validation, data.test):
        path = tmp_path / "gray" / f"{int(images[0, 0, 0, 0]) // 2}.png"
        content = path.read_bytes()
        Image.new("L", (8, 8), 255).save(path)
        done = run("gan.py", "--resume", status=2)
        assert done.stderr.endswith("the run in runs/gan was started with other data\n")
        path.write_bytes(content)


@pytest.mark.parametrize("options, message", [
    (["--sample", 3], "there is no runs/gan/best.pt; train first, or name the run's folder with "
                      "--out"),
    (["--size", 30], "--size must be a multiple of 4"),
    (["--data", "nowhere"], "--data nowhere: neither a folder nor a data set (see --help)"),
    (["--data", "same"], "--data: fewer than two images are left for the test set, not counting "
                         "copies; add others, or raise --limit if you used it"),
    (["--data", "."], "--data . and runs/gan, where the run writes, must be apart; "
                       "choose another --out"),
    (["--data", "images"], "--data images and images, where the run writes, must be apart; "
                            "choose another --out"),
    (["--data", "same", "--out", "same/out"],
     "--data same and same/out, where the run writes, must be apart; choose another --out"),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same").mkdir()
    (tmp_path / "images").mkdir()
    for i in range(120):
        Image.new("L", (20, 20)).save(tmp_path / "same" / f"{i}.png")
    monkeypatch.setattr("sys.argv", ["gan.py", *map(str, options)])
    with pytest.raises(common.UserError) as error:
        gan.main()
    assert str(error.value) == message


def test_a_run_that_diverges_ends_with_the_reason(run):
    warning, error = run("gan.py", *SMALL, "--lr", 1e30, "--clip", "inf",
                         status=2).stderr.splitlines()
    assert warning.startswith("warning: with 1680 training steps the model may learn little")
    assert error.startswith("gan.py: error: the loss or its gradient is not finite;")
