"""What the four scripts share: small independent helpers, each useful alone.

torchvision, Pillow and Matplotlib are imported where they are used, so that synthetic
data needs none of them and `--help` stays quick.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import io
import itertools
import json
import math
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two runs at once into one folder are not noticed
    fcntl = None

# ---------------------------------------------------------------- Errors and signals


class UserError(Exception):
    """A mistake the user can mend: one line that names the file or flag, and the way out."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program stands, so that `with` and `finally` still run."""


STOPPED_BY = []  # the exception of a signal: Python drops one raised while it collects garbage
SAVING = []  # not empty while torch.save() writes: an exception in there can end the process


def raise_late_signal() -> None:
    """Raise what a signal has not raised yet, or in vain."""
    if STOPPED_BY:
        raise STOPPED_BY[0]


def run_main(main: Callable) -> None:
    """Run `main()`; a UserError is one line and exit status 2, Ctrl-C is 130, SIGTERM 143."""
    def stop(signal_number, frame):
        STOPPED_BY.append(Terminated if signal_number == signal.SIGTERM else KeyboardInterrupt)
        if not SAVING:
            raise STOPPED_BY[0]
    for number in signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is in the background
            signal.signal(number, stop)
    sys.unraisablehook = lambda dropped: STOPPED_BY or sys.__unraisablehook__(dropped)
    keep_freed_memory()
    # What PyTorch warns of differs from version to version, and is in order here.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\b")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    for stream in sys.stdin, sys.stdout:  # bytes that are not UTF-8 come out as they went in
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        if WORLD > 1:
            # Every start under a name of its own: those of the last one left their addresses.
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(str(RESTARTS), store)
            dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD)
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads our output, as `head` does, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except RuntimeError as error:
        if WORLD == 1 or not ("by peer" in str(error) or "connect" in str(error)):
            raise
        print(f"process {RANK}: another process of this run is gone", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        sys.exit(143 if isinstance(stop, Terminated) else 130)


def one_line(message: object) -> str:
    """The message in one line, whatever the names in it are made of."""
    return str(message).replace("\n", "\\n")


def warn(message: str) -> None:
    if RANK == 0:
        print(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------- Several processes

# torchrun starts WORLD processes, on one machine or more, and tells each its number; after a crash
# it starts them again.
RANK, LOCAL_RANK, WORLD, RESTARTS = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("TORCHELASTIC_RESTART_COUNT", 0)))


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model; with several processes, one whose backward pass averages their gradients."""
    if WORLD == 1:
        return model
    group = dist.new_group(backend="nccl") if device.type == "cuda" else None
    return DDP(model, process_group=group, **{DDP_BUFFERS: False})


def shares(batches: Iterable[Tensor], terms: Tensor | None = None) -> list:
    """Deal each batch of indices out to the processes: a list of this one's (indices, weight,
    terms in the whole batch). From here on each process draws random numbers of its own.

    The mean over processes of weight * (mean loss of the share) is the mean loss of the batch.
    `terms`, (N,): how many terms of the loss each example has; one, if None.
    """
    if RANK:
        torch.manual_seed(torch.initial_seed() + RANK)
    dealt = []
    for batch in batches:
        mine = batch[RANK::WORLD]
        if len(batch) < 2 * WORLD:  # too few for batch norm in each: all do the whole batch
            mine = batch
        count, ours = (len(rows) if terms is None else terms[rows].sum().item()
                       for rows in (batch, mine))
        dealt.append((mine, WORLD * ours / count if len(mine) < len(batch) else 1.0, count))
    return dealt


def mean_of_processes(tensor: Tensor) -> Tensor:
    """The mean of what the processes have in this place, on the CPU."""
    tensor = tensor.cpu()
    if WORLD > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD
    return tensor


def average_buffers(*models: nn.Module) -> None:
    """Average the processes' running statistics, which each takes from its own shares."""
    for model in models if WORLD > 1 else ():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean_of_processes(buffer.clone()))


def mine(items: Sequence) -> Sequence:
    """What this process has to do of a list that the processes share out."""
    return items[RANK::WORLD]


def gather(results: list) -> list:
    """The results of all processes, in the order of the list of which each did what is `mine`."""
    parts = [results]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, results)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


def of_the_first(value: Any) -> Any:
    """What the first process has in this place."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


# ---------------------------------------------------------------- PyTorch from 1.7 to today

HAS_AUTOCAST = hasattr(torch, "autocast")  # 1.10; before, float16 on CUDA alone
_cpu = getattr(getattr(torch, "cpu", None), "get_capabilities", dict)()  # old versions cannot tell
CPU_HAS_BFLOAT16 = _cpu.get("avx512_bf16", False) or _cpu.get("amx_bf16", False)
FUSED_ATTENTION = hasattr(nn.functional, "scaled_dot_product_attention")  # 2.0
DDP = nn.parallel.DistributedDataParallel
# For running statistics of each process's own; the name changed in 2.15.
DDP_BUFFERS = ("forward_sync_buffers" if "forward_sync_buffers" in DDP.__init__.__code__.co_varnames
               else "broadcast_buffers")
# torch.load() that runs no code; that of 1.13 refuses every float.
SAFE_LOADING = {"weights_only": True} if int(torch.__version__.split(".")[0]) > 1 else {}
FUSED_ADAM = {"fused": True} if "fused" in torch.optim.AdamW.__init__.__code__.co_varnames else {}


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The context of a forward pass in `dtype`; float32 changes nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype) if HAS_AUTOCAST else torch.cuda.amp.autocast()


def gradient_scaler(dtype: torch.dtype) -> Any:
    """Loss scaling, which float16 needs; any other type passes through it unchanged."""
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):  # 2.3
        return torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    return torch.cuda.amp.GradScaler(enabled=dtype == torch.float16)


def compile_model(model: nn.Module, enabled: bool) -> nn.Module:
    """The model, compiled if that is asked for and PyTorch can (2.0)."""
    if enabled and not hasattr(torch, "compile"):
        warn(f"--compile needs PyTorch 2.0, this is {torch.__version__}: going on without it")
        return model
    return torch.compile(model) if enabled else model


# ---------------------------------------------------------------- Device, seed, memory


def select_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA, then MPS, then CPU, whichever is there first."""
    if name == "auto":
        mps = getattr(torch.backends, "mps", None)  # Apple's GPUs, from PyTorch 1.12 on
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if mps and mps.is_available() else "cpu")
    if name == "cuda" and WORLD > 1:  # a GPU for each process of a machine
        name = f"cuda:{LOCAL_RANK}"
    try:
        there = torch.zeros(1, device=name)
        there.cpu()  # "meta" has no numbers to give back
        device = there.device
    except Exception:
        raise UserError(f"--device {name}: not found by this PyTorch; try --device auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def select_dtype(precision: str, device: torch.device, small: bool = False) -> torch.dtype:
    """The type of the forward pass; `auto` is bfloat16 where the device has instructions for it,
    float16 on older CUDA devices, float32 elsewhere, and on CPUs if the matrices are `small`.
    """
    cuda = device.type == "cuda"
    if precision == "auto":
        modern = (HAS_AUTOCAST and torch.cuda.get_device_capability(device)[0] >= 8 if cuda
                  else CPU_HAS_BFLOAT16 and device.type == "cpu" and not small)
        precision = "bfloat16" if modern else "float16" if cuda else "float32"
    if precision == "float16" and not cuda or precision == "bfloat16" and not HAS_AUTOCAST:
        raise UserError(f"--precision {precision} does not work on {device.type} with PyTorch "
                        f"{torch.__version__}; try --precision auto")
    return getattr(torch, precision)


def seed_everything(*seed: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device, from one or more whole numbers.

    Each epoch begins with `seed_everything(seed, epoch)`, so a resumed run draws the same numbers.
    """
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def checksum(data: tuple) -> int:
    """Of nested tuples of tensors and plain Python values; the same in each of several processes,
    or else a UserError.
    """
    def update(value, crc):
        if isinstance(value, tuple):
            for part in value:
                crc = update(part, crc)
            return crc
        return zlib.crc32(value.numpy() if torch.is_tensor(value) else repr(value).encode(), crc)
    result = update(data, 0)
    if result != of_the_first(result):
        raise UserError(f"--data: process {RANK} has other data than the first; copy it there")
    return result


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors: mapping it anew costs page faults."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map no block by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


# ---------------------------------------------------------------- Command line


def number(kind: type, low: float, high: float = 10**9) -> Callable:
    """An argparse type: an int or float from `low` to `high`, both included."""
    def parse(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    parse.__name__ = kind.__name__  # as argparse calls it in "invalid int value"
    return parse


def option_parser(script: str, doc: str, data_help: str, epochs_help: str = "%(default)s",
                  **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options that mean the same in every script, and the script's defaults."""
    parser = argparse.ArgumentParser(
        script, f"python {script} [options]", doc, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=26, width=80))
    parser.error = lambda message: parser.exit(2, f"{script}: error: {one_line(message)}\n")
    group = parser.add_argument_group("options that every script has")
    for flag, kind, metavar, meaning in (
            ("--data", str, "DATA", data_help),
            ("--data-dir", str, "DIR", "where downloaded data sets are kept"),
            ("--out", str, "DIR", "folder for what this run writes"),
            ("--epochs", number(int, 1), "N",
             f"passes over the training part, at most [{epochs_help}]"),
            ("--batch-size", number(int, 1), "N", "examples a step"),
            ("--lr", number(float, 0), "RATE", "peak learning rate"),
            ("--weight-decay", number(float, 0), "RATE", "decay of weights, not of biases"),
            ("--clip", number(float, 0), "NORM", "largest norm of the gradient; 0: any"),
            ("--patience", number(int, 1), "N", "epochs to wait for a better validation result"),
            ("--seed", number(int, 0, 2**32 - 1), "N", "decides split, weights, order and noise"),
            ("--device", str, "NAME", "auto, cpu, cuda, cuda:1, mps")):
        meaning += "" if flag == "--epochs" else " [%(default)s]"
        group.add_argument(flag, type=kind, metavar=metavar, help=meaning)
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16", "float16"),
                       default="auto", help="of the forward pass [%(default)s]")
    group.add_argument("--compile", action="store_true", help="use torch.compile (PyTorch 2)")
    group.add_argument("--resume", action="store_true",
                       help="go on from last.pt in --out, with the options it was started with")
    parser.set_defaults(data_dir="data", device="auto", seed=0, **defaults)
    return parser


def parse_options(parser: argparse.ArgumentParser, fixed: Sequence = ()) -> argparse.Namespace:
    """Parse the command line; with `--resume`, or started again by torchrun after a crash, behind
    the options in last.pt.

    `fixed` names the options that a resumed run cannot change: those of its model and data.
    """
    def refuse(message):
        raise ValueError(message)
    args = parser.parse_args()
    path = Path(args.out, "last.pt")
    if args.resume or RESTARTS and of_the_first(path.is_file()):
        with using(path):
            saved, words = load_checkpoint(path, parser.prog)["options"], []
            others = saved.keys() ^ vars(args).keys()
            if others:
                raise ValueError("another version's options: " + ", ".join(sorted(others)))
            saved.update(resume=True, out=args.out)
            for name, value in saved.items():
                flag = "--" + name.replace("_", "-")
                if isinstance(value, list):
                    words += [flag, *map(str, value)]
                elif value is not None and value is not False:  # 0 is a value like others
                    words += [flag if value is True else f"{flag}={value}"]
            error, parser.error = parser.error, refuse
            parser.parse_args(words)
            parser.error = error
        args = parser.parse_args(words + sys.argv[1:])
        for name in fixed:
            if getattr(args, name) != saved.get(name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: the run in {args.out} was started with {saved.get(name)};"
                                f" leave {flag} out, or start a new run in another --out")
    return args


# ---------------------------------------------------------------- Files of a run


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: a crash at any moment leaves the old or the new one, whole.

    Of several processes the first alone writes.
    """
    raise_late_signal()
    if RANK:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; what was there is kept") from None


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Save a dictionary of tensors and plain Python values."""
    buffer = io.BytesIO()
    SAVING.append(path)
    try:
        torch.save(checkpoint, buffer)
    finally:
        SAVING.clear()
    write_file(path, buffer.getvalue())


def save_epoch(folder: Path, history: list, best: dict | None, last: dict) -> None:
    """Write history.csv, best.pt if there is a new best epoch, and then last.pt."""
    rows = [history[0].keys(), *(row.values() for row in history)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_file(folder / "history.csv", table.encode())
    if best:
        save_checkpoint(folder / "best.pt", best)
    save_checkpoint(folder / "last.pt", last)


@contextlib.contextmanager
def using(path: Path) -> Iterator[None]:
    """Whatever goes wrong while the content of a file is put to use becomes one line about it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:150]
        raise UserError(f"{path} is damaged or does not fit: {reason}") from None


def load_checkpoint(path: str | Path, script: str, *keys: str) -> dict:
    """Load what `script` saved. Raises UserError if that is missing, damaged or another script's,
    or lacks one of the `keys`.

    No code in the file is run, except on PyTorch 1.13 and below: load only your own files there.
    The first of several processes reads the file for all.
    """
    path = Path(path)
    with using(path):
        content = of_the_first(path.read_bytes() if RANK == 0 and path.is_file() else None)
        if content is None:
            raise UserError(f"there is no {path}; train first, or name the run's folder with --out")
        archive = zipfile.ZipFile(io.BytesIO(content))
        if any(entry.compress_type for entry in archive.infolist()):  # small here, huge in memory
            raise ValueError("it is compressed")
        damaged = archive.testzip()  # by checksums; PyTorch has none
        if damaged:
            raise ValueError(f"{damaged} is not what was written")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", **SAFE_LOADING)
        if checkpoint["script"] != script:
            raise UserError(f"{path} was written by {checkpoint['script']}, not by {script}")
        if not checkpoint.keys() >= set(keys):
            raise ValueError("it lacks " + ", ".join(sorted(set(keys) - checkpoint.keys())))
    return checkpoint


def set_aside(folder: Path, name: str) -> None:
    """Rename a folder that holds another run to `name`.1, .2 and so on, and say so."""
    n = next(n for n in range(1, 10**6) if not Path(f"{folder}.{n}").exists())
    try:
        folder.rename(f"{folder}.{n}")
    except OSError as error:
        raise UserError(f"cannot move {name} aside: {error.strerror}; take another folder"
                        ) from None
    warn(f"{name} held another run, which is now in {name}.{n}")


def restore(path: Path, checkpoint: dict, state: dict, checksum: int) -> list:
    """Load what was saved of `state` back into its parts, if it was trained on the same data.

    Returns the history of the run so far.
    """
    with using(path):
        if checkpoint["data"] != checksum:
            raise UserError(f"{path} is of a run on other data; start a new run for these")
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        print("resumed after epoch", len(checkpoint["history"]))
        return checkpoint["history"]


@contextlib.contextmanager
def run_folder(out: str, resume: bool) -> Iterator[Path]:
    """Context of a training run: its folder, for it alone, with an earlier run moved aside unless
    it is resumed. A run that is interrupted says how to go on.
    """
    folder = Path(out).absolute()
    last, lock = folder / "last.pt", contextlib.nullcontext()
    try:
        if RANK == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(f"{folder}.lock", "w")
            if fcntl:  # the system lets go of it when this process ends, in whatever way
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if last.exists() and not resume:
                set_aside(folder, out)
                folder.mkdir()
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing there; take another one") from None
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder to write to") from None
    try:
        with lock:
            yield folder
    except KeyboardInterrupt:
        command = f"python {shlex.quote(sys.argv[0])} --out {shlex.quote(out)} --resume"
        print("\ninterrupted;", f"go on with: {command}" if last.exists() else "nothing saved yet")
        raise


def write_summary(path: Path, **facts: Any) -> None:
    """Write summary.json: `facts`, and the versions of what computed them."""
    facts["versions"] = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    write_file(path, (json.dumps(facts, indent=2) + "\n").encode())


# ---------------------------------------------------------------- Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list:
    """Decay matrices and kernels alone; pulling biases and norm scales to zero helps nothing."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, total: float) -> Any:
    """Learning rate up to its peak in a line over `warmup` steps (Goyal et al., 2017), then to 0
    along half a cosine (Loshchilov and Hutter, 2017).
    """
    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - warmup) / max(1, total - warmup)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def clip_gradients(model: nn.Module, clip: float, step: int, scaler: Any) -> Tensor:
    """Scale the gradient down to the norm `clip` (0: leave it); return the norm it had.

    Raises UserError if it is not finite, before it can spoil the weights; where the loss is
    scaled for float16, `scaler` skips such a step by itself. Pascanu et al., 2013.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    if not scaler.is_enabled() and not torch.isfinite(norm):
        raise UserError(f"the loss or its gradient is not finite at step {step}; try a lower --lr "
                        "or a --clip (what was saved up to the last whole epoch is good)")
    return norm


def epochs_since_best(history: list, metric: str, best: Callable = max) -> int:
    """For early stopping: how many epochs ago `metric` was at its best, the max or the min."""
    values = [row[metric] for row in history]
    return len(values) - 1 - values.index(best(values))


def pace(history: list, epochs: int) -> str:
    """How long the last epoch took, and the rest will: "9.6 s, 4 min left"."""
    def text(seconds):
        return (f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 100 else
                f"{seconds / 60:.0f} min")
    seconds, epoch = history[-1]["seconds"], history[-1]["epoch"]
    return f"{text(seconds)}, {text(seconds * (epochs - epoch))} left"


def plot_history(path: Path, history: list, title: str, panels: dict) -> None:
    """Draw {y axis: {label: column}} as panels side by side, over the epochs."""
    rows = (len(panels) + 2) // 3  # at most three panels fit side by side
    columns = math.ceil(len(panels) / rows)
    figure, axes = new_figure(rows, columns, (4.4 * columns, 3.3 * rows + 0.2), title)
    for axis, (ylabel, curves) in zip(axes.flat, panels.items()):
        for label, column in curves.items():
            axis.plot([row["epoch"] for row in history], [row[column] for row in history], ".-",
                      label=label)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save_figure(path, figure)


class ProgressBar(tqdm):
    def __iter__(self):
        for item in super().__iter__():
            raise_late_signal()
            yield item


def progress(iterable: Iterable, description: str) -> ProgressBar:
    """A progress bar of 80 columns that stays silent in a log file."""
    return ProgressBar(iterable, description, leave=False, disable=RANK > 0 or None, ncols=80)


def new_figure(rows: int, columns: int, inches: tuple, title: str) -> tuple:
    """A Matplotlib figure that needs no display, and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(inches, constrained_layout=True)
    figure.suptitle(plain(title))
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure as PNG, in at most 8000 pixels a side, which take a quarter of a GiB."""
    if RANK:
        return
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of letters that the font lacks, and of little room
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, dpi=min(120, 8000 / max(figure.get_size_inches())))
    write_file(path, buffer.getvalue())


def plain(text: str) -> str:
    """A text of the user's for Matplotlib to draw as it is: no formula between two dollar signs,
    no byte that is not UTF-8.
    """
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()


# ---------------------------------------------------------------- Tables

LARGEST_TABLE = 1024  # MiB; all of it is held in memory


def read_table(path: str, names: Sequence[str]) -> list:
    """Rows (line number, [cell, cell]) of a CSV or TSV file in UTF-8.

    The first row is a header if it has both `names`, and tells their columns; a file without one
    has them in the first two. Raises UserError with the number of a line that cannot be used.
    """
    try:
        with open(path, "rb") as file:
            blocks = iter(lambda: file.read(2**20), b"")
            content = b"".join(itertools.islice(blocks, LARGEST_TABLE))
            if file.read(1):  # /dev/zero has no end
                raise UserError(f"--data {path}: more than {LARGEST_TABLE} MiB; take a part of it")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}; name a CSV or TSV file") from None
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise UserError(f"--data {path}: line {line} is not UTF-8; save it as UTF-8") from None
    tabs = "\t" in text.split("\n")[0]  # TSV has no quotes, so that a text may hold one
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",",
                        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True)
    rows, columns = [], None
    try:
        for row in filter(None, reader):
            if columns is None and set(names) <= set(row):
                columns = [row.index(name) for name in names]
                continue
            columns = columns or [0, 1]
            cells = [row[column] if column < len(row) else "" for column in columns]
            if not all(cell.strip() for cell in cells):
                raise UserError(f"--data {path}: line {reader.line_num} needs a {names[0]}, a tab "
                                f"or comma, and a {names[1]}")
            rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise UserError(f"--data {path}: line {reader.line_num}: {error}") from None
    return rows


# ---------------------------------------------------------------- Images


def read_image(path: str | Path, size: int, channels: int) -> np.ndarray:
    """An image file of any size as uint8 (size, size, channels), channels 1 or 3.

    The shorter side is fitted, the longer one cropped about the centre. Raises UserError.
    """
    from PIL import Image, ImageOps
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 8
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("RGB" if channels == 3 else "L")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.BICUBIC)
            return np.array(image).reshape(size, size, channels)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller"
                        ) from None
    except Exception:
        raise UserError(f"{path}: not an image that can be read") from None


def load_image_folder(folder: str, size: int, channels: int, labelled: bool = True) -> tuple:
    """Load `train/<class>/`, with or without `val/` and `test/`, or just `<class>/`.

    Returns {"train": (images, labels), ...} and the class names; images are uint8
    (N, size, size, channels), labels int64 (N,). Unreadable files are named and skipped.
    Not `labelled`, all files are of one class, in sub-folders or not.
    Raises UserError if the folder is missing, or a class in it has no images.
    """
    root = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(f"--data {folder}: neither a folder nor the name of a data set")
    parts = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    parts = parts if "train" in parts else {"train": root}
    classes = [""]
    if labelled:
        classes = sorted(entry.name for entry in parts["train"].iterdir() if entry.is_dir())
    if labelled and len(classes) < 2:
        raise UserError(f"--data {folder}: {parts['train']} needs a sub-folder of images for each "
                        f"of at least two classes, and has {len(classes)}")
    loaded, skipped = {}, []
    for part, base in parts.items():
        files = [(path, label) for label, name in enumerate(classes)
                 for path in sorted((base / name).rglob("*")) if path.is_file()]
        images, labels = [], []
        for path, label in progress(files, f"reading {part}"):
            try:
                images.append(read_image(path, size, channels))
                labels.append(label)
            except UserError as error:
                skipped.append(str(error))
        missing = set(range(len(classes))) - set(labels)
        if missing and part == "train" or not images:
            raise UserError(f"--data {folder}: no readable image in {base / classes[min(missing)]}")
        loaded[part] = torch.from_numpy(np.stack(images)), torch.tensor(labels)
    if skipped:
        warn(f"skipped {len(skipped)} files: {'; '.join(skipped[:3])}{' ...' * (len(skipped) > 3)}")
    return loaded, classes


def load_torchvision(name: str, data_dir: str) -> tuple:
    """Load a torchvision data set from `data_dir`, after a download if it is not there.

    Returns what load_image_folder does, in the images' own size. Raises UserError if the set
    is neither there nor to be had, within 10 seconds of a network that does not answer.
    """
    try:
        import torchvision
    except Exception as error:
        raise UserError(f"{name} needs torchvision, which fails to import ({error})") from None
    dataset = getattr(torchvision.datasets, name)

    def load(**options):
        return {part: dataset(data_dir, train=part == "train", **options)
                for part in ("train", "test")}
    try:
        if LOCAL_RANK:  # let the first process of each machine download it
            dist.barrier()
        parts = load()
    except Exception:  # it is not there, or not whole
        url = getattr(dataset, "url", None) or getattr(dataset, "mirrors", dataset.resources[0])[0]
        try:
            require_answer(url)
            parts = load(download=True)
        except Exception as error:
            raise UserError(f"{name} is not in {data_dir}, and no download: {error}") from None
    finally:
        if WORLD > 1 and LOCAL_RANK == 0:
            dist.barrier()
    loaded = {}
    for part, data in parts.items():
        images = torch.as_tensor(data.data)  # without a last dimension if it is grey
        images = images.reshape(*images.shape[:3], -1).contiguous()
        loaded[part] = images, torch.as_tensor(data.targets)
    return loaded, parts["train"].classes


def require_answer(url: str, seconds: int = 10) -> None:
    """Raise OSError unless `url` answers in time; even the look-up of its name can hang."""
    socket.setdefaulttimeout(seconds)  # for each wait of the download that follows
    ask = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1])"
    try:
        done = subprocess.run([sys.executable, "-c", ask, url], timeout=seconds,
                              stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer in {seconds} seconds") from None
    if done.returncode and b"HTTPError" not in done.stderr:  # any status is an answer
        raise OSError(done.stderr.decode().strip().split("\n")[-1])


def split_indices(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out) of a split that holds out `fraction` of each class's labels (N,)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        held[members[:math.ceil(fraction * len(members)) if len(members) > 1 else 0]] = True
    return torch.where(~held)[0], torch.where(held)[0]


def hold_out_missing(parts: dict, seed: int) -> None:
    """Where {"train": (images, labels), ...} has no "test" or "val", take a tenth of "train"."""
    for part in ("test", "val"):
        if part not in parts:
            keep, held = split_indices(parts["train"][1], 0.1, seed)
            parts[part] = tuple(tensor[held] for tensor in parts["train"])
            parts["train"] = tuple(tensor[keep] for tensor in parts["train"])
