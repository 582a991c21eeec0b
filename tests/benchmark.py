"""Speed against the usual way: each pair of programs takes turns, in processes of its own.

  python tests/benchmark.py cnn            a table: medians, spread, ratio
  python tests/benchmark.py cnn --json     the same for a machine to read

The tests assert no time; this does not either. It prints what it measured.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import cnn  # noqa: E402
import common  # noqa: E402
import gan  # noqa: E402
import rnn  # noqa: E402
import transformer  # noqa: E402

# ---------------------------------------------------------------- cnn.py

CNN_IMAGES = 100 * 128


def cnn_data():
    part = cnn.synthetic_shapes(CNN_IMAGES, seed=0)
    few = cnn.Part(*(tensor[:128] for tensor in part))
    return cnn.Dataset("synthetic", list(cnn.SHAPES), train=part, validation=few, test=few)


def measure_cnn_ours(precision="auto"):
    """The script's own epoch, and forward, backward and optimizer alone on one batch."""
    common.keep_freed_memory()
    data, device = cnn_data(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        args = cnn.build_parser().parse_args(["--epochs", "2", "--precision", precision])
        history = cnn.train(args, data, Path(folder), device)
    seconds = history[-1]["seconds"]
    model, dtype = cnn.CNN(widths=args.widths), common.select_dtype(precision, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    images, labels = data.train.images[:128], data.train.labels[:128]
    model.train()
    for step in range(5 + 100):
        if step == 5:
            start = time.perf_counter()
        optimizer.zero_grad()
        with common.autocast(device, dtype):
            logits = model(images)
        cnn.cross_entropy(logits.float(), labels, 0.1).backward()
        optimizer.step()
    bare = (time.perf_counter() - start) / 100 * (CNN_IMAGES / 128)
    return {"images a second": CNN_IMAGES / seconds, "share outside the model": 1 - bare / seconds}


def measure_cnn_float32():
    """As a processor without bfloat16 instructions does it."""
    return measure_cnn_ours("float32")


def measure_cnn_usual():
    """The same network, NCHW, with a DataLoader of two workers and torchvision's PIL transforms."""
    from PIL import Image
    from torchvision import transforms
    part = cnn.synthetic_shapes(CNN_IMAGES, seed=0)
    arrays, labels = part.images.numpy(), part.labels.tolist()
    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=3, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.25,) * 3)])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, i):
            return transform(Image.fromarray(arrays[i])), labels[i]
    loader = torch.utils.data.DataLoader(Images(), batch_size=128, shuffle=True, num_workers=2,
                                         persistent_workers=True)
    layers, channels = [], 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.MaxPool2d(2)]
        channels = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 256), nn.ReLU(),
                          nn.Dropout(0.2), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    model.train()
    for _ in range(2):
        start = time.perf_counter()
        for images, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    return {"images a second": CNN_IMAGES / (time.perf_counter() - start)}


# ---------------------------------------------------------------- gan.py

GAN_IMAGES = 60 * 64


def measure_gan_ours(precision="auto"):
    """The script's own second epoch, validation and its grid of samples included."""
    common.keep_freed_memory()
    images = gan.synthetic_digits(GAN_IMAGES, seed=0)
    data = gan.Dataset("synthetic", images, images[:128], images[:128])
    with tempfile.TemporaryDirectory() as folder:
        args = gan.build_parser().parse_args(["--epochs", "2", "--batch-size", "64",
                                              "--precision", precision])
        history = gan.train(args, data, Path(folder), Path(folder), torch.device("cpu"))
    return {"images a second": GAN_IMAGES / history[-1]["seconds"]}


def measure_gan_float32():
    return measure_gan_ours("float32")


def measure_gan_usual():
    """The same two networks in the default memory format, a DataLoader, a plain loop."""
    from PIL import Image
    from torchvision import transforms
    arrays = gan.synthetic_digits(GAN_IMAGES, seed=0).numpy()[..., 0]
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(arrays)

        def __getitem__(self, i):
            return transform(Image.fromarray(arrays[i]))
    loader = torch.utils.data.DataLoader(Images(), batch_size=64, shuffle=True, num_workers=2,
                                         persistent_workers=True)
    generator = nn.Sequential(nn.Linear(100, 256 * 9, bias=False), nn.Unflatten(1, (256, 3, 3)),
                              gan.Generator().layers).to(memory_format=torch.contiguous_format)
    discriminator = gan.Discriminator().to(memory_format=torch.contiguous_format)
    optimizers = [torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
                  for network in (discriminator, generator)]
    criterion = nn.BCEWithLogitsLoss()
    for _ in range(2):
        start = time.perf_counter()
        for real in loader:
            ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
            optimizers[0].zero_grad()
            criterion(discriminator(real), ones).backward()
            fake = generator(torch.randn(len(real), 100))
            criterion(discriminator(fake.detach()), zeros).backward()
            optimizers[0].step()
            optimizers[1].zero_grad()
            criterion(discriminator(fake), ones).backward()
            optimizers[1].step()
    return {"images a second": GAN_IMAGES / (time.perf_counter() - start)}


# ---------------------------------------------------------------- rnn.py


def measure_rnn_ours(cells=("lstm", "gru"), backend="torch"):
    """The script's own second epoch on its first task, and how much of it is padding."""
    common.keep_freed_memory()
    args = rnn.build_parser().parse_args(["--epochs", "2", "--backend", backend])
    data, result, computed = rnn.load_data(args, "classify"), {}, []
    few = rnn.Part(*(tensor[:128] for tensor in data.validation))
    data = data._replace(validation=few)
    for cell in cells:
        runs = {}
        with tempfile.TemporaryDirectory() as folder:
            rnn.train(args, data, cell, runs, Path(folder), torch.device("cpu"))
        row = runs[f"classify {cell}"]["history"][-1]
        result[f"{cell} strings a second"] = row["sequences_per_second"]
    model = rnn.build(runs[f"classify {cell}"])
    model.layers.register_forward_hook(lambda _, inputs, output: computed.append(
        inputs[0].shape[0] * inputs[0].shape[1]))
    with torch.no_grad():
        for indices in rnn.batches(data.train.lengths, args.batch_size, 2):
            model(*rnn.take(data.train, indices, "cpu"))
    result["share of padding"] = 1 - int(data.train.lengths.sum()) / sum(computed)
    return result


def measure_rnn_bare(cell, same_shapes):
    """A bare loop around torch.nn: batches of random lengths, padded; or of our lengths."""
    common.keep_freed_memory()
    args = rnn.build_parser().parse_args([])
    data = rnn.load_data(args, "classify")
    embedding, layers = nn.Embedding(len(data.symbols), 64), rnn.CELLS["torch"][cell](64, 64)
    head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, len(data.answers)))
    parameters = [p for module in (embedding, layers, head) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, **common.FUSED_ADAM)
    lengths = data.train.lengths
    for _ in range(2):
        start = time.perf_counter()
        batches = (rnn.batches(lengths, args.batch_size, 2) if same_shapes
                   else torch.randperm(len(lengths)).split(args.batch_size))
        for indices in batches:
            groups = [indices]
            if same_shapes:  # lengths at most a tenth apart by themselves
                bands = (lengths[indices].float().log() / 0.1).floor()
                groups = [indices[bands == band] for band in bands.unique()]
            last = []
            for group in groups:
                inputs = data.train.inputs[group, :int(lengths[group].max())].t()
                output, _ = layers(embedding(inputs))
                last.append(output[lengths[group] - 1, torch.arange(len(group))])
            targets = data.train.targets[torch.cat(groups), 0]
            optimizer.zero_grad()
            F.cross_entropy(head(torch.cat(last)), targets).backward()
            nn.utils.clip_grad_norm_(parameters, args.clip)
            optimizer.step()
    return {f"{cell} strings a second": len(lengths) / (time.perf_counter() - start)}


# ---------------------------------------------------------------- transformer.py

TRANSFORMER_PAIRS = 64 * 160


def transformer_data():
    pairs = transformer.synthetic_pairs("reverse", TRANSFORMER_PAIRS, 2, 20, seed=0)
    few = dict(list(pairs.items())[:10])
    vocabulary = transformer.Vocabulary({token for source in pairs for token in source})
    tokens = sum(len(source) + 1 for source in pairs)  # of all targets, their <eos> with them
    return transformer.Dataset("reverse", vocabulary, pairs, few, few, {}), tokens


def measure_transformer_ours(precision="auto"):
    """The script's own epoch at its default options."""
    common.keep_freed_memory()
    data, tokens = transformer_data()
    with tempfile.TemporaryDirectory() as folder:
        args = transformer.build_parser().parse_args(["--epochs", "2", "--precision", precision])
        history = transformer.train(args, data, Path(folder), torch.device("cpu"))
    result = {"target tokens a second": tokens / history[-1]["seconds"]}
    return dict(result, **measure_transformer_decoding()) if precision == "auto" else result


def measure_transformer_bfloat16():
    """What the script leaves alone on CPUs."""
    return measure_transformer_ours("bfloat16")


class UsualTransformer(nn.Module):
    """torch.nn.Transformer with what it lacks: embeddings, positions, the output layer."""

    def __init__(self, vocabulary):
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, 64), nn.Embedding(vocabulary, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 256, dropout=0.0, batch_first=True,
                                          norm_first=True)
        self.output = nn.Linear(64, vocabulary)
        self.register_buffer("positions", transformer.sinusoidal_positions(100, 64))

    def forward(self, source, target):
        source_padding, target_padding = source == transformer.PAD, target == transformer.PAD
        future = torch.ones(target.shape[1], target.shape[1]).triu(1).bool()
        source, target = (embedding(tokens) * 8 + self.positions[:tokens.shape[1]] for
                          embedding, tokens in ((self.source, source), (self.target, target)))
        return self.output(self.transformer(
            source, target, tgt_mask=future, src_key_padding_mask=source_padding,
            tgt_key_padding_mask=target_padding, memory_key_padding_mask=source_padding))


def measure_transformer_usual():
    """torch.nn.Transformer of the same size, on batches of random lengths, padded."""
    data, tokens = transformer_data()
    pairs = [data.vocabulary.encode(source, targets[0]) for source, targets in data.train.items()]
    model = UsualTransformer(len(data.vocabulary.tokens)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        start = time.perf_counter()
        for indices in torch.randperm(len(pairs)).split(64):
            source, target = (
                nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=transformer.PAD)
                for rows in zip(*(pairs[i] for i in indices)))
            logits = model(source, target[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(),
                                   ignore_index=transformer.PAD, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return {"target tokens a second": tokens / (time.perf_counter() - start)}


def endless_transformer(length):
    """A model that never writes <eos>, so that each of 64 sources takes `length` tokens."""
    torch.manual_seed(0)
    model = transformer.Transformer(30, max_length=length).eval()
    with torch.no_grad():
        model.embedding.weight[:, 0] = 0
        model.embedding.weight[transformer.EOS, 0] = -1
        model.decoder_norm.bias[0] = 100  # its logit is near -100
    return model, torch.randint(4, 30, (64, 20))


def measure_transformer_decoding():
    """Greedy, by the script's own search, with the cache."""
    result = {}
    for length in (32, 64, 128, 256):
        model, source = endless_transformer(length)
        transformer.beam_search(model, source)
        start = time.perf_counter()
        rows = transformer.beam_search(model, source)
        seconds = time.perf_counter() - start
        assert all(len(row[-1]) == length for row in rows)
        result[f"tokens a second, {length} long"] = 64 * length / seconds
    return result


@torch.no_grad()
def measure_transformer_prefix(length):
    """Greedy without a cache: the decoder goes through the whole prefix for each token."""
    model, source = endless_transformer(length)
    start = time.perf_counter()
    memory = model.encode(source)
    tokens = torch.full((64, 1), transformer.BOS)
    for _ in range(length):
        logits = model.decode(tokens, memory)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    seconds = time.perf_counter() - start
    return {f"tokens a second, {length} long": 64 * length / seconds}


# ---------------------------------------------------------------- Taking turns

PROGRAMS = {"cnn": {"ours": measure_cnn_ours, "ours, float32": measure_cnn_float32,
                     "usual": measure_cnn_usual},
            "gan": {"ours": measure_gan_ours, "ours, float32": measure_gan_float32,
                    "usual": measure_gan_usual},
            "rnn": {"ours": measure_rnn_ours,
                    "bare lstm, random": lambda: measure_rnn_bare("lstm", False),
                    "bare gru, random": lambda: measure_rnn_bare("gru", False),
                    "bare lstm, same": lambda: measure_rnn_bare("lstm", True),
                    "bare gru, same": lambda: measure_rnn_bare("gru", True),
                    "scratch lstm": lambda: measure_rnn_ours(["lstm"], "scratch"),
                    "scratch gru": lambda: measure_rnn_ours(["gru"], "scratch")},
            "transformer": {"ours": measure_transformer_ours,
                            "ours, bfloat16": measure_transformer_bfloat16,
                            "usual": measure_transformer_usual,
                            "no cache, 64": lambda: measure_transformer_prefix(64),
                            "no cache, 256": lambda: measure_transformer_prefix(256)}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=PROGRAMS)
    parser.add_argument("--turns", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one program, in its own process
    args = parser.parse_args()
    programs = PROGRAMS[args.script]
    if args.measure:
        sys.stdout = sys.stderr  # what the scripts print is not the result
        result = programs[args.measure]()
        sys.__stdout__.write(json.dumps(result))
        return
    runs = {name: [] for name in programs}
    for _ in range(args.turns):
        for name in programs:
            command = [sys.executable, __file__, args.script, "--measure", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)
            runs[name].append(json.loads(done.stdout))
    first, *others = programs
    ratios = {other: [a[quantity] / b[quantity] for a, b in zip(runs[first], runs[other])]
              for other in others for quantity in list(runs[other][0])[:1]}
    if args.json:
        print(json.dumps({"runs": runs, "ratios": ratios}, indent=2))
        return
    print(f"{args.script}: {args.turns} turns, PyTorch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.machine()}")
    rows = [(f"{name}: {quantity}", [run[quantity] for run in runs[name]])
            for name in runs for quantity in runs[name][0]]
    rows += [(f"{first} / {other}", values) for other, values in ratios.items()]
    print(f"{'':36}{'median':>10}{'min':>10}{'max':>10}")
    for title, values in rows:
        print(f"{title:36}{statistics.median(values):10.3g}{min(values):10.3g}{max(values):10.3g}")


if __name__ == "__main__":
    main()
