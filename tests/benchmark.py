"""Speed against the usual way: both take turns in one process, on the same data.

  python tests/benchmark.py cnn          training: also rnn, gan, transformer
  python tests/benchmark.py decoding     the Transformer with a cache and without, 64 tokens
  python tests/benchmark.py images       reading photographs of 12 megapixels

Other options are those of the script: python tests/benchmark.py cnn --precision float32. Training
is the second of two epochs, with everything in it but validation. A ratio is taken within each
turn. Tests assert no time, and neither does this: it prints what it measured.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import usual_way  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

import cnn  # noqa: E402
import common  # noqa: E402
import gan  # noqa: E402
import rnn  # noqa: E402
import transformer  # noqa: E402

CPU = torch.device("cpu")
# Of an epoch; of sequences a fifth of them is not for training.
EXAMPLES = {"cnn": 100 * 128, "gan": 240 * 16, "rnn": 4000, "transformer": 160 * 64}
FEW = 64  # examples to validate on, which takes no time


def seconds(function, times=1):
    """The least seconds of some calls, after one to warm up."""
    function()
    measured = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        measured.append(time.perf_counter() - start)
    return min(measured)


def train(script, data, options, epochs, *cell):
    """The history of the script's own train()."""
    args = script.build_parser().parse_args(["--epochs", str(epochs), *options])
    with tempfile.TemporaryDirectory() as folder:
        args.out = folder
        args.checksum = 0
        return script.train(args, data, *cell, Path(folder), CPU)


# ---------------------------------------------------------------- Training

# Each returns {quantity: (ours, usual)}, two functions that return examples a second.


def compare_epochs(examples, ours, usual):
    """ours() returns a history; usual() trains for one epoch."""
    return (lambda: examples / ours()[-1]["seconds"]), (lambda: examples / seconds(usual))


def measure_cnn(options):
    examples = EXAMPLES["cnn"]
    images, labels = cnn.synthetic_shapes(examples, 32, seed=0)
    few = cnn.ImageSet(images[:FEW], labels[:FEW])
    data = cnn.Dataset("synthetic", list(cnn.SHAPES), cnn.ImageSet(images, labels), few, few, [])
    return {"images a second": compare_epochs(
        examples, lambda: train(cnn, data, options, 2), usual_way.cnn(images, labels))}


def measure_gan(options):
    examples = EXAMPLES["gan"]
    images, labels = gan.synthetic_digits(examples, seed=0)
    gan.VALIDATION_SAMPLES = FEW
    data = gan.Dataset(images, images[:FEW], images[:FEW])
    return {"images a second": compare_epochs(
        examples, lambda: train(gan, data, options, 2), usual_way.gan(images, labels))}


def measure_rnn(options):
    size = ["--synthetic-size", str(EXAMPLES["rnn"])]
    data = rnn.load_data(rnn.build_parser().parse_args(size), "classify")
    data = data._replace(validation=rnn.SequenceSet(*(rows[:FEW] for rows in data.validation)))
    inputs, lengths, targets = data.train
    found = {}
    for cell, layers in (("lstm", nn.LSTM), ("gru", nn.GRU)):
        usual = usual_way.rnn(layers, inputs, lengths, targets.squeeze(1), len(data.vocabulary),
                              len(data.answers))
        found[f"{cell}: strings a second"] = compare_epochs(
            len(lengths), lambda cell=cell: train(rnn, data, options, 2, cell), usual)
    return found


def measure_transformer(options):
    size = ["--synthetic-size", str(EXAMPLES["transformer"])]
    data = transformer.load_data(transformer.build_parser().parse_args(size))
    data = data._replace(validation=data.validation[:FEW])
    pairs = [[data.vocabulary.encode([tokens], CPU)[0] for tokens in pair] for pair in data.train]
    usual = usual_way.transformer(pairs, len(data.vocabulary.tokens))
    return {"pairs a second": compare_epochs(
        len(pairs), lambda: train(transformer, data, options, 2), usual)}


# ---------------------------------------------------------------- Decoding and images


@torch.no_grad()
def decode_without_cache(model, source):
    """Greedy decoding, where the decoder goes through the whole prefix for each token."""
    memory, mask = model.encode(source)
    tokens = torch.full((len(source), 1), transformer.BOS)
    for _ in range(len(model.positions)):
        logits = model.decode(tokens, memory, mask)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(2)], 1)


def measure_decoding(options):
    """Our decoding with a cache and that without, by a model that never writes <eos>."""
    model = transformer.Transformer(vocabulary_size=30, max_length=64).eval()
    with torch.no_grad():  # the logit of <eos> is near -100
        model.embedding.weight[:, 0] = 0
        model.embedding.weight[transformer.EOS, 0] = -1
        model.decoder_norm.bias[0] = 100
    source = torch.randint(4, 30, (64, 20))

    def ours():
        return 64 * 64 / seconds(lambda: transformer.beam_search(model, source))

    def usual():
        return 64 * 64 / seconds(lambda: decode_without_cache(model, source))
    return {"tokens a second": (ours, usual)}


def measure_images(options, count=24, size=(4000, 3000)):
    """Our reading of JPEG files, and Pillow's of one after the other."""
    folder = tempfile.TemporaryDirectory()  # it goes when usual() does
    paths = [str(Path(folder.name, f"{i}.jpg")) for i in range(count)]
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    noise.resize(size, Image.BICUBIC).save(paths[0], quality=90)
    for path in paths[1:]:
        shutil.copy(paths[0], path)

    def ours():
        return count / seconds(lambda: common.read_images(paths, 32))

    def usual():
        assert os.path.isdir(folder.name)
        return count / seconds(lambda: [
            np.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path in paths])
    return {"photographs a second": (ours, usual)}


# ---------------------------------------------------------------- Taking turns

MEASURES = {"cnn": measure_cnn, "gan": measure_gan, "rnn": measure_rnn,
            "transformer": measure_transformer, "decoding": measure_decoding,
            "images": measure_images}


def take_turns(programs, turns):
    """{"ours": {quantity: [of each turn]}, "usual": ..., "ratio": ...}.

    programs: {quantity: (ours, usual)}.
    """
    found = {"ours": {}, "usual": {}, "ratio": {}}
    for quantity, (ours, usual) in programs.items():
        for kind in found:
            found[kind][quantity] = []
        for turn in range(turns):
            print(f"{quantity}: turn {turn + 1} of {turns}", file=sys.stderr)
            rates = ours(), usual()
            found["ours"][quantity].append(rates[0])
            found["usual"][quantity].append(rates[1])
            found["ratio"][quantity].append(rates[0] / rates[1])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, options = parser.parse_known_args()
    with contextlib.redirect_stdout(sys.stderr):  # what the scripts print is not the result
        found = take_turns(MEASURES[args.what](options), args.turns)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "turns": args.turns}
    if args.json:
        print(json.dumps({**facts, **found}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':34}{'median':>10}{'least':>10}{'most':>10}")
    for kind, quantities in found.items():
        for quantity, values in quantities.items():
            numbers = statistics.median(values), min(values), max(values)
            digits = 2 if kind == "ratio" else 0
            cells = [f"{number:10,.{digits}f}" for number in numbers]
            print(f"{kind + ', ' + quantity:34}", *cells, sep="")


if __name__ == "__main__":
    main()
