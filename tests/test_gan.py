"""gan.py: its networks, its data, its measures, and its command line from end to end."""

import copy
import csv
import hashlib
import json
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn

import common
import gan

TINY = ("--data", "synthetic", "--synthetic-size", 500, "--width", 4, "--latent", 8,
        "--batch-size", 64, "--device", "cpu")
CPU = torch.device("cpu")


# ---------------------------------------------------------------- Data


def test_typeset_digits_are_balanced_repeatable_and_tell_themselves_apart():
    images = gan.synthetic_digits(3000, seed=1)
    assert images.shape == (3000, 28, 28, 1) and images.dtype == torch.uint8
    assert gan.synthetic_digits(3000, seed=1).equal(images)
    assert not gan.synthetic_digits(3000, seed=2).equal(images)
    ink = images.float().mean((1, 2, 3))
    assert 3 < ink.min() and ink.max() < 130 and images.max() > 250  # none is empty or cut to black
    glyphs = gan.glyphs()
    assert glyphs.shape == (14, 10, 56, 56)
    means = glyphs.mean(0).flatten(1)
    similarity = torch.cdist(means, means) + 1e9 * torch.eye(10)
    assert similarity.min() > 3  # ten different shapes


def test_bytes_become_floats_and_floats_bytes():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    floats = gan.to_float(images)
    assert floats.shape == (1, 1, 16, 16) and floats.min() == -1 and floats.max() == 1
    assert gan.generate(nn.Identity(), floats, CPU).equal(images)


def test_a_folder_of_mixed_sizes_and_modes(run, tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep" / "deeper").mkdir(parents=True)
    for i in range(120):
        mode = ("RGB", "L", "P", "RGBA")[i % 4] if i % 3 else "RGB"
        size = (40 + i % 5, 44)
        place = folder / "deep" / "deeper" if i % 2 else folder
        Image.fromarray(np.random.RandomState(i).randint(0, 255, size[::-1] + (3,), np.uint8)
                        ).convert(mode).save(str(place / f"{i}.png"))
    (folder / "broken.png").write_text("no image")
    done = run("gan.py", *TINY, "--data", "photos", "--epochs", 1)
    assert "photos, 40x40x3, on cpu: images to train 97, validate 11, test 12" in done.stdout
    assert done.stderr == ("warning: skipped 1 files: photos/broken.png: not an image that can be "
                           "read\n")


def test_grey_images_are_trained_on_as_grey(tmp_path):
    Image.new("L", (300, 200)).save(str(tmp_path / "0.png"))
    assert gan.folder_format(str(tmp_path)) == (64, 1)
    Image.new("RGB", (18, 30)).save(str(tmp_path / "1.png"))
    Image.new("RGB", (17, 30)).save(str(tmp_path / "2.png"))
    assert gan.folder_format(str(tmp_path)) == (16, 3)


def test_cifar10_as_torchvision_keeps_it(monkeypatch, tmp_path, capsys):
    cifar10 = pytest.importorskip("torchvision").datasets.CIFAR10
    folder = tmp_path / "data" / cifar10.base_folder
    folder.mkdir(parents=True)
    rows = np.random.RandomState(0).randint(0, 256, (180, 3 * 32 * 32)).astype(np.uint8)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()
    lists = {"train_list": [[f"data_batch_{i + 1}", rows[30 * i:30 * i + 30]] for i in range(5)],
             "test_list": [["test_batch", rows[150:]]]}
    for attribute, batches in lists.items():
        monkeypatch.setattr(cifar10, attribute, [
            [name, write(name, {"data": part, "labels": [i % 10 for i in range(30)]})]
            for name, part in batches])
    names = {"label_names": list("abcdefghij")}
    monkeypatch.setattr(cifar10, "meta", {"filename": "batches.meta", "key": "label_names",
                                          "md5": write("batches.meta", names)})
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--data", "cifar10", "--epochs", 1]
    monkeypatch.setattr(sys, "argv", ["gan.py", *map(str, options)])
    gan.main()
    assert ("cifar10, 32x32x3, on cpu: images to train 130, validate 20, test 30"
            in capsys.readouterr().out)
    data = gan.load_data(gan.build_parser().parse_args(["--data", "cifar10"]))
    assert data.test[7].equal(torch.tensor(rows[157].reshape(3, 32, 32)).permute(1, 2, 0))


# ---------------------------------------------------------------- Networks


@pytest.mark.parametrize("size, channels, innermost", [
    (28, 1, 3), (32, 3, 4), (64, 3, 4), (16, 1, 4), (36, 3, 4), (44, 1, 2)])
def test_shapes_for_every_size(size, channels, innermost):
    assert gan.halvings(size)[-1] == innermost
    generator = gan.Generator(size, channels, latent=10, width=4)
    images = generator(torch.randn(3, 10))
    assert images.shape == (3, channels, size, size) and images.abs().max() <= 1
    assert gan.Discriminator(size, channels, width=4)(images).shape == (3,)


def test_the_projection_is_dcgan_s_first_transposed_convolution():
    generator = gan.Generator(latent=10, width=4).double().train()
    first = nn.ConvTranspose2d(10, 16, kernel_size=3, bias=False).double()
    first.weight.data = generator.project.weight.detach().view(3, 3, 16, 10).permute(3, 2, 0, 1)
    reference = nn.Sequential(first, copy.deepcopy(generator.layers)).train()
    latent = torch.randn(5, 10).double()
    assert torch.allclose(generator(latent), reference(latent[:, :, None, None]), atol=1e-10)


def test_layers_are_where_dcgan_has_them():
    kinds = [type(layer).__name__ for layer in gan.Discriminator(width=4).layers]
    assert kinds == ["Conv2d", "LeakyReLU"] + ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2
    kinds = [type(layer).__name__ for layer in gan.Generator(width=4).layers]
    assert kinds == ["BatchNorm2d", "ReLU", "ConvTranspose2d"] * 3 + ["Tanh"]
    for network in (gan.Generator(batch_norm=False), gan.Discriminator(batch_norm=False)):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert gan.Generator().project.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_losses_are_binary_cross_entropy():
    real, fake = torch.randn(7), torch.randn(7)
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = cross_entropy(real, torch.ones(7)) + cross_entropy(fake, torch.zeros(7))
    assert torch.allclose(gan.discriminator_loss(real, fake), expected)
    assert torch.allclose(gan.generator_loss(fake), cross_entropy(fake, torch.ones(7)))


def test_the_gradient_penalty_of_a_linear_discriminator_is_its_squared_norm():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(9, 1))
    penalty = gan.gradient_penalty(lambda x: linear(x).squeeze(1), torch.randn(4, 1, 3, 3))
    assert torch.allclose(penalty, linear[1].weight.pow(2).sum())
    penalty.backward()
    assert torch.allclose(linear[1].weight.grad, 2 * linear[1].weight)


def test_the_average_moves_by_one_minus_decay():
    average, model = gan.Generator(width=4), gan.Generator(width=4)
    model.train()(torch.randn(4, 100))
    before, theirs = {k: v.clone() for k, v in average.state_dict().items()}, model.state_dict()
    gan.update_average(average, model, 0.75)
    for name, value in average.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * theirs[name] if value.is_floating_point() else 1
        assert torch.allclose(value, torch.as_tensor(expected), atol=1e-6)
    gan.update_average(average, model, 0.0)
    assert all(value.equal(theirs[name]) for name, value in average.state_dict().items())


# ---------------------------------------------------------------- Measures


def test_frechet_distance_of_normal_distributions_is_the_formula():
    random = np.random.RandomState(0)
    noise = random.randn(4000, 3)
    noise = (noise - noise.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    a, b = noise * (1, 2, 3) + 5, noise * (2, 2, 1) + (5, 6, 5)  # exact moments
    assert gan.frechet_distance(a, b) == pytest.approx(1 + (1 - 2)**2 + 0 + (3 - 1)**2)
    turn, _ = np.linalg.qr(random.randn(3, 3))
    assert gan.frechet_distance(a @ turn, b @ turn) == pytest.approx(6)
    assert gan.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # With covariances that do not commute, against the square root by eigenvalues of A B itself.
    c = noise @ random.randn(3, 3)
    root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(c.T)).real).sum()
    expected = (((a.mean(0) - c.mean(0))**2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(c.T))
                - 2 * root)
    assert gan.frechet_distance(a, c) == pytest.approx(expected)


def test_density_and_coverage_on_a_case_worked_out_by_hand():
    real = np.array([[0.0], [1.0], [3.0], [6.0]], np.float32)  # radii at k = 1: 1, 1, 2, 3
    fake = np.array([[0.5], [0.6], [7.0]], np.float32)  # in the balls of 0 and 1, twice; of 6
    density, coverage = gan.density_coverage(real, fake, k=1)
    assert density == pytest.approx(5 / 3) and coverage == 0.75


def test_measures_order_noise_collapse_and_real_images():
    features = gan.random_features
    real, other = (features(gan.synthetic_digits(1000, seed)) for seed in (1, 2))
    blurred = gan.synthetic_digits(1000, 3).float().permute(0, 3, 1, 2)
    blurred = F.avg_pool2d(blurred, 5, stride=1, padding=2).permute(0, 2, 3, 1).byte()
    noise = torch.randint(0, 256, (1000, 28, 28, 1), dtype=torch.uint8)
    one = gan.synthetic_digits(1, 4).expand(1000, -1, -1, -1)
    distances = [gan.frechet_distance(real, x) for x in
                 (other, features(blurred), features(one), features(noise))]
    assert distances == sorted(distances) and distances[1] > 5 * distances[0]
    assert gan.density_coverage(real, other)[1] > 0.9
    assert gan.density_coverage(real, features(one))[1] < 0.05


def test_a_wall_shows_each_pixel_as_a_square(tmp_path):
    images = torch.randint(0, 256, (5, 28, 28, 1), dtype=torch.uint8)
    gan.draw_grid(tmp_path / "wall.png", images, 3, "a title " * 6)
    with Image.open(str(tmp_path / "wall.png")) as picture:
        drawn = torch.tensor(np.asarray(picture)[..., 0])
    wall = drawn[-120:].view(60, 2, 90, 2)  # below the title: two rows of three, twice as large
    assert wall.eq(wall[:, :1, :, :1]).all()
    cells = wall[:, 0, :, 0].reshape(2, 30, 3, 30).transpose(1, 2).reshape(6, 30, 30)
    assert cells[:5, 1:-1, 1:-1].equal(images[..., 0]) and cells[5].eq(255).all()
    title = drawn[:-120]
    assert title.min() < 200 and title[:, :3].min() == 255 and title[:, -3:].min() == 255


# ---------------------------------------------------------------- The command line


def test_it_learns_writes_everything_and_samples(run, tmp_path):
    done = run("gan.py", "--data", "synthetic", "--synthetic-size", 1500, "--epochs", 6,
               "--width", 16, "--batch-size", 32, "--lr", 0.001, "--average", 0.95,
               "--device", "cpu")
    out, images = tmp_path / "runs" / "gan", tmp_path / "images"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["script"] == "gan.py" and summary["data"] == "synthetic"
    rows = list(csv.DictReader((out / "history.csv").open()))
    frechet = [float(row["frechet"]) for row in rows]
    assert len(rows) == 6 and min(frechet) < 0.5 * frechet[0]
    assert summary["test"]["frechet"] > 2 * summary["test"]["frechet_floor"] > 0
    assert summary["test"]["best_epoch"] == 1 + frechet.index(min(frechet))
    for picture in (out / "curves.png", images / "epoch_001.png", images / "final.png",
                    images / "interpolation.png", images / "nearest.png"):
        with Image.open(str(picture)) as image:
            assert min(image.size) > 100
    with Image.open(str(images / "progress.gif")) as animation:
        assert animation.n_frames == 6
    assert done.stderr == "" and "epoch  6/6" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.endswith("python gan.py --out runs/gan --images images --sample 100\n")

    printed = run("gan.py", "--sample", 7).stdout.splitlines()
    assert printed == [f"images/samples/{i:05}.png" for i in range(7)]
    drawn = [np.asarray(Image.open(str(tmp_path / name))) for name in printed]
    assert all(image.shape == (28, 28) and image.dtype == np.uint8 for image in drawn)
    generator, _ = gan.load_generator(out / "best.pt", CPU)
    expected = gan.generate(generator, gan.latent_vectors(7, 100, seed=0), CPU)
    assert np.array_equal(np.stack(drawn), expected[..., 0].numpy())
    run("gan.py", "--sample", 1, "--seed", 5)
    assert not np.array_equal(drawn[0], np.asarray(Image.open(str(tmp_path / printed[0]))))


def test_an_interrupted_run_resumes_to_the_same_weights(run, tmp_path):
    options = [str(o) for o in (*TINY, "--epochs", 4)]
    run("gan.py", *options, "--out", "whole", "--images", "whole-images")
    command = [sys.executable, str(ROOT / "gan.py"), *options, "--out", "cut"]
    process = subprocess.Popen(command, cwd=str(tmp_path), stdout=subprocess.PIPE,
                               universal_newlines=True)
    for line in process.stdout:
        if line.startswith("epoch  2/4"):
            process.send_signal(signal.SIGTERM)
            break
    assert process.communicate(timeout=60)[0].endswith("--out cut --resume\n")
    assert process.returncode == 143
    run("gan.py", "--resume", "--out", "cut")
    whole, cut = (common.load_checkpoint(tmp_path / out / "last.pt", "gan.py")
                  for out in ("whole", "cut"))
    for name in ("generator", "discriminator", "average"):
        assert all(whole[name][key].equal(cut[name][key]) for key in whole[name])
    for row in whole["history"] + cut["history"]:
        del row["seconds"]
    assert whole["history"] == cut["history"]
    for name in ("epoch_004.png", "final.png"):
        pixels = [np.asarray(Image.open(str(tmp_path / folder / name)))
                  for folder in ("whole-images", "images")]
        assert np.array_equal(*pixels)


def test_a_run_of_the_default_length_shows_as_many_images_whatever_the_data():
    assert [gan.default_epochs(n) for n in (90, 8995, 54000, 10**7)] == [60, 60, 10, 1]
    assert gan.build_parser().parse_args([]).epochs is None


def test_a_second_run_keeps_the_images_of_the_first(run, tmp_path):
    run("gan.py", *TINY, "--epochs", 2)
    done = run("gan.py", *TINY, "--epochs", 1)
    assert "images held another run, which is now in images.1" in done.stderr
    assert (tmp_path / "images.1" / "epoch_002.png").exists()
    assert not (tmp_path / "images" / "epoch_002.png").exists()


def test_early_stopping_ends_a_run_that_no_longer_gains(run, tmp_path):
    done = run("gan.py", *TINY, "--epochs", 20, "--lr", 0, "--patience", 2,
               "--no-batch-norm")  # its running averages would go on changing
    assert "no better Fréchet distance for 2 epochs: stopping early" in done.stdout


@pytest.mark.parametrize("options, message", [
    (["--sample", 3], "there is no runs/gan/best.pt; train first, or name the run's folder with "
                      "--out"),
    (["--sample", 0], "argument --sample: 0 is not from 1 to 1000000000"),
    (["--data", "nowhere"], "--data nowhere: no folder with images, nor the name of a set"),
    (["--data", "few"], "--data few: 3 images are too few to learn from; provide at least 100"),
    ([*TINY, "--images", "file/x"],
     "--images file/x: Not a directory; choose a folder to write to"),
])
def test_a_mistake_is_one_line_and_exit_status_2(run, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.new("L", (20, 20)).save(str(tmp_path / "few" / f"{i}.png"))
    assert run("gan.py", *options, status=2).stderr == f"gan.py: error: {message}\n"


def test_a_run_that_diverges_stops_at_once(run):
    error = run("gan.py", *TINY, "--lr", 1e9, "--clip", 0, "--no-batch-norm", status=2).stderr
    assert error.startswith("gan.py: error: the loss or its gradient is not finite at step ")
    assert error.count("\n") == 1


def test_a_discriminator_that_wins_outright_is_reported(run):
    done = run("gan.py", *TINY, "--batch-size", 16, "--r1", 0, "--lr", 0.001, "--epochs", 6)
    assert done.stderr.count("the discriminator has told everything apart for 3 epochs") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["auto", "float32", "float16"])
def test_it_trains_on_cuda(run, tmp_path, precision):
    run("gan.py", "--data", "synthetic", "--epochs", 3, "--device", "cuda", "--precision",
        precision)
    history = (tmp_path / "runs" / "gan" / "history.csv").read_text()
    assert len(history.splitlines()) == 4 and "nan" not in history
