"""The helpers of common.py, each by what it promises."""

import errno
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common

ROOT = Path(common.__file__).resolve().parent


def test_warmup_rises_in_a_line_and_cosine_falls_to_zero():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = common.warmup_cosine(optimizer, warmup=3, total=13)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[8] == pytest.approx(1.0)  # half way down
    assert rates[13] == pytest.approx(0.0)
    expected = [1 + math.cos(math.pi * i / 10) for i in range(11)]
    assert rates[3:] == pytest.approx(expected)


def test_epochs_since_best_counts_from_the_first_of_equals():
    history = [{"a": value} for value in (0.1, 0.7, 0.7, 0.6)]
    assert [common.epochs_since_best(history[:n], "a") for n in (1, 2, 3, 4)] == [0, 0, 1, 2]


def test_clip_gradients_scales_to_the_norm_and_returns_the_old_one():
    model, scaler = nn.Linear(3, 1), common.gradient_scaler(torch.float32)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([4.0])
    assert common.clip_gradients(model, 0, 1, scaler).item() == 5
    assert model.bias.grad.item() == 4  # 0 leaves the gradient as it is
    common.clip_gradients(model, 2.5, 1, scaler)
    assert model.bias.grad.item() == pytest.approx(2, rel=1e-4)
    model.bias.grad[0] = math.nan
    with pytest.raises(common.UserError, match="not finite at step 7; try a lower --lr"):
        common.clip_gradients(model, 1.0, 7, scaler)


@pytest.mark.skipif(not common.HAS_AUTOCAST, reason="PyTorch 1.10 brought autocast for the CPU")
def test_precision_is_what_the_device_is_fastest_in(monkeypatch):
    cpu = torch.device("cpu")
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(common, "CPU_HAS_BFLOAT16", fast)
        assert common.select_dtype("auto", cpu) == dtype
        assert common.select_dtype("float32", cpu) == torch.float32
    with pytest.raises(common.UserError, match="--precision float16 does not work on cpu with "):
        common.select_dtype("float16", cpu)


def test_parameter_groups_decay_matrices_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, free = common.parameter_groups(model, 0.1)
    assert [p.dim() for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert [p.dim() for p in free["params"]] == [1] * 4 and free["weight_decay"] == 0


def test_seed_everything_repeats_and_tells_epochs_apart():
    def draw(*seed):
        common.seed_everything(*seed)
        return torch.rand(1).item(), np.random.rand()
    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(2, 1), draw(1), draw(12)}) == 4


def test_an_epoch_leaves_a_csv_table_and_checkpoints(tmp_path):
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    common.save_epoch(tmp_path, rows[:1], {"script": "x", "n": 1}, {"script": "x", "n": 1})
    common.save_epoch(tmp_path, rows, False, {"script": "x", "n": 2})  # not the best one
    assert (tmp_path / "history.csv").read_text() == "epoch,loss\n1,0.5\n2,0.25\n"
    assert common.load_checkpoint(tmp_path / "best.pt", "x")["n"] == 1
    assert common.load_checkpoint(tmp_path / "last.pt", "x")["n"] == 2


# ---------------------------------------------------------------- Files


@pytest.mark.parametrize("code, text", [(errno.ENOSPC, "No space left on device"),
                                        (errno.EROFS, "Read-only file system")])
def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, code, text):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"script": "x", "epoch": 1})

    def fail(descriptor):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(common.UserError) as error:
        common.save_checkpoint(path, {"script": "x", "epoch": 2})
    assert str(error.value) == f"cannot write {path}: {text}; what was there is kept"
    assert common.load_checkpoint(path, "x")["epoch"] == 1
    assert os.listdir(str(tmp_path)) == ["last.pt"]


def test_checkpoints_that_are_missing_foreign_or_truncated_are_one_line(tmp_path):
    path = tmp_path / "best.pt"
    with pytest.raises(common.UserError, match="there is no .*best.pt; train first"):
        common.load_checkpoint(path, "cnn.py")
    common.save_checkpoint(path, {"script": "rnn.py", "model": torch.randn(500)})
    with pytest.raises(common.UserError, match="best.pt was written by rnn.py, not by cnn.py"):
        common.load_checkpoint(path, "cnn.py")
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[:len(whole) * tenth // 10])
        with pytest.raises(common.UserError) as error:
            common.load_checkpoint(path, "rnn.py")
        assert str(error.value).startswith(f"{path} is damaged or does not fit: ")
        assert "\n" not in str(error.value)


class Payload:
    """Pickled, this is an order to create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.skipif(not common.SAFE_LOADING, reason="this PyTorch cannot promise it")
def test_a_checkpoint_runs_no_code(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"script": "cnn.py", "model": Payload(str(trap))}, str(tmp_path / "best.pt"))
    with pytest.raises(common.UserError, match="is damaged or does not fit"):
        common.load_checkpoint(tmp_path / "best.pt", "cnn.py")
    assert not trap.exists()


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path):
    out = str(tmp_path / "run")
    with common.run_folder(out, resume=False):
        with pytest.raises(common.UserError) as error:
            with common.run_folder(out, resume=False):
                pass
        assert str(error.value) == f"--out {out}: another run is writing there; take another one"
    with common.run_folder(out, resume=False) as folder:
        assert folder == Path(out)


def test_another_run_is_moved_aside_and_a_resumed_one_is_not(tmp_path, capsys):
    out = tmp_path / "run"
    for n in range(3):
        with common.run_folder(str(out), resume=False) as folder:
            assert not (folder / "last.pt").exists()
            (folder / "last.pt").write_text(str(n))
            (folder / ".best.pt.tmp").write_text("left by a crash")
    assert [path.joinpath("last.pt").read_text() for path in
            (tmp_path / "run.1", tmp_path / "run.2", out)] == ["0", "1", "2"]
    assert capsys.readouterr().err.endswith(f"warning: {out} held another run, which is now in "
                                            f"{out}.2\n")
    with common.run_folder(str(out), resume=True) as folder:
        assert (folder / "last.pt").read_text() == "2"
        assert not (folder / ".best.pt.tmp").exists()


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="--out .*file/run: .* choose a folder to write to"):
        with common.run_folder(str(tmp_path / "file" / "run"), resume=False):
            pass


@pytest.mark.parametrize("place", [
    "signal.pause()", "del killer\n        for _ in common.progress(range(10**9), ''): pass"])
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, number, status, place):
    code = f"""
import common, os, signal, sys
class Killer:
    def __del__(self):  # what is raised in here goes nowhere
        os.kill(os.getpid(), {int(number)})
        for _ in range(1000):
            pass
def main():
    killer = Killer() if {place.startswith("del")} else None
    with common.run_folder("my run", False) as folder:
        (folder / "last.pt").write_text("")
        killer or os.kill(os.getpid(), {int(number)})
        {place}
sys.argv = ["cnn.py", "--epochs", "9"]
common.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=100,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == status
    assert done.stderr == b"" or sys.version_info < (3, 8)  # it tells there what it drops
    assert done.stdout.decode() == ("\ninterrupted; go on with: "
                                    "python cnn.py --out 'my run' --resume\n")


def test_a_signal_waits_until_torch_save_is_done(tmp_path):
    code = """
import common, os, pathlib, signal
class Interrupting:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGINT)
        print("went on")
        return int, ()
common.run_main(lambda: common.save_checkpoint(pathlib.Path("last.pt"), {"": Interrupting()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"went on\n", b"")
    assert os.listdir(str(tmp_path)) == []


def test_output_that_nobody_reads_ends_quietly():
    code = "import common; common.run_main(lambda: [print(n) for n in range(10**6)])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    process.stdout.readline()
    process.stdout.close()  # as `head -n 1` does
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 1
    process.stderr.close()


# ---------------------------------------------------------------- Command line


@pytest.mark.parametrize("text, message", [
    ("0", "argument --epochs: 0 is not from 1 to 1000000000"),
    ("1.5", "argument --epochs: invalid int value: '1.5'")])
def test_a_wrong_number_is_one_line(text, message, capsys):
    parser = common.option_parser("x.py", "", "")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--epochs", text])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"x.py: error: {message}\n"


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e10"])
def test_numbers_that_no_option_takes(text):
    with pytest.raises(Exception, match=f"{text} is not from 0 to 1000000000"):
        common.number(float, 0)(text)


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(common.UserError, match="^--device warp: not found by this PyTorch; try"):
        common.select_device("warp")


# ---------------------------------------------------------------- Images


def save_image(path, size, mode="RGB", colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(str(path))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (300, 40)])
def test_images_of_any_mode_and_size_are_read(tmp_path, mode, size):
    save_image(tmp_path / "image.png", size, mode)
    for channels in (1, 3):
        image = common.read_image(tmp_path / "image.png", 32, channels)
        assert image.shape == (32, 32, channels) and image.dtype == np.uint8


def test_images_of_16_bits_keep_their_range(tmp_path):
    values = np.array([[0, 25600], [30000, 65535]], np.uint16)
    Image.fromarray(values).save(str(tmp_path / "deep.png"))
    image = common.read_image(tmp_path / "deep.png", 2, 1)
    assert image[..., 0].tolist() == [[0, 100], [117, 255]]


def test_an_image_is_cropped_about_its_centre(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(str(tmp_path / "wide.png"))
    assert (common.read_image(tmp_path / "wide.png", 10, 3) == 200).all()


def test_a_folder_of_classes_is_read_and_bad_files_are_named(tmp_path, capsys):
    for part, count in (("train", 3), ("test", 2)):
        for i, name in enumerate(("cat", "dog")):
            for n in range(count):
                save_image(tmp_path / part / name / f"{n}.png", (40, 30), colour=(i * 100, n, 0))
    (tmp_path / "train" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    parts, classes = common.load_image_folder(str(tmp_path), 32, 3)
    assert classes == ["cat", "dog"] and set(parts) == {"train", "test"}
    images, labels = parts["train"]
    assert images.shape == (6, 32, 32, 3) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:, 0, 0].tolist() == [[100 * i, n, 0] for i in (0, 1) for n in range(3)]
    assert capsys.readouterr().err == (
        f"warning: skipped 1 files: {tmp_path}/train/cat/broken.jpg: "
        "not an image that can be read\n")


def test_folders_that_cannot_be_trained_on_are_one_line(tmp_path):
    def message():
        with pytest.raises(common.UserError) as error:
            common.load_image_folder(str(tmp_path / "set"), 32, 3)
        return str(error.value)
    folder = f"--data {tmp_path}/set: "
    assert message() == folder + "neither a folder nor the name of a data set"
    (tmp_path / "set" / "cat").mkdir(parents=True)
    assert message() == folder + (f"{tmp_path}/set needs a sub-folder of images for each of at "
                                  "least two classes, and has 1")
    save_image(tmp_path / "set" / "dog" / "0.png", (5, 5))
    assert message() == folder + f"no readable image in {tmp_path}/set/cat"


def test_a_split_is_fixed_by_its_seed_and_keeps_the_classes_even():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 2 + [3])
    kept, held = common.split_indices(labels, 0.1, seed=5)
    assert sorted(kept.tolist() + held.tolist()) == list(range(83))
    assert labels[held].bincount(minlength=4).tolist() == [5, 3, 1, 0]
    assert held.tolist() == common.split_indices(labels, 0.1, seed=5)[1].tolist()
    assert held.tolist() != common.split_indices(labels, 0.1, seed=6)[1].tolist()


def test_a_server_that_refuses_or_hangs_is_given_up():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:{}/".format(server.getsockname()[1])
        with pytest.raises(OSError, match="URLError.*Connection refused"):
            common.require_answer(url, seconds=20)
        server.listen(1)  # connects, and never answers
        with pytest.raises(OSError, match="no answer in 2 seconds"):
            common.require_answer(url, seconds=2)
