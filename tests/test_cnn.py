"""cnn.py: its model, its data, its measures, and its command line from end to end."""

import csv
import json
import re
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

import cnn
import common

TINY = ("--data", "synthetic", "--synthetic-size", 600, "--widths", 8, 8, 8, "--hidden", 16,
        "--device", "cpu")


# ---------------------------------------------------------------- Data


def test_random_crop_flip_is_reflection_padding_and_cropping():
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    padded = F.pad(images.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode="reflect").byte()
    padded = padded.permute(0, 2, 3, 1)
    indices, seen = torch.arange(5).repeat(200), set()
    for i, crop in zip(indices.tolist(), cnn.random_crop_flip(images, indices, 4, flip=True)):
        matches = {(y, x, mirrored) for y in range(9) for x in range(9) for mirrored in (0, 1)
                   if crop[0, 0].equal(padded[i, y, x + 31 * mirrored])
                   and (crop.flip(1) if mirrored else crop).equal(padded[i, y:y + 32, x:x + 32])}
        assert len(matches) == 1
        seen |= matches
    assert len(seen) > 150  # nearly all of the 9 x 9 x 2 views occur
    assert cnn.random_crop_flip(images, indices[:5], 0, flip=False).equal(images)


def test_synthetic_shapes_are_balanced_repeatable_and_not_linearly_separable():
    train, test = cnn.synthetic_shapes(6000, seed=1), cnn.synthetic_shapes(1000, seed=2)
    assert train.images.shape == (6000, 32, 32, 3) and train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [600] * 10
    assert cnn.synthetic_shapes(6000, seed=1).images.equal(train.images)
    x, y = train.images.flatten(1).float() / 255 - 0.5, train.labels
    linear = nn.Linear(3072, 10)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(linear(x), y).backward()
        optimizer.step()
    correct = linear(x).argmax(1) == y
    held_out = linear(test.images.flatten(1).float() / 255 - 0.5).argmax(1) == test.labels
    assert correct.float().mean() > 0.2  # it did learn what it can
    assert held_out.float().mean() < 0.5


# ---------------------------------------------------------------- Model


def reference_network(model):
    """The README's blocks in their own order, Conv + BatchNorm + ReLU + MaxPool, same weights."""
    conv = [m for m in model.features if isinstance(m, nn.Conv2d)]
    norm = [m for m in model.features if isinstance(m, nn.BatchNorm2d)]
    blocks = [layer for c, n in zip(conv, norm) for layer in (c, n, nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*blocks, model.classifier).to(memory_format=torch.contiguous_format)


def test_the_network_is_the_readme_s_blocks_outputs_and_gradients():
    torch.manual_seed(0)
    model = cnn.CNN(widths=(8, 12, 16), hidden=20, dropout=0.0, mean=(0.4, 0.5, 0.6)).double()
    nn.init.normal_(model.classifier[-1].weight)
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2).double() / 255 - model.mean / 255) / (model.std / 255)
    for mode in (True, False):
        model.train(mode)
        expected = reference_network(model)(pixels.contiguous())
        model.zero_grad()
        expected.pow(2).mean().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        logits = model(images)
        assert torch.allclose(logits, expected, atol=1e-10)
        model.zero_grad()
        logits.pow(2).mean().backward()
        for parameter, gradient in zip(model.parameters(), gradients):
            assert torch.allclose(parameter.grad, gradient, atol=1e-10)


def test_shapes_and_parameters_of_each_layer():
    model = cnn.CNN(widths=(8, 12, 16), units=2, hidden=20, classes=7)
    shapes = []
    for layer in model.features:
        layer.register_forward_hook(lambda layer, given, made: shapes.append(tuple(made.shape[1:]))
                                    if isinstance(layer, nn.MaxPool2d) else None)
    assert model(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 7)
    assert shapes == [(8, 16, 16), (12, 8, 8), (16, 4, 4)]
    kernels = 9 * (3 * 8 + 8 * 8 + 8 * 12 + 12 * 12 + 12 * 16 + 16 * 16)
    assert sum(p.numel() for p in model.parameters()) == (
        kernels + 4 * (8 + 12 + 16) + 256 * 20 + 20 + 20 * 7 + 7)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in cnn.CNN(batch_norm=False).modules())


def test_a_new_network_gives_every_class_the_same_chance():
    logits = cnn.CNN(classes=10)(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8))
    assert torch.allclose(F.softmax(logits, 1), torch.full((4, 10), 0.1))


# ---------------------------------------------------------------- Measures


def test_label_smoothing_is_cross_entropy_with_mixed_targets():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    targets = 0.8 * F.one_hot(labels, 5) + 0.2 / 5
    expected = -(targets * F.log_softmax(logits, 1)).sum(1).mean()
    assert torch.allclose(cnn.cross_entropy(logits, labels, 0.2), expected)
    assert torch.allclose(cnn.cross_entropy(logits, labels), F.cross_entropy(logits, labels))


def test_measures_on_a_case_worked_out_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.05, 0.05, 0.9],
                                  [0.3, 0.6, 0.1]])
    labels = torch.tensor([0, 1, 2, 0])
    logits = probabilities.log()
    assert cnn.accuracy(logits, labels) == 0.5
    assert cnn.accuracy(logits, labels, top=2) == 1.0
    assert cnn.confusion_matrix(logits.argmax(1), labels, 3).tolist() == [[1, 1, 0], [1, 0, 0],
                                                                          [0, 0, 1]]
    # Bins of width 0.1: 0.6 wrong; 0.7 right and wrong; 0.9 right.
    expected = (abs(0 - 0.6) + abs(1 - 1.4) + abs(1 - 0.9)) / 4
    assert cnn.calibration_error(logits, labels, bins=10) == pytest.approx(expected, abs=1e-6)


def test_mirror_averages_an_image_and_its_mirror_image():
    model = cnn.CNN(widths=(4, 4, 4))
    nn.init.normal_(model.classifier[-1].weight)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    plain = cnn.predict_logits(model, images, False, torch.device("cpu"))
    flipped = cnn.predict_logits(model, images.flip(2), False, torch.device("cpu"))
    assert not torch.allclose(plain, flipped, atol=1e-3)
    both = cnn.predict_logits(model, images, True, torch.device("cpu"))
    assert torch.allclose(both, (plain + flipped) / 2, atol=1e-6)


# ---------------------------------------------------------------- The command line


def weights(path):
    return common.load_checkpoint(path, "cnn.py")["model"]


def test_it_learns_writes_everything_and_predicts(run, tmp_path):
    done = run("cnn.py", "--data", "synthetic", "--synthetic-size", 4000, "--epochs", 5,
               "--batch-size", 32, "--lr", 0.05, "--widths", 16, 32, 64, "--device", "cpu")
    out = tmp_path / "runs" / "cnn"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test"]["accuracy"] > 0.55  # 0.1 is chance
    assert summary["test"]["top3"] > summary["test"]["accuracy"]
    assert set(summary) == {"script", "data", "options", "test", "seconds", "versions"}
    assert summary["data"] == "synthetic" and summary["script"] == "cnn.py"
    assert len(summary["test"]["per_class"]) == 10
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [row["epoch"] for row in rows] == list("12345")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    for picture in ("curves", "confusion", "predictions", "filters"):
        with Image.open(str(out / (picture + ".png"))) as image:
            assert min(image.size) > 100
    assert f"accuracy {summary['test']['accuracy']:.2%}" in done.stdout
    assert "epoch  5/5" in done.stdout and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 80

    part = cnn.synthetic_shapes(40, seed=99)
    for i, image in enumerate(part.images):
        Image.fromarray(image.numpy()).save(str(tmp_path / f"{i}.png"))
    names = [f"{i}.png" for i in range(40)]
    lines = run("cnn.py", "--predict", *names).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == names
    right = [line.split("\t")[1] == list(cnn.SHAPES)[label]
             for line, label in zip(lines, part.labels)]
    assert np.mean(right) > 0.4
    assert all(0.1 <= float(line.split("\t")[2]) <= 1 for line in lines)
    assert run("cnn.py", "--predict", "-", stdin="\n".join(names)).stdout.splitlines() == lines
    assert run("cnn.py", "--predict", "-").stdout == ""
    assert run("cnn.py", "--predict", "no.png", status=2).stderr == (
        "cnn.py: error: no.png: no such file\n")


@pytest.mark.parametrize("stop, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_resumes_to_the_same_weights(run, tmp_path, stop, status):
    options = [str(o) for o in (*TINY, "--epochs", 4, "--batch-size", 64)]
    run("cnn.py", *options, "--out", "whole")
    command = [sys.executable, str(ROOT / "cnn.py"), *options, "--out", "cut"]
    process = subprocess.Popen(command, cwd=str(tmp_path), stdout=subprocess.PIPE,
                               universal_newlines=True)
    for line in process.stdout:
        if line.startswith("epoch  2/4"):
            process.send_signal(stop)
            break
    assert process.communicate(timeout=60)[0].endswith("--out cut --resume\n")
    assert process.returncode == status
    run("cnn.py", "--resume", "--out", "cut")
    for name in ("last.pt", "best.pt"):
        whole, resumed = weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)
        assert all(whole[key].equal(resumed[key]) for key in whole)
    tables = [list(csv.DictReader((tmp_path / out / "history.csv").open()))
              for out in ("whole", "cut")]
    for table in tables:
        for row in table:
            del row["seconds"]
    assert tables[0] == tables[1] and len(tables[0]) == 4
    message = run("cnn.py", "--resume", "--out", "cut", "--widths", 8, 8, 9, status=2).stderr
    assert message == ("cnn.py: error: --widths: the run in cut was started with [8, 8, 8]; leave "
                       "--widths out, or start a new run in another --out\n")


def test_early_stopping_ends_a_run_that_no_longer_gains(run, tmp_path):
    done = run("cnn.py", *TINY, "--epochs", 20, "--lr", 0, "--patience", 2)
    assert "no better validation accuracy for 2 epochs: stopping early" in done.stdout
    assert len((tmp_path / "runs" / "cnn" / "history.csv").read_text().splitlines()) == 1 + 3


def test_own_images_train_from_a_folder(run, tmp_path):
    part = cnn.synthetic_shapes(80, seed=3)
    for i, (image, label) in enumerate(zip(part.images, part.labels)):
        folder = tmp_path / "photos" / list(cnn.SHAPES)[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).resize((50, 40)).save(str(folder / f"{i}.jpg"))
    done = run("cnn.py", *TINY, "--data", "photos", "--epochs", 1)
    assert "photos, 10 classes, on cpu: images to train 60, validate 10, test 10" in done.stdout
    checkpoint = common.load_checkpoint(tmp_path / "runs" / "cnn" / "best.pt", "cnn.py")
    assert checkpoint["classes"] == sorted(cnn.SHAPES)


def test_too_few_images_to_hold_any_out_is_one_line(run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(str(tmp_path / "photos" / name / "0.png"))
    assert run("cnn.py", "--data", "photos", status=2).stderr == (
        "cnn.py: error: --data photos: no class has an image to spare to validate or test on; "
        "provide more of them\n")


def test_without_a_network_auto_trains_on_shapes_and_cifar10_is_an_error(run):
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    problem = ("CIFAR10 is not in data, and no download: urllib.error.URLError: <urlopen error "
               "[Errno 111] Connection refused>\n")
    done = run("cnn.py", *TINY, "--data", "auto", "--epochs", 1, env=offline)
    assert done.stderr == f"warning: {problem}         training on synthetic shapes instead\n"
    assert done.stdout.startswith("synthetic, ")
    done = run("cnn.py", "--data", "cifar10", status=2, env=offline)
    assert done.stderr == f"cnn.py: error: {problem}"


def test_cifar10_files_in_place_are_used(monkeypatch):
    class CIFAR10:
        classes = ["a", "b"]

        def __init__(self, root, train=True):
            planes = np.zeros((20 if train else 10, 3, 32, 32), np.uint8)
            self.data = planes.transpose(0, 2, 3, 1)  # as torchvision keeps them
            self.targets = [0, 1] * (10 if train else 5)
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    parts, classes = common.load_torchvision("CIFAR10", "data")
    assert parts["train"][0].shape == (20, 32, 32, 3) and classes == ["a", "b"]
    assert common.checksum(parts["train"]) != common.checksum(parts["test"])


@pytest.mark.parametrize("options, message", [
    (["--epochs", 0], "argument --epochs: 0 is not from 1 to 1000000000"),
    (["--lr", -1], "argument --lr: -1 is not from 0 to 1000000000"),
    (["--dropout", 1.5], "argument --dropout: 1.5 is not from 0 to 0.99"),
    (["--widths", 64, 128], "argument --widths: expected 3 arguments"),
    (["--device", "warp"], "--device warp: not found by this PyTorch; try --device auto"),
    (["--data", "nowhere"], "--data nowhere: neither a folder nor the name of a data set"),
    (["--resume"], "there is no runs/cnn/last.pt; train first, or name the run's folder with "
                   "--out"),
    (["--predict", "x.png"], "there is no runs/cnn/best.pt; train first, or name the run's folder "
                             "with --out"),
    ([*TINY, "--out", "file/run"], "--out file/run: Not a directory; choose a folder to write to"),
    (["--compil"], "unrecognized arguments: --compil"),
])
def test_a_mistake_is_one_line_and_exit_status_2(run, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    assert run("cnn.py", *options, status=2).stderr == f"cnn.py: error: {message}\n"


def test_a_run_that_diverges_stops_at_once(run):
    done = run("cnn.py", *TINY, "--lr", 1e9, "--clip", 0, "--no-batch-norm", status=2)
    assert re.fullmatch(r"cnn.py: error: the loss or its gradient is not finite at step \d; try a "
                        r"lower --lr or a --clip \(what was saved up to the last whole epoch is "
                        r"good\)\n", done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_an_error_where_there_is_none(run):
    assert run("cnn.py", "--device", "cuda", status=2).stderr == (
        "cnn.py: error: --device cuda: not found by this PyTorch; try --device auto\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["auto", "float32", "float16"])
def test_it_trains_on_cuda(run, tmp_path, precision):
    run("cnn.py", "--data", "synthetic", "--synthetic-size", 4000, "--epochs", 5,
        "--batch-size", 32, "--lr", 0.05, "--device", "cuda", "--precision", precision)
    summary = json.loads((tmp_path / "runs" / "cnn" / "summary.json").read_text())
    assert summary["test"]["accuracy"] > 0.55
