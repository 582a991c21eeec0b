"""Training the usual way, as tutorials have it: what benchmark.py compares the scripts with.

Each function returns a function that trains for one epoch, with the model and batch size of ours.
"""

import math

import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader
from torchvision import transforms

import gan as ours
from transformer import PAD, shift_right, sinusoidal_positions


def train_epoch(model, optimizer, batches, criterion, clip=math.inf):
    """Train on batches (inputs, ..., targets)."""
    model.train()
    for *inputs, targets in batches:
        optimizer.zero_grad()
        loss = criterion(model(*inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


class Images(torch.utils.data.Dataset):
    """PIL images through torchvision's transforms, as its own data sets do it."""

    def __init__(self, images, labels, *augmentation):
        self.images = images.numpy()  # uint8 (N, H, W, channels)
        self.labels = labels.tolist()
        channels = images.shape[3]
        self.transform = transforms.Compose([
            *augmentation,
            transforms.ToTensor(),
            transforms.Normalize([0.5] * channels, [0.5] * channels),
        ])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i].squeeze())), self.labels[i]


def cnn(images, labels):
    layers = []
    inputs = 3
    for outputs in (32, 64, 128):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
                   nn.MaxPool2d(2)]
        inputs = outputs
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.BatchNorm1d(256),
                          nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10))
    data = Images(images, labels, transforms.RandomCrop(32, padding=3, padding_mode="reflect"),
                  transforms.RandomHorizontalFlip())
    loader = DataLoader(data, 128, shuffle=True, num_workers=2, persistent_workers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    criterion = nn.CrossEntropyLoss()
    return lambda: train_epoch(model, optimizer, loader, criterion)


def gan(images, labels):
    """The networks of gan.py in the default memory format, trained as in examples/dcgan."""
    generator = ours.Generator()
    discriminator = ours.Discriminator().to(memory_format=torch.contiguous_format)
    loader = DataLoader(Images(images, labels), 16, shuffle=True, num_workers=2,
                        persistent_workers=True)
    optimizer_d, optimizer_g = (
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for network in (discriminator, generator))
    criterion = nn.BCEWithLogitsLoss()

    def epoch():
        for real, _ in loader:
            ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
            optimizer_d.zero_grad()
            criterion(discriminator(real), ones).backward()
            fake = generator(torch.randn(len(real), generator.latent))
            criterion(discriminator(fake.detach()), zeros).backward()
            optimizer_d.step()
            optimizer_g.zero_grad()
            criterion(discriminator(fake), ones).backward()
            optimizer_g.step()
    return epoch


class Classifier(nn.Module):
    """Embedding, two layers of torch.nn, packed sequences, batch norm, linear layer."""

    def __init__(self, cell, tokens, classes):
        super().__init__()
        self.embedding = nn.Embedding(tokens, 64)
        self.layers = cell(64, 64, num_layers=2, dropout=0.1, batch_first=True)
        self.output = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Linear(64, classes))

    def forward(self, inputs, lengths):
        packed = pack_padded_sequence(self.embedding(inputs), lengths, batch_first=True,
                                      enforce_sorted=False)
        _, state = self.layers(packed)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.output(hidden[-1])


def rnn(cell, inputs, lengths, targets, tokens, classes):
    model = Classifier(cell, tokens, classes)
    data = torch.utils.data.TensorDataset(inputs, lengths, targets)
    loader = DataLoader(data, 128, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    return lambda: train_epoch(model, optimizer, loader, criterion, clip=1.0)


class Transformer(nn.Module):
    """torch.nn.Transformer with what it lacks: embeddings, positions, the output layer."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 256, dropout=0.0, batch_first=True,
                                          norm_first=True)
        self.output = nn.Linear(64, vocabulary)
        self.register_buffer("positions", sinusoidal_positions(100, 64))

    def embed(self, tokens):
        return 8 * self.embedding(tokens) + self.positions[:tokens.shape[1]]

    def forward(self, source, target_input):
        length = target_input.shape[1]
        future = torch.ones(length, length).triu(1).bool()
        x = self.transformer(
            self.embed(source), self.embed(target_input), tgt_mask=future,
            src_key_padding_mask=source == PAD, memory_key_padding_mask=source == PAD)
        return self.output(x).transpose(1, 2)  # (N, vocabulary, T)


def collate(pairs):
    source, target = (pad_sequence(rows, batch_first=True) for rows in zip(*pairs))
    return source, shift_right(target), target


def transformer(pairs, vocabulary):
    model = Transformer(vocabulary)
    loader = DataLoader(pairs, 64, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD, label_smoothing=0.1)
    return lambda: train_epoch(model, optimizer, loader, criterion, clip=1.0)
