"""Train an encoder-decoder Transformer to turn one sequence of tokens into another.

  python transformer.py                     reverse words of 2 to 20 letters
  python transformer.py --data pairs.tsv    your own pairs: a source and a target on each line
  python transformer.py --predict hello     what the trained model makes of a source

Pictures, checkpoints and figures go to runs/transformer (--out). transformer.md explains it all.
"""

from __future__ import annotations

import csv
import io
import math
import random
import string
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import common

FUSED_ATTENTION = hasattr(F, "scaled_dot_product_attention")  # PyTorch 2.0
FUSED_ADAM = {"fused": True} if "fused" in torch.optim.AdamW.__init__.__code__.co_varnames else {}
PAD, BOS, EOS, UNK = range(4)  # padding, begin and end of a sequence, a token never seen
SEPARATOR = {"chars": "", "words": " "}  # between the tokens of a text
BEST = "validation_token_accuracy"  # picks the best epoch: finer than exact match, and never stuck

# ---------------------------------------------------------------- Data

# For each task: the target of a source; shortest and longest in training; longest beyond.
TASKS = {
    "reverse": (lambda source: source[::-1], 2, 20, 30),
    "copy": (lambda source: source, 2, 20, 30),
    "sort": (lambda source: "".join(sorted(source)), 2, 20, 30),
    # Last digit first: the order in which carrying makes the digits of a sum known.
    "add": (lambda source: str(sum(map(int, source.split("+"))))[::-1], 1, 8, 12),
}


def synthetic_pairs(task: str, count: int, low: int, high: int, seed: int) -> dict:
    """`count` sources of `low` to `high` letters (`add`: digits in both numbers), with targets."""
    generator, pairs = random.Random(seed), {}
    while len(pairs) < count:
        length = generator.randint(low, high)
        if task == "add":
            source = "+".join(f"{generator.randrange(10**length):0{length}}" for _ in range(2))
        else:
            source = "".join(generator.choices(string.ascii_lowercase, k=length))
        pairs[tuple(source)] = [tuple(TASKS[task][0](source))]
    return pairs


def tokenize(text: str, kind: str) -> tuple:
    """Characters or words; any run of white space counts as one blank."""
    return tuple(text.split() if kind == "words" else " ".join(text.split()))


def read_pairs(path: str, kinds, max_length: int) -> dict:
    """Read CSV or TSV: columns `source` and `target`, or the first two if no header has these.

    Returns {source tokens: [target tokens, ...]}, with the targets of all lines of that source.
    Raises UserError with the number of a line that cannot be used.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise common.UserError(f"--data {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise common.UserError(f"--data {path}: line {line} is not UTF-8; save it so") from None
    tabs = "\t" in text.split("\n")[0]  # TSV has no quotes, so that a text may hold one
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",",
                        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    columns, pairs = None, defaultdict(list)
    with common.using(Path(path)):
        for row in filter(None, reader):
            if columns is None and {"source", "target"} <= set(row):
                columns = row.index("source"), row.index("target")
                continue
            columns = columns or (0, 1)
            cells = [row[column] if column < len(row) else "" for column in columns]
            source, target = map(tokenize, cells, kinds)
            problem = "" if source and target else "needs a source, a tab or comma, and a target"
            if max(len(source), len(target)) > max_length:
                problem = f"has more than {max_length} tokens; shorten it, or raise --max-length"
            if problem:
                raise common.UserError(f"--data {path}: line {reader.line_num} {problem}")
            pairs[source] += [] if target in pairs[source] else [target]
    if len(pairs) < 10:
        raise common.UserError(f"--data {path}: {len(pairs)} different sources; 10 are needed")
    return pairs


class Vocabulary:
    """The tokens of the training part and their numbers, the same for sources and targets."""

    def __init__(self, tokens):
        self.tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(tokens)]
        self.numbers = {token: i for i, token in enumerate(self.tokens) if i > UNK}

    def encode(self, source, target=()) -> tuple:
        """int64 tensors: the source's `tokens <eos>` and the target's `<bos> tokens <eos>`."""
        source, target = ([self.numbers.get(token, UNK) for token in row] + [EOS]
                          for row in (source, target))
        return torch.tensor(source), torch.tensor([BOS] + target)


class Dataset(NamedTuple):
    name: str  # the data really used, as every log and picture calls it
    vocabulary: Vocabulary
    train: dict  # {source tokens: [right target tokens, ...]}, and so are the other parts
    validation: dict
    test: dict
    longer: dict  # sources longer than any in training; none for data of your own


def load_data(args) -> Dataset:
    """Make or read what `--data` names, and split it: no source is in two parts."""
    name, longer = args.data, {}
    if args.data == "synthetic":
        name, (_, low, high, beyond) = f"synthetic {args.task}", TASKS[args.task]
        pairs = synthetic_pairs(args.task, args.synthetic_size, low, high, args.seed)
        longer = synthetic_pairs(args.task, args.synthetic_size // 50, high + 1, beyond, args.seed)
    else:
        pairs = read_pairs(args.data, (args.source_tokens, args.target_tokens), args.max_length)
    sources = sorted(pairs)
    random.Random(args.seed).shuffle(sources)
    held = min(2000, len(sources) // 10)  # in each of validation and test
    train, validation, test = ({source: pairs[source] for source in part} for part in (
        sources[2 * held:], sources[:held], sources[held:2 * held]))
    tokens = {token for source in train for row in (source, *train[source]) for token in row}
    return Dataset(name, Vocabulary(tokens), train, validation, test, longer)


def batches(pairs: list, budget: float, shuffle: bool = False) -> list:
    """Put pairs of like length together, at most `budget` tokens a batch, padding counted.

    Returns lists of indices into `pairs`; with `shuffle`, chance decides between pairs of the
    same lengths and on the order of the batches, but their number stays the same.
    """
    lengths = [tuple(map(len, pair)) for pair in pairs]
    order = [(*lengths[i], random.random() if shuffle else i, i) for i in range(len(pairs))]
    result, widest = [[]], (0, 0)
    for *_, i in sorted(order):
        widest = tuple(map(max, widest, lengths[i]))
        if result[-1] and (len(result[-1]) + 1) * sum(widest) > budget:
            result.append([])
            widest = lengths[i]
        result[-1].append(i)
    return random.sample(result, len(result)) if shuffle else result


def collate(pairs, device):
    """source (N, S) and target (N, T), both padded; mask: bool (N, 1, 1, S), True where the source
    has a token, or None where all of it does, which spares attention the work."""
    source, target = (nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
                      for rows in zip(*pairs))
    mask = (source != PAD)[:, None, None, :]
    return source.to(device), target.to(device), None if mask.all() else mask.to(device)


# ---------------------------------------------------------------- Model


def scaled_dot_product_attention(query, key, value, mask=None):
    """softmax(Q K^T / sqrt(d_k)) V, and the weights that the softmax gives. Vaswani et al., 2017.

    query: (..., T, d_k); key, value: (..., S, d_k); mask: bool, True where a query may look at a
    key, broadcast to (..., T, S); every query needs one such key.
    Returns (..., T, d_k) and (..., T, S).
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def sinusoidal_positions(length: int, d_model: int):
    """(length, d_model): sines and cosines in turns, of wavelengths from 2 pi to 10000 * 2 pi."""
    frequencies = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000) / d_model))
    angles = torch.arange(length)[:, None] * frequencies  # (length, d_model / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class MultiHeadAttention(nn.Module):
    """Attention of several heads side by side, each in d_model / heads dimensions of its own."""

    def __init__(self, d_model: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(d_model, 3 * d_model)  # W_Q, W_K and W_V, one below the other
        self.out_proj = nn.Linear(d_model, d_model)  # W_O
        self.keep_weights, self.weights = False, None  # True: for a picture, by the plain path

    def project(self, x, first: int, last: int):
        """Of query (0), key (1) and value (2) the first to last, in one matrix product.

        x: (N, L, d_model) -> (last - first + 1, N, heads, L, d_k)
        """
        rows = slice(first * x.shape[-1], (last + 1) * x.shape[-1])
        x = F.linear(x, self.in_proj.weight[rows], self.in_proj.bias[rows])
        return x.view(*x.shape[:2], last - first + 1, self.heads, -1).permute(2, 0, 3, 1, 4)

    def attend(self, query, key, value, mask=None, causal: bool = False):
        """query: (N, heads, T, d_k); key, value: (N, heads, S, d_k) -> (N, T, d_model)."""
        if FUSED_ATTENTION and not self.keep_weights:
            x = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        else:
            if causal:  # position t looks at 0 ... t, and not at what it is to predict
                mask = torch.ones(query.shape[2], key.shape[2], device=query.device).tril().bool()
            x, weights = scaled_dot_product_attention(query, key, value, mask)
            self.weights = weights.detach() if self.keep_weights else None
        return self.out_proj(x.transpose(1, 2).flatten(2))  # the heads side by side again


class Residual(nn.Module):
    """A sublayer, and around it dropout, the residual connection and layer norm.

    Pre-norm, x + sublayer(norm(x)), leaves a path from end to end that no norm interrupts
    (Xiong et al., 2020); post-norm, norm(x + sublayer(x)), is the paper's (Vaswani et al., 2017).
    """

    def __init__(self, d_model: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(d_model), nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x, sublayer):
        if self.pre_norm:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward: (N, S, d_model) -> (N, S, d_model)."""

    def __init__(self, d_model: int, heads: int, d_ff: int, dropout: float, pre_norm: bool,
                 sublayers: int = 2):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, heads)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(inplace=True),
                                          nn.Linear(d_ff, d_model))
        self.residuals = nn.ModuleList(Residual(d_model, dropout, pre_norm)
                                       for _ in range(sublayers))

    def forward(self, x, mask=None):
        attention = self.self_attention
        x = self.residuals[0](x, lambda y: attention.attend(*attention.project(y, 0, 2), mask))
        return self.residuals[1](x, self.feed_forward)


class DecoderLayer(EncoderLayer):
    """Causal self-attention, cross-attention, feed-forward: (N, T, d_model) -> (N, T, d_model)."""

    def __init__(self, d_model: int, heads: int, d_ff: int, dropout: float, pre_norm: bool):
        super().__init__(d_model, heads, d_ff, dropout, pre_norm, sublayers=3)
        self.cross_attention = MultiHeadAttention(d_model, heads)

    def forward(self, x, cache: dict, mask=None, position=None):
        """cache: "source" and "target", their keys and values (2, N, heads, length, d_k).

        mask: the source's, (N, 1, 1, S). At a `position`, x is only what is there, (N * K, 1,
        d_model), for K hypotheses of each source; what was before it comes from the cache.
        """
        def look_back(y):
            query, *key_value = self.self_attention.project(y, 0, 2)
            if position is not None:
                if position % 32 == 0:  # room for 32 more, so that copies are rare
                    cache["target"] = F.pad(cache["target"], (0, 0, 0, 32))
                cache["target"][:, :, :, position:position + 1] = torch.stack(key_value)
                key_value = cache["target"][:, :, :, :position + 1]
            return self.self_attention.attend(query, *key_value, causal=position is None)

        def look_at_source(y):  # for which K hypotheses are like K positions: its keys serve all
            y = y.reshape(cache["source"].shape[1], -1, y.shape[-1])
            query = self.cross_attention.project(y, 0, 0)
            return self.cross_attention.attend(*query, *cache["source"], mask).view(x.shape)
        x = self.residuals[0](x, look_back)
        x = self.residuals[1](x, look_at_source)
        return self.residuals[2](x, self.feed_forward)


class Transformer(nn.Module):
    """Encoder and decoder, with one table of embeddings for source, target and output.

    source: int64 (N, S); target: int64 (N, T) -> logits: float (N, T, vocabulary), where those
    at t are for the token after target[:, t]. Vaswani et al., 2017.

    vocabulary: how many tokens there are; max_length: the most in a source, and in a target.
    """

    def __init__(self, vocabulary: int, d_model: int = 64, heads: int = 4, layers: int = 2,
                 d_ff: int = 256, dropout: float = 0.0, pre_norm: bool = True,
                 max_length: int = 100):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        table = sinusoidal_positions(max_length + 1, d_model)  # one more, for <bos>
        self.register_buffer("positions", table, persistent=False)
        self.dropout = nn.Dropout(dropout)
        sizes = d_model, heads, d_ff, dropout, pre_norm
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(layers))
        # The sum that pre-norm layers leave has not been normalised yet.
        self.encoder_norm = nn.LayerNorm(d_model) if pre_norm else nn.Identity()
        self.decoder_norm = nn.LayerNorm(d_model) if pre_norm else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # Glorot and Bengio, 2010
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)  # logits begin near 1 in size

    def embed(self, tokens, start: int = 0):
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(x + self.positions[start:start + tokens.shape[1]])

    def encode(self, source, mask=None) -> list:
        """source: (N, S); mask: (N, 1, 1, S) or None -> the cache of each decoder layer."""
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask)
        x = self.encoder_norm(x)
        key_values = [layer.cross_attention.project(x, 1, 2) for layer in self.decoder]
        return [{"source": pair, "target": pair[:, :, :, :0]} for pair in key_values]

    def decode(self, target, caches: list, mask=None, position=None):
        """target: (N, T), or its token at one `position` alone, (N * K, 1) -> logits."""
        x = self.embed(target, position or 0)
        for layer, cache in zip(self.decoder, caches):
            x = layer(x, cache, mask, position)
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def forward(self, source, target, mask=None):
        return self.decode(target, self.encode(source, mask), mask)


# ---------------------------------------------------------------- Training


def cross_entropy(logits, tokens, smoothing: float = 0.0):
    """Mean cross-entropy against targets of 1 - smoothing for the token, the rest for all alike.

    logits: float (N, T, vocabulary); tokens: int64 (N, T), where <pad> does not count. Also
    returns how many count, and how many of these are the most probable. Szegedy et al., 2016.
    """
    kept, tokens = (tokens != PAD).flatten(), tokens.flatten()
    log_probabilities = F.log_softmax(logits.flatten(0, 1).float(), dim=1)
    loss = ((1 - smoothing) * F.nll_loss(log_probabilities, tokens, ignore_index=PAD)
            - smoothing * (log_probabilities.mean(1) * kept).sum() / kept.sum())
    return loss, kept.sum(), ((log_probabilities.argmax(1) == tokens) & kept).sum()


def train(args, data: Dataset, folder, device) -> list:
    """Train a Transformer; keep its last epoch and the one best on validation in `folder`."""
    common.seed_everything(args.seed)
    pairs = [data.vocabulary.encode(source, target)
             for source, targets in data.train.items() for target in targets]
    options = {"vocabulary": len(data.vocabulary.tokens), "d_model": args.d_model,
               "heads": args.heads, "layers": args.layers, "d_ff": args.d_ff,
               "dropout": args.dropout, "pre_norm": not args.post_norm,
               "max_length": 2 * max(len(row) for pair in pairs for row in pair)}
    model = Transformer(**options).to(device)
    budget = args.batch_size * sum(len(s) + len(t) for s, t in pairs) / len(pairs)  # tokens
    steps = len(batches(pairs, budget))
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.98), **FUSED_ADAM)
    schedule = common.warmup_cosine(optimizer, args.warmup, args.epochs * steps)
    dtype = common.select_dtype(args.precision, device)
    scaler = common.gradient_scaler(dtype)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history = []
    if args.resume:
        checkpoint = common.load_checkpoint(folder / "last.pt", "transformer.py")
        with common.using(folder / "last.pt"):
            for name, part in state.items():
                part.load_state_dict(checkpoint[name])
            history = checkpoint["history"]
    compiled = common.compile_model(model, args.compile)

    for epoch in range(len(history) + 1, args.epochs + 1):
        if history and common.epochs_since_best(history, BEST) >= args.patience:
            print(f"no better validation accuracy for {args.patience} epochs: stopping early")
            break
        start = time.perf_counter()
        common.seed_everything(args.seed, epoch)
        model.train()
        totals = torch.zeros(3, device=device)  # loss, tokens, right ones
        bar = common.progress(batches(pairs, budget, shuffle=True), f"epoch {epoch}/{args.epochs}")
        for step, indices in enumerate(bar):
            source, target, mask = collate([pairs[i] for i in indices], device)
            with common.autocast(device, dtype):
                # Teacher forcing: whatever is predicted, the next input is the right token.
                logits = compiled(source, target[:, :-1], mask)
            loss, count, right = cross_entropy(logits, target[:, 1:], args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            common.clip_gradients(model, args.clip, (epoch - 1) * steps + step + 1, scaler)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            totals += torch.stack([loss.detach() * count, count, right])
            if step % 10 == 9:
                loss, _, share = (totals / totals[1]).tolist()
                bar.set_postfix_str(f"loss {loss:.3f}, tokens {share:.1%}", refresh=False)
        loss, _, share = (totals / totals[1]).tolist()
        row = {"epoch": epoch, "learning_rate": schedule.get_last_lr()[0], "train_loss": loss,
               "train_token_accuracy": share}
        for name, value in measure(model, data.vocabulary, data.validation, device)[0].items():
            row.update({} if name == "by_length" else {f"validation_{name}": value})
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        print(f"epoch {epoch:3}/{args.epochs}   train loss {loss:.3f}, tokens {share:.2%}   "
              f"validation loss {row['validation_loss']:.3f}, tokens "
              f"{row['validation_token_accuracy']:.2%}, exact match "
              f"{row['validation_exact_match']:.2%}   {row['seconds']:.1f} s", flush=True)
        common.write_history(folder / "history.csv", history)
        if common.epochs_since_best(history, BEST) == 0:
            common.save_checkpoint(folder / "best.pt", {
                "script": "transformer.py", "model": model.state_dict(), "model_options": options,
                "data": data.name, "tokens": data.vocabulary.tokens, "metrics": row,
                "kinds": [args.source_tokens, args.target_tokens]})
        common.save_checkpoint(folder / "last.pt", {
            "script": "transformer.py", "options": vars(args), "history": history,
            **{name: part.state_dict() for name, part in state.items()}})
    return history


# ---------------------------------------------------------------- Evaluation and pictures


@torch.no_grad()
def beam_search(model: Transformer, source, mask=None, beam: int = 1) -> list:
    """Write a target to each source token by token, keeping the `beam` best hypotheses of each.

    A beam of 1 is greedy decoding. A wider beam promises no better score by itself, since the
    greedy hypothesis can fall out of it; here that one competes at the end.

    source: int64 (N, S); mask: (N, 1, 1, S) or None. Returns N tuples: the score, which is the
    log-probability over a length penalty (Wu et al., 2016); the log-probability; the tokens.
    """
    greedy = beam_search(model, source, mask) if beam > 1 else None
    limit, result, device = len(model.positions) - 1, [None] * len(source), source.device
    penalty = ((5 + torch.arange(limit + 1, device=device)) / 6.0)**0.6
    active = torch.arange(len(source), device=device)  # sources still being worked on
    caches = model.encode(source, mask)
    tokens = source.new_full((len(source), 1, 1), BOS)  # (n, k, t + 1); k is 1, then `beam`
    totals = torch.zeros(tokens.shape[:2], device=device)  # (n, k): log-probabilities
    lengths, ended = torch.zeros_like(totals).long(), torch.zeros_like(totals).bool()
    for position in range(limit):
        n, k, _ = tokens.shape
        logits = model.decode(tokens[:, :, -1].reshape(n * k, 1), caches, mask, position)
        steps = F.log_softmax(logits.float(), dim=-1).view(n, k, -1)  # (n, k, vocabulary)
        steps[..., :EOS] = -math.inf  # <pad> and <bos> are no answers
        frozen = torch.full_like(steps[0, 0], -math.inf)
        frozen[PAD] = 0  # what has ended goes on as it is, at no cost
        sums = totals[..., None] + torch.where(ended[..., None], frozen, steps)
        lengths = lengths + (~ended).long()
        ranks = (sums / penalty[lengths][..., None]).flatten(1)  # (n, k * vocabulary)
        scores, chosen = ranks.topk(min(beam, ranks.shape[1]))  # (n, beam), the best first
        parents = torch.arange(k, device=device).repeat_interleave(len(frozen))[chosen]
        rows = torch.arange(n, device=device)[:, None] * k + parents  # of the n * k until now
        newest = (chosen % len(frozen))[..., None]
        tokens = torch.cat([tokens.flatten(0, 1)[rows], newest], 2)
        totals, lengths = sums.flatten(1).gather(1, chosen), lengths.flatten()[rows]
        ended = ended.flatten()[rows] | (newest[..., 0] == EOS)
        # At best, an open hypothesis ends at the greatest length with no more probability lost.
        hope = (totals / penalty[limit]).masked_fill(ended, -math.inf).max(1).values
        done = ended[:, 0] & (scores[:, 0] >= hope) | (position + 1 == limit)
        if done.any():
            best = active, scores[:, 0], totals[:, 0], tokens[:, 0, 1:]
            for i, *numbers, row in zip(*(column[done].tolist() for column in best)):
                result[i] = (*numbers, row[:(row + [EOS]).index(EOS)])
            active, tokens, totals, lengths, ended, rows = (
                x[~done] for x in (active, tokens, totals, lengths, ended, rows))
            mask = mask if mask is None else mask[~done]
            if len(active) == 0:
                break
        for cache in caches:
            if beam > 1 or done.any():
                cache["target"] = cache["target"][:, rows.flatten()]
            if done.any():
                cache["source"] = cache["source"][:, ~done]
    return list(map(max, greedy, result)) if greedy else result


def translate(model, vocabulary, sources, device, beam: int = 1) -> list:
    """For each of the sources, in their order: score, log-probability, target tokens as text."""
    model.eval()
    pairs, result = [vocabulary.encode(source) for source in sources], {}
    for indices in common.progress(batches(pairs, 8192), "decoding"):
        source, _, mask = collate([pairs[i] for i in indices], device)
        for i, (*numbers, row) in zip(indices, beam_search(model, source, mask, beam)):
            result[i] = (*numbers, tuple(vocabulary.tokens[token] for token in row))
    return [result[i] for i in range(len(pairs))]


def edit_distance(a, b) -> int:
    """The fewest insertions, deletions and substitutions from a to b. Levenshtein, 1966."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@torch.no_grad()
def measure(model, vocabulary, answers: dict, device, beam: int = 1):
    """Returns metrics, and what translate() makes of each source.

    Teacher forcing: loss, token_accuracy. Free running, where the model goes on from its own
    tokens: exact_match with any of a source's answers, also by_length of the source, and
    error_rate, the edit distance to the nearest answer over its length.
    """
    model.eval()
    pairs = [vocabulary.encode(source, target) for source in answers for target in answers[source]]
    totals = torch.zeros(3, device=device)  # loss, tokens, right ones
    for indices in batches(pairs, 16384):
        source, target, mask = collate([pairs[i] for i in indices], device)
        loss, count, right = cross_entropy(model(source, target[:, :-1], mask), target[:, 1:])
        totals += torch.stack([loss * count, count, right])
    loss, _, token_accuracy = (totals / totals[1]).tolist()
    found = translate(model, vocabulary, list(answers), device, beam)
    nearest = [min((edit_distance(tokens, target), len(target)) for target in answers[source])
               for source, (*_, tokens) in zip(answers, found)]
    errors, length = map(sum, zip(*nearest))
    groups = defaultdict(list)
    for source, (distance, _) in zip(answers, nearest):
        groups[len(source)].append(distance == 0)
    return {"loss": loss, "token_accuracy": token_accuracy, "error_rate": errors / length,
            "exact_match": sum(map(sum, groups.values())) / len(answers),
            "by_length": {n: sum(groups[n]) / len(groups[n]) for n in sorted(groups)}}, found


def evaluate(args, data: Dataset, folder, device, history) -> None:
    """Measure the best Transformer on the test part; draw the pictures; write summary.json."""
    model, vocabulary, checkpoint = load_model(folder / "best.pt", device)
    test, greedy = measure(model, vocabulary, data.test, device)
    wider, found = measure(model, vocabulary, data.test, device, args.beam)
    changed = [(a, b) for a, b in zip(greedy, found) if a[-1] != b[-1]]
    test["beam"] = {"width": args.beam, "exact_match": wider["exact_match"],
                    "error_rate": wider["error_rate"],
                    "better": sum(a[0] < b[0] for a, b in changed),
                    "worse": sum(a[0] > b[0] for a, b in changed)}
    test["best_epoch"] = checkpoint["metrics"]["epoch"]
    if data.longer:
        test["longer"], _ = measure(model, vocabulary, data.longer, device)
    seconds = sum(row["seconds"] for row in history)
    common.write_summary(folder / "summary.json", script="transformer.py", data=data.name,
                         options=vars(args), test=test, seconds=seconds)
    title = f"Transformer on {data.name}"
    common.plot_history(folder / "curves.png", history, title, {
        "loss": {"training, smoothed": "train_loss", "validation": "validation_loss"},
        "share right": {"training tokens": "train_token_accuracy", "validation tokens": BEST,
                        "validation sequences": "validation_exact_match"},
        "learning rate": {"learning rate": "learning_rate"}})
    draw_attention(folder / "attention.png", model, vocabulary, data.test, title, device)
    draw_positions(folder / "positions.png", model.positions.cpu(), title)
    draw_length(folder / "length.png", test, title)
    print(f"\ntest on {data.name} ({len(found)} sources, weights of epoch {test['best_epoch']}): "
          f"exact match {test['exact_match']:.2%}, error rate {test['error_rate']:.3%}, "
          f"tokens with teacher forcing {test['token_accuracy']:.2%}\n"
          f"beam {args.beam}: exact match {wider['exact_match']:.2%}; its score is better than "
          f"greedy for {test['beam']['better']} sources, worse for {test['beam']['worse']}")
    if data.longer:
        print(f"sources longer than any in training: exact match "
              f"{test['longer']['exact_match']:.2%}, error rate {test['longer']['error_rate']:.1%}")
    rows = [(source, row[-1], row[-1] in data.test[source]) for source, row in
            zip(data.test, greedy)]
    for source, tokens, right in rows[:4] + [row for row in rows[4:] if not row[-1]][:4]:
        print("  ", SEPARATOR[args.source_tokens].join(source), "->",
              SEPARATOR[args.target_tokens].join(tokens), "" if right else "(wrong)")
    print(f"training took {seconds:.0f} s; pictures and checkpoints are in {args.out}\n"
          f"write targets of your own with: python transformer.py --out {args.out} --predict TEXT")


def draw_attention(path, model, vocabulary, answers, title, device):
    """Where each head of the last decoder layer looks in a source as it writes each token."""
    source = max(answers, key=lambda source: (min(len(source), 16), source))
    target = translate(model, vocabulary, [source], device)[0][-1]
    attention = model.decoder[-1].cross_attention
    attention.keep_weights = True
    tokens, written, _ = collate([vocabulary.encode(source, target)], device)
    with torch.no_grad():
        model(tokens, written[:, :-1])
    heads, height, width = attention.weights[0].shape
    down, across = math.ceil(heads / 4), min(heads, 4)
    figure, axes = common.new_figure(
        down, across, (across * (1 + 0.2 * width), down * (1 + 0.2 * height)),
        f"{title}: cross-attention of the last decoder layer")
    for head, (axis, weights) in enumerate(zip(axes.flat, attention.weights[0].cpu()), 1):
        axis.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"head {head}", xticks=range(width), yticks=range(height),
                 xlabel="source", ylabel="token written")
        axis.set_xticklabels([*source, "<eos>"], fontsize=8, rotation=90)
        axis.set_yticklabels([*target, "<eos>"], fontsize=8)
    common.save_figure(path, figure)


def draw_positions(path, table, title):
    """The positional encoding, and how alike two positions are by their dot product."""
    figure, ((left, right),) = common.new_figure(1, 2, (10, 4), f"{title}: positional encoding")
    left.imshow(table, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    left.set(title="a position in each row", xlabel="dimension", ylabel="position")
    image = right.imshow(table @ table.t() / (table[0] @ table[0]), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=right, label="dot product, as a share of that with itself")
    right.set(title="how alike two positions are", xlabel="position", ylabel="position")
    common.save_figure(path, figure)


def draw_length(path, test, title):
    figure, ((axis,),) = common.new_figure(1, 1, (8, 3.5), f"{title}: exact match against length")
    for label, part in (("test part", test), ("longer than any in training", test.get("longer"))):
        if part:
            axis.bar(list(part["by_length"]), list(part["by_length"].values()), label=label)
    axis.set(xlabel="tokens in the source", ylabel="exact match", ylim=(0, 1.05))
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)
    common.save_figure(path, figure)


def load_model(path, device):
    """The Transformer saved in a best.pt, its vocabulary, and the checkpoint itself."""
    checkpoint = common.load_checkpoint(path, "transformer.py")
    with common.using(path):
        model = Transformer(**checkpoint["model_options"])
        model.load_state_dict(checkpoint["model"])
    return model.to(device), Vocabulary(checkpoint["tokens"][UNK + 1:]), checkpoint


def predict(args, device) -> None:
    """Print `source <tab> target <tab> probability` for each text of --predict."""
    model, vocabulary, checkpoint = load_model(Path(args.out, "best.pt"), device)
    kinds, lines = checkpoint["kinds"], args.predict
    if lines == ["-"]:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        lines = sys.stdin.read().rstrip("\n").split("\n")
    sources = [tokenize(line, kinds[0]) for line in lines]
    for i, source in enumerate(sources, 1):
        if not 0 < len(source) < len(model.positions):  # <eos> takes one
            raise common.UserError(f"--predict: line {i} has {len(source)} tokens, and the model "
                                   f"takes 1 to {len(model.positions) - 1}; shorten it, or "
                                   "train on longer ones")
    unseen = {token for source in sources for token in source} - set(vocabulary.numbers)
    if unseen:
        common.warn("never seen in training, read as <unk>: " + " ".join(sorted(unseen)[:20]))
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    found = translate(model, vocabulary, sources, device, args.beam)
    for source, (_, log_probability, target) in zip(sources, found):
        texts = (SEPARATOR[kind].join(row) for kind, row in zip(kinds, (source, target)))
        print(*texts, f"{math.exp(log_probability):.4f}", sep="\t")


# ---------------------------------------------------------------- Command line


def build_parser():
    parser = common.option_parser(
        "transformer.py", __doc__, "synthetic, or a CSV or TSV file with columns source and target",
        data="synthetic", out="runs/transformer", epochs=6, batch_size=64, lr=2e-3,
        weight_decay=0.01, clip=1.0, patience=10)
    group = parser.add_argument_group("options of the Transformer", (
        "A batch holds as many tokens as --batch-size pairs of average length: short pairs are "
        "more, long ones fewer."))
    whole, share = common.number(int, 1), common.number(float, 0, 0.99)
    group.add_argument("--task", choices=list(TASKS), default="reverse",
                       help="the synthetic data; add gives a sum, its last digit first [reverse]")
    for side in "source", "target":
        group.add_argument(f"--{side}-tokens", choices=("chars", "words"), default="chars",
                           help=f"what a token of a {side} is [chars]")
    for flag, kind, default, metavar, meaning in (
            ("--synthetic-size", common.number(int, 100), 50000, "N",
             "pairs of the synthetic data, all parts together"),
            ("--max-length", whole, 256, "TOKENS", "longest source or target that --data may have"),
            ("--d-model", whole, 64, "N", "width of the model"),
            ("--heads", whole, 4, "N", "attention heads in a layer"),
            ("--layers", whole, 2, "N", "layers of the encoder, and of the decoder"),
            ("--d-ff", whole, 256, "N", "width of the hidden layer of feed-forward"),
            ("--dropout", share, 0.0, "SHARE", "share of a sublayer's output zeroed in training"),
            ("--label-smoothing", share, 0.1, "SHARE", "share of a target spread over all tokens"),
            ("--warmup", common.number(int, 0), 400, "STEPS", "steps until the rate is at --lr"),
            ("--beam", whole, 4, "K", "hypotheses that beam search keeps; 1: greedy decoding")):
        group.add_argument(flag, type=kind, default=default, metavar=metavar,
                           help=meaning + " [%(default)s]")
    group.add_argument("--post-norm", action="store_true",
                       help="layer norm after each residual connection, as in the paper")
    group.add_argument("--predict", nargs="+", metavar="TEXT",
                       help="write targets to texts by best.pt in --out; - reads lines from stdin")
    return parser


def main() -> None:
    args = common.parse_options(build_parser(), fixed=(
        "data", "seed", "task", "synthetic_size", "source_tokens", "target_tokens", "max_length",
        "d_model", "heads", "layers", "d_ff", "dropout", "post_norm"))
    if args.d_model % args.heads or args.d_model % 2:
        raise common.UserError(f"--d-model {args.d_model}: must be even, and a multiple of --heads "
                               f"{args.heads}")
    device = common.select_device(args.device)
    common.keep_freed_memory()
    if args.predict:
        predict(args, device)
        return
    with common.run_folder(args.out, args.resume) as folder:
        data = load_data(args)
        print(f"{data.name}: {len(data.train)} sources to train on, {len(data.validation)} to "
              f"validate, {len(data.test)} to test; {len(data.vocabulary.tokens)} tokens; "
              f"on {device}")
        history = train(args, data, folder, device)
        evaluate(args, data, folder, device, history)


if __name__ == "__main__":
    common.run_main(main)
