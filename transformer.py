"""Train a Transformer to turn one sequence of tokens into another.

  python transformer.py                   write words of 2 to 20 letters backward
  python transformer.py --data pairs.tsv  your own pairs: columns source and target
  python transformer.py --predict hello   run the trained model on text

Plots and checkpoints go to runs/transformer (--out). transformer.md explains every part.
"""

from __future__ import annotations

import math
import random
import string
import time
import zlib
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import common

# The special tokens, first in each vocabulary: padding, end and beginning of a sequence, unknown.
PAD, EOS, BOS, UNK = range(4)
# The kinds of tokens, and what separates them in a text.
SEPARATORS = {"chars": "", "words": " "}

# ---------------------------------------------------------------- Data


def add_numbers(source: str) -> str:
    """The sum of two numbers, all digits reversed: "59+71" (95 + 17 = 112) -> "211"."""
    # In this order, each carry is known by the time that it is needed.
    first, second = source.split("+")
    total = int(first[::-1]) + int(second[::-1])
    return str(total)[::-1]


# The target of a source, for each synthetic task.
TASKS = {
    "reverse": lambda source: source[::-1],
    "copy": lambda source: source,
    "sort": lambda source: "".join(sorted(source)),
    "add": add_numbers,
}


def synthetic_pairs(task: str, count: int, low: int, high: int, seed: int) -> list:
    """Return `count` pairs of texts (source, target), no source twice. A source has `low` to `high`
    random letters; for `add`, two numbers of that many digits.
    """
    rng = random.Random(seed)
    sources = set()
    while len(sources) < count:
        length = rng.randint(low, high)
        if task == "add":
            bounds = 10**(length - 1), 10**length
            first = rng.randrange(*bounds)
            second = rng.randrange(*bounds)
            # The text as a whole is reversed, so the numbers swap places too: the sum is the same.
            source = f"{first}+{second}"[::-1]
        else:
            source = "".join(rng.choices(string.ascii_lowercase, k=length))
        sources.add(source)
    return [(source, TASKS[task](source)) for source in sorted(sources)]


def split_tokens(text: str, kind: str) -> tuple:
    """Return the words of a text, or its characters."""
    return tuple(text.split() if kind == "words" else text)


class Vocabulary:
    """Maps tokens to ids and back; sources and targets share one vocabulary."""

    def __init__(self, tokens: list):
        self.tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *tokens]  # as numbered above
        # Without the special tokens: in a text, the word "<pad>" is a word like any other.
        self.ids = {token: i for i, token in enumerate(tokens, UNK + 1)}

    def encode(self, rows: list, device: torch.device) -> Tensor:
        """Append <eos> to each row of tokens and pad with <pad>: int64 (N, longest row + 1)."""
        encoded = []
        for row in rows:
            ids = [self.ids.get(token, UNK) for token in row]
            encoded.append(torch.tensor([*ids, EOS]))
        return pad_sequence(encoded, batch_first=True, padding_value=PAD).to(device)

    def decode(self, ids: list) -> tuple:
        """Return the tokens before the first <eos>, or all if there is none."""
        end = [*ids, EOS].index(EOS)  # the EOS appended here is found if there is no other
        return tuple(self.tokens[i] for i in ids[:end])


class Dataset(NamedTuple):
    """Lists of pairs (source tokens, target tokens); no source is in more than one of the lists."""

    name: str
    vocabulary: Vocabulary
    longest: int  # tokens in the longest source or target
    train: list
    validation: list
    test: list


def load_data(args: Namespace) -> Dataset:
    """Make or read the pairs of --data; a tenth of the sources is for validation, another for test.

    Raises UserError if there are fewer than 10 different sources, or if a pair is too long.
    """
    if args.data == "synthetic":
        name = args.task
        low, high = (1, 5) if args.task == "add" else (2, 20)
        table = synthetic_pairs(args.task, args.synthetic_size, low, high, args.seed)
    else:
        name = args.data
        common.check_apart(args.data, args.out)
        table = common.read_table(args.data, ("source", "target"))
    pairs = [(split_tokens(source, args.source_tokens), split_tokens(target, args.target_tokens))
             for source, target in table]
    sources = [source for source, _ in pairs]
    if len(set(sources)) < 10:
        raise common.UserError(f"--data {args.data}: at least 10 different sources are needed")
    lengths = [max(map(len, pair)) for pair in pairs]
    longest = max(lengths)
    if longest > args.max_length:
        example = table[lengths.index(longest)][0][:50]  # the beginning of that pair's source
        raise common.UserError(f"--data {args.data}: the source or target of '{example}' has "
                               f"{longest} tokens; shorten it, or raise --max-length")
    # Equal sources are in the same tenth. There are no classes to spread, so all are one group.
    tenths = common.split_tenths(sources, [0] * len(sources), args.seed).tolist()
    validation = [pair for pair, tenth in zip(pairs, tenths) if tenth == 0]
    test = [pair for pair, tenth in zip(pairs, tenths) if tenth == 1]
    train = [pair for pair, tenth in zip(pairs, tenths) if tenth > 1]
    tokens = set()
    for source, target in train:
        tokens.update(source, target)
    unseen = sum(not tokens.issuperset(target) for _, target in validation)
    if unseen > len(validation) / 20:
        common.warn(f"{unseen} of {len(validation)} validation targets contain a token that occurs "
                    "in no training pair, so the model cannot write them; if the tokens are words, "
                    "try --target-tokens chars")
    return Dataset(name, Vocabulary(sorted(tokens)), longest, train, validation, test)


def similar_length_batches(pairs: list, batch_size: int, *seed: int) -> list:
    """Return batches, as arrays of indices, in random order. The pairs of a batch have similar
    lengths, and need little padding. With several processes, each has its share of every batch.
    """
    rng = np.random.default_rng(seed)
    # The random fraction shuffles pairs of the same lengths.
    lengths = [(len(source), len(target) + rng.random()) for source, target in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    if len(pairs) < common.WORLD:
        raise common.UserError("there are fewer training pairs than processes")
    # As few batches as possible, of nearly equal size. The limit is batch_size pairs, or 2 * WORLD
    # if that is more: if there are several batches, each has at least half of the limit, so that
    # every process has a pair.
    steps = math.ceil(len(pairs) / max(batch_size, 2 * common.WORLD))
    batches = np.array_split(order, steps)
    rng.shuffle(batches)
    return [batch[common.RANK::common.WORLD] for batch in batches]


# ---------------------------------------------------------------- Model


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple:
    """Return softmax(Q K^T / sqrt(d_k)) V, and the softmax. Vaswani et al., 2017.

    query: (..., T, d_k); key, value: (..., S, d_k); mask: bool, broadcast to (..., T, S), True
    where a query may look at a key -> (..., T, d_k) and (..., T, S).
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (..., T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    return weights @ value, weights


class MultiHeadAttention(nn.Module):
    """Several attention heads side by side, each in d_k = d_model / heads dimensions."""

    def __init__(self, d_model: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def split_heads(self, x: Tensor) -> Tensor:
        """(N, length, d_model) -> (N, heads, length, d_k)"""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_and_values(self, memory: Tensor | None, cache: dict | None) -> tuple:
        """Return keys and values (N, heads, S, d_k): those in the cache, if any, then those of
        memory, which also join the cache.

        In self-attention, memory holds the new positions at each call. In cross-attention, it is
        the encoder's output at the first call, and then None: the cache has all keys and values.
        """
        if memory is None:
            return cache[self]
        both = self.split_heads(self.key(memory)), self.split_heads(self.value(memory))
        if cache is not None:
            if self in cache:
                # The new keys after the old keys, the new values after the old values.
                both = tuple(torch.cat(parts, dim=2) for parts in zip(cache[self], both))
            cache[self] = both
        return both

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor,
                cache: dict | None = None) -> Tensor:
        """Each position of x (N, T, d_model) looks at the positions of memory (N, S, d_model) where
        the mask, broadcast to (N, heads, T, S), is True -> (N, T, d_model).

        cache: {module: (keys, values)} of earlier positions. They come before those of memory,
        which are added to it; the S of the mask counts both.
        """
        # 1) Project: queries from x, keys and values from memory.
        query = self.split_heads(self.query(x))  # (N, heads, T, d_k)
        key, value = self.keys_and_values(memory, cache)  # (N, heads, S, d_k)
        # 2) Attention, for all heads at once.
        y, weights = attention(query, key, value, mask)  # (N, heads, T, d_k)
        # Of the first example, (heads, T, S), for a plot; a copy, so that the rest is freed.
        self.attention_weights = weights[0].detach().clone()
        # 3) Concatenate the heads, and project.
        return self.output(y.transpose(1, 2).flatten(2))  # (N, T, d_model)


class FeedForward(nn.Sequential):
    """Two linear layers, at each position by itself: (N, length, d_model) -> the same shape."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__(
            nn.Linear(d_model, d_ff),
            nn.ReLU(),
            nn.Linear(d_ff, d_model))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward: (N, S, d_model) -> (N, S, d_model).

    Layer norm comes before each sublayer (Xiong et al., 2020); in Vaswani et al., after each sum.
    """

    def __init__(self, d_model: int, heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source_mask: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attention(y, y, source_mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention, feed-forward: (N, T, d_model) -> (N, T, d_model)."""

    def __init__(self, d_model: int, heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, heads)
        self.cross_attention = MultiHeadAttention(d_model, heads)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None, causal_mask: Tensor, source_mask: Tensor,
                cache: dict | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attention(y, y, causal_mask, cache))
        x = x + self.dropout(self.cross_attention(self.norm2(x), memory, source_mask, cache))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Return (length, d_model): sines and cosines, wavelengths from 2 pi to nearly 10000 * 2 pi."""
    exponents = torch.arange(0, d_model, 2) / d_model
    angles = torch.arange(length)[:, None] / 10000**exponents  # (length, d_model / 2)
    waves = torch.stack([angles.sin(), angles.cos()], dim=2)  # (length, d_model / 2, 2)
    return waves.flatten(1)


class Transformer(nn.Module):
    """Encoder and decoder, with one table of embeddings for source, target and output.

    source: int64 (N, S); target_input: int64 (N, T), which begins with <bos>. Each has at most
    max_length tokens. -> logits: float (N, T, vocabulary); logits[:, t] predict the token that
    follows target_input[:, t].
    """

    def __init__(self, vocabulary_size: int, max_length: int = 100, d_model: int = 64,
                 heads: int = 4, layers: int = 2, d_ff: int = 256, dropout: float = 0.0):
        super().__init__()
        sizes = (d_model, heads, d_ff, dropout)
        self.embedding = nn.Embedding(vocabulary_size, d_model)
        self.register_buffer("positions", sinusoidal_positions(max_length, d_model),
                             persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(layers))
        # With pre-norm, the output of the last layer is not normalized yet.
        self.encoder_norm = nn.LayerNorm(d_model)
        self.decoder_norm = nn.LayerNorm(d_model)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)  # Glorot and Bengio, 2010
        # Replaces the first values of the embedding, so that most logits start near size 1.
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """int64 (N, length), the first at position `start` -> (N, length, d_model)"""
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(x + self.positions[start:start + tokens.shape[1]])

    def encode(self, source: Tensor) -> tuple:
        """source: (N, S) -> memory (N, S, d_model), and its mask (N, 1, 1, S), False at <pad>."""
        source_mask = (source != PAD)[:, None, None, :]
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, source_mask)
        return self.encoder_norm(x), source_mask

    def decode(self, target_input: Tensor, memory: Tensor | None, source_mask: Tensor,
               cache: dict | None = None, start: int = 0) -> Tensor:
        """Return logits (N, T, vocabulary) for the tokens that follow those of target_input (N, T).

        With a cache, target_input continues the `start` tokens of earlier calls.
        """
        x = self.embed(target_input, start)
        # Position t attends to positions 0 to t, and predicts the token at t + 1. <pad> needs no
        # mask here: it comes after all tokens whose predictions count.
        places = torch.arange(start + target_input.shape[1], device=x.device)
        causal_mask = places <= places[start:, None]  # key <= query: (T, start + T)
        for layer in self.decoder:
            x = layer(x, memory, causal_mask, source_mask, cache)
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def forward(self, source: Tensor, target_input: Tensor) -> Tensor:
        return self.decode(target_input, *self.encode(source))


@torch.no_grad()
def beam_search(model: Transformer, source: Tensor, beam: int = 1) -> tuple:
    """Write targets token by token, keeping the `beam` best hypotheses of each source: those with
    the highest mean log-probability of a token. A beam of 1 is greedy decoding. source: int64
    (N, S) -> the best targets found, int64 (N, T), with <pad> after <eos>, and the sums of the
    log-probabilities of their tokens, float (N,).
    """
    # Each hypothesis has a row: there are N * beam rows, and those of a source are adjacent.
    memory, source_mask = (x.repeat_interleave(beam, dim=0) for x in model.encode(source))
    # The row of each source's first hypothesis, (N, 1).
    first_row = torch.arange(0, len(memory), beam, device=source.device).unsqueeze(1)
    vocabulary_size = len(model.embedding.weight)
    tokens = source.new_full((len(memory), 1), BOS)  # (N * beam, 1 + position)
    # At first the hypotheses of a source are equal: only one counts.
    sums = torch.full((len(memory), 1), -math.inf, device=source.device)  # of log-probabilities
    sums[::beam] = 0
    cache = {}
    for position in range(len(model.positions)):  # max_length
        ended = tokens[:, -1] <= EOS  # the last token is <pad> or <eos>
        if ended.all():
            break
        logits = model.decode(tokens[:, -1:], memory, source_mask, cache, position)
        log_probabilities = F.log_softmax(logits[:, 0], dim=1)  # (N * beam, vocabulary)
        # A hypothesis that has ended continues with <pad>, at no cost; no other continues with it.
        # <bos> and <unk> are never written.
        log_probabilities[:, [PAD, BOS, UNK]] = -math.inf
        log_probabilities[ended] = -math.inf
        log_probabilities[ended, PAD] = 0
        totals = sums + log_probabilities  # (N * beam, vocabulary)
        # Keep the best of all continuations of a source, those with the highest mean: the sum would
        # favor short targets. Each is numbered by the hypothesis that it continues and its token:
        # hypothesis * vocabulary_size + token.
        # The length after this step, without <pad> and <eos>, which are not greater than EOS; <bos>
        # stands for the token that will be added or, once the hypothesis has ended, for <eos>.
        lengths = (tokens > EOS).sum(1, keepdim=True)  # (N * beam, 1)
        chosen = (totals / lengths).view(len(source), -1).topk(beam).indices  # (N, beam)
        # The rows that the new hypotheses continue, and the tokens that they add.
        rows = (first_row + chosen // vocabulary_size).flatten()  # (N * beam,)
        newest = (chosen % vocabulary_size).view(-1, 1)  # (N * beam, 1)
        tokens = torch.cat([tokens[rows], newest], dim=1)
        sums = totals[rows].gather(1, newest)
        memory = None  # its keys and values are in the cache
        # The keys and values follow their hypotheses. Those of cross-attention are the same in all
        # rows of a source, so for them this changes nothing.
        if beam > 1:  # else each row continues itself
            for module, (key, value) in cache.items():
                cache[module] = key[rows], value[rows]
    return tokens[::beam, 1:], sums[::beam, 0]


# ---------------------------------------------------------------- Training


def shift_right(target: Tensor) -> Tensor:
    """Return the decoder's input for a target (N, T): <bos>, and all tokens but the last."""
    return F.pad(target[:, :-1], (1, 0), value=BOS)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy with label smoothing (Szegedy et al., 2016): a fraction
    `smoothing` of each label's probability is spread evenly over the vocabulary.

    It is F.cross_entropy() with label_smoothing, which PyTorch has only from 1.10 on.
    logits: float (N, vocabulary); labels: int64 (N,).
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    of_labels = F.nll_loss(log_probabilities, labels)
    of_vocabulary = -log_probabilities.mean()
    return (1 - smoothing) * of_labels + smoothing * of_vocabulary


def score(row: dict) -> tuple:
    """Return what epochs are compared by: validation token accuracy, then the lower loss. Exact
    match is coarser: it may stay 0 while the model improves.
    """
    return row["validation_token_accuracy"], -row["validation_loss"]


def train(args: Namespace, data: Dataset, folder: Path, device: torch.device) -> list:
    """Train a Transformer; keep its last and its best epoch in `folder`. Returns the history."""
    torch.manual_seed(args.seed)
    options = {  # of the model; in last.pt, "options" are those of the command line
        "vocabulary_size": len(data.vocabulary.tokens),
        # Not --max-length: room for <eos>, and for texts to predict of up to twice the longest.
        "max_length": 2 * data.longest + 1,
        "d_model": args.d_model,
        "heads": args.heads,
        "layers": args.layers,
        "d_ff": args.d_ff,
        "dropout": args.dropout}
    model = Transformer(**options).to(device)
    # The learning rate changes at each step, so the scheduler needs the number of steps in an
    # epoch, which does not depend on the seed.
    steps = len(similar_length_batches(data.train, args.batch_size, args.seed))
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.98), **common.FUSED)
    scheduler = common.make_scheduler(optimizer, args, steps)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = common.load_last(folder, args, state) if args.resume else []
    ddp_model = common.wrap_model(model, args, device)
    # On a CPU, bfloat16 is slower than float32 at the default size; with a --d-model of 128 or more
    # it is faster.
    autocast = common.autocast(args.precision, device, cpu_gains=args.d_model >= 128)

    for epoch in common.epochs_to_train(args, history, score):
        start = time.perf_counter()
        model.train()
        metrics = []
        batches = similar_length_batches(data.train, args.batch_size, args.seed, epoch)
        for indices in common.progress_bar(batches, f"epoch {epoch}/{args.epochs}"):
            sources, targets = zip(*(data.train[i] for i in indices))
            source = data.vocabulary.encode(sources, device)  # (N, S)
            target = data.vocabulary.encode(targets, device)  # (N, T)
            # Teacher forcing: whatever the model would write, its next input is the correct token.
            with autocast:
                logits = ddp_model(source, shift_right(target))  # (N, T, vocabulary)
            # Padding does not count.
            kept = target != PAD
            logits = logits[kept].float()  # (tokens, vocabulary)
            labels = target[kept]
            loss = cross_entropy(logits, labels, args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            norm = common.clip_gradients(model, args.clip)
            optimizer.step()
            scheduler.step()
            accuracy = (logits.argmax(1) == labels).float().mean()
            metrics.append({"train_loss": loss.detach(), "train_token_accuracy": accuracy,
                            "gradient_norm": norm, "clipped": norm > args.clip})

        # Faster than in the test: autocast, and greedy decoding, measure()'s own default.
        with autocast:
            validation, _ = common.on_first_process(measure, model, data.vocabulary,
                                                    data.validation, device)
        row = {"epoch": epoch, **common.means(metrics),
               **{f"validation_{name}": value for name, value in validation.items()},
               "seconds": time.perf_counter() - start}
        history.append(row)
        print("epoch {epoch:2}/{epochs}  loss: training (smoothed) {train_loss:.3f}, validation "
              "{validation_loss:.3f}; exact match {validation_exact_match:.1%}  "
              "{seconds:.1f} s".format(epochs=args.epochs, **row), flush=True)
        # Saved if this epoch is the best so far, which the validation set alone decides.
        best = {"model": model.state_dict(), "options": options,
                "tokens": list(data.vocabulary.ids),  # the keys: all but the special tokens
                # predict() warns of others.
                "tokens_of_sources": sorted(set().union(*(source for source, _ in data.train))),
                "source_tokens": args.source_tokens, "target_tokens": args.target_tokens}
        common.save_epoch(folder, args, history, state, best, score)
    return history


# ---------------------------------------------------------------- Evaluation and plots


def evaluation_batches(model: Transformer, rows: list) -> list:
    """Split rows into batches of 100 or, if texts may be long, of about 25,000 tokens in all, to
    limit the memory.
    """
    size = max(1, min(100, 25000 // len(model.positions)))
    return [rows[start:start + size] for start in range(0, len(rows), size)]


def write_targets(model: Transformer, vocabulary: Vocabulary, sources: list,
                  device: torch.device, beam: int = 1) -> list:
    """Return a list: for each source, the (target tokens, probability) that the model writes."""
    written = []
    for batch in common.progress_bar(evaluation_batches(model, sources), "decoding"):
        target, log_probabilities = beam_search(model, vocabulary.encode(batch, device), beam)
        rows = map(vocabulary.decode, target.tolist())
        # math.exp() is in double precision: the probability of a long target can be tiny.
        written += zip(rows, map(math.exp, log_probabilities.tolist()))
    return written


def edit_distance(a: tuple, b: tuple) -> int:
    """Return the least number of insertions, deletions and substitutions. Levenshtein, 1966.

    It takes len(a) * len(b) steps.
    """
    row = list(range(len(b) + 1))  # from nothing to each prefix of b
    for i, x in enumerate(a):
        above = row
        row = [i + 1]
        for j, y in enumerate(b):
            substituted = above[j] + (x != y)
            row.append(min(substituted, above[j + 1] + 1, row[j] + 1))
    return row[-1]


@torch.no_grad()
def measure(model: Transformer, vocabulary: Vocabulary, pairs: list, device: torch.device,
            beam: int = 1) -> tuple:
    """Return the metrics and, for each source, (source, target, output, probability): what the
    model writes by itself, and the nearest target if there are several.

    The metrics: loss and token accuracy under teacher forcing; of the outputs, the fraction of
    exact matches and the error rate (edit distance / length of the target).
    """
    model.eval()
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))  # for batches with little padding
    losses, hits = [], []
    for batch in evaluation_batches(model, pairs):
        sources, targets = zip(*batch)
        target = vocabulary.encode(targets, device)  # (N, T)
        kept = target != PAD
        logits = model(vocabulary.encode(sources, device), shift_right(target))[kept]
        losses.append(F.cross_entropy(logits, target[kept], reduction="none"))
        hits.append(logits.argmax(1) == target[kept])

    answers = defaultdict(list)  # all targets of each source
    for source, target in pairs:
        answers[source].append(target)
    written = write_targets(model, vocabulary, list(answers), device, beam)
    exact = errors = length = 0
    outputs = []
    for (output, probability), (source, targets) in zip(written, answers.items()):
        distance, nearest = min((edit_distance(output, target), target) for target in targets)
        exact += distance == 0
        errors += distance
        length += len(nearest)
        outputs.append((source, nearest, output, probability))
    return {"loss": torch.cat(losses).mean().item(),
            "token_accuracy": torch.cat(hits).float().mean().item(),
            "exact_match": exact / len(answers), "error_rate": errors / length}, outputs


def evaluate(args: Namespace, data: Dataset, folder: Path, device: torch.device,
             history: list) -> None:
    """Measure the best model on the test set; write summary.json; draw the plots."""
    model, vocabulary, checkpoint = load_model(folder / "best.pt", device)
    # The test set is used only here.
    test, outputs = measure(model, vocabulary, data.test, device, args.beam)
    if args.beam > 1:
        test["greedy"], _ = measure(model, vocabulary, data.test, device)
    test["best_epoch"] = checkpoint["metrics"]["epoch"]
    common.write_summary(folder, args, history, test)
    print("test: exact match {exact_match:.2%}, error rate {error_rate:.2%}, token accuracy "
          "{token_accuracy:.2%} (the model of epoch {best_epoch})".format(**test))
    sources, targets, written, probabilities = zip(*outputs)
    target_separator = SEPARATORS[args.target_tokens]
    common.write_predictions(
        folder, list(map(SEPARATORS[args.source_tokens].join, sources)),
        list(map(target_separator.join, targets)), list(map(target_separator.join, written)),
        probabilities)
    title = f"Transformer on {data.name}"
    figure, _ = common.plot_history(history, args, title, {
        "loss": {"training, with --label-smoothing": "train_loss", "validation": "validation_loss"},
        "fraction correct": {"training tokens": "train_token_accuracy",
                             "validation tokens": "validation_token_accuracy",
                             "validation sequences": "validation_exact_match"},
        "gradient norm": {"before clipping": "gradient_norm"}})
    figure.savefig(folder / "curves.png")
    # A pair that need not be cut, if there is one.
    pair = next((pair for pair in data.test if max(map(len, pair)) <= 20), data.test[0])
    draw_attention(folder / "attention.png", model, vocabulary, pair, device, title)


def draw_attention(path: Path, model: Transformer, vocabulary: Vocabulary, pair: tuple,
                   device: torch.device, title: str) -> None:
    """Plot the cross-attention of the last decoder layer under teacher forcing, for one pair, whose
    source and target are cut to 20 tokens, of at most 20 characters each.
    """
    source, target = (vocabulary.encode([tokens[:20]], device) for tokens in pair)
    with torch.no_grad():
        model(source, shift_right(target))
    weights = model.decoder[-1].cross_attention.attention_weights.cpu()  # (heads, T, S)
    read = [common.escape_dollars(vocabulary.tokens[i][:20]) for i in source[0]]
    # Row t shows the attention when target[t] is predicted.
    written = [common.escape_dollars(vocabulary.tokens[i][:20]) for i in target[0]]
    columns = 1 if len(weights) % 2 else 2  # so that no panel stays empty
    rows = len(weights) // columns
    figure, axes = common.new_figure(rows, columns, (8.3, 4 * rows), f"{title}: cross-attention")
    for i, axis in enumerate(axes.flat):
        axis.imshow(weights[i], cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"head {i + 1}", xlabel="source", xticks=range(len(read)))
        axis.set_xticklabels(read, rotation=90)
        axis.set(ylabel="target", yticks=range(len(written)), yticklabels=written)
    figure.savefig(path)


def load_model(path: Path, device: torch.device) -> tuple:
    """Return the model saved in a best.pt, its vocabulary, and the checkpoint itself."""
    checkpoint = common.load_checkpoint(path, "transformer.py")
    model = Transformer(**checkpoint["options"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), Vocabulary(checkpoint["tokens"]), checkpoint


def predict(args: Namespace, device: torch.device) -> None:
    """Print `source <tab> target <tab> probability` for each text of --predict."""
    model, vocabulary, checkpoint = load_model(Path(args.out, "best.pt"), device)
    texts = [common.clean_text(text) for text in common.prediction_inputs(args.predict)]
    sources = [split_tokens(text, checkpoint["source_tokens"]) for text in texts]
    longest = max(map(len, sources), default=0)
    if longest >= len(model.positions):
        raise common.UserError(f"--predict: a text has {longest} tokens, and the model takes up to "
                               f"{len(model.positions) - 1}; shorten it, or train on longer ones")
    unknown = set().union(*sources).difference(checkpoint["tokens_of_sources"])
    if unknown:
        common.warn(f"never seen in training: {sorted(unknown)[:20]}")
    written = write_targets(model, vocabulary, sources, device, args.beam)
    for text, (tokens, probability) in zip(texts, written):
        target = SEPARATORS[checkpoint["target_tokens"]].join(tokens)
        print(f"{text}\t{target}\t{probability:.4g}")


# ---------------------------------------------------------------- Command line


def build_parser() -> common.ArgumentParser:
    parser = common.option_parser(
        "transformer.py", __doc__, out="runs/transformer", epochs=6, batch_size=64, lr=2e-3,
        warmup=0.1, weight_decay=0.01, clip=1.0, patience=10)
    count = common.number(int, 1)
    probability = common.number(float, 0, 0.99)
    add = parser.add_argument_group("options of the Transformer").add_argument
    add("--data", default="synthetic", help="synthetic, or a CSV or TSV of source and target")
    add("--task", choices=TASKS, default="reverse",
        help="synthetic task; add has the last digits first")
    add("--synthetic-size", type=common.number(int, 10), default=50000,
        help="synthetic pairs, all sets")
    add("--source-tokens", choices=SEPARATORS, default="chars", help="what sources are split into")
    add("--target-tokens", choices=SEPARATORS, default="chars", help="what targets are split into")
    add("--max-length", type=count, default=256, help="longest source or target allowed")
    add("--d-model", type=count, default=64,
        help="width of the model: even, and a multiple of --heads")
    add("--heads", type=count, default=4, help="attention heads in a layer")
    add("--layers", type=count, default=2, help="layers of the encoder, and of the decoder")
    add("--d-ff", type=count, default=256, help="hidden width of the feed-forward networks")
    add("--dropout", type=probability, default=0.0, help="dropout probability")
    add("--label-smoothing", type=probability, default=0.1, help="fraction spread over all tokens")
    add("--beam", type=count, default=4, help="hypotheses that beam search keeps; 1 is greedy")
    add("--predict", nargs="+", metavar="TEXT", help="write targets with best.pt; - reads stdin")
    return parser


def main() -> None:
    args = common.parse_options(build_parser())
    device = common.select_device(args)
    if args.predict:
        predict(args, device)
        return
    if args.d_model % args.heads or args.d_model % 2:
        raise common.UserError("--d-model must be even, and a multiple of --heads")
    if args.data == "synthetic" and "words" in (args.source_tokens, args.target_tokens):
        raise common.UserError("--source-tokens words, --target-tokens words: synthetic strings "
                               "have no words; add --data FILE")
    data = load_data(args)
    sets = data.train, data.validation, data.test
    args.checksum = zlib.crc32(repr(sets).encode())  # load_last() refuses other data
    common.describe_sets(data.name, device, *sets)
    with common.run_folder(args) as folder:
        history = train(args, data, folder, device)
        if common.RANK == 0:
            evaluate(args, data, folder, device, history)


if __name__ == "__main__":
    common.run_main(main)
