"""Several processes, as torchrun starts them: the same training, shared out."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Started

import common

# Sizes that two processes cannot share out evenly, and that leave a last batch of odd size.
TINY = {
    "cnn": "--data synthetic --synthetic-size 615 --widths 8 8 8 --hidden 16 --batch-size 50",
    "rnn": "--synthetic-size 101 --hidden 8 --batch-size 31 --cells gru",
    "gan": "--data synthetic --synthetic-size 551 --width 4 --batch-size 33",
    "transformer": "--synthetic-size 303 --d-model 8 --heads 2 --d-ff 8 --layers 1 --batch-size 7"}

RUNS = {"cnn": 1, "rnn": 2, "gan": 1, "transformer": 1}  # rnn.py: one for each task


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def launch(folder, count, script, *options):
    """Run a script in `count` processes with the environment that torchrun gives them."""
    port = free_port()
    started = [Started(folder, script, *options, "--device", "cpu", env={
        "WORLD_SIZE": str(count), "RANK": str(n), "LOCAL_RANK": str(n),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for n in range(count)]
    done = [process.wait() for process in started]
    assert [process.returncode for process in done] == [0] * count, done
    return done


def history(folder):
    rows = list(csv.DictReader((folder / "history.csv").open()))
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def metrics(folder, script):
    test = json.loads((folder / "summary.json").read_text())["test"]
    if script == "rnn":  # speeds are nobody's metrics
        test = [test["gru"]["accuracy"], test["gru"]["exact_match"]]
    return test


@pytest.mark.parametrize("script", list(TINY))
def test_two_processes_report_what_one_does_and_one_goes_on(tmp_path, script):
    first, second = launch(tmp_path, 2, f"{script}.py", *TINY[script].split(), "--out",
                           "run", "--epochs", 2)
    assert "training took" in first.stdout and second.stdout == ""
    assert first.stderr == second.stderr == ""
    measured = metrics(tmp_path / "run", script)
    # One process, on the same weights: nothing is left to train, so it measures and draws again.
    launch(tmp_path, 1, f"{script}.py", "--out", "run", "--resume")
    assert metrics(tmp_path / "run", script) == measured
    launch(tmp_path, 1, f"{script}.py", "--out", "run", "--resume", "--epochs", 3)
    assert [row["epoch"] for row in history(tmp_path / "run")] == list("123" * RUNS[script])


def gradients(value) -> list:
    """From a nest of checkpoints, what the optimizers made of the first gradient they were given:
    SGD's momentum is that gradient, Adam's a share of 1 - beta1 of it."""
    if not isinstance(value, dict):
        return []
    found = [value[name] for name in ("momentum_buffer", "exp_avg") if name in value]
    return found + [tensor for part in value.values() for tensor in gradients(part)]


# Steps of all data at once, without clipping, which would hide a wrong scale. Neither batch norm
# nor dropout, nor other noise.
STEPS = {
    "cnn": "--no-batch-norm --dropout 0 --crop 0 --no-flip --epochs 1",
    "rnn": "--tasks generate --epochs 1",
    "gan": "--no-batch-norm --beta1 0 --lr 0 --epochs 16",  # the last has the gradient penalty
    "transformer": "--epochs 1 --label-smoothing 0"}


# Each process draws latent vectors of its own; here it takes its share of the same ones.
SAME_LATENT = """
import os, runpy, torch
rank, world, randn = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.randn
drawn = randn(1000, 100, generator=torch.Generator().manual_seed(0))

def share(count, *shape, **options):
    if shape != (100,) or options.get("generator"):
        return randn(count, *shape, **options)
    return drawn[rank::world][:count]
torch.randn = share
runpy.run_path({!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", list(TINY))
def test_two_processes_have_the_gradient_of_one(tmp_path, script):
    start = tmp_path / "start.py"
    start.write_text(SAME_LATENT.format(str(ROOT / f"{script}.py")))
    options = [*TINY[script].split(), "--clip", 0, "--batch-size", 10**6, *STEPS[script].split(),
               "--precision", "float32"]
    for count in (1, 2):
        launch(tmp_path, count, start, *options, "--out", f"run{count}")
    one, two = (gradients(common.load_checkpoint(tmp_path / f"run{n}" / "last.pt",
                                                 f"{script}.py")) for n in (1, 2))
    assert len(one) == len(two) > 5
    assert max(a.abs().max() for a in one) > 1e-3
    for a, b in zip(one, two):
        assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()


def test_shares_are_of_one_batch_and_their_weights_make_its_mean(monkeypatch):
    loss, batches = torch.rand(11), torch.arange(11).split(4)
    terms = torch.randint(1, 9, (11,))
    monkeypatch.setattr(common, "WORLD", 2)
    for counts in (None, terms):
        dealt = []
        for rank in range(2):
            monkeypatch.setattr(common, "RANK", rank)
            dealt.append(common.shares(batches, counts))
        weights = torch.ones(11) if counts is None else terms.float()
        for batch, *parts in zip(batches, *dealt):
            mean = sum(weight * (loss[rows] * weights[rows]).sum() / weights[rows].sum()
                       for rows, weight, _ in parts) / 2
            assert torch.isclose(mean, (loss[batch] * weights[batch]).sum() / weights[batch].sum())
            assert parts[0][2] == parts[1][2] == weights[batch].sum()
            # A batch of three is too small for batch norm in two processes: both do all of it.
            rows = torch.cat([rows for rows, *_ in parts]).sort().values
            assert rows.equal(batch if len(batch) > 3 else batch.repeat_interleave(2))


def test_processes_with_different_data_end_in_one_line(tmp_path):
    port, options = free_port(), [*TINY["cnn"].split(), "--out", "run", "--device", "cpu"]
    started = [Started(tmp_path, "cnn.py", *options, "--seed", n, env={
        "WORLD_SIZE": "2", "RANK": str(n), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}) for n in range(2)]
    first, second = (process.wait() for process in started)
    assert (first.returncode, first.stderr) == (
        1, "process 0: another process of this run is gone\n")
    assert (second.returncode, second.stderr) == (
        2, "cnn.py: error: --data: process 1 has other data than the first; copy it there\n")


@pytest.mark.skipif(torch.__version__.startswith(("1.7", "1.8")), reason="no torchrun")
def test_torchrun_starts_again_what_was_killed(tmp_path):
    options = [*TINY["cnn"].split(), "--epochs", "4", "--device", "cpu"]
    launch(tmp_path, 2, "cnn.py", *options, "--out", "whole")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=3",
         f"--master_port={free_port()}", str(ROOT / "cnn.py"), *options, "--out", "cut"],
        cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    for line in process.stdout:
        if line.startswith("epoch  2/4"):
            children = Path("/proc/{0}/task/{0}/children".format(process.pid)).read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    rest, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors and "epoch  4/4" in rest and "epoch  1/4" not in rest
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    whole, cut = (common.load_checkpoint(tmp_path / out / "last.pt", "cnn.py")["model"]
                  for out in ("whole", "cut"))
    assert all(whole[name].equal(cut[name]) for name in whole)
