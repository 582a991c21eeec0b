"""Speed against the usual way: programs take turns, each in a process of its own.

  python tests/benchmark.py cnn                          or gan, rnn, transformer: one table
  python tests/benchmark.py cnn --compile                the script with and without --compile
  python tests/benchmark.py cnn-accuracy --data FOLDER   training time to 80 % of the test part
  python tests/benchmark.py cnn --json                   the same for a machine to read

A ratio is taken within each turn; the table gives the median of the turns, the least and the most.

  step               forward with the loss, backward and optimizer, nothing else
  whole epoch        all from one epoch's end to the next: loading, clipping, validation on a tenth;
                     ours also saves its checkpoints and draws what it draws
  GFLOP/s            products and convolutions of the step, by PyTorch's own formulas, over the
                     whole step's time; against the largest matrix product's in the same type, and
                     the same convolutions, each alone on its own input
  to the first step  from the shell to the end of the script's first optimizer step
  default run        of one epoch, evaluation and pictures included; cnn: as many images as CIFAR-10

The tests assert no time; this does not either. It prints what it measured.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import usual_way  # noqa: E402
from torch import nn  # noqa: E402

import cnn  # noqa: E402
import common  # noqa: E402
import gan  # noqa: E402
import rnn  # noqa: E402
import transformer  # noqa: E402

try:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry
except ImportError:  # before PyTorch 2.1: no arithmetic rates
    flop_registry, TorchDispatchMode = None, object

CPU = torch.device("cpu")

# ---------------------------------------------------------------- Instruments


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of the matrix products and convolutions within it."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function._overloadpacket in flop_registry:
            count = flop_registry[function._overloadpacket]
            self.total += count(*arguments, **(options or {}), out_val=result)
        return result


class Stopwatch:
    """Seconds of each epoch, and those of them in forward, backward and optimizer.

    For the life of the process it stands in for methods of PyTorch and, by (owner, name), for the
    forward passes and losses of a script; an epoch of a script ends with common.save_epoch().
    """

    def __init__(self, *forward):
        optimizers = ((getattr(torch.optim, name), "step") for name in ("SGD", "Adam", "AdamW"))
        for owner, name in (*forward, (F, "cross_entropy"), (torch.Tensor, "backward"),
                            *optimizers):
            setattr(owner, name, self.timed(getattr(owner, name)))
        save_epoch = common.save_epoch
        common.save_epoch = lambda *arguments: (save_epoch(*arguments), self.lap())
        self.inside, self.operations = False, None
        self.restart()

    def restart(self):
        self.laps, self.step, self.start = [], 0.0, time.perf_counter()

    def lap(self):
        now = time.perf_counter()
        self.laps.append((now - self.start, self.step))
        self.start, self.step = now, 0.0

    def timed(self, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            # Evaluation is no part of the step; what a method calls in turn is timed with it.
            if self.inside or not torch.is_grad_enabled():
                return function(*arguments, **options)
            self.inside, start = True, time.perf_counter()
            with self.operations or contextlib.nullcontext():
                result = function(*arguments, **options)
            self.inside = False
            self.step += time.perf_counter() - start
            return result
        return call

    def results(self, examples: int, unit: str) -> dict:
        """Medians over the epochs after the first."""
        epoch, step = (statistics.median(seconds) for seconds in zip(*self.laps[1:]))
        return {f"step, {unit} a second": examples / step,
                f"whole epoch, {unit} a second": examples / epoch,
                "share of the epoch outside the step": 1 - step / epoch}


def shortest(function, times: int = 10) -> float:
    """The least seconds of a few calls, after one for warming up."""
    seconds = []
    for _ in range(1 + times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


# ---------------------------------------------------------------- Our scripts' own loops

# train(folder, examples, *options) runs the script's own train() and returns how many `unit` an
# epoch had; `counted`: examples for a count of operations; the forward passes and losses that its
# step consists of; its `cells`, if it trains several networks.
Script = namedtuple("Script", "train unit counted forward cells")


def cnn_parts(examples):
    return [cnn.synthetic_shapes(n, seed=0) for n in (examples, max(10, examples // 10))]


def train_cnn(folder, examples, *options):
    train, validation = cnn_parts(examples)
    data = cnn.Dataset("synthetic", list(cnn.SHAPES), train, validation, validation)
    cnn.train(cnn.build_parser().parse_args(options), data, folder, CPU)
    return examples


def train_gan(folder, examples, *options):
    images = gan.synthetic_digits(examples + max(100, examples // 10), seed=0)
    data = gan.Dataset("synthetic", images[:examples], images[examples:], images[examples:])
    gan.train(gan.build_parser().parse_args(options), data, folder, folder, CPU)
    return examples


def train_rnn(folder, examples, *options):
    args = rnn.build_parser().parse_args([f"--synthetic-size={examples}", *options])
    rnn.train(args, rnn.load_data(args, "classify"), args.cells[0], {}, folder, CPU)
    return examples


def transformer_data(examples):
    """Pairs to reverse, a tenth more to validate, and the number of all targets' tokens."""
    pairs = list(transformer.synthetic_pairs("reverse", examples * 11 // 10, 2, 20, 0).items())
    train, few = dict(pairs[:examples]), dict(pairs[examples:])
    vocabulary = transformer.Vocabulary({token for source in train for token in source})
    tokens = sum(len(source) + 1 for source in train)  # with <eos>
    return transformer.Dataset("reverse", vocabulary, train, few, few, {}), tokens


def train_transformer(folder, examples, *options):
    data, tokens = transformer_data(examples)
    transformer.train(transformer.build_parser().parse_args(options), data, folder, CPU)
    return tokens


SCRIPTS = {
    "cnn": Script(train_cnn, "images", 128, [(cnn.CNN, "forward"), (cnn, "cross_entropy")], [()]),
    "gan": Script(train_gan, "images", 16 * 64,  # every 16th step has a penalty
                  [(gan.Generator, "forward"), (gan.Discriminator, "forward"),
                   (gan, "gradient_penalty"), (gan, "discriminator_loss"),
                   (gan, "generator_loss")], [()]),
    "rnn": Script(train_rnn, "strings", 200, [(rnn.RNNClassifier, "forward")],
                  [("--cells", "lstm"), ("--cells", "gru")]),
    "transformer": Script(train_transformer, "target tokens", 10 * 64, [
        (transformer.Transformer, "forward"), (transformer, "cross_entropy")], [()])}
EXAMPLES = {"cnn": 100 * 128, "gan": 90 * 64, "rnn": 4000, "transformer": 160 * 64,
            "cnn-accuracy": 50000}  # of an epoch


def measure_ours(args, *options):
    """The script's own loop at its default options, or with some."""
    script, results = SCRIPTS[args.script], {}
    common.keep_freed_memory()
    watch = Stopwatch(*(() if args.compile else script.forward))  # none within what is compiled
    for cell in script.cells:
        epochs = "4" if args.compile or cell else "2"
        watch.restart()
        with tempfile.TemporaryDirectory() as folder:
            number = script.train(Path(folder), args.examples, "--epochs", epochs, *cell,
                                  *options)
        found = watch.results(number, script.unit)
        step, epoch, _ = found
        if args.compile:
            seconds = watch.laps[0][0] - number / found[epoch]
            found = {epoch: found[epoch], "first epoch, seconds more": seconds}
        elif flop_registry and not options:
            found["GFLOP/s"] = found[step] * operations(watch, script, cell) / 1e9
        results.update({": ".join([*cell[1:], key]): value for key, value in found.items()})
    return results


def operations(watch, script, cell) -> float:
    """Floating-point operations of forward and backward, for one example or token."""
    watch.operations = Operations()
    # Fused kernels cannot be counted; the written-out ones have the same products.
    cell = (*cell, "--backend", "scratch") if cell else ()
    fused, common.FUSED_ATTENTION = common.FUSED_ATTENTION, False
    with tempfile.TemporaryDirectory() as folder:
        number = script.train(Path(folder), script.counted, "--epochs", "1", *cell)
    common.FUSED_ATTENTION = fused
    total, watch.operations = watch.operations.total, None
    return total / number


def measure_padding(args):
    """Of the steps that the RNN computes, the share that is padding."""
    data, computed = rnn.load_data(rnn.build_parser().parse_args([]), "classify"), []
    model = rnn.RNNClassifier(len(data.symbols), len(data.answers))
    model.layers.register_forward_hook(lambda _, inputs, output: computed.append(
        inputs[0].shape[0] * inputs[0].shape[1]))
    with torch.no_grad():
        for indices in rnn.batches(data.train.lengths, 128, 2):
            model(*rnn.take(data.train, indices, CPU))
    return {"share of padding": 1 - int(data.train.lengths.sum()) / sum(computed)}


# ---------------------------------------------------------------- The usual way, measured


def measure_loop(watch, loader, epoch, validate=lambda: None):
    """Two epochs; then as many steps on a batch that is there: the workers slow the others."""
    for _ in range(2):
        epoch(loader)
        validate()
        watch.lap()
    results = watch.results(len(loader.dataset), "images")
    size = min(loader.batch_size, len(loader.dataset))
    batch = loader.collate_fn([loader.dataset[i] for i in range(size)])
    watch.restart()
    for steps in 3, len(loader):
        epoch([batch] * steps)
        watch.lap()
    alone = watch.results(len(loader) * size, "images")
    results["step, images a second"] = alone["step, images a second"]
    return results


def measure_cnn_usual(args):
    model, loader, test_loader = usual_way.cnn(*cnn_parts(args.examples))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    watch = Stopwatch((nn.Sequential, "forward"))
    return measure_loop(watch, loader, lambda batches: usual_way.epoch(model, optimizer, batches),
                        lambda: usual_way.accuracy(model, test_loader))


def measure_gan_usual(args):
    """No measure of the images, and no picture, where ours has both after each epoch."""
    discriminator, generator, loader = usual_way.gan(gan.synthetic_digits(args.examples, seed=0))
    optimizers = [torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
                  for network in (discriminator, generator)]
    watch = Stopwatch((nn.Sequential, "forward"), (gan.Discriminator, "forward"),
                      (nn.BCEWithLogitsLoss, "forward"))
    return measure_loop(watch, loader, lambda batches: usual_way.gan_epoch(
        discriminator, generator, optimizers, batches))


def measure_rnn_bare(args, bands):
    """A bare loop around torch.nn: batches of random lengths, padded; or batches like ours."""
    common.keep_freed_memory()
    options = rnn.build_parser().parse_args([f"--synthetic-size={args.examples}"])
    data, results = rnn.load_data(options, "classify"), {}

    def batches(part):
        indices = (rnn.batches(part.lengths, options.batch_size, 2) if bands
                   else torch.randperm(len(part.lengths)).split(options.batch_size))
        return ((part.inputs[i], part.lengths[i], part.targets[i, 0]) for i in indices)
    watch = Stopwatch((usual_way.BareClassifier, "forward"))
    for cell in "lstm", "gru":
        model = usual_way.BareClassifier(cell, len(data.symbols), len(data.answers), bands)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, **common.FUSED_ADAM)
        watch.restart()
        for _ in range(4):
            usual_way.epoch(model, optimizer, batches(data.train), options.clip)
            usual_way.accuracy(model, batches(data.validation))
            watch.lap()
        results.update({f"{cell}: {key}": value for key, value in
                        watch.results(len(data.train.lengths), "strings").items()})
    return results


def measure_transformer_usual(args):
    """Validated by teacher forcing alone, where ours also writes the targets out."""
    data, tokens = transformer_data(args.examples)
    model = usual_way.Transformer(len(data.vocabulary.tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train, validation = (
        [data.vocabulary.encode(source, targets[0]) for source, targets in part.items()]
        for part in (data.train, data.validation))
    watch = Stopwatch((usual_way.Transformer, "forward"))
    for _ in range(2):
        usual_way.epoch(model, optimizer, usual_way.padded(train), 1.0,
                        ignore_index=transformer.PAD, label_smoothing=0.1)
        usual_way.accuracy(model, usual_way.padded(validation))
        watch.lap()
    return watch.results(tokens, "target tokens")


# ---------------------------------------------------------------- Decoding


@torch.no_grad()
def search_without_cache(model, source):
    """Greedy; the decoder goes through the whole prefix for each token."""
    memory, tokens = model.encode(source), torch.full((len(source), 1), transformer.BOS)
    for _ in range(len(model.positions) - 1):
        logits = model.decode(tokens, memory)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)


def measure_decoding(args, search=transformer.beam_search, lengths=(32, 64, 128, 256), times=3):
    """A model that never writes <eos>, so that each of 64 sources takes `length` tokens."""
    results = {}
    for length in lengths:
        torch.manual_seed(0)
        model = transformer.Transformer(30, max_length=length).eval()
        with torch.no_grad():
            model.embedding.weight[:, 0] = 0
            model.embedding.weight[transformer.EOS, 0] = -1
            model.decoder_norm.bias[0] = 100  # its logit is near -100
        source = torch.randint(4, 30, (64, 20))
        seconds = shortest(lambda: search(model, source), times)  # noqa: B023
        results[f"tokens a second, {length} long"] = 64 * length / seconds
    return results


# ---------------------------------------------------------------- This machine's limits


def dtype_of(script) -> torch.dtype:
    return common.select_dtype("auto", CPU, small=script in ("rnn", "transformer"))


def measure_matrix_product(args):
    """The largest rate of a few sizes, in the type that the script computes in."""
    rates = []
    for size in 1024, 2048:
        a, b = torch.randn(2, size, size).to(dtype_of(args.script))
        rates.append(2 * size**3 / shortest(lambda: a @ b) / 1e9)  # noqa: B023
    return {"GFLOP/s": max(rates)}


def measure_convolutions(args):
    """Each convolution of the networks, forward and backward, by itself, on its own input."""
    layers, counter, dtype, seconds = [], Operations(), dtype_of(args.script), 0.0
    networks = {"cnn": [(cnn.CNN(), torch.zeros(128, 32, 32, 3, dtype=torch.uint8))],
                "gan": [(gan.Generator(), torch.randn(64, 100)),
                        (gan.Discriminator(), torch.randn(64, 1, 28, 28))]}[args.script]

    def keep(module, inputs, output):
        layers.append((module, inputs[0], torch.randn_like(output)))
    for network, inputs in networks:
        hooks = [module.register_forward_hook(keep) for module in network.modules()
                 if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]
        network(inputs)
        for hook in hooks:
            hook.remove()
    for module, inputs, gradient in layers:
        module, gradient = module.to(dtype), gradient.to(dtype)
        inputs = inputs.detach().to(dtype).requires_grad_(inputs.requires_grad)
        with counter:
            module(inputs).backward(gradient)
        seconds += shortest(lambda: module(inputs).backward(gradient))  # noqa: B023
    return {"GFLOP/s": counter.total / seconds / 1e9}


# ---------------------------------------------------------------- From the shell

FIRST_STEP = """
import os, runpy, sys, torch
def leave_after(step):
    def first(*arguments, **options):
        step(*arguments, **options)
        os._exit(0)
    return first
for optimizer in torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW:
    optimizer.step = leave_after(optimizer.step)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit("the script ended without a step")
"""


def start(*command):
    """Run Python with a command line, in a folder of its own: its seconds, its peak memory."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=output,
                                   stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        output.seek(0)
        if status:
            sys.exit(f"{' '.join(command)}\n{output.read()}")
    return seconds, usage.ru_maxrss / 1024  # Linux counts in KiB


def default_run(args, *options):
    """The command line of the script's default job, of data that need no download."""
    data = ["--data", args.data or "synthetic"] if args.script in ("cnn", "gan") else []
    return [str(ROOT / (args.script + ".py")), *data, *options]


def measure_memory(args):
    size = ["--synthetic-size", "50000"] if args.script == "cnn" else []
    return {"peak of memory, MiB": start(*default_run(args, "--epochs", "1", *size))[1]}


OUTSIDE = {  # measured by this process; the others in one of their own
    "to the first step": lambda args: {"seconds": start("-c", FIRST_STEP, *default_run(args))[0]},
    "import torch": lambda args: {"seconds": start("-c", "import torch, os; os._exit(0)")[0]},
    "default run": measure_memory}

# ---------------------------------------------------------------- Accuracy of the CNN

GOAL, USUAL_CAP, SCHEDULES = 0.8, 40, (6, 8, 10)  # accuracy; epochs at most; ours, one by one


def accuracy_data(args):
    parts, classes = common.load_image_folder(args.data, cnn.SIZE, 3)
    every = max(1, len(parts["train"][1]) // args.examples)  # but for a trial, all
    train, test = (cnn.Part(*(x[::every].clone() for x in parts[part]))
                   for part in ("train", "test"))
    return cnn.Dataset("cifar10", classes, train, test, test)


def measure_accuracy_ours(args):
    """cnn.py with the shortest of a few schedules that reaches the goal."""
    data, evaluations, predict_logits = accuracy_data(args), [], cnn.predict_logits
    common.keep_freed_memory()

    def timed(*arguments):
        begin = time.perf_counter()
        logits = predict_logits(*arguments)
        evaluations.append(time.perf_counter() - begin)
        return logits
    cnn.predict_logits = timed
    for epochs in SCHEDULES:
        del evaluations[:]
        options = cnn.build_parser().parse_args([f"--epochs={epochs}", f"--seed={args.turn}"])
        with tempfile.TemporaryDirectory() as folder:
            history = cnn.train(options, data, Path(folder), CPU)
        reached = [row["epoch"] for row in history if row["validation_accuracy"] >= GOAL]
        if reached:
            break
    count = reached[0] if reached else epochs
    seconds = sum(row["seconds"] for row in history[:count]) - sum(evaluations[:count])
    return {"seconds of training": seconds, "epochs": count, "epochs of the schedule": epochs,
            "test accuracy": history[count - 1]["validation_accuracy"]}


def measure_accuracy_usual(args):
    """Adam with its usual learning rate, until the goal is reached."""
    torch.manual_seed(args.turn)
    data, seconds, accuracies = accuracy_data(args), 0.0, [0.0]
    model, loader, test_loader = usual_way.cnn(data.train, data.test)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while accuracies[-1] < GOAL and len(accuracies) <= USUAL_CAP:
        begin = time.perf_counter()
        usual_way.epoch(model, optimizer, loader)
        seconds += time.perf_counter() - begin
        accuracies.append(usual_way.accuracy(model, test_loader))
    return {"seconds of training": seconds, "epochs": len(accuracies) - 1,
            "test accuracy": accuracies[-1]}


# ---------------------------------------------------------------- Taking turns

LIMITS = {"matrix product": measure_matrix_product, "convolutions": measure_convolutions}
IMAGES = {"ours": measure_ours,
          "ours, float32": lambda args: measure_ours(args, "--precision", "float32")}
PROGRAMS = {
    "cnn": {**IMAGES, "usual": measure_cnn_usual, **LIMITS, **OUTSIDE},
    "gan": {**IMAGES, "usual": measure_gan_usual, **LIMITS, **OUTSIDE},
    "rnn": {"ours": measure_ours,
            "bare, random lengths": lambda args: measure_rnn_bare(args, bands=False),
            "bare, our batches": lambda args: measure_rnn_bare(args, bands=True),
            "scratch": lambda args: measure_ours(args, "--backend", "scratch"),
            "our batches": measure_padding, "matrix product": measure_matrix_product, **OUTSIDE},
    "transformer": {
        "ours": measure_ours, "usual": measure_transformer_usual, "cached": measure_decoding,
        "no cache": lambda args: measure_decoding(args, search_without_cache, (64, 256), 1),
        "matrix product": measure_matrix_product, **OUTSIDE},
    "cnn-accuracy": {"ours": measure_accuracy_ours, "usual": measure_accuracy_usual}}
COMPILED = {"ours, compiled": lambda args: measure_ours(args, "--compile"),
            "ours, not compiled": measure_ours}
# Pairs whose ratio is of interest: the first with any later program that has the same quantity.
COMPARED = {"ours": "", "ours, compiled": "", "cached": "", "to the first step": "",
            "ours, float32": "usual"}


def ratios(runs: dict) -> dict:
    """{"a / b: quantity": [of each turn]} for pairs of programs with a quantity in common."""
    found = {}
    for a, b in itertools.combinations(runs, 2):
        for quantity in runs[a][0] if a in COMPARED and b.startswith(COMPARED[a]) else ():
            general = quantity.split(": ")[-1]  # without the cell
            other = quantity if quantity in runs[b][0] else general
            if other in runs[b][0] and not general.startswith("share"):
                found[f"{a} / {b}: {quantity}"] = [
                    x[quantity] / y[other] for x, y in zip(runs[a], runs[b])]
    return found


def print_table(runs: dict) -> None:
    rows = [(f"{name}: {quantity}", [run[quantity] for run in runs[name]])
            for name in runs for quantity in runs[name][0]]
    print(f"{'':62}{'median':>9}{'least':>9}{'most':>9}")
    for title, values in [*rows, *ratios(runs).items()]:
        cells = statistics.median(values), min(values), max(values)
        print(f"{title:62}", *(f"{cell:9,.0f}" if cell >= 1000 else f"{cell:9.3g}"
                               for cell in cells), sep="")


def in_child(name: str, turn: int) -> dict:
    """What a program returns, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, "--turn", str(turn)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True,
                          env=dict(os.environ, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1"))
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=PROGRAMS)
    parser.add_argument("--turns", type=int, help="[3; 1 for cnn-accuracy]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--compile", action="store_true", help="measure --compile alone")
    parser.add_argument("--data", help="for cnn-accuracy, and the default run of cnn and gan")
    parser.add_argument("--examples", type=int, help="in an epoch, to try this out with few")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one program, in its own process
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.script == "cnn-accuracy" and not args.data:
        parser.error("cnn-accuracy needs --data FOLDER, with train/CLASS/ and test/CLASS/")
    args.data = args.data and os.path.abspath(args.data)
    args.examples = args.examples or EXAMPLES[args.script]
    programs = dict(COMPILED if args.compile else PROGRAMS[args.script])
    for name in LIMITS if flop_registry is None else ():
        programs.pop(name, None)
    if args.script == "transformer" and (
            "label_smoothing" not in F.cross_entropy.__code__.co_varnames):
        programs.pop("usual", None)  # its torch.nn.Transformer and loss are of PyTorch 1.10
    if args.measure:
        with contextlib.redirect_stdout(sys.stderr):  # what the scripts print is not the result
            result = programs[args.measure](args)
        print(json.dumps(result))
        return
    turns = args.turns or (1 if args.script == "cnn-accuracy" else 3)
    runs = {name: [] for name in programs}
    for turn in range(turns):
        for name, program in programs.items():
            if name != "default run" or turn == 0:  # its memory changes little
                print(f"turn {turn + 1} of {turns}: {name}", file=sys.stderr)
                runs[name].append(program(args) if name in OUTSIDE else in_child(name, turn))
    facts = {"script": args.script, "turns": turns, "torch": str(torch.__version__),
             "threads": torch.get_num_threads(), "machine": platform.machine(),
             "type": str(dtype_of(args.script)).split(".")[1]}
    if args.json:
        print(json.dumps({**facts, "runs": runs, "ratios": ratios(runs)}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print_table(runs)


if __name__ == "__main__":
    main()
