"""Code shared by the four scripts: options, device, schedule, checkpoints, plots, reading files.

Nothing here knows any of the models. torchvision, Pillow and Matplotlib are imported where they
are used, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import glob
import io
import json
import math
import os
import random
import shlex
import signal
import socket
import sys
import time
import unicodedata
import warnings
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

# ---------------------------------------------------------------- Start and end of a run


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong and what to do about it."""


def run_main(main: Callable) -> None:
    """Run `main()`. An error that the user can fix, or of the operating system, is printed as one
    line, with exit status 2.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, like Ctrl-C
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    # Of no use to a user. First, all warnings of PyTorch's modules.
    warnings.filterwarnings("ignore", module=r"torch\b")
    # Then those of an argument renamed in PyTorch 2.13, of an operator, which 1.10 to 1.12 blame on
    # the module that uses it, and of a character that Matplotlib's font lacks.
    warnings.filterwarnings("ignore", message=".*(broadcast_buffers|__floordiv__|missing from)")
    try:
        start_processes()
        with contextlib.suppress(AttributeError):  # in a notebook there is nothing to set
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        main()
        sys.stdout.flush()
    except (UserError, OSError) as error:
        if not isinstance(error, BrokenPipeError):  # the reader has gone, as with `| head`
            message = " ".join(str(error).split())
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        # What is still buffered cannot be written if the disk is full or the reader gone; then send
        # it to nowhere, or Python would fail on it again when it exits.
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@functools.lru_cache(maxsize=None)
def warn(message: str) -> None:
    """Print a warning in the first process, the same one only once."""
    if RANK == 0:
        warnings.warn(message)


# ---------------------------------------------------------------- Several processes (torchrun)

# Set by torchrun: how many processes there are, the number of this one, and that on this machine.
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def start_processes() -> None:
    """Initialize the process group if there are several processes. Only the first one prints its
    progress.
    """
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if WORLD > 1:
        try:
            dist.init_process_group("gloo")
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is set, but not by torchrun: {error}") from None


def wrap_model(model: nn.Module, args: Namespace, device: torch.device) -> nn.Module:
    """Return the model to call in training: compiled with --compile, and wrapped to average the
    gradients if there are several processes.
    """
    if args.compile:
        model = torch.compile(model)
    if WORLD == 1:
        return model
    group = None  # the default, gloo
    if device.type == "cuda" and dist.is_nccl_available():
        group = dist.new_group(backend="nccl")  # faster on GPUs; Windows lacks it
    # Batch norm's running statistics are those of the first process, which evaluates and saves.
    return nn.parallel.DistributedDataParallel(model, process_group=group, broadcast_buffers=False)


def on_first_process(function: Callable, *arguments: Any) -> Any:
    """Call a function in the first process only; return its result, or raise its UserError or
    OSError, in all of them.
    """
    result = problem = None
    if RANK == 0:
        try:
            result = function(*arguments)
        except (UserError, OSError) as error:
            problem = error  # sent to all: if the first alone stopped, the others would wait for it
    if WORLD > 1:
        shared = [result, problem]
        dist.broadcast_object_list(shared, src=0)
        result, problem = shared
    if problem:
        raise problem
    return result


def shuffled_batches(count: int, batch_size: int, *seed: int) -> Tensor:
    """Return the indices 0 to count - 1 in random order, as the batches of this process: int64
    (steps, batch_size / WORLD).

    seed: integers that seed the order (none, if only the number of steps matters). A batch has at
    most `count` examples; the last, incomplete one is dropped.
    """
    batch_size = min(batch_size, count)
    batch_size -= batch_size % WORLD  # each process has an equal share
    if batch_size < 2 * WORLD:  # batch norm needs two examples
        raise UserError(f"--batch-size: a step needs at least {2 * WORLD} training examples; "
                        "provide more, or a larger --batch-size")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count)).long()
    steps = count // batch_size
    return order[:steps * batch_size].view(steps, batch_size)[:, RANK::WORLD]


# ---------------------------------------------------------------- Device and precision

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
# With weights_only, torch.load() is meant to run no code from the file. 1.13 has it, too, but
# rejects floats.
SAFE_LOADING = {"weights_only": True} if VERSION >= (2, 0) else {}
# AdamW in one pass over all parameters; before 2.5 not on every device.
FUSED = {"fused": True} if VERSION >= (2, 5) else {}
# Whether an x86 CPU has instructions for bfloat16. False where PyTorch is too old to tell.
try:
    capabilities = torch.cpu.get_capabilities()
    CPU_HAS_BFLOAT16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
except AttributeError:
    CPU_HAS_BFLOAT16 = False


def select_device(args: Namespace) -> torch.device:
    """Return the device of --device; `auto` is CUDA if it is available, otherwise the CPU.

    Raises UserError if it does not work, or does not support --precision.
    """
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # a device may have a name, and yet not work
    except Exception as error:
        raise UserError(f"--device {name}: {str(error)[:200]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    autocast(args.precision, device)  # only for its error: now, not after the data are loaded
    return device


def autocast(precision: str, device: torch.device, cpu_gains: bool = True) -> Any:
    """Return the autocast context of a forward pass.

    `auto` is bfloat16 on a GPU that has it, and on a CPU that has it if `cpu_gains`: whether the
    matrices of the model are large enough to be faster. `bfloat16` raises UserError without it.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        has_bfloat16 = VERSION >= (1, 10) and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_bfloat16 = device.type == "cpu" and CPU_HAS_BFLOAT16
    if precision == "bfloat16" and not has_bfloat16:
        raise UserError("--precision bfloat16: this device, or this version of PyTorch, is not "
                        "known to support it; use auto")
    faster = has_bfloat16 and (on_gpu or cpu_gains)
    if precision == "bfloat16" or (precision == "auto" and faster):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- Command line

# Options that --resume may change; a new value of any other one is an error. (--compile must be
# given again.)
RESUMABLE = {"data", "data_dir", "out", "epochs", "patience", "clip", "beam", "device",
             "precision", "compile", "resume", "predict", "sample"}


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and shows default values that are not None, except
    those of flags.
    """

    def _get_help_string(self, action):  # argparse calls it for each option
        if action.default is None or action.nargs == 0:  # 0: a flag
            return action.help
        return super()._get_help_string(action)


def number(kind: type, low: float, high: float = 10**9) -> Callable:
    """An argparse type: an int or float from `low` to `high`, both included."""
    def parse(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    return parse


def option_parser(script: str, doc: str, **defaults: Any) -> ArgumentParser:
    """A parser with the options that all scripts have, and this script's defaults for them."""
    parser = ArgumentParser(prog=script, usage=f"python {script} [options]", description=doc,
                            allow_abbrev=False, formatter_class=HelpFormatter)
    count, positive = number(int, 1), number(float, 1e-9, math.inf)
    add = parser.add_argument_group("options of all four scripts").add_argument
    add("--data-dir", default="data", help="folder of downloaded data sets (cnn.py, gan.py)")
    add("--out", help="folder of the run's plots and checkpoints")
    add("--epochs", type=count, help="maximum number of passes over the training set")
    add("--batch-size", type=number(int, 2), help="examples per training step")
    add("--lr", type=positive, help="peak learning rate")
    add("--warmup", type=number(float, 0, 0.9),
        help="fraction of training in which the learning rate rises")
    add("--weight-decay", type=number(float, 0), help="weight decay of weight matrices")
    add("--clip", type=positive, help="maximum norm of the gradient; inf turns clipping off")
    add("--patience", type=count, help="epochs without improvement before early stopping")
    add("--seed", type=number(int, 0), default=0, help="random seed")
    add("--device", default="auto", help="auto, cpu, cuda or, for one of several GPUs, cuda:N")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="precision of the forward pass in training; auto: bfloat16 where it is faster")
    if hasattr(torch, "compile"):
        add("--compile", action="store_true", help="use torch.compile")
    add("--resume", action="store_true", help="continue the run in --out, with its options")
    # subfolders: where in --out checkpoints may be; rnn.py has several.
    parser.set_defaults(script=script, subfolders=["."], compile=False)
    parser.set_defaults(**defaults)
    return parser


def parse_options(parser: ArgumentParser) -> Namespace:
    """Parse the command line. With --resume, the options of the run in --out are the defaults.

    Raises UserError if an option is given that a resumed run cannot change.
    """
    args = parser.parse_args()
    if not args.resume:
        return args
    paths = sorted(find_files(args, "last.pt"), key=os.path.getmtime)
    # The newest has the options of the latest command. If there is none, load_checkpoint() names
    # the default path.
    path = paths[-1] if paths else Path(args.out, "last.pt")
    saved = load_checkpoint(path, args.script)["options"]
    # Parse again: what is given on the command line overrides what was saved.
    parser.set_defaults(**saved)
    # The folder may have been renamed, and this machine may have no compiler.
    parser.set_defaults(out=args.out, compile=args.compile)
    args = parser.parse_args()
    # `saved` also has script, subfolders and checksum, which no option can change.
    for name, value in saved.items():
        if name not in RESUMABLE and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: the run in {args.out} was started with {value}; leave {flag} "
                            "out, or start a new run in another --out")
    if args.epochs != saved["epochs"]:
        warn("another --epochs changes the length of the schedule, so the learning rate jumps")
    return args


# ---------------------------------------------------------------- Files of a run


def find_files(args: Namespace, pattern: str) -> list:
    """The checkpoints of the run in --out whose names match a glob pattern."""
    paths = []
    for name in args.subfolders:
        paths += Path(args.out, name).glob(pattern)
    return paths


def lock(folder: Path, locks: list) -> None:
    """Lock a folder (not on Windows). The lock lasts until its file descriptor, which is added to
    `locks`, is closed.

    Raises UserError if another run has locked it.
    """
    try:
        import fcntl  # not available on Windows
        locks.append(os.open(folder, os.O_RDONLY))
        fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise UserError(f"--out {folder}: another run is using this folder; choose another"
                        ) from None
    except OSError as error:
        warn(f"{folder} cannot be locked ({error.strerror}): do not start a second run in it")


@contextlib.contextmanager
def run_folder(args: Namespace) -> Iterator[Path]:
    """The context of a training run: yields its folder, which no other run may use.

    An earlier run in it is moved aside, unless it is resumed. A run that is interrupted says how
    to continue; checkpoints are replaced in one step, so it may be interrupted at any moment.
    """
    folder = Path(args.out).resolve()  # of a symbolic link, the folder that it points to
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--out {args.out} holds more than a run; name a folder of its own")

    locks = []  # file descriptors

    def prepare():
        if find_files(args, "*.pt") and not args.resume:
            lock(folder, locks)  # an error if that run is still going on
            old = f"{folder}-{time.strftime('%Y%m%d-%H%M%S')}"
            folder.rename(old)
            warn(f"--out {args.out} held another run, which is now in {old}")
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, locks)
    try:
        on_first_process(prepare)
        yield folder
    except KeyboardInterrupt:
        if find_files(args, "last.pt"):
            command = f"python {shlex.quote(sys.argv[0])} --out {shlex.quote(args.out)} --resume"
            # Not on stdout: with `| tee`, Ctrl-C has ended its reader, too.
            warn(f"interrupted; continue with: {command}")
        raise
    finally:
        for descriptor in locks:
            os.close(descriptor)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint in one step: after a crash the file is the old or the new one, whole."""
    # Into memory first: torch.save() fails with errors of its own, or even crashes, if writing to a
    # file is interrupted or the disk is full.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        # All of it must be on the disk before it takes the place of the old file.
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, script: str) -> dict:
    """Load what `script` saved; see SAFE_LOADING for the risk of files from strangers."""
    if not path.is_file():
        raise UserError(f"there is no {path}; train first, or name the run's folder with --out")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load() does not verify checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")  # caught below
        checkpoint = torch.load(path, map_location="cpu", **SAFE_LOADING)
        author = checkpoint["script"]
    except Exception as error:
        raise UserError(f"{path} is damaged or not a checkpoint: {str(error)[:200]}") from None
    if author != script:
        raise UserError(f"{path} was written by {author}, not by {script}")
    return checkpoint


def load_last(folder: Path, args: Namespace, state: dict) -> list:
    """Load last.pt into the parts of `state`; return the history of the run so far.

    Raises UserError if the data are not those of that run, judging by `args.checksum`, which the
    script sets when it has loaded them.
    """
    checkpoint = load_checkpoint(folder / "last.pt", args.script)
    if checkpoint["options"]["checksum"] != args.checksum:
        raise UserError(f"--data {args.data}: the run in {args.out} was started with other data")
    for name, part in state.items():
        part.load_state_dict(checkpoint[name])
    print(f"{folder.name}: resumed after epoch {len(checkpoint['history'])}")
    return checkpoint["history"]


def save_epoch(folder: Path, args: Namespace, history: list, state: dict, best: dict,
               score: Callable) -> None:
    """Write the files of an epoch: history.csv; last.pt, with `state`; and best.pt, with `best`, if
    the epoch is the best by `score`. "script" and "metrics" (the last row of the history) are added
    to best.pt. Its "options" are the arguments of the model; in last.pt, those of the command line.

    Raises UserError, and writes nothing, if a value in the history's last row is not finite.
    """
    # In every process: each has its own losses.
    if not all(map(math.isfinite, history[-1].values())):
        raise UserError("the loss or its gradient is not finite; start again with a lower --lr or "
                        "--clip (checkpoints of earlier epochs are kept)")
    if RANK > 0:
        return
    with open(folder / "history.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(history[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(history)
    if epochs_since_best(history, score) == 0:
        save_checkpoint(folder / "best.pt", {**best, "script": args.script, "metrics": history[-1]})
    last = {name: part.state_dict() for name, part in state.items()}
    last.update(script=args.script, options=vars(args), history=history)
    save_checkpoint(folder / "last.pt", last)


def write_summary(folder: Path, args: Namespace, history: list, test: dict) -> None:
    """Write summary.json: options, test metrics, seconds of all epochs, versions."""
    # JSON has no infinity.
    options = {name: "inf" if value == math.inf else value for name, value in vars(args).items()}
    summary = {"script": args.script, "data": args.data, "options": options, "test": test,
               "seconds": sum(row["seconds"] for row in history),
               "versions": {"python": sys.version, "torch": torch.__version__}}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


# ---------------------------------------------------------------- Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list:
    """Weight decay for matrices and kernels, none for biases and the scales of norms."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


def warmup_cosine(progress: float, warmup: float) -> float:
    """The learning rate relative to its peak, when a fraction `progress` of training is done.

    It rises linearly during `warmup` (Goyal et al., 2017), and then falls to 0 along half a cosine
    (Loshchilov and Hutter, 2017).
    """
    if progress < warmup:
        return progress / warmup
    # At most 1: LambdaLR asks for one more step than there are.
    done = min(1, (progress - warmup) / (1 - warmup))
    return 0.5 + 0.5 * math.cos(math.pi * done)


def make_scheduler(optimizer: torch.optim.Optimizer, args: Namespace, steps: int,
                   few: int = 200) -> Any:
    """A scheduler that follows warmup_cosine(), with `steps` steps an epoch. Warns if there are
    fewer than `few` in all.
    """
    total = args.epochs * steps
    if total < few:
        warn(f"with {total} training steps the model may learn little; raise --epochs and "
             "--patience, or lower --batch-size")

    def factor(step):
        # The middle of the step, so that neither the first nor the last has a rate of 0.
        return warmup_cosine((step + 0.5) / total, args.warmup)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` if it is larger; return the norm that it had.

    Pascanu et al., 2013.
    """
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def means(steps: list) -> dict:
    """Return the mean of each metric over the steps of an epoch.

    steps: for each step, a dict of tensors with one element each. They stay on the device until
    here, so that no step waits for it. With several processes, each has the means over its own
    examples.
    """
    return {name: torch.stack([step[name] for step in steps]).float().mean().item()
            for name in steps[0]}


def epochs_since_best(history: list, score: Callable) -> int:
    """Return the number of epochs since `score(row)` was highest."""
    scores = [score(row) for row in history]
    return len(scores) - 1 - scores.index(max(scores))


def epochs_to_train(args: Namespace, history: list, score: Callable) -> Iterator[int]:
    """Yield the numbers of the epochs to train: up to --epochs, or until early stopping, which
    waits until the warm-up is over. The caller appends a row to `history` in each epoch.
    """
    while len(history) < args.epochs:
        warmed_up = len(history) > args.warmup * args.epochs
        if history and warmed_up and epochs_since_best(history, score) >= args.patience:
            print(f"early stopping: no improvement on validation for {args.patience} epochs")
            break
        epoch = len(history) + 1
        # Each epoch has its own seed, so a resumed run draws the same random numbers.
        seed = np.random.SeedSequence([args.seed, epoch, RANK]).generate_state(1)
        torch.manual_seed(int(seed[0]))
        yield epoch


def progress_bar(iterable: Iterable, description: str, total: int | None = None) -> tqdm:
    """Return a progress bar of 80 columns that stays silent in a log file."""
    disable = True if RANK > 0 else None  # None: only if the output is no terminal
    return tqdm(iterable, description, total, leave=False, disable=disable, ncols=80)


# ---------------------------------------------------------------- Evaluation and plots


def classification_report(predicted: Tensor, labels: Tensor, classes: list) -> dict:
    """Return the accuracy, the accuracy of always predicting the largest class, the macro-averaged
    F1 (over classes with examples), and the accuracy on each class (None without examples).

    predicted, labels: int64 (N,).
    """
    sizes = labels.bincount(minlength=len(classes))
    guesses = predicted.bincount(minlength=len(classes))
    correct = labels[predicted == labels].bincount(minlength=len(classes))
    f1 = 2 * correct / (sizes + guesses).clamp(min=1).double()
    per_class = {}
    for name, size, hits in zip(classes, sizes.tolist(), correct.tolist()):
        per_class[name] = hits / size if size else None
    return {"accuracy": correct.sum().item() / len(labels),
            "largest_class": sizes.max().item() / len(labels),
            "macro_f1": f1[sizes > 0].mean().item(), "per_class": per_class}


def print_report(report: dict) -> None:
    """Print what classification_report() returns."""
    print(f"accuracy {report['accuracy']:.2%} (always predicting the largest class: "
          f"{report['largest_class']:.2%}), macro-averaged F1 {report['macro_f1']:.3f}")
    for name, accuracy in report["per_class"].items():
        print("       -" if accuracy is None else f"{accuracy:8.2%}", name)


def write_predictions(folder: Path, inputs: list, targets: list, predictions: list,
                      probabilities: list) -> None:
    """Write predictions.tsv: the mistakes, then the correct predictions, in both groups the most
    probable first. Print the first three lines.

    inputs, targets, predictions: a text for each test example; probabilities: of the predictions.
    """
    def order(row):
        _, target, prediction, probability = row
        return target == prediction, -probability  # False, a mistake, comes before True
    rows = sorted(zip(inputs, targets, predictions, probabilities), key=order)
    lines = ["{}\t{}\t{}\t{:.4g}".format(*row) for row in rows]
    text = "\n".join(["input\ttarget\tprediction\tprobability", *lines, ""])
    path = folder / "predictions.tsv"
    path.write_text(text, "utf-8", "surrogateescape")
    print(f"the first lines of {path} (input, target, prediction, probability):")
    print("\n".join(lines[:3]))


def new_figure(rows: int, columns: int, inches: tuple, title: str) -> tuple:
    """A Matplotlib figure, which needs no display, and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(inches, constrained_layout=True)
    figure.suptitle(escape_dollars(title))
    return figure, figure.subplots(rows, columns, squeeze=False)


def escape_dollars(text: str) -> str:
    """Escape dollar signs, between which Matplotlib would read a formula; replace what is not in
    UTF-8, as in some file names.
    """
    return text.encode(errors="replace").decode().replace("$", r"\$")


# A legend stands above its panel, where it covers no curve.
LEGEND = {"fontsize": 8, "loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}


def plot_history(history: list, args: Namespace, title: str, panels: dict) -> tuple:
    """Plot the history in panels, two in a row; the last one shows the learning rate.

    panels: {ylabel: {label in the legend: column of the history}}, up to three curves in a panel.
    Returns the figure and {ylabel: axis}, for a script to add to.

    The panel "gradient norm" is required. It also shows --clip, and the fraction of the steps that
    exceeded it: the mean of all columns whose names end in "clipped". The axis of a panel
    "fraction ..." ends at 1 at most.
    """
    rows = len(panels) // 2 + 1  # enough for one more panel, two in a row
    figure, grid = new_figure(rows, 2, (8.3, 2.8 * rows), title)
    axes = dict(zip([*panels, "learning rate"], grid.flat))
    epoch = [row["epoch"] for row in history]
    for ylabel, curves in panels.items():
        for style, (label, column) in zip(("-", "--", ":"), curves.items()):
            values = [row[column] for row in history]
            axes[ylabel].plot(epoch, values, style, marker=".", label=label)
    clipped = [row[name] for row in history for name in row if name.endswith("clipped")]
    limit = f"limit (--clip): {np.mean(clipped):.0%} of the steps exceed it"
    axes["gradient norm"].axhline(args.clip, color="black", linewidth=1, label=limit)
    # The schedule itself, at many moments, so that the warm-up is seen.
    moments = np.linspace(0, epoch[-1], 1000)
    rates = [args.lr * warmup_cosine(moment / args.epochs, args.warmup) for moment in moments]
    axes["learning rate"].plot(moments, rates, label=f"schedule of {args.epochs} epochs")
    for ylabel, axis in axes.items():
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.grid(alpha=0.3)
        axis.legend(**LEGEND)
        if ylabel.startswith("fraction"):
            axis.set_ylim(top=min(1, axis.get_ylim()[1]))
    return figure, axes


# ---------------------------------------------------------------- Data


def split_tenths(contents: list, groups: list, seed: int) -> Tensor:
    """Assign each example to one of ten parts: int64 (N,), 0 to 9.

    Equal contents are in the same part, and each group is spread evenly over the parts. If equal
    contents have different groups, the last one counts.
    """
    generator = random.Random(seed)
    group_of = dict(zip(contents, groups))
    # Sort by group, in random order within it, and deal the contents out to the parts in turn.
    order = sorted(group_of, key=lambda content: (group_of[content], generator.random()))
    part_of = {content: place % 10 for place, content in enumerate(order)}
    return torch.tensor([part_of[content] for content in contents])


def make_disjoint_sets(sets: dict, seed: int) -> None:
    """Take a tenth of "train" for each of "test" and "val" that is missing; then leave no image in
    two sets, and none twice in "test" or "val".

    sets: {"train": (images, labels), ...}, changed in place; there may be more parts with a row for
    each image. Images with the same pixels are equal.
    """
    def contents(images):  # the hashes differ between runs; only which are equal matters
        return [hash(image.tobytes()) for image in images.numpy()]
    images, labels = sets["train"][:2]
    part = split_tenths(contents(images), labels.tolist(), seed)
    # If a set was given, its tenth stays in "train".
    for tenth, name in enumerate(("test", "val")):
        chosen = (part == tenth).tolist()
        sets.setdefault(name, [rows[chosen] for rows in sets["train"]])
    # Remove from each set the images of the sets before it; so "train" loses what was taken above.
    seen = set()
    for name in ("test", "val", "train"):
        keys = contents(sets[name][0])
        if len(set(keys) - seen) < 2:  # metrics such as a variance need two
            raise UserError(f"--data: fewer than two images are left for the {name} set, not "
                            "counting copies; add others, or raise --limit if you used it")
        new = []
        for key in keys:
            new.append(key not in seen)
            if name != "train":  # in training, a copy counts as one more example
                seen.add(key)
        sets[name] = [rows[new] for rows in sets[name]]


def describe_sets(name: str, device: torch.device, *sets: Sequence) -> None:
    """Print the sizes of the training, validation and test set, and warn if one of the last two is
    very small.
    """
    train, validation, test = map(len, sets)
    print(f"{name}, on {device}: {train:,} training, {validation:,} validation and {test:,} test "
          "examples", flush=True)
    if min(validation, test) < 30:
        warn("with fewer than 30 examples to validate or test on, the results are mostly chance")


def clean_text(text: str) -> str:
    """Normalize a text to Unicode's form NFC, and collapse its white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_table(path: str, names: tuple) -> list:
    """Return the columns `names` of a CSV or TSV file in UTF-8, as a list of tuples.

    The first line names the columns. Rows with an empty cell in one of them are skipped. Raises
    UserError with the number of a line that does not fit.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except ValueError:
        raise UserError(f"--data {path}: not a text file in UTF-8 (is it .xlsx or .gz?); save the "
                        "table as CSV in UTF-8") from None
    separator = max(",;\t", key=text.partition("\n")[0].count)  # the most frequent in line 1
    # In a TSV file, quotation marks are kept as they are.
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(10**9)  # characters in a cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting,
                        skipinitialspace=True, strict=True)
    rows = []
    skipped = []  # line numbers
    try:
        header = [cell.strip(' "').lower() for cell in next(reader, [])]
        if not set(names) <= set(header):
            raise ValueError(f"the columns are {', '.join(header)[:200] or 'missing'}")
        columns = [header.index(name) for name in names]
        for row in filter(any, reader):  # without blank lines
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, but {len(header)} in the first line; in a CSV "
                                 "file, a text that contains a separator or a line break needs "
                                 "quotation marks around it")
            cells = tuple(clean_text(row[column]) for column in columns)
            if "" in cells:
                skipped.append(reader.line_num)
            else:
                rows.append(cells)
    except (ValueError, csv.Error) as error:
        raise UserError(f"--data {path}, line {reader.line_num}: {error} (the first line must name "
                        f"the columns {' and '.join(names)}; commas, semicolons or tabs separate "
                        "them)") from None
    if skipped:
        warn(f"{path}: skipped {len(skipped)} row(s) with an empty cell; the first are in lines "
             f"{skipped[:10]}")
    if not rows:
        raise UserError(f"--data {path}: there are no rows below the header")
    return rows


def prediction_inputs(values: list) -> list:
    """Return the arguments of --predict, or for "-" the non-blank lines of standard input."""
    if values != ["-"]:
        return values
    text = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


# ---------------------------------------------------------------- Images


def read_image(path: str, size: int) -> np.ndarray:
    """Read an image as uint8 (size, size, 3), resized and center-cropped to a square.

    Transparent pixels become white. Raises UserError.
    """
    from PIL import Image, ImageOps
    try:
        image = Image.open(path)
        image.draft("RGB", (2 * size, 2 * size))  # decodes a large JPEG at a fraction of its size
        image.load()  # raises an error if pixels are damaged
        if image.format != "TIFF":  # Pillow rotates those itself
            with contextlib.suppress(Exception):  # a broken EXIF record
                image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats
            raise ValueError("it has more than 8 bits per channel; convert it to 8 bits")
        image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.BICUBIC)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path} cannot be read as an image: {error}") from None
    return np.array(image)


def check_apart(data: str, *written: str) -> None:
    """Raise UserError if a folder to write to is in the folder of the data, or contains it."""
    source = Path(data).resolve()
    for name in written:
        folder = Path(name).resolve()
        if source == folder or source in folder.parents or folder in source.parents:
            raise UserError(f"--data {data} and {name}, where the run writes, must be apart; "
                            "choose another --out")


def image_files(folder: str | Path) -> list:
    """The files in a folder and its subfolders, sorted, without hidden ones. Links are followed; a
    link to a folder above it repeats files.
    """
    pattern = os.path.join(glob.escape(str(folder)), "**")  # all files and folders, however deep
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))


def read_images(paths: list, size: int) -> tuple:
    """Read image files in parallel. Files that cannot be read are named and skipped.

    Returns the images, uint8 (N, size, size, 3), and the indices of their paths. Raises UserError
    if there are none, or more than fit into a quarter of the memory.
    """
    # While they are stacked, and then split into sets, they take up to three times as much.
    gigabytes = len(paths) * size**2 * 3 / 1e9
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        # Each process on this machine reads all images; torchrun says how many there are.
        available = memory / 4 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if gigabytes > available:
            raise UserError(f"{len(paths):,} images of {size} x {size} pixels take {gigabytes:.1f} "
                            f"GB, and {available:.1f} are allowed: a quarter of the memory, "
                            "shared by the processes; use fewer (in training: --limit), or train "
                            "with a smaller --size")

    with contextlib.suppress(ImportError):  # if it is installed, .heic files (iPhones) can be read
        import pillow_heif
        pillow_heif.register_heif_opener()

    def read(path):
        try:
            return read_image(path, size)
        except UserError as error:
            warn(f"skipped: {error}")
            return None
    # Pillow decodes without holding Python's lock, so threads run side by side.
    with ThreadPoolExecutor() as threads:
        images = list(progress_bar(threads.map(read, paths), "reading images", len(paths)))
    kept = [i for i, image in enumerate(images) if image is not None]
    if len(kept) < len(paths):
        warn(f"{len(paths) - len(kept)} of {len(paths)} files cannot be read")
    if not kept:
        raise UserError(f"none of the {len(paths)} files can be read as an image")
    blank = sum((images[i] == images[i][0, 0]).all() for i in kept)
    if blank:
        warn(f"{blank} of {len(kept)} images consist of a single color (transparent pixels become "
             "white)")
    return torch.from_numpy(np.stack([images[i] for i in kept])), kept


def load_torchvision(name: str, data_dir: str) -> tuple:
    """{"train": (images, labels), "test": ...} of a torchvision data set, and its class names.

    images: uint8 (N, H, W, channels); labels: int64 (N,). The first process downloads it if it is
    not there; raises UserError if that fails.
    """
    from torchvision import datasets
    dataset = getattr(datasets, name)
    socket.setdefaulttimeout(10)  # seconds; a network that does not answer must not hang the run

    def load(part, **options):
        try:
            return dataset(data_dir, part == "train", **options)
        except Exception as error:
            raise UserError(f"{name} is not in {data_dir}, and cannot be downloaded: {error}"
                            ) from None

    def download():
        load("train", download=True)
    on_first_process(download)
    sets = {}
    for part in ("train", "test"):
        data = load(part)
        # CIFAR-10's images are a transposed view, which zlib.crc32() refuses; gray images lack the
        # last dimension.
        images = torch.as_tensor(data.data).contiguous()
        sets[part] = images.reshape(*images.shape[:3], -1), torch.as_tensor(data.targets)
    return sets, data.classes
