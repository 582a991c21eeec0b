"""Every option of every script: what it does with --resume, and bad values."""

import argparse
import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import common


def options(script):
    """The options of a script; those after training, like --predict, are no options of a run."""
    return [action for action in importlib.import_module(script).build_parser()._actions
            if action.dest not in ("help", "resume", "predict", "sample")]


CASES = [(script, action) for script in TINY for action in options(script)]
NAMES = [f"{script} {action.option_strings[0]}" for script, action in CASES]


def another(action):
    """Words for an option that give it another value than its default."""
    if action.nargs == 0:
        return []
    default = action.default if isinstance(action.default, list) else [action.default]
    for word in action.choices or ("other", "5", "0.3", "300"):
        try:
            value = (action.type or str)(word)
        except (ValueError, argparse.ArgumentTypeError):
            continue
        if [value] != default:
            return [word] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(script, words): the options that a script takes from a command line."""
    monkeypatch.chdir(str(tmp_path))

    def start(script, words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        return common.parse_options(importlib.import_module(script).build_parser())
    return start


@pytest.mark.filterwarnings("ignore:another --epochs")
@pytest.mark.parametrize("script, action", CASES, ids=NAMES)
def test_with_resume_an_option_acts_or_is_refused(parse, script, action):
    flag, name = action.option_strings[0], action.dest
    words = [flag, *another(action)]
    changed = parse(script, words)
    Path(changed.out).mkdir(parents=True)
    path = Path(changed.out, "last.pt")
    # Left out, an option has the value that the run began with, but --compile is off.
    common.save_checkpoint(path, {"script": f"{script}.py", "options": vars(changed)})
    kept = parse(script, ["--resume", "--out", changed.out])
    assert vars(kept) == {**vars(changed), "resume": True, "compile": False}
    # Given, it acts or is refused.
    began = parse(script, ["--out", changed.out])
    common.save_checkpoint(path, {"script": f"{script}.py", "options": vars(began)})
    given = ["--resume", "--out", changed.out, *words]
    if name in common.RESUMABLE:
        assert getattr(parse(script, given), name) == getattr(changed, name)
        return
    with pytest.raises(common.UserError) as caught:
        parse(script, given)
    assert str(caught.value) == (
        f"{flag}: the run in {changed.out} was started with {getattr(began, name)}; leave {flag} "
        "out, or start a new run in another --out")


@pytest.mark.parametrize("script", TINY)
def test_help_has_a_line_for_every_option_with_its_default(script):
    parser = importlib.import_module(script).build_parser()
    shown = " ".join(parser.format_help().split())
    for action in parser._actions[1:]:
        help = action.help
        if action.default is not None and action.nargs != 0:
            help = f"{help} (default: {action.default})"
        assert f"{action.option_strings[0]} " in shown and help in shown


# Each of these must change what is learned. (rnn.py is trained to sort.)
ACTING = {
    "cnn": ["--batch-size 64", "--lr 0.01", "--warmup 0", "--weight-decay 0.1", "--clip 0.01",
            "--seed 1", "--crop 0", "--no-flip", "--dropout 0", "--label-smoothing 0",
            "--no-batch-norm"],
    "rnn": ["--batch-size 20", "--lr 0.01", "--warmup 0", "--weight-decay 1", "--clip 0.01",
            "--seed 1", "--dropout 0", "--chrono-max 2", "--teacher-forcing 0"],
    "gan": ["--batch-size 8", "--lr 0.01", "--warmup 0.5", "--weight-decay 1", "--clip 0.01",
            "--seed 1", "--beta1 0.9", "--r1 0", "--ema 0"],
    "transformer": ["--batch-size 32", "--lr 0.01", "--warmup 0", "--weight-decay 1",
                    "--clip 0.01", "--seed 1", "--dropout 0.1", "--label-smoothing 0"]}


def learned(folder, script, words):
    """The weights in best.pt, as one vector. There is no test set: no training may look at it."""
    module = importlib.import_module(script)
    args = module.build_parser().parse_args(
        [*TINY[script].split(), "--epochs", "1", "--out", str(folder), *words.split()])
    args.checksum = 0
    folder.mkdir()
    task, cell = (["generate"], ["gru"]) if script == "rnn" else ([], [])
    data = module.load_data(args, *task)._replace(test=None)
    module.train(args, data, *cell, folder, torch.device("cpu"))
    model = common.load_checkpoint(folder / "best.pt", f"{script}.py")["model"]
    return torch.cat([tensor.flatten().float() for tensor in model.values()])


@pytest.mark.filterwarnings("ignore:with .* training steps")
@pytest.mark.parametrize("script", TINY)
def test_options_of_the_training_change_what_is_learned(tmp_path, monkeypatch, script):
    monkeypatch.setattr("gan.VALIDATION_SAMPLES", 100)  # to save time
    first = learned(tmp_path / "first", script, "")
    assert first.equal(learned(tmp_path / "again", script, ""))
    for i, words in enumerate(ACTING[script]):
        assert not first.equal(learned(tmp_path / str(i), script, words)), words


BAD = {"int": ["-1", "x", "1.5", "9" * 30, ""], "float": ["-1", "x", "nan", "-inf", ""]}
TYPED = [(script, action) for script, action in CASES if action.type or action.choices]


@pytest.mark.parametrize("script, action", TYPED,
                         ids=[f"{script} {action.option_strings[0]}" for script, action in TYPED])
def test_a_bad_value_is_one_line_that_names_the_option(parse, script, action):
    kind = action.type.__name__ if action.type else "choice"
    count = action.nargs if isinstance(action.nargs, int) else 1
    for value in BAD.get(kind, ["nothing", ""]):
        with pytest.raises(common.UserError) as caught:
            parse(script, [action.option_strings[0], *[value] * count])
        message = str(caught.value)
        assert message.startswith(f"argument {action.option_strings[0]}: ")
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize("script, words", [
    ("cnn", ["--predict", "a.png"]), ("rnn", ["--predict", "a"]), ("gan", ["--sample", "3"]),
    ("transformer", ["--predict", "a"])])
def test_resume_may_stand_beside_a_prediction(parse, script, words):
    began = parse(script, ["--out", "run"])
    Path("run").mkdir()
    common.save_checkpoint(Path("run/last.pt"),
                           {"script": f"{script}.py", "options": vars(began)})
    given = parse(script, ["--resume", "--out", "run", *words])
    assert getattr(given, words[0][2:])


def test_of_several_checkpoints_the_newest_has_the_options(parse):
    for cell, epochs, seconds in (("gru", 2, 1), ("lstm", 20, 3), ("rnn", 2, 2)):
        began = parse("rnn", ["--out", "run", "--epochs", str(epochs)])
        path = Path("run", f"classify-{cell}", "last.pt")
        path.parent.mkdir(parents=True)
        common.save_checkpoint(path, {"script": "rnn.py", "options": vars(began)})
        os.utime(str(path), (seconds, seconds))
    assert parse("rnn", ["--resume", "--out", "run"]).epochs == 20


@pytest.mark.parametrize("script", TINY)
def test_a_run_resumes_with_more_epochs_and_its_own_options(run, script):
    run(f"{script}.py", *TINY[script].split(), "--epochs", 1, "--out", "run")
    done = run(f"{script}.py", "--resume", "--out", "run", "--epochs", 2)
    assert ("warning: another --epochs changes the length of the schedule, so the learning rate "
            "jumps\n") in done.stderr
    assert "resumed after epoch 1\n" in done.stdout
    done = run(f"{script}.py", "--resume", "--out", "run", "--seed", 1, status=2)
    assert done.stderr == (f"{script}.py: error: --seed: the run in run was started with 0; leave "
                           "--seed out, or start a new run in another --out\n")


def write_table(folder, target):
    folder.mkdir()
    rows = [f"{'ab'[i % 2]} text {i}\t{target}{i % 2}" for i in range(100)]
    Path(folder, "rows.tsv").write_text("\n".join(["text\tlabel", *rows]))


def test_moved_data_resume_and_other_data_are_refused(run, tmp_path):
    write_table(tmp_path / "old", "x")
    write_table(tmp_path / "other", "y")
    run("rnn.py", "--hidden", 4, "--cells", "gru", "--epochs", 1, "--data", "old/rows.tsv")
    shutil.move(str(tmp_path / "old"), str(tmp_path / "new"))
    run("rnn.py", "--resume", "--epochs", 2, "--data", "new/rows.tsv")
    done = run("rnn.py", "--resume", "--data", "other/rows.tsv", status=2)
    assert done.stderr.splitlines()[-1] == ("rnn.py: error: --data other/rows.tsv: the run in "
                                            "runs/rnn was started with other data")
