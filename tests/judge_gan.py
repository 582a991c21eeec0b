"""What a classifier trained on real images makes of generated ones, and whether gan.py's measures
put images in the order that they should.

  python tests/judge_gan.py mnist --data-dir data --out runs/gan --samples 10000

Trains cnn.py's network on the real training images for a minute, measures it on the real test
images, then lets it name samples of best.pt in --out. `sure` is the share with a probability of
at least 0.9 for one class, and of at least 0.7. Then the Fréchet distance, density and coverage
against the real test images: of real training images, the samples, ten of the samples over and
over, and noise.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import cnn  # noqa: E402
import common  # noqa: E402
import gan  # noqa: E402

DEVICE = torch.device("cpu")


def enlarge(images):
    """uint8 (N, 28, 28, 1) -> (N, 32, 32, 3), what the classifier takes."""
    return F.pad(images, (0, 0, 2, 2, 2, 2)).expand(-1, -1, -1, 3)


def train_classifier(images, labels, epochs=6):
    torch.manual_seed(0)
    model = cnn.CNN(widths=(16, 32, 64), hidden=128)
    steps = epochs * len(labels) // 64
    optimizer = torch.optim.SGD(common.parameter_groups(model, 5e-4), lr=0.05, momentum=0.9)
    schedule = common.warmup_cosine(optimizer, steps // 8, steps)
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(labels)).split(64):
            if len(indices) == 64:
                optimizer.zero_grad()
                batch = cnn.random_crop_flip(images, indices, 2, flip=False)
                F.cross_entropy(model(batch), labels[indices]).backward()
                optimizer.step()
                schedule.step()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--out", default="runs/gan")
    parser.add_argument("--samples", type=int, default=10000)
    args = parser.parse_args()
    common.keep_freed_memory()
    parts, classes = common.load_torchvision(gan.TORCHVISION[args.data], args.data_dir)
    (images, labels), (test, truth) = parts["train"], parts["test"]
    model = train_classifier(enlarge(images), labels)
    generator, _ = gan.load_generator(Path(args.out, "best.pt"), DEVICE)
    latent = gan.latent_vectors(args.samples, generator.project.in_features, seed=1)
    fake = gan.generate(generator, latent, DEVICE)
    for name, part in ("real test images", test), ("generated images", fake):
        confidence, predicted = F.softmax(cnn.predict_logits(model, enlarge(part), False, DEVICE),
                                          1).max(1)
        right = f", right {(predicted == truth).float().mean():.2%}" if part is test else ""
        sure = (f"{(confidence >= least).float().mean():.2%}" for least in (0.9, 0.7))
        print(f"{name}: {len(part)}, sure {', '.join(sure)}{right}")
        for i, count in enumerate(predicted.bincount(minlength=10).tolist()):
            print(f"  {classes[i]:<14}{count / len(part):7.2%}")
    real, n = gan.random_features(test[:5000]), min(5000, args.samples)
    noise = torch.randint(0, 256, test[:n].shape, dtype=torch.uint8)
    print("against real test images            Fréchet   density  coverage")
    for name, part in (("real training images", images[:n]), ("generated images", fake[:n]),
                       ("ten generated images, repeated", fake[torch.arange(n) % 10]),
                       ("noise", noise)):
        features = gan.random_features(part)
        density, coverage = gan.density_coverage(real, features)
        print(f"  {name:32}{gan.frechet_distance(real, features):9.3f}{density:10.2f}"
              f"{coverage:10.1%}")


if __name__ == "__main__":
    main()
