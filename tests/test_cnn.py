"""cnn.py: its data, model and measures, image folders, and the command line from end to end."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cnn
import common

SMALL = ("--data", "synthetic", "--synthetic-size", 600, "--widths", 8, 8, 8, "--hidden", 16,
         "--device", "cpu")


def summary(out="runs/cnn"):
    """What the run in a folder below the working directory says about its test."""
    return json.loads(Path(out, "summary.json").read_text())["test"]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(str(path))


# ---------------------------------------------------------------- Data and model


def test_random_crop_flip_is_reflection_padding_and_cropping():
    images = torch.randint(0, 256, (3, 9, 9, 3), dtype=torch.uint8)
    planes = images.permute(0, 3, 1, 2).float()
    padded = F.pad(planes, (2, 2, 2, 2), mode="reflect").byte().permute(0, 2, 3, 1)
    views = {}  # of which image each possible view is
    for i, y, x in np.ndindex(3, 5, 5):
        view = padded[i, y:y + 9, x:x + 9]
        for either in (view, view.flip(1)):
            views[either.numpy().tobytes()] = i
    indices = torch.arange(3).repeat(400)
    crops = cnn.random_crop_flip(images, indices, 2, flip=True)
    seen = [crop.numpy().tobytes() for crop in crops]
    assert [views[crop] for crop in seen] == indices.tolist()
    assert len(set(seen)) == len(views) == 3 * 5 * 5 * 2
    assert cnn.random_crop_flip(images, indices[:3], 0, flip=False).equal(images)


def test_synthetic_shapes_are_balanced_and_repeatable():
    first, second, other = (cnn.synthetic_shapes(50, 24, seed) for seed in (1, 1, 2))
    assert first.images.shape == (50, 24, 24, 3) and first.labels.bincount().tolist() == [5] * 10
    assert first.images.equal(second.images) and not first.images.equal(other.images)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_model_is_plain_layers_outputs_and_gradients(batch_norm):
    torch.manual_seed(0)
    model = cnn.CNN(classes=7, size=16, widths=(4, 6, 8), convs=2, hidden=20, dropout=0.0,
                    batch_norm=batch_norm, mean=(0.25, 0.5, 0.75)).double()
    layers = []
    inputs = 3
    for outputs in (4, 6, 8):
        for _ in range(2):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU())
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(8 * 2 * 2, 20, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(20))
    plain = nn.Sequential(*layers, nn.ReLU(), nn.Linear(20, 7)).double()
    for parameter, same in zip(model.parameters(), plain.parameters()):
        nn.init.normal_(parameter, std=0.3)
        same.data.copy_(parameter.data)
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    mean = torch.tensor([0.25, 0.5, 0.75]).double().view(3, 1, 1)
    pixels = (images.permute(0, 3, 1, 2).double() / 255 - mean) / 0.25
    for mode in (True, False):
        model.train(mode)
        plain.train(mode)
        logits, expected = model(images), plain(pixels)
        assert torch.allclose(logits, expected, atol=1e-10)
        for output in (logits, expected):
            output.pow(2).mean().backward()
        for parameter, same in zip(model.parameters(), plain.parameters()):
            assert torch.allclose(parameter.grad, same.grad, atol=1e-10)


def test_shapes_of_the_blocks_and_the_first_probabilities():
    model = cnn.CNN(classes=5, size=40, widths=(8, 12, 16))
    images = torch.randint(0, 256, (2, 40, 40, 3), dtype=torch.uint8)
    x = torch.rand(2, 3, 40, 40)
    for block, shape in zip(model.features, [(8, 20, 20), (12, 10, 10), (16, 5, 5)]):
        x = block(x)
        assert x.shape == (2, *shape)
    assert torch.allclose(F.softmax(model(images), 1), torch.full((2, 5), 0.2))


# ---------------------------------------------------------------- Measures


def test_label_smoothing_is_cross_entropy_with_mixed_targets():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    targets = 0.8 * F.one_hot(labels, 5) + 0.2 / 5
    expected = -(targets * F.log_softmax(logits, 1)).sum(1).mean()
    assert torch.allclose(cnn.cross_entropy(logits, labels, 0.2), expected)
    assert torch.allclose(cnn.cross_entropy(logits, labels), F.cross_entropy(logits, labels))


def test_calibration_error_worked_out_by_hand():
    probabilities = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.05, 0.95], [0.35, 0.65]])
    labels = torch.tensor([0, 1, 1, 0])
    # In bins of a tenth: 0.65 is wrong; one of two is correct at 0.75; 0.95 is correct.
    expected = (abs(0 - 0.65) + abs(1 - 1.5) + abs(1 - 0.95)) / 4
    assert cnn.calibration_error(probabilities.log(), labels, 10) == pytest.approx(expected)


def test_the_last_epoch_of_the_highest_accuracy_is_the_best():
    history = [{"epoch": epoch, "validation_accuracy": accuracy}
               for epoch, accuracy in enumerate((0.5, 0.7, 0.7, 0.6), start=1)]
    assert [common.epochs_since_best(history[:n], cnn.score) for n in (2, 3, 4)] == [0, 0, 1]


def test_flips_are_averaged():
    model = cnn.CNN(widths=(4, 4, 4))
    nn.init.normal_(model.classifier[-1].weight)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    plain = cnn.predict_logits(model, images, False)
    flipped = cnn.predict_logits(model, images.flip(2), False)
    assert not torch.allclose(plain, flipped, atol=1e-3)
    both = cnn.predict_logits(model, images, True)
    assert torch.allclose(both, (plain + flipped) / 2, atol=1e-6)


# ---------------------------------------------------------------- Folders of images


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos("cat", 20) writes 20 random images to photos/cat in the working directory."""
    monkeypatch.chdir(str(tmp_path))
    rng = np.random.default_rng(0)

    def write(name, count):
        Path("photos", name).mkdir(parents=True)
        for i in range(count):
            save(Path("photos", name, f"{i}.png"), rng.integers(0, 256, (8, 8, 3)))
    return write


def load(*options):
    options = ["--data", "photos", "--size", "8", *options]
    data = cnn.load_data(cnn.build_parser().parse_args(options))
    return data, [len(images) for images, _ in data[2:5]]


def test_sets_that_are_there_are_kept(photos):
    for name, count in (("train", 20), ("val", 6), ("test", 4)):
        photos(f"{name}/cat", count)
        photos(f"{name}/dog", count)
    data, sizes = load()
    assert data.classes == ["cat", "dog"] and sizes == [40, 12, 8]


def test_missing_sets_are_tenths_without_hidden_folders_and_copies(photos):
    for name in ("cat", "dog", ".ipynb_checkpoints"):
        photos(name, 50)
    for path in Path("photos", "dog").glob("*.png"):
        shutil.copy(str(path), str(path.with_name("copy of " + path.name)))
    data, sizes = load()
    assert data.classes == ["cat", "dog"] and sizes == [120, 10, 10]
    contents = [{image.numpy().tobytes() for image in images} for images, _ in data[2:5]]
    assert len(set().union(*contents)) == sum(map(len, contents)) == 100
    for part in (data.validation, data.test):
        assert part.labels.bincount().tolist() == [5, 5]
    for file, image in zip(data.test_files, data.test.images):
        assert Image.open(file).tobytes() == image.numpy().tobytes()
    assert 24 <= sum(load("--limit", "30")[1]) <= 30  # without copies in validation and test


SPLIT = ("? Name sets train, val and test, with no other folder beside them; or move all classes "
         "into a folder train")


@pytest.mark.parametrize("folders, message", [
    (["training_set/a", "b"], f"sets or classes: training_set{SPLIT}"),
    (["seg_train/a", "seg_test/a"], f"sets or classes: seg_test, seg_train{SPLIT}"),
    (["train/a", "train/b", "Valid/a"], f"sets or classes: Valid, train{SPLIT}"),
    (["train/a", "train/b", "test/a", "test/b", "c"], f"sets or classes: test, train{SPLIT}"),
    (["val/a", "val/b", "test/a", "test/b"], f"sets or classes: test, val{SPLIT}"),
    (["Testing/a", "valley/a"], f"sets or classes: Testing{SPLIT}"),
    (["a"], "photos has 1 class folder(s); at least two are needed"),
    (["train/a", "train/b", "test/a", "test/c"],
     "photos/test and photos/train must have the same class folders, some of which may be empty; "
     "one lacks b, c"),
])
def test_folders_of_another_structure_are_refused(photos, folders, message):
    for name in folders:
        photos(name, 1)
    with pytest.raises(common.UserError) as caught:
        load()
    assert str(caught.value) == f"--data photos: {message}"
    with pytest.raises(common.UserError, match="--data photos and photos/runs, .* must be apart"):
        load("--out", "photos/runs")


def test_a_set_without_files_is_named(photos):
    for name in ("train/cat", "train/dog"):
        photos(name, 10)
    for name in ("val/cat", "val/dog"):
        photos(name, 0)
    with pytest.raises(common.UserError, match="^--data photos: there are no files in photos/val$"):
        load()


def test_a_class_that_shows_nothing_is_a_warning_and_an_empty_one_an_error(photos):
    photos("train/dark", 0)
    photos("train/noise", 30)
    data, _ = load()
    with pytest.raises(common.UserError, match="training image of the class dark is left"):
        cnn.describe_classes(data)
    for i in range(30):
        save(Path("photos", "train", "dark", f"{i}.png"), np.full((8, 8, 3), i))
    with pytest.warns(UserWarning, match="30 of 60 images consist of a single color"):
        data, _ = load()
    same = data.train._replace(images=torch.ones_like(data.train.images))
    with pytest.warns(UserWarning, match="images of dark are all the same"):
        cnn.describe_classes(data._replace(train=same))


def test_a_class_without_test_images_has_no_accuracy(run, photos):
    for name, count in (("train/cat", 20), ("train/dog", 25), ("test/cat", 10), ("test/dog", 0)):
        photos(name, count)
    done = run("cnn.py", *SMALL, "--data", "photos", "--size", 8, "--epochs", 1)
    assert "warning: with fewer than 30 examples to validate or test on" in done.stderr
    assert re.search(r"^cat \d\d, dog \d\d$", done.stdout, re.M)
    assert re.search(r"^ +- dog$", done.stdout, re.M)
    assert summary()["per_class"]["dog"] is None
    text = Path("runs/cnn/predictions.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    assert {Path(row[0]).parent for row in rows} == {Path("photos/test/cat")}
    assert len(rows) == 10 and {row[1] for row in rows} == {"cat"}
    assert sum(row[1] == row[2] for row in rows) / 10 == summary()["accuracy"]
    predicted = run("cnn.py", "--predict", *(row[0] for row in rows)).stdout.splitlines()
    for row, line in zip(rows, predicted):
        file, label, probability = line.split("\t")
        assert [file, label] == [row[0], row[2]] and float(probability) == pytest.approx(
            float(row[3]), abs=1e-3)


def test_resume_refuses_other_images_to_evaluate_on(run, photos):
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog"):
        photos(name, 20)
    run("cnn.py", *SMALL, "--data", "photos", "--size", 8, "--epochs", 1)
    for name in ("val", "test"):
        path = min(Path("photos", name, "dog").iterdir())
        content = path.read_bytes()
        path.unlink()
        done = run("cnn.py", "--resume", "--epochs", 2, status=2)
        assert done.stderr.endswith("the run in runs/cnn was started with other data\n")
        path.write_bytes(content)


def test_details_that_32_pixels_cannot_show_are_learned_at_96(run, photos):
    stripes = np.indices((96, 96, 3)) % 2  # across, and upright
    rng = np.random.default_rng(0)
    for i in range(200):
        pixels = 100 + 50 * stripes[i % 2] + rng.normal(0, 20, (96, 96, 3))
        name = "train" if i < 120 else "test"
        save(Path("photos", name, str(i % 2), f"{i}.png"), pixels.clip(0, 255))
    for size in ("32", "96"):
        run("cnn.py", *SMALL, "--data", "photos", "--size", size, "--epochs", 4, "--lr", 0.05,
            "--batch-size", 8, "--no-flip", "--out", size)
        assert common.load_checkpoint(Path(size, "best.pt"), "cnn.py")["flip"] is False
    assert 0.3 < summary("32")["accuracy"] < 0.7 and summary("96")["accuracy"] > 0.95


# ---------------------------------------------------------------- The command line

LEARN = ("--data", "synthetic", "--synthetic-size", 3000, "--epochs", 4, "--batch-size", 32,
         "--lr", 0.05, "--widths", 12, 24, 48, "--hidden", 64)


def test_it_learns_writes_everything_and_predicts(run, tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    done = run("cnn.py", *LEARN, "--device", "cpu")
    assert summary()["accuracy"] > 0.5  # chance is 0.1
    assert f"accuracy {summary()['accuracy']:.2%}" in done.stdout and done.stderr == ""
    rows = list(csv.DictReader(Path("runs/cnn/history.csv").open()))
    assert [row["epoch"] for row in rows] == list("1234")
    assert float(rows[3]["train_loss"]) < float(rows[0]["train_loss"])
    assert 0 <= float(rows[0]["clipped"]) <= 1 and float(rows[0]["gradient_norm"]) > 0
    for plot in ("curves", "confusion", "predictions"):
        with Image.open(f"runs/cnn/{plot}.png") as image:
            assert min(image.size) > 100

    # The mean and standard deviation of the training set are kept with the weights.
    model, checkpoint = cnn.load_model(Path("runs/cnn/best.pt"), torch.device("cpu"))
    data = cnn.load_data(cnn.build_parser().parse_args(list(map(str, LEARN))))
    colors = data.train.images.double().flatten(0, 2)  # (number of pixels, 3)
    assert torch.allclose(model.mean.flatten().double(), colors.mean(0), atol=6)
    assert torch.allclose(model.std.flatten().double(), colors.std(0), atol=2)
    assert checkpoint["flip"] is True and not model.training

    shapes = cnn.synthetic_shapes(40, size=32, seed=99)
    names = [f"{i}.png" for i in range(40)]
    for name, image in zip(names, shapes.images):
        save(Path(name), image)
    predicted = run("cnn.py", "--predict", *names).stdout
    files, classes, probabilities = zip(*(line.split("\t") for line in predicted.splitlines()))
    assert list(files) == names and min(map(float, probabilities)) >= 0.1
    expected = [list(cnn.SHAPES)[label] for label in shapes.labels]
    assert sum(a == b for a, b in zip(classes, expected)) > 12  # chance is 4
    assert run("cnn.py", "--predict", "-", stdin="\n".join(names)).stdout == predicted
    assert run("cnn.py", "--predict", "-").stdout == ""
    # A file that cannot be read is skipped; the others are classified as before.
    done = run("cnn.py", "--predict", "no.png", *names)
    assert done.stdout == predicted
    assert "skipped: no.png cannot be read as an image: [Errno 2]" in done.stderr
    error = run("cnn.py", "--predict", "no.png", status=2).stderr
    assert error.endswith("cnn.py: error: none of the 1 files can be read as an image\n")


def test_cifar10_as_torchvision_keeps_it(cifar10, monkeypatch):
    # torchvision's images are a transposed view of (N, 3, 32, 32).
    monkeypatch.setattr("sys.argv", ["cnn.py", "--data", "auto", "--data-dir", str(cifar10),
                                     "--epochs", "1", "--widths", "8", "8", "8",
                                     "--device", "cpu"])
    cnn.main()
    assert json.loads(Path("runs/cnn/summary.json").read_text())["data"] == "cifar10"
    first = cnn.load_data(cnn.build_parser().parse_args(["--limit", "40"])).train.images
    assert first.is_contiguous()


def test_without_a_network_auto_trains_on_shapes_and_cifar10_is_an_error(run):
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    problem = "CIFAR10 is not in data, and cannot be downloaded: .*refused.*"
    done = run("cnn.py", *SMALL, "--data", "auto", "--epochs", 1, env=offline)
    # Old versions of torchvision print progress, too.
    assert re.search(f"warning: {problem}; training on synthetic shapes instead\n", done.stderr)
    assert "\nsynthetic, on cpu: " in "\n" + done.stdout
    done = run("cnn.py", "--data", "cifar10", status=2, env=offline)
    assert re.search(f"cnn.py: error: {problem}\n", done.stderr)


@pytest.mark.parametrize("options, message", [
    (["--widths", 64, 128], "argument --widths: expected 3 arguments"),
    (["--size", 30], "--size must be a multiple of 8"),
    (["--data", "nowhere"],
     "--data nowhere: neither a folder nor auto, cifar10 or synthetic"),
    (["--resume"], "there is no runs/cnn/last.pt; train first, or name the run's folder with "
                   "--out"),
    (["--predict", "x.png"], "there is no runs/cnn/best.pt; train first, or name the run's folder "
                             "with --out"),
    ([*SMALL, "--lr", 1e9, "--clip", "inf", "--no-batch-norm"],
     "the loss or its gradient is not finite; start again with a lower --lr or --clip "
     "(checkpoints of earlier epochs are kept)"),
])
def test_a_mistake_is_one_line_and_exit_status_2(run, options, message):
    lines = run("cnn.py", *options, status=2).stderr.splitlines()
    assert lines[-1] == f"cnn.py: error: {message}"
    assert all("training steps the model may learn little" in line for line in lines[:-1])


def test_a_device_that_is_not_there_is_one_line_with_the_reason(run):
    error = run("cnn.py", "--device", "warp", status=2).stderr
    assert re.fullmatch("cnn.py: error: --device warp: .*device.*\n", error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [
    ["--precision", "auto"], ["--precision", "float32"], ["--precision", "bfloat16"],
    ["--compile"]])
def test_it_trains_on_cuda(run, tmp_path, options):
    run("cnn.py", *LEARN, "--device", "cuda", *options)
    assert summary(tmp_path / "runs" / "cnn")["accuracy"] > 0.5
