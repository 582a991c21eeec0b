"""Several processes, as torchrun starts them: one training, shared out."""

import csv
import socket

import pytest
import torch
from conftest import ROOT, TINY, Started

import common

FOLDERS = {"rnn": ["classify-gru", "generate-gru"]}  # of the checkpoints; the others have one


def launch(folder, count, script, *options, status=0):
    """Run a script in `count` processes with the environment that torchrun gives them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    started = []
    for rank in range(count):
        env = {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(Started(folder, script, *options, "--device", "cpu", env=env))
    done = [process.wait() for process in started]
    assert [process.returncode for process in done] == [status] * count, done
    return done


@pytest.mark.parametrize("script", TINY)
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, script):
    options = ["--out", "run", "--epochs", 1, *TINY[script].split()]
    first, second = launch(tmp_path, 2, f"{script}.py", *options)
    assert "1/1" in first.stdout and second.stdout == ""
    assert second.stderr == ""
    assert all("training steps the model may learn little" in line
               for line in first.stderr.splitlines())
    launch(tmp_path, 1, f"{script}.py", "--out", "run", "--resume", "--epochs", 2)
    launch(tmp_path, 2, f"{script}.py", "--out", "run", "--resume", "--epochs", 3)
    assert (tmp_path / "run" / "summary.json").exists()
    for name in FOLDERS.get(script, [""]):
        rows = csv.DictReader((tmp_path / "run" / name / "history.csv").open())
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]


# Steps that hardly change the weights (SGD's do: the CNN's first gradients are 0), with nothing
# random and no batch norm, whose statistics are those of each process. The targets of a batch have
# all one length: of different ones, the mean over a process's tokens would be that of its share.
STEPS = {
    "cnn": "--dropout 0 --crop 0 --no-flip --epochs 3 --batch-size 500 --lr 0.1",
    "rnn": "--dropout 0 --epochs 1 --lr 1e-9",
    "gan": "--epochs 2 --batch-size 100 --lr 1e-9",
    "transformer": "--data pairs.tsv --epochs 1 --batch-size 40 --lr 1e-9"}

START = """
import os, runpy, torch
rank, world, randn = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.randn

def draw(*shape, generator=None, **options):
    if generator is not None:  # in evaluation: the same numbers in every process
        return randn(*shape, generator=generator, **options)
    count, length = shape  # the latent vectors of a step: this process's share of the same ones
    everyone = randn(count * world, length, generator=torch.Generator().manual_seed(0))
    return everyone[rank::world]
torch.randn = draw
torch.nn.BatchNorm1d = torch.nn.BatchNorm2d = torch.nn.Identity
runpy.run_path({!r}, run_name="__main__")
"""


def gradients(checkpoint):
    """What the optimizers in a checkpoint have made of the gradients: their running means."""
    found = []
    for part in checkpoint.values():
        if isinstance(part, dict) and "state" in part:
            for buffers in part["state"].values():
                found.append(buffers.get("momentum_buffer", buffers.get("exp_avg")))
    return found


@pytest.mark.parametrize("script", TINY)
def test_two_processes_have_the_gradients_of_one(tmp_path, script):
    rows = [f"{i:04}\t{9999 - i}" for i in range(200)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *rows]))
    start = tmp_path / "start.py"
    start.write_text(START.format(str(ROOT / f"{script}.py")))
    options = [*TINY[script].split(), *STEPS[script].split(), "--clip", "inf",
               "--precision", "float32"]
    for count in (1, 2):
        launch(tmp_path, count, start, *options, "--out", f"run{count}")
    for name in FOLDERS.get(script, [""]):
        one, two = (gradients(common.load_checkpoint(
            tmp_path / f"run{count}" / name / "last.pt", f"{script}.py")) for count in (1, 2))
        assert len(one) == len(two) > 5
        assert max(gradient.abs().max() for gradient in one) > 1e-3
        for a, b in zip(one, two):
            assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()


def test_an_error_of_all_processes_or_of_the_first_one_ends_them_all(tmp_path):
    (tmp_path / "file").touch()
    # Only the first process makes the folder.
    for options, message in ((["--batch-size", 3], "a step needs at least 4 training examples"),
                             (["--out", "file/run"], "Not a directory")):
        for done in launch(tmp_path, 2, "cnn.py", *TINY["cnn"].split(), *options, status=2):
            assert message in done.stderr and "Traceback" not in done.stderr
