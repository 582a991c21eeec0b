"""Shared by all tests: the scripts are importable, and `run` starts their real command line."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

# Networks this small are slower on two threads than on one. Set before PyTorch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def run(tmp_path):
    """run("cnn.py", "--epochs", 1): the finished process, its working directory tmp_path.

    It is forked from this one, which has imported what takes seconds to import; with `fresh`, or
    where that cannot be, it is a new interpreter.
    """
    import torch

    def start(script, *options, status=0, stdin="", env=None, fresh=False):
        command = [str(ROOT / script), *map(str, options)]
        if fresh or torch.cuda.is_available() or not hasattr(os, "fork"):
            done = subprocess.run([sys.executable, *command], cwd=str(tmp_path), input=stdin,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300,
                                  universal_newlines=True, env=dict(os.environ, **(env or {})))
        else:
            done = fork(command, tmp_path, stdin, env or {})()
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done
    return start


def fork(command, folder, stdin="", env=None):
    """Start `python *command` in a fork; returns a function that waits for it to end, and returns
    what subprocess.run() would.
    """
    import matplotlib.backends.backend_agg  # noqa: F401
    import torchvision  # noqa: F401
    streams = [tempfile.TemporaryFile("w+") for _ in range(3)]
    streams[0].write(stdin)
    streams[0].seek(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(str(folder))
            os.environ.update(env or {})
            signal.alarm(300)
            for number, stream in enumerate(streams):
                os.dup2(stream.fileno(), number)
            sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in enumerate("rww"))
            sys.argv = command
            sys.modules.pop("common", None)  # it reads the environment
            runpy.run_path(command[0], run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait():
        _, status = os.waitpid(child, 0)
        status = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        for stream in streams:
            stream.seek(0)
        stdout, stderr = (stream.read() for stream in streams[1:])
        return subprocess.CompletedProcess(command, status, stdout, stderr)
    return wait
