"""Runs that are killed at random moments and resumed, again and again, until they are done.

  python -m pytest tests/test_crashes.py                    a few kills of each script
  KILLS=50 python -m pytest -n 0 -s tests/test_crashes.py   50 of each, and when they came
"""

import csv
import json
import os
import random
import re
import signal
import time
from collections import Counter

import pytest
import torch
from conftest import Started

import common

KILLS = int(os.environ.get("KILLS", 4))
TINY = {
    "cnn": "--data synthetic --synthetic-size 600 --widths 8 8 8 --hidden 16 --epochs 4",
    "rnn": "--synthetic-size 100 --hidden 8 --epochs 2 --batch-size 32",
    "gan": "--data synthetic --synthetic-size 500 --width 4 --epochs 4",
    "transformer": "--synthetic-size 300 --d-model 8 --heads 2 --d-ff 8 --layers 1 --epochs 4"}
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}  # and the exit status


def start(script, folder, *options):
    """A run with all that it writes in `folder`."""
    images = ["--images", "images"] if script == "gan" else []
    folder.mkdir(exist_ok=True)
    return Started(folder, f"{script}.py", *options, "--out", "run", "--device", "cpu", *images)


def plain(value):
    """A nest of checkpoints, tables and metrics, without what says how long anything took."""
    if torch.is_tensor(value):
        return value.dtype, value.flatten().tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if "second" not in str(key)
                and key not in ("options", "resume")}
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value


def result(script, folder):
    """All that a run left: weights and other state, history, metrics, the names of its files."""
    run = folder / "run"
    table = list(csv.DictReader((run / "history.csv").open()))
    files = sorted(name for name in (str(path.relative_to(folder)) for path in folder.rglob("*"))
                   if not re.match(r"\w+\.\d", name))  # what a first epoch cut short had drawn
    return (files, plain(table), plain(json.loads((run / "summary.json").read_text())["test"]),
            *(plain(common.load_checkpoint(run / name, f"{script}.py"))
              for name in ("best.pt", "last.pt")))


def epochs(output) -> list:
    """What the lines about epochs begin with: which they are of, in their order."""
    return re.findall(r"^.*epoch +\d+/", output, re.M)


def wait_for(moment, process, folder, seconds) -> None:
    """Until some time within half of `seconds`, a file is being written, or after a new picture."""
    begun, pattern = time.time(), {"writing": ".*.tmp", "drawing": "*.png"}.get(moment)
    end = begun + seconds * (2 if pattern else random.random() / 2)
    while process.process.is_alive() and time.time() < end:
        try:
            if pattern and any(path.stat().st_mtime > begun for path in folder.rglob(pattern)):
                time.sleep(random.random() / 3 if moment == "drawing" else 0)
                break
        except FileNotFoundError:  # it has its name by now
            pass
        time.sleep(0.0005)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of POSIX")
@pytest.mark.parametrize("script", list(TINY))
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(tmp_path, script):
    options, begun = TINY[script].split(), time.perf_counter()
    assert start(script, tmp_path / "whole", *options).wait().returncode == 0
    seconds = time.perf_counter() - begun
    whole, killed, rounds, kills = result(script, tmp_path / "whole"), Counter(), 0, 0
    while kills < KILLS:
        rounds += 1
        folder, done, printed = tmp_path / f"round {rounds}", None, []
        while done is None or done.returncode:
            saved = (folder / "run" / "last.pt").exists()
            process = start(script, folder, *(["--resume"] if saved else options))
            moment = random.choice(("any time", "any time", "writing", "drawing"))
            if kills < KILLS:
                wait_for(moment, process, folder, seconds)
                # Ctrl-C in the middle of Python's own start is not the script's to answer.
                number = random.choice(list(SIGNALS)) if epochs(process.output()) else 9
                if process.process.is_alive():
                    os.kill(process.process.pid, number)
            done = process.wait()
            assert "Traceback" not in done.stderr, done.stderr
            if done.returncode:
                assert done.returncode == SIGNALS[number], done.stderr
                if number != signal.SIGKILL:
                    assert "\ninterrupted; " in done.stdout and done.stderr == ""
                kills += 1
                killed[moment, signal.Signals(number).name] += 1
            # At most the epoch that was not finished is done again.
            fresh = epochs(done.stdout)
            if saved and fresh and printed:
                assert printed[-1] == fresh[0] or fresh[0] not in printed
            printed = printed + fresh if saved else fresh
            for name in ("best.pt", "last.pt"):
                if (folder / "run" / name).exists():  # then it is whole
                    common.load_checkpoint(folder / "run" / name, f"{script}.py")
        assert result(script, folder) == whole
    print(f"\n{script}.py: {kills} kills in {rounds} runs:",
          ", ".join(f"{n} {' '.join(kind)}" for kind, n in sorted(killed.items())))
