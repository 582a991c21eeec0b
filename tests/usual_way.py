"""The usual way, as the tutorials have it: what tests/benchmark.py compares the scripts with."""

import torch
from PIL import Image
from torch import nn
from torchvision import transforms

import gan as ours
from transformer import PAD, sinusoidal_positions


def epoch(model, optimizer, batches, clip=0.0, **loss):
    """Train on batches of (inputs, ..., targets)."""
    model.train()
    criterion = nn.CrossEntropyLoss(**loss)
    for *inputs, targets in batches:
        optimizer.zero_grad()
        criterion(model(*inputs), targets).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


@torch.no_grad()
def accuracy(model, batches) -> float:
    model.eval()
    right = [model(*inputs).argmax(1) == targets for *inputs, targets in batches]
    return torch.cat(right).float().mean().item()


# ---------------------------------------------------------------- Images


class Images(torch.utils.data.Dataset):
    """Images (N, H, W, C) as PIL images through torchvision's transforms, as its own sets do it."""

    def __init__(self, images, labels, *augmentation):
        self.arrays, self.labels = images.numpy(), labels.tolist()
        middle = (0.5,) * images.shape[3]
        self.transform = transforms.Compose([*augmentation, transforms.ToTensor(),
                                             transforms.Normalize(middle, middle)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i].squeeze())), self.labels[i]


def load(images, batch_size, shuffle=True):
    return torch.utils.data.DataLoader(images, batch_size, shuffle, num_workers=2,
                                       persistent_workers=True)


def cnn(train, test):
    """The network of cnn.py in NCHW, and loaders of both parts, each (images, labels)."""
    layers, channels = [], 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.MaxPool2d(2)]
        channels = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 256), nn.ReLU(),
                          nn.Dropout(0.2), nn.Linear(256, 10))
    augmentation = (transforms.RandomCrop(32, padding=3, padding_mode="reflect"),
                    transforms.RandomHorizontalFlip())
    return model, load(Images(*train, *augmentation), 128), load(Images(*test), 128, False)


def gan(images):
    """The two networks of gan.py in the default memory format, and a loader."""
    generator = nn.Sequential(nn.Linear(100, 256 * 9, bias=False), nn.Unflatten(1, (256, 3, 3)),
                              ours.Generator().layers).to(memory_format=torch.contiguous_format)
    discriminator = ours.Discriminator().to(memory_format=torch.contiguous_format)
    return discriminator, generator, load(Images(images, torch.zeros(len(images))), 64)


def gan_epoch(discriminator, generator, optimizers, batches):
    criterion = nn.BCEWithLogitsLoss()
    for real, _ in batches:
        ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
        optimizers[0].zero_grad()
        criterion(discriminator(real), ones).backward()
        fake = generator(torch.randn(len(real), 100))
        criterion(discriminator(fake.detach()), zeros).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        criterion(discriminator(fake), ones).backward()
        optimizers[1].step()


# ---------------------------------------------------------------- Sequences


class BareClassifier(nn.Module):
    """Embedding, torch.nn's LSTM or GRU, the last valid step, batch norm, Linear.

    With `bands`, lengths at most a tenth apart go through the layers together.
    """

    def __init__(self, cell, symbols, classes, bands):
        super().__init__()
        self.embedding, self.bands = nn.Embedding(symbols, 64), bands
        self.layers = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](64, 64)
        self.head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, classes))

    def last_step(self, inputs, lengths):
        output, _ = self.layers(self.embedding(inputs[:, :lengths.max()].t()))
        return output[lengths - 1, torch.arange(len(lengths))]

    def forward(self, inputs, lengths):
        if not self.bands:
            return self.head(self.last_step(inputs, lengths))
        band = (lengths.float().log() / 0.1).floor()
        groups = [torch.where(band == value)[0] for value in band.unique()]
        last = torch.cat([self.last_step(inputs[group], lengths[group]) for group in groups])
        return self.head(last[torch.cat(groups).argsort()])


class Transformer(nn.Module):
    """torch.nn.Transformer with what it lacks: embeddings, positions, the output layer."""

    def __init__(self, vocabulary):
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, 64), nn.Embedding(vocabulary, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 256, dropout=0.0, batch_first=True,
                                          norm_first=True)
        self.output = nn.Linear(64, vocabulary)
        self.register_buffer("positions", sinusoidal_positions(100, 64))

    def forward(self, source, target):
        """int64 (N, S) and (N, T) -> logits (N * T, vocabulary)."""
        source_padding, target_padding = source == PAD, target == PAD
        future = torch.ones(target.shape[1], target.shape[1]).triu(1).bool()
        source, target = (embedding(tokens) * 8 + self.positions[:tokens.shape[1]] for
                          embedding, tokens in ((self.source, source), (self.target, target)))
        x = self.transformer(source, target, tgt_mask=future, src_key_padding_mask=source_padding,
                             tgt_key_padding_mask=target_padding,
                             memory_key_padding_mask=source_padding)
        return self.output(x).flatten(0, 1)


def padded(pairs):
    """Batches of 64 pairs of random lengths: source, target without its end, its tokens to come."""
    for indices in torch.randperm(len(pairs)).split(64):
        source, target = (nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
                          for rows in zip(*(pairs[i] for i in indices)))
        yield source, target[:, :-1], target[:, 1:].flatten()
