"""What a classifier trained on real images makes of generated ones, and whether gan.py's metrics
rank sets of images correctly.

  python tests/judge_gan.py mnist --data-dir data --out runs/gan --samples 10000

Trains the model of cnn.py on the real training images for a minute, measures it on the real test
images, then lets it classify samples of best.pt in --out. `sure` is the fraction of images to which
it gives one class a probability of at least 0.9, and of at least 0.7. Then the Fréchet distance,
density and coverage against the real test images: of real training images, the samples, ten of the
samples over and over, and noise.
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

CPU = torch.device("cpu")


def enlarge(images):
    """uint8 (N, 28, 28, 1) -> (N, 32, 32, 3), which is what the classifier takes."""
    return F.pad(images, (0, 0, 2, 2, 2, 2)).expand(-1, -1, -1, 3)


def train_classifier(images, labels):
    torch.manual_seed(0)
    model = cnn.CNN(widths=(16, 32, 64), hidden=128)
    args = argparse.Namespace(epochs=6, warmup=0.125)
    steps = len(labels) // 64
    optimizer = torch.optim.SGD(common.parameter_groups(model, 5e-4), lr=0.05, momentum=0.9)
    scheduler = common.make_scheduler(optimizer, args, steps)
    model.train()
    for epoch in range(args.epochs):
        for indices in common.shuffled_batches(len(labels), 64, 0, epoch):
            logits = model(cnn.random_crop_flip(images, indices, 2, flip=False))
            loss = F.cross_entropy(logits, labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return model


def report(model, classes, name, images):
    """Print how sure the classifier is, and which classes it finds. Returns its predictions."""
    logits = cnn.predict_logits(model, enlarge(images), False)
    confidence, predicted = F.softmax(logits, dim=1).max(1)
    sure = [(confidence >= limit).float().mean().item() for limit in (0.9, 0.7)]
    print(f"{name}: {len(images)}, sure {sure[0]:.2%}, {sure[1]:.2%}")
    for label, count in enumerate(predicted.bincount(minlength=10).tolist()):
        print(f"  {classes[label]:<14}{count / len(images):7.2%}")
    return predicted


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--out", default="runs/gan")
    parser.add_argument("--samples", type=int, default=10000)
    args = parser.parse_args()
    sets, classes = common.load_torchvision(gan.TORCHVISION[args.data], args.data_dir)
    images, labels = sets["train"]
    test, test_labels = sets["test"]
    model = train_classifier(enlarge(images), labels)
    generator = gan.load_generator(Path(args.out, "best.pt"), CPU)
    fake = gan.generate(generator, gan.latent_vectors(args.samples, generator.latent, seed=1))
    predicted = report(model, classes, "real test images", test)
    print(f"  accuracy {(predicted == test_labels).float().mean():.2%}")
    report(model, classes, "generated images", fake)

    real_features = gan.random_features(gan.random_sample(test))
    count = min(5000, args.samples)
    noise = torch.randint(0, 256, test[:count].shape, dtype=torch.uint8)
    print("against real test images            Fréchet   density  coverage")
    for name, compared in (("real training images", images[:count]),
                           ("generated images", fake[:count]),
                           ("ten generated images, repeated", fake[torch.arange(count) % 10]),
                           ("noise", noise)):
        metrics = gan.measure(real_features, compared)
        print("  {:32}{frechet:9.3f}{density:10.2f}{coverage:10.1%}".format(name, **metrics))


if __name__ == "__main__":
    main()
