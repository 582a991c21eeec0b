"""Train a Transformer to turn one sequence of tokens into another.

  python transformer.py                   reverse words of 2 to 20 letters
  python transformer.py --data pairs.tsv  your pairs: columns source and target
  python transformer.py --predict hello   what the trained model writes

Pictures, checkpoints and figures go to runs/transformer (--out).
transformer.md explains every part.
"""

from __future__ import annotations

import argparse
import math
import random
import string
import sys
import time
from collections import defaultdict, namedtuple
from pathlib import Path
from typing import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

PAD, BOS, EOS, UNK = range(4)  # padding, begin and end of a sequence, a token never seen
# A text's tokens, where any run of white space is one blank, and what joins them again.
SPLIT = {"chars": lambda text: tuple(" ".join(text.split())), "words": lambda t: tuple(t.split())}
JOIN = {"chars": "".join, "words": " ".join}
METRICS = {"loss": "loss {:.3f}", "token_accuracy": "tokens {:.2%}",
           "exact_match": "exact match {:.2%}", "error_rate": "error rate {:.2%}"}
BEST = "validation_token_accuracy"  # picks the best epoch: finer than exact match, and never stuck
SIZES = "d_model", "heads", "layers", "d_ff", "dropout"

# ---------------------------------------------------------------- Data

# For each task: the target of a source; shortest and longest in training; longest beyond.
TASKS = {
    "reverse": (lambda source: source[::-1], 2, 20, 30),
    "copy": (lambda source: source, 2, 20, 30),
    "sort": (lambda source: "".join(sorted(source)), 2, 20, 30),
    # All numbers last digit first: the order in which carrying makes the digits of a sum known.
    "add": (lambda source: str(sum(int(n[::-1]) for n in source.split("+")))[::-1], 1, 5, 8)}


def synthetic_pairs(task: str, count: int, low: int, high: int, seed: int) -> dict:
    """`count` sources of `low` to `high` letters (`add`: digits in both numbers), with targets."""
    generator, pairs = random.Random(seed), {}
    while len(pairs) < count:
        length = generator.randint(low, high)
        source = "".join(generator.choices(string.ascii_lowercase, k=length))
        if task == "add":
            numbers = (generator.randrange(10**(length - 1), 10**length) for _ in range(2))
            source = "+".join(str(number)[::-1] for number in numbers)
        pairs[tuple(source)] = [tuple(TASKS[task][0](source))]
    return pairs


def read_pairs(path: str, kinds: Sequence[str], max_length: int) -> dict:
    """Read {source tokens: [target tokens, ...]}, with the targets of all lines of a source."""
    pairs = defaultdict(list)
    for line, cells in common.read_table(path, ("source", "target")):
        source, target = (SPLIT[kind](cell) for kind, cell in zip(kinds, cells))
        if max(len(source), len(target)) > max_length:
            raise common.UserError(f"--data {path}: line {line} has more than {max_length} tokens; "
                                   "shorten it, or raise --max-length")
        if target not in pairs[source]:
            pairs[source].append(target)
    if len(pairs) < 10:
        raise common.UserError(f"--data {path}: {len(pairs)} different sources; 10 are needed")
    return pairs


class Vocabulary:
    """The tokens of the training part and their numbers, the same for sources and targets."""

    def __init__(self, tokens: Iterable[str]):
        self.tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(tokens)]
        self.numbers = {token: i for i, token in enumerate(self.tokens) if i > UNK}

    def encode(self, source: Sequence[str], target: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
        """int64 tensors: the source's `tokens <eos>` and the target's `<bos> tokens <eos>`."""
        source, target = ([self.numbers.get(token, UNK) for token in row] + [EOS]
                          for row in (source, target))
        return torch.tensor(source), torch.tensor([BOS] + target)


# Each part: {source tokens: [right target tokens, ...]}. `longer`: sources beyond those trained on.
Dataset = namedtuple("Dataset", "name vocabulary train validation test longer")


def load_data(args: argparse.Namespace) -> Dataset:
    """Make or read what `--data` names, and split it: no source is in two parts."""
    if args.data == "synthetic":
        name, (_, low, high, beyond) = f"synthetic {args.task}", TASKS[args.task]
        pairs = synthetic_pairs(args.task, args.synthetic_size, low, high, args.seed)
        longer = synthetic_pairs(args.task, args.synthetic_size // 50, high + 1, beyond, args.seed)
    else:
        name, kinds, longer = args.data, (args.source_tokens, args.target_tokens), {}
        pairs = read_pairs(args.data, kinds, args.max_length)
    sources = sorted(pairs)
    random.Random(args.seed).shuffle(sources)
    held = min(2000, len(sources) // 10)  # in each of validation and test
    validation, test, train = ({source: pairs[source] for source in part} for part in (
        sources[:held], sources[held:2 * held], sources[2 * held:]))
    tokens = {token for source in train for row in (source, *train[source]) for token in row}
    return Dataset(name, Vocabulary(tokens), train, validation, test, longer)


def batches(pairs: list, budget: float, shuffle: bool = False) -> list:
    """Indices into `pairs`: pairs of like length together, at most `budget` tokens a batch with
    the padding. With `shuffle`, chance orders the batches, and pairs of the same lengths.
    """
    order = [(len(source), len(target), random.random() if shuffle else 0, i)
             for i, (source, target) in enumerate(pairs)]
    result, longest = [[]], 0
    for source, target, _, i in sorted(order):  # the last source is always the longest
        longest = max(longest, target)
        if result[-1] and (len(result[-1]) + 1) * (source + longest) > budget:
            result.append([])
            longest = target
        result[-1].append(i)
    return random.sample(result, len(result)) if shuffle else result


def collate(pairs: list, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """source (N, S) and target (N, T), padded; mask: bool (N, 1, 1, S), True where the source has
    a token, or None where all of it does, which spares attention the work."""
    source, target = (nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
                      for rows in zip(*pairs))
    mask = (source != PAD)[:, None, None, :]
    return source.to(device), target.to(device), None if mask.all() else mask.to(device)


# ---------------------------------------------------------------- Model


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor,
                                 mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(d_k)) V, (..., T, d_k), and the weights of the softmax, (..., T, S).

    query: (..., T, d_k); key, value: (..., S, d_k); mask: bool, broadcast to (..., T, S), True
    where a query may look at a key; every query needs one such key. Vaswani et al., 2017.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """(length, d_model): sines and cosines in turns, of wavelengths from 2 pi to 10000 * 2 pi."""
    frequencies = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000) / d_model))
    angles = torch.arange(length)[:, None] * frequencies  # (length, d_model / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class MultiHeadAttention(nn.Module):
    """Attention of several heads side by side, each in d_k = d_model / heads dimensions."""

    def __init__(self, d_model: int, heads: int):
        super().__init__()
        if d_model % heads:
            raise ValueError(f"d_model {d_model} is no multiple of heads {heads}")
        self.in_proj = nn.Linear(d_model, 3 * d_model)  # W_Q, W_K and W_V, one below the other
        self.out_proj = nn.Linear(d_model, d_model)  # W_O
        self.heads, self.keep_weights = heads, False  # True: for a picture, by the plain path

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Of query (0), key (1) and value (2) the first to last, in one matrix product:
        (N, L, d_model) -> (last - first + 1, N, heads, L, d_k).
        """
        rows = slice(first * x.shape[-1], (last + 1) * x.shape[-1])
        x = F.linear(x, self.in_proj.weight[rows], self.in_proj.bias[rows])
        return x.view(*x.shape[:2], last - first + 1, self.heads, -1).permute(2, 0, 3, 1, 4)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None,
               causal: bool = False) -> Tensor:
        """query: (N, heads, T, d_k); key, value: (N, heads, S, d_k) -> (N, T, d_model)."""
        if common.FUSED_ATTENTION and not self.keep_weights:
            x = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        else:
            if causal:  # position t looks at 0 ... t, and not at what it is to predict
                mask = torch.ones(query.shape[2], key.shape[2], device=query.device).tril().bool()
            x, self.weights = scaled_dot_product_attention(query, key, value, mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # the heads side by side again


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward: (N, S, d_model) -> (N, S, d_model)."""

    def __init__(self, d_model: int, heads: int, d_ff: int, dropout: float, pre_norm: bool,
                 sublayers: int = 2):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, heads)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(inplace=True),
                                          nn.Linear(d_ff, d_model))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(sublayers))
        self.dropout, self.pre_norm = nn.Dropout(dropout), pre_norm

    def residual(self, norm: nn.Module, x: Tensor, sublayer: Callable) -> Tensor:
        if self.pre_norm:  # a path from end to end that no norm interrupts: Xiong et al., 2020
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))  # the paper: Vaswani et al., 2017

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attend, project = self.self_attention.attend, self.self_attention.project
        x = self.residual(self.norms[0], x, lambda y: attend(*project(y, 0, 2), mask))
        return self.residual(self.norms[1], x, self.feed_forward)


class DecoderLayer(EncoderLayer):
    """Causal self-attention, cross-attention, feed-forward: (N, T, d_model) -> (N, T, d_model)."""

    def __init__(self, d_model: int, heads: int, *sizes):
        super().__init__(d_model, heads, *sizes, sublayers=3)
        self.cross_attention = MultiHeadAttention(d_model, heads)

    def forward(self, x: Tensor, cache: dict, mask: Tensor | None = None,
                position: int | None = None) -> Tensor:
        """cache: "source" and "target", keys and values (2, N, heads, length, d_k). At a
        `position`, x is what is there alone, (N * K, 1, d_model), for K hypotheses of a source.
        """
        def look_back(y):
            query, *key_value = self.self_attention.project(y, 0, 2)
            if position is not None:
                if position % 32 == 0:  # room for 32 more, so that copies are rare
                    cache["target"] = F.pad(cache["target"], (0, 0, 0, 32))
                cache["target"][:, :, :, position:position + 1] = torch.stack(key_value)
                key_value = cache["target"][:, :, :, :position + 1]
            return self.self_attention.attend(query, *key_value, causal=position is None)

        def look_at_source(y):  # K hypotheses are like K positions: the source's keys serve all
            y = y.reshape(cache["source"].shape[1], -1, y.shape[-1])
            query = self.cross_attention.project(y, 0, 0)
            return self.cross_attention.attend(*query, *cache["source"], mask).view(x.shape)
        x = self.residual(self.norms[0], x, look_back)
        x = self.residual(self.norms[1], x, look_at_source)
        return self.residual(self.norms[2], x, self.feed_forward)


class Transformer(nn.Module):
    """Encoder and decoder, with one table of embeddings for source, target and output.

    int64 (N, S) and (N, T), of at most max_length tokens -> float (N, T, vocabulary): logits at t
    for the token after target[:, t].
    """

    def __init__(self, vocabulary: int, max_length: int = 100, d_model: int = 64, heads: int = 4,
                 layers: int = 2, d_ff: int = 256, dropout: float = 0.0, pre_norm: bool = True):
        super().__init__()
        sizes = d_model, heads, d_ff, dropout, pre_norm
        self.embedding, self.dropout = nn.Embedding(vocabulary, d_model), nn.Dropout(dropout)
        table = sinusoidal_positions(max_length + 1, d_model)  # one more, for <bos>
        self.register_buffer("positions", table, persistent=False)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(layers))
        # The sum that pre-norm layers leave has not been normalised yet.
        self.encoder_norm = nn.LayerNorm(d_model) if pre_norm else nn.Identity()
        self.decoder_norm = nn.LayerNorm(d_model) if pre_norm else nn.Identity()
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)  # Glorot and Bengio, 2010
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)  # logits begin near 1 in size

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(x + self.positions[start:start + tokens.shape[1]])

    def encode(self, source: Tensor, mask: Tensor | None = None) -> list:
        """source: (N, S); mask: (N, 1, 1, S) or None -> the cache of each decoder layer."""
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask)
        x = self.encoder_norm(x)
        key_values = [layer.cross_attention.project(x, 1, 2) for layer in self.decoder]
        return [{"source": pair, "target": pair[:, :, :, :0]} for pair in key_values]

    def decode(self, target: Tensor, caches: list, mask: Tensor | None = None,
               position: int | None = None) -> Tensor:
        """target: (N, T), or its token at one `position` alone, (N * K, 1) -> logits."""
        x = self.embed(target, position or 0)
        for layer, cache in zip(self.decoder, caches):
            x = layer(x, cache, mask, position)
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.decode(target, self.encode(source, mask), mask)


# ---------------------------------------------------------------- Training


def cross_entropy(logits: Tensor, tokens: Tensor, smoothing: float = 0.0) -> tuple:
    """Mean cross-entropy against targets of 1 - smoothing for the token, the rest for all alike;
    how many tokens count, which <pad> does not; how many are the most probable.

    logits: float (N, T, vocabulary); tokens: int64 (N, T). Szegedy et al., 2016.
    """
    kept, tokens = (tokens != PAD).flatten(), tokens.flatten()
    log_probabilities = F.log_softmax(logits.flatten(0, 1).float(), dim=1)
    loss = ((1 - smoothing) * F.nll_loss(log_probabilities, tokens, ignore_index=PAD)
            - smoothing * (log_probabilities.mean(1) * kept).sum() / kept.sum())
    return loss, kept.sum(), ((log_probabilities.argmax(1) == tokens) & kept).sum()


def train(args: argparse.Namespace, data: Dataset, folder: Path, device: torch.device) -> list:
    """Train a Transformer; keep its last epoch and the one best on validation in `folder`."""
    common.seed_everything(args.seed)
    pairs = [data.vocabulary.encode(source, target)
             for source, targets in data.train.items() for target in targets]
    options = {"vocabulary": len(data.vocabulary.tokens), "pre_norm": not args.post_norm,
               "max_length": 2 * max(len(row) for pair in pairs for row in pair),
               **{name: getattr(args, name) for name in SIZES}}
    model = Transformer(**options).to(device)
    budget = args.batch_size * sum(len(s) + len(t) for s, t in pairs) / len(pairs)  # tokens
    steps = len(batches(pairs, budget))
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.98), **common.FUSED_ADAM)
    schedule = common.warmup_cosine(optimizer, args.warmup, args.epochs * steps)
    dtype = common.select_dtype(args.precision, device, small=True)
    scaler = common.gradient_scaler(dtype)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    checksum = common.checksum((data.train, data.validation, data.vocabulary.tokens))
    path, history = folder / "last.pt", []
    if args.resume:
        checkpoint = common.load_checkpoint(path, "transformer.py")
        history = common.restore(path, checkpoint, state, checksum)
    parallel = common.parallel(common.compile_model(model, args.compile), device)
    terms = torch.tensor([len(target) - 1 for _, target in pairs])  # tokens to predict

    for epoch in range(len(history) + 1, args.epochs + 1):
        if history and common.epochs_since_best(history, BEST) >= args.patience:
            print(f"no better validation accuracy for {args.patience} epochs: stopping early")
            break
        start = time.perf_counter()
        common.seed_everything(args.seed, epoch)
        model.train()
        totals = torch.zeros(2, device=device)  # loss, right tokens
        bar = common.progress(common.shares(batches(pairs, budget, shuffle=True), terms),
                              f"epoch {epoch}/{args.epochs}")
        for step, (indices, weight, count) in enumerate(bar):
            source, target, mask = collate([pairs[i] for i in indices], device)
            with common.autocast(device, dtype):
                # Teacher forcing: whatever is predicted, the next input is the right token.
                logits = parallel(source, target[:, :-1], mask)
            loss, tokens, right = cross_entropy(logits, target[:, 1:], args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(weight * loss).backward()
            scaler.unscale_(optimizer)
            common.clip_gradients(model, args.clip, (epoch - 1) * steps + step + 1, scaler)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            totals += weight * count * torch.stack([loss.detach(), right / tokens])
            if step % 10 == 9:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        loss, share = (common.mean_of_processes(totals) / terms.sum()).tolist()
        validation, _ = measure(model, data.vocabulary, data.validation)
        history.append({"epoch": epoch, "learning_rate": schedule.get_last_lr()[0],
                        "train_loss": loss, "train_token_accuracy": share,
                        **{f"validation_{name}": validation[name] for name in METRICS},
                        "seconds": time.perf_counter() - start})
        print(f"epoch {epoch:2}/{args.epochs}  train {loss:.2f}  validation "
              f"{validation['loss']:.2f}, exact match {validation['exact_match']:.1%}  "
              f"{common.pace(history, args.epochs)}", flush=True)
        best = common.epochs_since_best(history, BEST) == 0 and {
            "script": "transformer.py", "model": model.state_dict(), "model_options": options,
            "tokens": data.vocabulary.tokens, "kinds": [args.source_tokens, args.target_tokens],
            "metrics": history[-1]}
        common.save_epoch(folder, history, best, {
            "script": "transformer.py", "options": vars(args), "data": checksum,
            "history": history, **{name: part.state_dict() for name, part in state.items()}})
    return history


# ---------------------------------------------------------------- Evaluation and pictures


@torch.no_grad()
def beam_search(model: Transformer, source: Tensor, mask: Tensor | None = None,
                beam: int = 1) -> list:
    """Write a target to each source (N, S) token by token, keeping the `beam` best hypotheses of
    each. The greedy one, a beam of 1, can fall out of a wider beam; it competes at the end.

    Returns N tuples: the score, which is the log-probability over a length penalty (Wu et al.,
    2016); the log-probability; the tokens.
    """
    greedy = beam_search(model, source, mask) if beam > 1 else None
    n, limit, vocabulary = len(source), len(model.positions) - 1, len(model.embedding.weight)
    penalty = ((5 + torch.arange(limit + 1, device=source.device)) / 6.0)**0.6
    caches = model.encode(source, mask)
    tokens = source.new_full((n, 1, 1), BOS)  # (n, k, position + 1); k is 1, then `beam`
    totals = torch.zeros((n, 1), device=source.device)  # (n, k): log-probabilities
    ended, sources, results = totals.bool(), torch.arange(n, device=source.device), []
    for position in range(limit):
        logits = model.decode(tokens[:, :, -1].reshape(-1, 1), caches, mask, position)
        steps = F.log_softmax(logits.float(), dim=-1).view(*ended.shape, vocabulary)
        steps[..., :EOS] = steps[ended] = -math.inf  # <pad> and <bos> are no answers,
        steps[..., PAD][ended] = 0  # but what has ended goes on as it is, at no cost
        sums = totals[..., None] + steps
        lengths = (tokens > EOS).sum(2) + 1  # one more: the token to come, or <eos>
        ranks = (sums / penalty[lengths][..., None]).flatten(1)  # (n, k * vocabulary)
        scores, chosen = ranks.topk(min(beam, ranks.shape[1]))  # (n, beam), the best first
        parents, newest = chosen // vocabulary, chosen % vocabulary
        rows = torch.arange(len(ended), device=source.device)[:, None] * ended.shape[1] + parents
        tokens = torch.cat([tokens.flatten(0, 1)[rows], newest[..., None]], 2)
        totals, ended = sums.flatten(1).gather(1, chosen), newest <= EOS
        # At best, an open hypothesis ends at the greatest length with no more probability lost.
        hope = (totals / penalty[limit]).masked_fill(ended, -math.inf).max(1).values
        done = ended[:, 0] & (scores[:, 0] >= hope) | (position == limit - 1)
        shrink = 2 * done.sum() >= len(done)  # half of the batch is worth a copy of the caches
        if shrink:
            best = sources, scores[:, 0], totals[:, 0], tokens[:, 0, 1:]
            results += zip(*(part[done].tolist() for part in best))
            if done.all():
                break
            sources, tokens, totals, ended, rows = (
                part[~done] for part in (sources, tokens, totals, ended, rows))
            mask = mask if mask is None else mask[~done]
            for cache in caches:
                cache["source"] = cache["source"][:, ~done]
        for cache in caches if shrink or beam > 1 else ():
            cache["target"] = cache["target"][:, rows.flatten()]
    results = [(score, total, row[:(row + [EOS]).index(EOS)])
               for _, score, total, row in sorted(results)]
    return list(map(max, greedy, results)) if greedy else results


def edit_distance(a: Sequence, b: Sequence) -> int:
    """The fewest insertions, deletions and substitutions from a to b. Levenshtein, 1966."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def write_targets(model: Transformer, vocabulary: Vocabulary, sources: Iterable,
                  beam: int = 1) -> dict:
    """Free running: {source: (score, log-probability, target tokens)}, by beam_search()."""
    model.eval()
    sources, found = list(sources), {}
    pairs = [vocabulary.encode(source) for source in sources]
    for indices in common.progress(common.mine(batches(pairs, 8192)), "decoding"):
        source, _, mask = collate([pairs[i] for i in indices], model.positions.device)
        for i, (*numbers, row) in zip(indices, beam_search(model, source, mask, beam)):
            found[sources[i]] = *numbers, tuple(vocabulary.tokens[token] for token in row)
    for part in common.gather([found]):
        found.update(part)
    return found


def compare(found: dict, answers: dict) -> dict:
    """What was written against the nearest of the right targets: exact_match, also by_length of
    the source; error_rate, which is edit distance over the right target's length.
    """
    errors, lengths, right = 0, 0, defaultdict(list)
    for source, targets in answers.items():
        row = found[source][-1]
        distance, length = min((edit_distance(row, target), len(target)) for target in targets)
        errors, lengths = errors + distance, lengths + length
        right[len(source)].append(distance == 0)
    return {"exact_match": sum(map(sum, right.values())) / len(answers),
            "error_rate": errors / lengths,
            "by_length": {n: sum(right[n]) / len(right[n]) for n in sorted(right)}}


@torch.no_grad()
def measure(model: Transformer, vocabulary: Vocabulary, answers: dict) -> tuple[dict, dict]:
    """Metrics on {source: [right target, ...]}, and what write_targets() writes to the sources:
    loss and token_accuracy under teacher forcing with the first answer, and those of compare().
    """
    model.eval()
    pairs = [vocabulary.encode(source, targets[0]) for source, targets in answers.items()]
    totals = []  # of each batch: loss, tokens, right tokens
    for indices in common.mine(batches(pairs, 8192)):
        source, target, mask = collate([pairs[i] for i in indices], model.positions.device)
        loss, count, right = cross_entropy(model(source, target[:, :-1], mask), target[:, 1:])
        totals.append(torch.stack([loss * count, count, right]).cpu())
    totals = sum(common.gather(totals))
    loss, _, token_accuracy = (totals / totals[1]).tolist()
    found = write_targets(model, vocabulary, answers)
    return {"loss": loss, "token_accuracy": token_accuracy, **compare(found, answers)}, found


def describe(metrics: dict) -> str:
    return ", ".join(METRICS[name].format(metrics[name]) for name in METRICS if name in metrics)


def evaluate(args: argparse.Namespace, data: Dataset, folder: Path, device: torch.device,
             history: list) -> None:
    """Measure the best Transformer on the test part; draw the pictures; write summary.json."""
    model, vocabulary, checkpoint = load_model(folder / "best.pt", device)
    test, greedy = measure(model, vocabulary, data.test)
    wider = write_targets(model, vocabulary, data.test, args.beam)
    gains = [wider[s][0] - greedy[s][0] for s in greedy if wider[s][-1] != greedy[s][-1]]
    beam = {"width": args.beam, **compare(wider, data.test),
            "better": sum(gain > 0 for gain in gains), "worse": sum(gain < 0 for gain in gains)}
    test.update(beam=beam, best_epoch=checkpoint["metrics"]["epoch"])
    print(f"\ntest on {data.name}, {len(greedy)} sources, weights of epoch {test['best_epoch']}:\n"
          f"{describe(test)}\nbeam {args.beam}: {describe(beam)},\n"
          f"scores better than greedy: {beam['better']}, worse: {beam['worse']}")
    if data.longer:
        test["longer"], _ = measure(model, vocabulary, data.longer)
        print(f"sources longer than any in training:\n{describe(test['longer'])}")
    rows = [(greedy[source][-1] in targets, source, greedy[source][-1])
            for source, targets in data.test.items()]
    for right, source, target in rows[:4] + [row for row in rows[4:] if not row[0]][:4]:
        print("  ", JOIN[args.source_tokens](source), "->", JOIN[args.target_tokens](target),
              "" if right else "(wrong)")
    seconds = sum(row["seconds"] for row in history)
    common.write_summary(folder / "summary.json", script="transformer.py", data=data.name,
                         options=vars(args), test=test, seconds=seconds)
    title = f"Transformer on {data.name}"
    common.plot_history(folder / "curves.png", history, title, {
        "loss": {"training, smoothed": "train_loss", "validation": "validation_loss"},
        "share right": {"training tokens": "train_token_accuracy", "validation tokens": BEST,
                        "validation sequences": "validation_exact_match"},
        "learning rate": {"learning rate": "learning_rate"}})
    _, *pair = max(rows, key=lambda row: (row[0], min(len(row[1]), 16)))
    draw(folder, title, model, vocabulary, pair, test)
    print(f"training took {seconds:.0f} s; pictures and checkpoints are in {args.out}\n"
          f"write targets with: python transformer.py --out {args.out} --predict TEXT ...")


def draw(folder: Path, title: str, model: Transformer, vocabulary: Vocabulary, pair: Sequence,
         test: dict) -> None:
    """Cross-attention of the last decoder layer on one pair, in at most 8 heads and 50 tokens;
    positions; accuracy by length.
    """
    pair = [row[:50] for row in pair]
    attention = model.decoder[-1].cross_attention
    attention.keep_weights = True
    source, target, _ = collate([vocabulary.encode(*pair)], model.positions.device)
    with torch.no_grad():
        model(source, target[:, :-1])
    weights = attention.weights[0, :8].cpu()  # (heads, T, S)
    heads, height, width = weights.shape
    read, written = ([*map(common.plain, row), "<eos>"] for row in pair)
    inches = max(8, 1 + heads * (0.3 + 0.2 * width)), 1.6 + 0.2 * height
    figure, axes = common.new_figure(1, heads, inches,
                                     f"{title}: cross-attention of the last decoder layer")
    for head, axis in enumerate(axes.flat):
        axis.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"head {head + 1}", xlabel="source", ylabel="token written")
        axis.set_xticks(range(width), read, fontsize=8, rotation=90)
        axis.set_yticks(range(height), written, fontsize=8)
        axis.label_outer()
    common.save_figure(folder / "attention.png", figure)

    figure, ((axis,),) = common.new_figure(1, 1, (6, 4), f"{title}: positional encoding")
    figure.colorbar(axis.imshow(model.positions.cpu(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto"))
    axis.set(xlabel="dimension", ylabel="position")
    common.save_figure(folder / "positions.png", figure)

    figure, ((axis,),) = common.new_figure(1, 1, (8, 3.5), f"{title}: exact match against length")
    for label, part in ("test part", test), ("longer than any in training", test.get("longer")):
        if part:
            axis.plot(*zip(*part["by_length"].items()), "o-", label=label)
    axis.set(xlabel="tokens in the source", ylabel="exact match", ylim=(-0.05, 1.05),
             xlim=(0, None))
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2)
    common.save_figure(folder / "length.png", figure)


def load_model(path: Path, device: torch.device) -> tuple[Transformer, Vocabulary, dict]:
    """The Transformer saved in a best.pt, its vocabulary, and the checkpoint itself."""
    checkpoint = common.load_checkpoint(path, "transformer.py", "kinds", "metrics")
    with common.using(path):
        model = Transformer(**checkpoint["model_options"])
        model.load_state_dict(checkpoint["model"])
        vocabulary = Vocabulary(checkpoint["tokens"][UNK + 1:])
        if len(vocabulary.tokens) != len(model.embedding.weight):
            raise ValueError(f"a vocabulary of {len(vocabulary.tokens)} tokens")
    return model.to(device), vocabulary, checkpoint


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Print `source <tab> target <tab> probability` for each text of --predict."""
    model, vocabulary, checkpoint = load_model(Path(args.out, "best.pt"), device)
    (kind, answer_kind), limit = checkpoint["kinds"], len(model.positions) - 1
    lines = args.predict if args.predict != ["-"] else sys.stdin.read().rstrip("\n").split("\n")
    sources = [SPLIT[kind](line) for line in lines]
    for i, source in enumerate(sources, 1):
        if not 0 < len(source) <= limit:  # <eos> takes one more
            raise common.UserError(f"--predict: line {i} has {len(source)} tokens, and the model "
                                   f"takes 1 to {limit}; shorten it, or train on longer ones")
    unseen = {token for source in sources for token in source} - set(vocabulary.numbers)
    if unseen:
        common.warn("never seen in training, read as <unk>: " + " ".join(sorted(unseen)[:20]))
    found = write_targets(model, vocabulary, sources, args.beam)
    for source in sources:
        _, log_probability, target = found[source]
        print(JOIN[kind](source), JOIN[answer_kind](target), f"{math.exp(log_probability):.4f}",
              sep="\t")


# ---------------------------------------------------------------- Command line


def build_parser() -> argparse.ArgumentParser:
    parser = common.option_parser(
        "transformer.py", __doc__, "synthetic, or a CSV or TSV file with columns source and target",
        data="synthetic", out="runs/transformer", epochs=6, batch_size=64, lr=2e-3,
        weight_decay=0.01, clip=1.0, patience=10)
    group = parser.add_argument_group("options of the Transformer")
    whole, share = common.number(int, 1), common.number(float, 0, 0.99)
    group.add_argument("--task", choices=list(TASKS), default="reverse",
                       help="the synthetic data; add has its digits last one first [reverse]")
    for side in "source", "target":
        group.add_argument(f"--{side}-tokens", choices=list(SPLIT), default="chars",
                           help=f"what a token of a {side} is [chars]")
    for flag, kind, default, metavar, meaning in (
            ("--synthetic-size", common.number(int, 100), 50000, "N", "synthetic pairs in all"),
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
                           help=f"{meaning} [%(default)s]")
    group.add_argument("--post-norm", action="store_true",
                       help="layer norm after each residual connection, as in the paper")
    group.add_argument("--predict", nargs="+", metavar="TEXT",
                       help="write targets to texts by best.pt in --out; - reads lines from stdin")
    return parser


def main() -> None:
    args = common.parse_options(build_parser(), fixed=(
        "data", "seed", "task", "synthetic_size", "source_tokens", "target_tokens", "max_length",
        *SIZES, "post_norm"))
    if args.d_model % args.heads or args.d_model % 2:
        raise common.UserError("--d-model must be even, and a multiple of --heads")
    device = common.select_device(args.device)
    if args.predict:
        predict(args, device)
        return
    with common.run_folder(args.out, args.resume) as folder:
        data = load_data(args)
        print(f"{data.name}, {len(data.vocabulary.tokens)} tokens, on {device}: sources to train "
              f"{len(data.train)}, validate {len(data.validation)}, test {len(data.test)}")
        history = train(args, data, folder, device)
        evaluate(args, data, folder, device, history)


if __name__ == "__main__":
    common.run_main(main)
