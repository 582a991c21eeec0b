"""Train LSTM and GRU on the same sequences, with the same budget; compare them.

  python rnn.py                        two synthetic tasks: classify and generate
  python rnn.py --data reviews.csv     your own texts: columns text and label
  python rnn.py --predict "some text"  classify texts by the trained network

Pictures, checkpoints and figures go to runs/rnn (--out).
rnn.md explains every part.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_sequence

import common

PAD, UNKNOWN, END = range(3)  # the first symbols of every vocabulary; END also starts an answer
IGNORE = -100  # fills targets after their end: cross_entropy leaves it out
LONGEST = 400  # symbols of a text that are read

# ---------------------------------------------------------------- Data


# A part, or a batch. inputs: int64 (N, longest), numbers of symbols, PAD after the end; lengths:
# int64 (N,), on the CPU; targets: int64 (N, 1), classes, or (N, longest + 1), symbols, END, IGNORE.
Part = namedtuple("Part", "inputs lengths targets")
# Of a task: its name, the vocabulary, what the targets are numbers of, and the three Parts.
Dataset = namedtuple("Dataset", "task symbols answers train validation test")


def temporal_order(count: int, seed: Sequence[int]) -> tuple[list, list]:
    """Strings of 20 to 100 symbols, noise but for three X or Y, whose order is the label: problem
    6b of Hochreiter and Schmidhuber, 1997 (100 to 110 symbols there).
    """
    random, texts, labels = np.random.default_rng(seed), [], []
    for length in random.integers(20, 101, count):
        symbols, label = random.choice(list("abcd"), length), random.choice(["X", "Y"], 3)
        places = length * random.uniform((0.1, 0.33, 0.66), (0.2, 0.43, 0.76))
        symbols[places.astype(int)] = label
        texts.append("E" + "".join(symbols[1:-1]) + "B")
        labels.append("".join(label))
    return texts, labels


def sorting(count: int, seed: Sequence[int]) -> tuple[list, list]:
    """Strings of 8 to 16 digits, and each of them sorted."""
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list("0123456789"), n)) for n in random.integers(8, 17, count)]
    return texts, ["".join(sorted(text)) for text in texts]


def encode(rows: Sequence, vocabulary: Sequence, padding: int) -> tuple[Tensor, Tensor]:
    """Numbers in the vocabulary, int64 (N, longest), and lengths (N,); nothing is one UNKNOWN."""
    number = {symbol: i for i, symbol in enumerate(vocabulary)}
    rows = [torch.tensor([number.get(symbol, UNKNOWN) for symbol in row[:LONGEST]] or [UNKNOWN])
            for row in rows]
    return pad_sequence(rows, True, padding), torch.tensor([len(row) for row in rows])


def load_data(args: argparse.Namespace, task: str) -> Dataset:
    """The data of one task: synthetic, or the texts of a file."""
    if args.data == "synthetic":  # sorting takes longer to learn, and less time for each
        generator, size = {"classify": (temporal_order, 1), "generate": (sorting, 3)}[task]
        parts = [generator(size * args.synthetic_size // n, [args.seed, n]) for n in (1, 5, 2)]
    else:
        cells = [cells for _, cells in common.read_table(args.data, ("text", "label"))]
        texts, labels = np.array(cells, object).reshape(-1, 2).T
        classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if len(classes) < 2 or counts.min() < 3:
            rare = ", ".join(name[:30] for name in classes[counts < 3][:3]) or "classes"
            raise common.UserError(f"--data {args.data}: too few rows of {rare}; two labels with "
                                   "three rows each are needed (a header must be text,label)")
        split = {"train": (np.arange(len(texts)), torch.from_numpy(numbers))}
        common.hold_out_missing(split, args.seed)
        indices = [split[part][0] for part in ("train", "val", "test")]
        parts = [(texts[i], labels[i]) for i in indices]
    # A symbol seen once teaches little by itself; taken as unknown, it trains that embedding.
    counts = Counter("".join(parts[0][0]))
    symbols = ["", "", "\n", *sorted(s for s in counts if counts[s] > 1 and s != "\n")]
    answers = sorted(set(parts[0][1])) if task == "classify" else symbols
    encoded = []
    for texts, targets in parts:  # a class is one symbol, a sequence ends with END
        targets = [[name] if task == "classify" else name + "\n" for name in targets]
        if task == "classify" and args.ngrams:  # so that there are n-grams at the end of a text
            texts = [text + "\n" for text in texts]
        encoded.append(Part(*encode(texts, symbols, PAD), encode(targets, answers, IGNORE)[0]))
    return Dataset(task, symbols, answers, *encoded)


def batches(lengths: Tensor, size: int, groups: int) -> list:
    """Indices of batches in random order, each of `groups` groups of sequences of like length."""
    order = (lengths + torch.rand(len(lengths))).argsort()  # at random within a length
    # Batch norm needs two sequences at least; equal parts of at most three or more have them.
    chunks = np.array_split(order.numpy(), math.ceil(len(order) / max(3, size // groups)))
    chunks = [torch.from_numpy(chunks[i]) for i in torch.randperm(len(chunks))]
    return [torch.cat(chunks[i:i + groups]) for i in range(0, len(chunks), groups)]


def take(part: Part, indices: Tensor, device: torch.device) -> Part:
    """A batch, cut to its longest sequence."""
    lengths = part.lengths[indices]
    inputs = part.inputs[indices, :lengths.max()].to(device)
    return Part(inputs, lengths, part.targets[indices, :lengths.max() + 1].to(device))


# ---------------------------------------------------------------- Model


class Recurrent:
    """The layers of an RNN, LSTM or GRU, every step of them computed by the class's `step`.

    The class of torch.nn behind it creates the parameters; arguments, results and state dicts are
    as there. inputs: (T, N, input_size) or a PackedSequence; state: (layers * directions, N, H),
    for the LSTM two of it, zeros if None. Returns the hidden states of the last layer (T, N,
    directions * H) and the state of each sequence after its own last step.
    """

    def forward(self, inputs: Tensor | PackedSequence, state: Any = None) -> tuple:
        packed, directions = isinstance(inputs, PackedSequence), 2 if self.bidirectional else 1
        if self.batch_first and not packed:
            inputs = inputs.transpose(0, 1)
        x = inputs.data if packed else inputs.flatten(0, 1)  # (steps of all sequences, input_size)
        sizes = inputs.batch_sizes.tolist() if packed else [inputs.shape[1]] * len(inputs)
        if state is None:
            state = x.new_zeros(self.num_layers * directions, sizes[0], self.hidden_size)
            state = (state, state) if self.mode == "LSTM" else state
        elif packed:  # the longest sequence comes first
            state = self.permute_hidden(state, inputs.sorted_indices)
        state, final = state if self.mode == "LSTM" else (state,), []
        for i, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(self.all_weights):
            if i % directions == 0:  # the first direction of a layer, or the only one
                below, x = F.dropout(x, self.dropout, self.training) if i else x, []
            # What the inputs contribute is known beforehand: one large product, not T small ones.
            steps = F.linear(below, weight_ih, bias_ih).split(sizes)
            now, past = [s[i] for s in state], [None] * len(sizes)
            for t in reversed(range(len(sizes))) if i % directions else range(len(sizes)):
                n = sizes[t]  # the first n sequences have this step; the others keep their state
                new, gates = self.step(steps[t], [s[:n] for s in now], weight_hh, bias_hh)
                now = [torch.cat([s, old[n:]]) if n < len(old) else s for s, old in zip(new, now)]
                past[t] = new, gates
            final.append(now)
            x.append(torch.cat([new[0] for new, _ in past]))  # (steps of all sequences, H)
            if len(x) == directions:
                x = torch.cat(x, 1)
        self.past = past  # states and gates of the last direction, for a look at them
        state = tuple(torch.stack(tensors) for tensors in zip(*final))
        state = state if self.mode == "LSTM" else state[0]
        if packed:
            return inputs._replace(data=x), self.permute_hidden(state, inputs.unsorted_indices)
        x = x.view(*inputs.shape[:2], -1)
        return x.transpose(0, 1) if self.batch_first else x, state


class RNN(Recurrent, nn.RNN):
    """A plain recurrent network (Elman, 1990)."""

    def step(self, x: Tensor, state: Sequence, weight: Tensor, bias: Tensor) -> tuple:
        """One step; x: W_ih x + b_ih, (N, gates * H) -> the new state, and its gates by name."""
        hidden, = state  # (N, H)
        return (torch.tanh(x + F.linear(hidden, weight, bias)),), {}


class LSTM(Recurrent, nn.LSTM):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate: Gers et al., 2000)."""

    def step(self, x: Tensor, state: Sequence, weight: Tensor, bias: Tensor) -> tuple:
        hidden, cell = state  # (N, H) each
        i, f, g, o = (x + F.linear(hidden, weight, bias)).chunk(4, 1)
        i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
        cell = f * cell + i * torch.tanh(g)
        hidden = o * torch.tanh(cell)
        return (hidden, cell), {"input gate": i, "forget gate": f, "output gate": o}


class GRU(Recurrent, nn.GRU):
    """Gated recurrent unit (Cho et al., 2014), with the reset gate after the product with W_hn."""

    def step(self, x: Tensor, state: Sequence, weight: Tensor, bias: Tensor) -> tuple:
        hidden, = state  # (N, H)
        x_r, x_z, x_n = x.chunk(3, 1)
        h_r, h_z, h_n = F.linear(hidden, weight, bias).chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        hidden = n + z * (hidden - n)  # = (1 - z) n + z h, with one product less
        return (hidden,), {"reset gate": r, "update gate": z}


CELLS = {"torch": {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN},
         "scratch": {"lstm": LSTM, "gru": GRU, "rnn": RNN}}


def recurrent(cell: str, backend: str, hidden: int, layers: int, dropout: float, memory: float,
              bidirectional: bool = False) -> nn.Module:
    """Layers whose units at first keep what they hold for 1 to `memory` steps, by a bias of
    log(steps): chrono initialization, Tallec and Ollivier, 2018.
    """
    module = CELLS[backend][cell](hidden, hidden, layers, dropout=dropout if layers > 1 else 0.0,
                                  bidirectional=bidirectional)
    for name, bias in module.named_parameters():
        if name.startswith("bias_hh") and cell != "rnn":
            keep = torch.empty(hidden).uniform_(1, memory).log()
            bias.data[hidden:2 * hidden] = keep  # the LSTM's forget gate, the GRU's update gate
            if cell == "lstm":
                bias.data[:hidden] = -keep  # the input gate; GRU has one gate for the two
    return module


def like_lengths(lengths: Tensor, apart: float = 0.0) -> list:
    """Indices of the sequences of each length, or of lengths at most a share `apart`."""
    lengths, order = lengths.sort()
    keys = (lengths.float().log() / apart).floor() if apart else lengths
    return order.split(keys.unique_consecutive(return_counts=True)[1].tolist())


def ngrams(inputs: Tensor, base: int) -> list:
    """The last 2, 3, 4 and 5 symbols at each step, each of them as one number in this base.

    inputs: int64 (T, N), numbers below `base` -> four of the same shape. END stands before the
    first symbol, and 0 is what would begin before that.
    """
    numbers, first = [inputs.contiguous()], END
    for _ in range(4):
        before = F.pad(numbers[-1], (0, 0, 1, 0), value=first)[:-1]  # those that end a step earlier
        numbers.append((before * base + inputs) * (before > 0))
        first = 0
    return numbers[1:]


def frequent_ngrams(part: Part, base: int) -> Tensor:
    """The numbers of n-grams that come at least three times in a part, in order, and a last one."""
    valid = torch.arange(part.inputs.shape[1])[:, None] < part.lengths
    numbers = torch.cat([number[valid] for number in ngrams(part.inputs.t(), base)])
    values, counts = numbers.unique(return_counts=True)
    return torch.cat([values[(counts > 2) & (values > 0)], torch.tensor([2**63 - 1])])


class NgramEmbedding(nn.Module):
    """The sum of embeddings of the last 2 to 5 symbols at each step (Bojanowski et al., 2017).

    inputs: int64 (T, N) -> float (T, N, width). `known` are the n-grams with an embedding, as from
    frequent_ngrams(); padding is in none. In training each is left out with probability `dropout`.
    """

    def __init__(self, symbols: int, width: int, known: Tensor, dropout: float = 0.0):
        super().__init__()
        self.symbols, self.dropout = symbols, nn.Dropout(dropout)
        self.embedding = nn.Embedding(len(known), width, padding_idx=len(known) - 1)
        nn.init.zeros_(self.embedding.weight)  # of unknown ones, the last row, it stays so
        self.register_buffer("known", known, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        total = 0
        for number in ngrams(inputs, self.symbols):
            row = torch.searchsorted(self.known, number)
            row = row.masked_fill(self.known[row] != number, len(self.known) - 1)
            kept = self.dropout(torch.ones(*row.shape, 1, device=row.device))
            total = total + kept * self.embedding(row)
        return total


class RNNClassifier(nn.Module):
    """Embedding or Linear, recurrent layers, the last valid step, BatchNorm, Dropout, Linear.

    With `known` n-grams each step sees the last symbols together, and a linear classifier, to which
    each n-gram of a sequence adds its votes, stands beside the network (Cheng et al., 2016).

    inputs: int64 (N, T), numbers of symbols, or float (N, T, symbols) if `continuous`, padded at
    the end; lengths: int64 (N,), on the CPU -> logits: float (N, classes). The rest is Seq2Seq's.
    """

    def __init__(self, symbols: int, classes: int, cell: str = "lstm", backend: str = "torch",
                 hidden: int = 64, layers: int = 1, dropout: float = 0.0, memory: float = 100,
                 bidirectional: bool = False, continuous: bool = False,
                 known: Tensor | None = None):
        super().__init__()
        self.input = (nn.Linear if continuous else nn.Embedding)(symbols, hidden)
        self.ngrams = known is not None
        if self.ngrams:
            self.longer = NgramEmbedding(symbols, hidden, known, dropout)
            self.votes = NgramEmbedding(symbols, classes, known)
        self.dropout, width = nn.Dropout(dropout), 2 * hidden if bidirectional else hidden
        self.layers = recurrent(cell, backend, hidden, layers, dropout, memory, bidirectional)
        self.batch_norm, self.output = nn.BatchNorm1d(width), nn.Linear(width, classes)

    def last_valid_step(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """The last hidden state of each sequence (N, hidden); of both ends if bidirectional."""
        # The backward direction starts at the end, so it takes sequences of one length. Forward,
        # padding comes too late to matter, and lengths at most a tenth apart go together. Packing
        # would do for any, but makes the library several times slower on the CPU.
        both, last = self.layers.bidirectional, []
        groups = like_lengths(lengths, 0.0 if both else 0.1)
        for group in groups:
            n, width = lengths[group], self.layers.hidden_size
            steps = inputs[group, :n.max()].transpose(0, 1)
            x = self.input(steps) + (self.longer(steps) if self.ngrams else 0)  # (T, n, hidden)
            output, _ = self.layers(self.dropout(x))  # (T, n, width), or twice the width
            ends = output[n - 1, torch.arange(len(n))]
            last.append(torch.cat([ends[:, :width], output[0, :, width:]], 1) if both else ends)
        return torch.cat(last)[torch.cat(groups).argsort()]

    def forward(self, inputs: Tensor, lengths: Tensor, targets: Tensor | None = None,
                teacher_forcing: float | None = None) -> Tensor:
        logits = self.output(self.dropout(self.batch_norm(self.last_valid_step(inputs, lengths))))
        if self.ngrams:
            logits = logits + self.votes(inputs.t()).sum(0)  # over the steps: (N, classes)
        return logits


class Seq2Seq(nn.Module):
    """Encoder and decoder of the same cell (Sutskever et al., 2014; Cho et al., 2014).

    inputs, lengths: as above; targets: int64 (N, T) -> logits: float (N, T, symbols). The decoder
    is fed the true symbol with probability `teacher_forcing`, else the one it predicted (scheduled
    sampling, Bengio et al., 2015). With 0 it decodes greedily: of the targets only T matters.
    """

    def __init__(self, symbols: int, cell: str = "lstm", backend: str = "torch", hidden: int = 64,
                 layers: int = 1, dropout: float = 0.0, memory: float = 100):
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.encoder = recurrent(cell, backend, hidden, layers, dropout, memory)
        self.decoder = recurrent(cell, backend, hidden, layers, dropout, memory)
        self.output = nn.Linear(hidden, symbols)

    def encode(self, inputs: Tensor, lengths: Tensor) -> Tensor | tuple:
        """The encoder's state after each sequence's own last step; no step of it is padding."""
        groups = like_lengths(lengths)
        states = [self.encoder(self.embedding(inputs[group, :lengths[group[0]]].t()))[1]
                  for group in groups]
        order = torch.cat(groups).argsort()  # back to that of the batch
        if isinstance(states[0], tuple):
            return tuple(torch.cat(tensors, 1)[:, order] for tensors in zip(*states))
        return torch.cat(states, 1)[:, order]

    def forward(self, inputs: Tensor, lengths: Tensor, targets: Tensor,
                teacher_forcing: float) -> Tensor:
        state = self.encode(inputs, lengths)
        true = F.pad(targets.t().clamp(min=PAD), (0, 0, 1, 0), value=END)[:-1]  # (T, N)
        if teacher_forcing == 1:  # every input of the decoder is known: all steps in one call
            return self.output(self.decoder(self.embedding(true), state)[0]).transpose(0, 1)
        symbol, logits = true[0], []
        for following in [*true[1:], true[0]]:  # the last is not used
            output, state = self.decoder(self.embedding(symbol)[None], state)
            logits.append(self.output(output[0]))  # (N, symbols)
            forced = torch.rand(symbol.shape, device=symbol.device) < teacher_forcing
            symbol = torch.where(forced, following, logits[-1].argmax(1))
        return torch.stack(logits, 1)


def build(run: dict, **changes: Any) -> nn.Module:
    """The network that a run's options describe, with its best weights if there are any yet."""
    model = {"classify": RNNClassifier, "generate": Seq2Seq}[run["task"]](
        **{**run["options"], **changes})
    if "best" in run:
        model.load_state_dict(run["best"])
        names = len(run["symbols"]), len(run["answers"])
        if names != (run["options"]["symbols"], model.output.out_features):
            raise ValueError("{} symbols and {} answers".format(*names))
    return model.eval()


# ---------------------------------------------------------------- Training


def train(args: argparse.Namespace, data: Dataset, cell: str, runs: dict, folder: Path,
          device: torch.device) -> None:
    """Train a cell on a task; `runs` holds all runs so far, for last.pt, and takes this one."""
    common.seed_everything(args.seed)
    options = {"symbols": len(data.symbols), "cell": cell, "backend": args.backend,
               "hidden": args.hidden, "layers": args.layers, "dropout": args.dropout,
               "memory": args.memory}
    if data.task == "classify":
        options.update(classes=len(data.answers), bidirectional=args.bidirectional)
        if args.ngrams:
            options["known"] = frequent_ngrams(data.train, len(data.symbols))
    checksum = common.checksum(data)
    run = runs.setdefault(f"{data.task} {cell}", {
        "task": data.task, "cell": cell, "options": options, "symbols": data.symbols,
        "answers": data.answers, "history": [], "data": checksum})
    history, model = run["history"], build(run).to(device)
    groups = 2 if data.task == "classify" else 1  # without batch norm, one length a batch will do
    steps = len(batches(data.train.lengths, args.batch_size, groups))
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  **common.FUSED_ADAM)
    schedule = common.warmup_cosine(optimizer, steps, args.epochs * steps)
    dtype = common.select_dtype(args.precision, device, small=True)
    scaler = common.gradient_scaler(dtype)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if history:
        common.restore(folder / "last.pt", {**run, **run["last"]}, state, checksum)
    parallel = common.parallel(common.compile_model(model, args.compile), device)
    terms = (data.train.targets != IGNORE).sum(1)

    for epoch in range(len(history) + 1, args.epochs + 1):
        if history and common.epochs_since_best(history, "validation_accuracy") >= args.patience:
            print(f"no better validation accuracy for {args.patience} epochs: stopping early")
            break
        start = time.perf_counter()
        common.seed_everything(args.seed, epoch)
        decay = (epoch - 1) / max(1, args.epochs - 1) if args.decay_teacher_forcing else 0
        teacher_forcing = args.teacher_forcing * (1 - decay)
        model.train()
        total_loss = torch.zeros((), device=device)
        dealt = common.shares(batches(data.train.lengths, args.batch_size, groups), terms)
        bar = common.progress(dealt, f"{data.task} {cell} {epoch}/{args.epochs}")
        for step, (indices, weight, count) in enumerate(bar):
            batch = take(data.train, indices, device)
            with common.autocast(device, dtype):
                logits = parallel(*batch, teacher_forcing)  # (N, classes) or (N, T, symbols)
            loss = F.cross_entropy(logits.float().flatten(0, -2), batch.targets.flatten())
            optimizer.zero_grad()
            scaler.scale(weight * loss).backward()
            scaler.unscale_(optimizer)
            common.clip_gradients(model, args.clip, (epoch - 1) * steps + step + 1, scaler)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total_loss += weight * count * loss.detach()
        common.average_buffers(model)
        train_loss = common.mean_of_processes(total_loss).item() / terms.sum().item()
        speed = len(terms) / (time.perf_counter() - start)
        validation_loss, _, _, hits = predict_part(model, data.validation, device)
        row = {"task": data.task, "cell": cell, "epoch": epoch, "teacher_forcing": teacher_forcing,
               "learning_rate": schedule.get_last_lr()[0],
               "train_loss": train_loss, "validation_loss": validation_loss,
               "validation_accuracy": hits.mean().item(), "sequences_per_second": speed,
               "seconds": time.perf_counter() - start}
        history.append(row)
        print(f"{data.task} {cell:4} {epoch:2}/{args.epochs}  train {train_loss:.3f}  "
              f"validation {validation_loss:.3f}, {row['validation_accuracy']:.2%}  "
              f"{common.pace(history, args.epochs)}", flush=True)
        best = common.epochs_since_best(history, "validation_accuracy") == 0
        if best:
            run["best"] = copy.deepcopy(model.state_dict())
            best = {"script": "rnn.py", "data": args.data, "metrics": row,
                    "runs": {key: {**value, "last": None} for key, value in runs.items()}}
        run["last"] = {name: part.state_dict() for name, part in state.items()}
        common.save_epoch(folder, [row for run in runs.values() for row in run["history"]], best, {
            "script": "rnn.py", "options": vars(args), "runs": runs})


# ---------------------------------------------------------------- Evaluation and pictures


def predict_part(model: nn.Module, part: Part, device: torch.device) -> tuple:
    """Mean loss; predictions and their probabilities, shaped as part.targets; (N,) which are
    right: of symbols, generated without teacher forcing, all must be, END included.
    """
    model.eval()  # batch norm by its running averages, no dropout
    predicted, probabilities = part.targets.clone(), torch.ones(part.targets.shape)
    results, loss = [], 0.0
    for indices in common.mine(part.lengths.argsort().split(500)):
        batch = take(part, indices, device)
        with torch.no_grad():
            logits = model(*batch, 0.0).flatten(0, -2)
        results.append((
            indices, F.cross_entropy(logits, batch.targets.flatten(), reduction="sum").item(),
            *(x.view(batch.targets.shape).cpu() for x in F.softmax(logits, 1).max(1))))
    for indices, part_loss, values, best in common.gather(results):
        loss += part_loss
        predicted[indices, :best.shape[1]] = best
        probabilities[indices, :best.shape[1]] = values
    counted = part.targets != IGNORE
    right = ((predicted == part.targets) | ~counted).all(1).float()
    return loss / int(counted.sum()), predicted, probabilities, right


def spell(answer: Tensor, names: Sequence[str]) -> str:
    """The name of a class, or the symbols of a sequence up to END; always one line."""
    return "".join(names[max(i, PAD)] for i in answer.tolist()).split("\n")[0]


def evaluate(args: argparse.Namespace, tasks: list, runs: dict, folder: Path,
             device: torch.device) -> None:
    """Measure the best networks on the test parts; draw the pictures; write summary.json."""
    title, test = f"{', '.join(args.cells)} on {args.data}", {cell: {} for cell in args.cells}
    curves, axes = common.new_figure(len(tasks), 3, (13, 3.2 * len(tasks) + 0.3), title)
    examples, pages = common.new_figure(len(tasks), 1, (8, 2.4 * len(tasks) + 0.4), title)
    print("\ntask      cell parameters  accuracy  exact match  epochs  seconds  sequences/s")
    for data, panels, page in zip(tasks, axes, pages.flat):
        groups, answers, hits = data.test.lengths.argsort().chunk(8), {}, {}
        lengths = [data.test.lengths[group].float().mean() for group in groups]
        for cell in args.cells:
            run = runs[f"{data.task} {cell}"]
            columns = {name: [row[name] for row in run["history"]] for name in run["history"][0]}
            model, epochs = build(run).to(device), columns["epoch"]
            _, answers[cell], _, hits[cell] = predict_part(model, data.test, device)
            share = hits[cell].mean().item()
            metric = "accuracy" if data.task == "classify" else "exact_match"
            facts = {"parameters": sum(p.numel() for p in model.parameters()),
                     "epochs": len(epochs), "seconds": sum(columns["seconds"]),
                     "sequences_per_second": np.median(columns["sequences_per_second"]).item()}
            test[cell][metric], test[cell][data.task] = share, facts
            cells = [f"{share:.2%}" if metric == name else "-" for name in ("accuracy",
                                                                          "exact_match")]
            print("{:10}{:5}{parameters:10,}{:>10}{:>13}{epochs:8}{seconds:9.1f}"
                  "{sequences_per_second:13.0f}".format(data.task, cell, *cells, **facts))
            shares = [hits[cell][group].mean() for group in groups]
            draw_line(panels[0], epochs, columns["train_loss"], cell, "epoch", "training loss")
            rights = columns["validation_accuracy"]
            draw_line(panels[1], epochs, rights, cell, "epoch", "share right")
            draw_line(panels[2], lengths, shares, cell, "length of the sequence", "share right")
        panels[0].set(title=data.task, yscale="log")
        panels[1].set(title=f"{data.task}: validation", ylim=(None, 1.02))
        panels[2].set(title=f"{data.task}: test", ylim=(None, 1.02))
        draw_predictions(page, data, answers, hits)
        if data.task == "classify":
            draw_memory(folder, title, data, args, runs)
    common.save_figure(folder / "curves.png", curves)
    common.save_figure(folder / "predictions.png", examples)
    seconds = sum(row["seconds"] for run in runs.values() for row in run["history"])
    common.write_summary(folder / "summary.json", script="rnn.py", data=args.data,
                         options=vars(args), test=test, seconds=seconds)
    print(f"training took {seconds:.0f} s; pictures and checkpoints are in {args.out}\n"
          f"answer texts of your own with: python rnn.py --out {args.out} --predict TEXT ...")


def draw_line(axis: Any, x: Sequence, y: Sequence, label: str, xlabel: str, ylabel: str) -> None:
    axis.plot(x, y, ".-", label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(True, alpha=0.3)
    axis.legend(frameon=False)


def draw_predictions(axis: Any, data: Dataset, answers: dict, hits: dict) -> None:
    """A table of eight test sequences, those first that most cells got wrong; errors in red."""
    shown = sum(hits.values()).argsort()[:8].tolist()
    inputs, lengths = data.test.inputs, data.test.lengths.tolist()
    rows = [[spell(inputs[k, :50], data.symbols) + " ..." * (lengths[k] > 50),
             *(spell(column[k], data.answers) for column in (data.test.targets, *answers.values()))]
            for k in shown]
    rows = [list(map(common.plain, row)) for row in rows]
    colours = [["none", "none", *("none" if hit[k] else "mistyrose" for hit in hits.values())]
               for k in shown]
    table = axis.table(rows, colours, colLabels=["sequence", "true", *answers], loc="center",
                       cellLoc="left")
    table.auto_set_column_width([*range(len(rows[0]))])
    axis.axis("off")


def gradient_norms(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Norm of the gradient of a sequence's loss at the state after each step: (T,), mean over N.
    The model has backend scratch; inputs (N, T) hold no padding.
    """
    logits = model(inputs, torch.full((len(inputs),), inputs.shape[1]))
    loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    states = [part for state, _ in model.layers.past for part in state]
    squares = [gradient.pow(2).sum(1) for gradient in torch.autograd.grad(loss, states)]
    return torch.stack(squares).view(inputs.shape[1], -1, len(inputs)).sum(1).sqrt().mean(1)


def draw_memory(folder: Path, title: str, data: Dataset, args: argparse.Namespace,
                runs: dict) -> None:
    """The norm of the gradient, after training if the cell was trained, and the gates along one of
    the longest sequences.
    """
    longest, pictures = data.test.lengths == data.test.lengths.max(), {}
    inputs, targets = data.test.inputs[longest], data.test.targets[longest]
    figure, ((axis,),) = common.new_figure(1, 1, (5.5, 3.5), title)
    for cell in CELLS["torch"]:
        common.seed_everything(args.seed)
        options = {**runs[f"classify {args.cells[0]}"]["options"], "cell": cell}
        run = runs.get(f"classify {cell}", {"task": "classify", "options": options})
        model, name = build(run, backend="scratch").double(), cell
        name += "" if "best" in run else ", untrained"
        norms = gradient_norms(model, inputs, targets)
        draw_line(axis, range(len(norms)), norms.flip(0) / norms[-1], name, "steps before the end",
                  "gradient norm, relative to the end")
        with torch.no_grad():
            model(inputs[:1], torch.tensor([inputs.shape[1]]))
        for gate in model.layers.past[0][1]:
            values = torch.stack([gates[gate][0] for _, gates in model.layers.past], 1)
            pictures[f"{name}: {gate}"] = values[values.mean(1).argsort()]  # (hidden, T)
    axis.set_yscale("log")
    common.save_figure(folder / "gradients.png", figure)
    figure, axes = common.new_figure(len(pictures), 1, (12, 1.7 * len(pictures) + 0.6), title)
    for axis, (name, values) in zip(axes.flat, pictures.items()):
        figure.colorbar(axis.imshow(values, aspect="auto", vmin=0, vmax=1), ax=axis)
        axis.set(title=name, ylabel="unit", xticks=range(values.shape[1]))
        axis.set_xticklabels([common.plain(data.symbols[i]) for i in inputs[0]], fontsize=6)
    common.save_figure(folder / "gates.png", figure)


def load_runs(path: Path) -> dict:
    """The runs in a best.pt or last.pt, each of which holds what it should."""
    runs = common.load_checkpoint(path, "rnn.py", "runs")["runs"]
    with common.using(path):
        for run in runs.values():
            build(run)
            if {"cell", "history", "best", "last", "data"} - set(run):
                raise ValueError("a run in it is not whole")
    return runs


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Print `text <tab> answer <tab> probability` for each text of --predict."""
    path, texts = Path(args.out, "best.pt"), args.predict
    runs = load_runs(path).values()
    with common.using(path):  # of the runs that fit --tasks and --cells best, the most accurate
        run = max(runs, key=lambda run: (run["task"] == args.tasks[0], run["cell"] in args.cells,
                                         max(r["validation_accuracy"] for r in run["history"])))
        model = build(run).to(device)
    if texts == ["-"]:
        texts = [line.rstrip("\r\n") for line in sys.stdin]
    tail = "\n" if "known" in run["options"] else ""
    inputs, lengths = encode([text + tail for text in texts or [""]], run["symbols"], PAD)
    # The targets' shape alone counts: one class, or a symbol more than the inputs have.
    columns = 1 if run["task"] == "classify" else inputs.shape[1] + 1
    part = Part(inputs, lengths, inputs.new_zeros(len(inputs), columns))
    _, answers, probabilities, _ = predict_part(model, part, device)
    # Of a sequence all up to its END counts, or up to a symbol more than the text has: whatever
    # longer texts beside it make the network write after that.
    late, end = torch.arange(columns) > lengths[:, None], (answers == END).long()
    answers[late], probabilities[late | (end.cumsum(1) > end)] = END, 1
    for text, answer, probability in zip(texts, answers, probabilities):
        print(f"{text}\t{spell(answer, run['answers'])}\t{probability.prod():.4f}")


# ---------------------------------------------------------------- Command line


def build_parser() -> argparse.ArgumentParser:
    parser = common.option_parser(
        "rnn.py", __doc__, "synthetic, or a CSV or TSV file with columns text and label",
        data="synthetic", out="runs/rnn", epochs=12, batch_size=128, lr=3e-3, weight_decay=0.01,
        clip=1.0, patience=10, precision="float32")
    group = parser.add_argument_group("options of the RNN")
    whole, share = common.number(int, 1), common.number(float, 0, 1)
    tasks, cells = ["classify", "generate"], list(CELLS["torch"])
    for flag, kind, default, metavar, meaning in (
            ("--hidden", whole, 64, "N", "width of the state and of the embedding"),
            ("--layers", whole, 1, "N", "recurrent layers on top of each other"),
            ("--dropout", share, 0.0, "SHARE", "share of a layer's inputs zeroed in training"),
            ("--memory", common.number(float, 1), 100, "STEPS",
             "time that units keep what they hold, at most, before they learn"),
            ("--teacher-forcing", share, 1.0, "SHARE", "share of true symbols a decoder is fed"),
            ("--synthetic-size", common.number(int, 100), 4000, "N", "strings; to sort, 3 times")):
        group.add_argument(flag, type=kind, default=default, metavar=metavar,
                           help=f"{meaning} [%(default)s]")
    group.add_argument("--tasks", nargs="+", choices=tasks, default=tasks,
                       help="both by default; own data: classify")
    group.add_argument("--cells", nargs="+", choices=cells, default=cells[:2],
                       help="rnn is a plain one, with tanh [lstm gru]")
    group.add_argument("--backend", choices=list(CELLS), default="torch",
                       help="cells of the library, or those of this file [%(default)s]")
    group.add_argument("--decay-teacher-forcing", action="store_true",
                       help="lower it in a line to 0 in the last epoch")
    group.add_argument("--bidirectional", action="store_true", help="classify by both ends")
    group.add_argument("--ngrams", action="store_true",
                       help="let a classifier see the last 2 to 5 symbols together at each step")
    group.add_argument("--predict", nargs="+", metavar="TEXT",
                       help="answer texts by best.pt in --out; - reads one a line from stdin")
    return parser


def main() -> None:
    args = common.parse_options(build_parser(), fixed=(
        "data", "seed", "tasks", "cells", "hidden", "layers", "dropout", "memory", "bidirectional",
        "ngrams", "synthetic_size"))
    device = common.select_device(args.device)
    if args.predict:
        predict(args, device)
        return
    tasks = [load_data(args, task) for task in args.tasks
             if task == "classify" or args.data == "synthetic"]
    if not tasks:
        raise common.UserError("--tasks generate: there is no such data but the synthetic; leave "
                               "--tasks out to classify the texts of --data")
    with common.run_folder(args.out, args.resume) as folder:
        runs = load_runs(folder / "last.pt") if args.resume else {}
        for data in tasks:
            print(f"{data.task}, {args.data}, on {device}: sequences to train "
                  f"{len(data.train.lengths)}, validate {len(data.validation.lengths)}, test "
                  f"{len(data.test.lengths)}")
            for cell in args.cells:
                train(args, data, cell, runs, folder, device)
        evaluate(args, tasks, runs, folder, device)


if __name__ == "__main__":
    common.run_main(main)
