"""Runs that are interrupted or killed, and resumed, again and again, until they are done.

  python -m pytest tests/test_crashes.py                  a few kills of each script
  KILLS=50 python -m pytest -n 0 tests/test_crashes.py    50 of each
"""

import csv
import json
import os
import random
import re
import signal
import time

import pytest
import torch
from conftest import ROOT, TINY, Started

import common

KILLS = int(os.environ.get("KILLS", 2))
# With random numbers in every step of training. rnn.py trains four models.
OPTIONS = {
    "cnn": "--epochs 4", "rnn": "--epochs 2 --cells lstm gru --teacher-forcing 0.5",
    "gan": "--epochs 4", "transformer": "--epochs 4 --dropout 0.1"}
if not hasattr(signal, "SIGKILL"):
    pytest.skip("needs the signals of POSIX", allow_module_level=True)
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 130, signal.SIGINT: 130}


def start(script, folder, program=None):
    """Start or resume a run; `program` is the file to run if it is not the script."""
    folder.mkdir(exist_ok=True)
    options = [*TINY[script].split(), *OPTIONS[script].split()]
    if any(folder.rglob("last.pt")):
        options = ["--resume"]
    return Started(folder, program or f"{script}.py", *options, "--out", "run", "--device", "cpu")


def saved(folder):
    """The checkpoints of a run; rnn.py has a folder of them for each task and cell."""
    return sorted(folder.rglob("*.pt"))


def plain(value):
    """A nest of results without tensors, and without what says how long anything took."""
    if torch.is_tensor(value):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()
                if "seconds" not in str(key) and key != "options"}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


def result(script, folder):
    """Everything that a run has left behind: its files and what is in them, except times."""
    run = folder / "run"
    files = {str(path.relative_to(run)): path.read_bytes()
             for path in run.rglob("*") if path.is_file()}
    for path in saved(run):
        files[str(path.relative_to(run))] = plain(common.load_checkpoint(path, f"{script}.py"))
    for path in run.rglob("history.csv"):
        files[str(path.relative_to(run))] = plain(list(csv.DictReader(path.open())))
    files["summary.json"] = plain(json.loads((run / "summary.json").read_text())["test"])
    return files


def broken_in_a_library(stderr):
    """Whether a Ctrl-C fell into a library, whose cleanup then failed with another error."""
    # Matplotlib's _setattr_cm(), for one, removes attributes that it has not set yet.
    files = re.findall('^ *File "(.*)", line', stderr, re.MULTILINE)
    return ("KeyboardInterrupt\n\nDuring handling of the above exception" in stderr
            and "site-packages" in files[-1])


def run_until_killed(script, folder, seconds, kill):
    """Start or resume a run; perhaps kill it, at any moment, also before its first checkpoint.
    Returns whether it was killed.
    """
    process = start(script, folder)
    number = signal.SIGKILL
    if kill:
        process.process.join(seconds * random.random())
        if "training" in process.output():  # Ctrl-C while Python starts is not the script's
            number = random.choice(list(STATUS))
        if process.process.is_alive():
            os.kill(process.process.pid, number)
    done = process.wait()
    broken = broken_in_a_library(done.stderr)
    # Python itself swallows, and reports, a Ctrl-C that falls into a callback such as __del__().
    if not broken and "Exception ignored in" not in done.stderr:
        assert "Traceback" not in done.stderr, done.stderr
    expected = 1 if broken else STATUS[number]
    assert done.returncode in (0, expected), done.stderr
    if done.returncode == 130 and any(folder.rglob("last.pt")):
        assert done.stderr.endswith("run --resume\n")
    for path in saved(folder):
        common.load_checkpoint(path, f"{script}.py")  # whole at any moment
    return done.returncode != 0


@pytest.mark.parametrize("script", list(TINY))
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(tmp_path, script):
    begun = time.perf_counter()
    assert not run_until_killed(script, tmp_path / "whole", 0, kill=False)
    seconds = time.perf_counter() - begun
    expected = result(script, tmp_path / "whole")
    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / f"round {rounds}"
        while run_until_killed(script, folder, seconds, kill=kills < KILLS):
            kills += 1
        assert result(script, folder) == expected


# A script that is interrupted after the first epoch of each training.
INTERRUPTED = """
import runpy, common
save = common.save_epoch
def save_and_stop(folder, args, history, *others):
    save(folder, args, history, *others)
    if len(history) == 1:
        raise KeyboardInterrupt
common.save_epoch = save_and_stop
runpy.run_path({!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", list(TINY))
def test_interrupted_between_epochs_a_run_ends_as_if_it_had_not_been(tmp_path, script):
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED.format(str(ROOT / f"{script}.py")))
    assert start(script, tmp_path / "whole").wait().returncode == 0
    for _ in range(4 if script == "rnn" else 1):
        done = start(script, tmp_path / "parts", program).wait()
        assert done.returncode == 130 and done.stderr.endswith("--out run --resume\n")
    assert start(script, tmp_path / "parts", program).wait().returncode == 0
    assert result(script, tmp_path / "parts") == result(script, tmp_path / "whole")
