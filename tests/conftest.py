"""Shared by all tests: the scripts are importable, and `run` starts their real command line."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Networks this small are slower on two threads than on one. Set before PyTorch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The options of a small run of each script.
TINY = {
    "cnn": "--data synthetic --synthetic-size 600 --widths 4 4 4 --hidden 8",
    "rnn": "--synthetic-size 300 --hidden 8 --cells gru --batch-size 40",
    "gan": "--data synthetic --limit 300 --width 4",
    "transformer": "--synthetic-size 300 --d-model 8 --heads 2 --d-ff 8 --layers 1"}

# Child processes are forked from a server that has imported what takes seconds to import and has
# computed nothing: else CUDA would not work in a fork, nor the autograd of PyTorch 1.7.
CHILDREN = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    CHILDREN.set_forkserver_preload(["pytest", "torch.distributed", "torchvision",
                                     "matplotlib.backends.backend_agg"])


def in_child(function, *arguments):
    """Start a function in a process of its own; returns that process."""
    process = CHILDREN.Process(target=function, args=arguments)
    process.start()
    return process


def run_script(command, folder, env, streams):
    """In a child: what `python *command` does there, its standard streams the three files."""
    for number, (path, mode) in enumerate(zip(streams, "rww")):
        with open(str(path), mode) as stream:
            os.dup2(stream.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in enumerate("rww"))
    os.chdir(str(folder))
    os.environ.update(env)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Started:
    """A script that runs in a process of its own, as `python script *options` would in `folder`."""

    def __init__(self, folder, script, *options, stdin="", env=None):
        self.command = [str(ROOT / script), *map(str, options)]
        self.kept = tempfile.TemporaryDirectory()  # which goes when this object does
        self.streams = [Path(self.kept.name, name) for name in ("stdin", "stdout", "stderr")]
        for path, content in zip(self.streams, (stdin, "", "")):
            path.write_text(content, encoding="utf-8")
        self.process = in_child(run_script, self.command, folder, env or {}, self.streams)

    def output(self) -> str:
        return self.streams[1].read_text(encoding="utf-8")

    def wait(self):
        """Wait for its end; returns what subprocess.run() would."""
        self.process.join(300)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.command)
        return subprocess.CompletedProcess(self.command, self.process.exitcode, self.output(),
                                           self.streams[2].read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def warn_again():
    """warn() prints the same warning only once in a process; each test is to see its own."""
    import common
    common.warn.cache_clear()


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """The folder of a small CIFAR-10 in torchvision's own format, which checks no checksums."""
    import pickle

    import numpy as np
    from torchvision.datasets import cifar
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        pixels = rng.integers(0, 256, (40, 3 * 32 * 32), dtype=np.uint8)
        content = {"data": pixels, "labels": [i % 10 for i in range(40)]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = {"label_names": [f"class {label}" for label in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(cifar, "check_integrity", lambda path, *_: os.path.exists(path))
    monkeypatch.chdir(tmp_path)
    return folder.parent


@pytest.fixture
def run(tmp_path):
    """run("cnn.py", "--epochs", 1): the finished process, its working directory tmp_path."""
    def start(script, *options, status=0, **settings):
        done = Started(tmp_path, script, *options, **settings).wait()
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done
    return start
