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

# ---------------------------------------------------------------- cnn.py

CNN_IMAGES = 100 * 128


def cnn_data():
    part = cnn.synthetic_shapes(CNN_IMAGES, seed=0)
    few = cnn.Part(*(tensor[:128] for tensor in part))
    return cnn.Dataset("synthetic", list(cnn.SHAPES), train=part, validation=few, test=few)


def measure_cnn_ours():
    """The script's own epoch, and forward, backward and optimizer alone on one batch."""
    common.keep_freed_memory()
    data = cnn_data()
    with tempfile.TemporaryDirectory() as folder:
        args = cnn.build_parser().parse_args(["--epochs", "2"])
        history = cnn.train(args, data, Path(folder), torch.device("cpu"))
    seconds = history[-1]["seconds"]
    model = cnn.CNN(widths=args.widths)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    images, labels = data.train.images[:128], data.train.labels[:128]
    model.train()
    for step in range(5 + 50):
        if step == 5:
            start = time.perf_counter()
        optimizer.zero_grad()
        cnn.cross_entropy(model(images), labels, 0.1).backward()
        optimizer.step()
    bare = (time.perf_counter() - start) / 50 * (CNN_IMAGES / 128)
    return {"images a second": CNN_IMAGES / seconds, "share outside the model": 1 - bare / seconds}


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
    for width in (32, 96, 192):
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


# ---------------------------------------------------------------- Taking turns

PROGRAMS = {"cnn": {"ours": measure_cnn_ours, "usual": measure_cnn_usual}}


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
