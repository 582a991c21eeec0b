"""Every option of every script with odd values, alone and together: a run ends well, or with
exit status 2 and one line that says why; never with a traceback, and never not at all.
"""

import importlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import in_child
from PIL import Image

import common

ODD = ("0", "-1", "1", "2", "3", "7", "40", "1000000000", "9" * 30, "0.5", "0.99", "1e-300", "1e9",
       "1e10", "nan", "inf", "-inf", "", " ", "-", "--", "text", "True", "\u4e2d \u202e\xe9",
       "\udce9", "a\nb", "$x_$", "%s%n{}", "nowhere/at/all", "x" * 300, "one.csv")
# For these a large number costs no more time or memory than a small one.
FREE = {"batch_size", "lr", "weight_decay", "clip", "patience", "seed", "memory", "r1", "warmup",
        "max_length"}
LARGEST = {"epochs": 2, "layers": 3, "units": 3, "synthetic_size": 600}  # of the others 40
POOLS = {
    "data": ("synthetic", "auto", "cifar10", "one.csv", "rows.csv", "pairs.tsv", "bytes.csv",
             "classes", "flat", "parts", "nothing", "."),
    "out": ("first", "second", "out.\u4e2d$", "one.csv/x", "."), "device": ("cpu", "auto", "meta"),
    "predict": ("-", "ab", "classes/a/0.png"), "images": ("images", "classes", "."),
    "synthetic_size": ("100", "101", "500", "503")}
# What a case begins with, so that it is quick. Of an option that comes twice the last counts.
BASE = {"cnn": "--data synthetic --epochs 1 --synthetic-size 100 --widths 2 3 4 --hidden 8",
        "rnn": "--epochs 1 --synthetic-size 100 --hidden 4 --tasks classify --cells gru",
        "gan": "--data synthetic --epochs 1 --synthetic-size 500 --width 2 --latent 5",
        "transformer": "--epochs 1 --synthetic-size 100 --d-model 8 --d-ff 8 --heads 2 --layers 1"}


def write_data():
    """In the working directory, files and folders of data, some of no use."""
    def write(name, content):
        with open(name, "wb") as file:
            file.write(content.encode("utf-8", "surrogateescape"))

    def images(folder, count, size=(9, 6)):
        os.makedirs(folder)
        for i in range(count):
            Image.new("RGB" if i % 3 else "L", size, i).save(f"{folder}/{i}.png")
    write("one.csv", "a,b\n")
    write("rows.csv", "text,label\n" + "".join(f"$x_{i % 3} \u4e2d,{i % 2}\n" for i in range(8)))
    write("pairs.tsv", "".join(f"a {i}\t$b_{i} \u4e2d\n" for i in range(12)))
    write("bytes.csv", "\udcff\udcfe\x00\x00")
    images("classes/a", 5)
    images("classes/$b_$", 4, (1, 1))
    images("flat", 101)
    images("parts/train", 100)
    images("parts/test", 1)
    os.mkdir("nothing")


def fits(action, word, otherwise=False) -> bool:
    """Whether an option takes a word, and the run is over in a moment; `otherwise` if not taken."""
    try:
        value = (action.type or str)(word)
    except Exception:
        return otherwise
    small = isinstance(value, str) or value <= LARGEST.get(action.dest, 40)
    return small or action.dest in FREE


def cases(parser, chance, count):
    """Lists of words: each option with some odd values, and `count` random combinations."""
    actions = [action for action in parser._actions if action.dest != "help"]
    for action in parser._actions:
        yield [action.option_strings[-1]]
        good = [word for word in ODD if fits(action, word)]
        bad = [word for word in ODD if word not in good and fits(action, word, True)]
        some = chance.sample(bad, min(len(bad), 8)) + chance.sample(good, min(len(good), 3))
        for word in some:
            if action.nargs != 0:
                words = [word] * (action.nargs if isinstance(action.nargs, int) else 1)
                yield [action.option_strings[-1], *words]
    for _ in range(count):
        words = []
        for action in chance.choices(actions, k=chance.randint(1, 5)):
            n = {None: 1, "+": chance.choice((1, 1, 2, 4))}.get(action.nargs, action.nargs)
            pool = action.choices or POOLS.get(action.dest) or [w for w in ODD if fits(action, w)]
            if chance.random() < 0.05:
                pool, n = [word for word in ODD if fits(action, word, True)], chance.randint(0, 4)
            words += [action.option_strings[-1], *(chance.choice(list(pool)) for _ in range(n))]
        yield words


def attempt(script, words) -> str:
    """Run a script with these words; what it did other than it should, if anything."""
    sys.argv, sys.stderr = [script.__name__ + ".py", *words], io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"ab\n1+2 \xff\n\nclasses/a/0.png\n"))
    sys.stdout, status = io.TextIOWrapper(io.BytesIO()), 0
    signal.alarm(20)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.resetwarnings()
            for kind in DeprecationWarning, PendingDeprecationWarning, ResourceWarning:
                warnings.simplefilter("ignore", kind)
            common.run_main(script.main)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    lines = [line for line in sys.stderr.getvalue().splitlines()
             if not line.startswith(("warning: ", "         "))]
    lines += [str(warning.message) for warning in seen]
    if status == 2 and len(lines) == 1 and lines[0].startswith(sys.argv[0] + ": error: "):
        return "refused"
    return "\n".join(lines) if status or lines else "done"


def play(name, count):
    """Run all cases in the working directory; a list of [words, what came of them, seconds]."""
    script, chance, results = importlib.import_module(name), random.Random(name), []
    write_data()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("20 seconds")))
    # Spare what takes long and is not tried here: the network, the disk, the compiler.
    common.require_answer = mock.Mock(side_effect=OSError("no network"))
    os.fsync, torch.compile = mock.Mock(), lambda model: model
    if name == "gan":
        glyphs, latent_vectors = script.glyphs(), script.latent_vectors
        script.glyphs = lambda: glyphs
        script.latent_vectors = lambda n, *rest: latent_vectors(min(n, 50), *rest)
    drawing = common.new_figure, common.save_figure
    axis = np.frompyfunc(lambda _: mock.MagicMock(), 1, 1)
    quick = (lambda rows, columns, *_: (mock.MagicMock(), axis(np.zeros((rows, columns)))),
             lambda path, figure: None)
    for i, words in enumerate(cases(script.build_parser(), chance, count)):
        common.new_figure, common.save_figure = drawing if i % 50 == 0 else quick
        start, base = time.time(), BASE[name].split()
        if "--resume" in words:
            base = []  # the options are in last.pt
        results.append([words, attempt(script, base + words), time.time() - start])
    return results


def play_to(path, folder, *case):
    os.chdir(str(folder))
    path.write_text(json.dumps(play(*case)))


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="a case that hangs ends by an alarm")
@pytest.mark.parametrize("name, count", [("cnn", 60), ("rnn", 60), ("gan", 50),
                                         ("transformer", 60)])
def test_any_options_end_well_or_in_one_line(tmp_path, name, count):
    (tmp_path / "work").mkdir()
    in_child(play_to, tmp_path / "results", tmp_path / "work", name, count).join()
    results = json.loads((tmp_path / "results").read_text())
    wrong = [f"{name}.py {words}: {what}" for words, what, _ in results
             if what not in ("done", "refused")]
    assert not wrong, "\n".join(wrong)
    outcomes = [what for _, what, _ in results]
    assert len(outcomes) > 150 and min(map(outcomes.count, ("done", "refused"))) > 30
