"""Shared by all tests: the scripts are importable, and `run` starts their real command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Networks this small are slower on two threads than on one. Set before PyTorch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def run(tmp_path):
    """run("cnn.py", "--epochs", 1): the finished process, its working directory tmp_path."""
    def start(script, *options, status=0, stdin="", env=None):
        command = [sys.executable, str(ROOT / script)] + [str(option) for option in options]
        done = subprocess.run(command, cwd=str(tmp_path), input=stdin, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, universal_newlines=True, timeout=300,
                              env=dict(os.environ, **(env or {})))
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done
    return start
