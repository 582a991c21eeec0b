"""Train LSTM and GRU on the same sequences, with the same budget, and compare them.

  python rnn.py                          two synthetic tasks: classify and generate
  python rnn.py --data reviews.csv       your own texts: columns text and label
  python rnn.py --predict "some text"    classify texts with the trained networks

Pictures, checkpoints and figures go to runs/rnn (--out). rnn.md explains every part.
"""

from __future__ import annotations

import copy
import csv
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

import common

PAD, UNKNOWN, END = range(3)  # the first symbols of every vocabulary; END also starts an answer
IGNORE = -100  # fills targets after their end: cross_entropy leaves it out
LONGEST = 400  # symbols of a text that are read
METRICS = {"classify": "accuracy", "generate": "exact_match"}  # in the test, by task

# ---------------------------------------------------------------- Data


class Part(NamedTuple):
    """Sequences: the training, validation or test part, or a batch of one."""

    inputs: torch.Tensor  # int64 (N, longest): numbers of symbols, PAD after the end
    lengths: torch.Tensor  # int64 (N,), always on the CPU
    targets: torch.Tensor  # int64 (N,): classes; or (N, longest + 1): symbols, END, IGNORE


class Dataset(NamedTuple):
    task: str  # classify or generate
    symbols: list  # the vocabulary
    classes: list  # what a classifier answers; a generator answers with symbols
    train: Part
    validation: Part
    test: Part


def temporal_order(count: int, seed):
    """Strings of 20 to 100 symbols; the label is the order of the three X or Y among the noise.

    Problem 6b of Hochreiter and Schmidhuber, 1997, whose strings had 100 to 110 symbols.
    """
    random, texts, labels = np.random.default_rng(seed), [], []
    for length in random.integers(20, 101, count):
        symbols, label = random.choice(list("abcd"), length), random.choice(["X", "Y"], 3)
        places = length * random.uniform((0.1, 0.33, 0.66), (0.2, 0.43, 0.76))
        symbols[places.astype(int)] = label
        texts.append("E" + "".join(symbols[1:-1]) + "B")
        labels.append("".join(label))
    return texts, labels


def sorting(count: int, seed):
    """Strings of 8 to 16 digits, and each of them sorted."""
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list("0123456789"), n)) for n in random.integers(8, 17, count)]
    return texts, ["".join(sorted(text)) for text in texts]


def read_table(path: str):
    """Texts and labels of a CSV or TSV file: columns text and label, or else the first two.

    Raises UserError if it cannot be read, or a label has too few rows to learn and to test it.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
            names = rows.fieldnames or ()
            first, second = ("text", "label") if {"text", "label"} <= set(names) else names[:2]
            texts, labels = zip(*[(row[first] + "", row[second] + "") for row in rows])
    except OSError as error:
        raise common.UserError(f"--data {path}: {error.strerror}; name a CSV or TSV file") from None
    except (ValueError, TypeError, csv.Error):  # TypeError: a field is missing
        raise common.UserError(f"--data {path}, line {rows.line_num}: a table in UTF-8 is needed, "
                               "its columns named, a text and a label in each row") from None
    rare = [label for label, count in Counter(labels).items() if count < 3]
    if rare or len(set(labels)) < 2:
        raise common.UserError(f"--data {path}: too few rows of {', '.join(rare[:9]) or 'classes'};"
                               " at least two classes are needed, and three rows of each")
    return texts, labels


def encode(texts, symbols):
    """Numbers of symbols, int64 (N, longest), and lengths (N,); an empty text is one UNKNOWN."""
    number = {symbol: i for i, symbol in enumerate(symbols)}
    rows = [torch.tensor([number.get(symbol, UNKNOWN) for symbol in text[:LONGEST]] or [UNKNOWN])
            for text in texts]
    return pad_sequence(rows, True, PAD), torch.tensor([len(row) for row in rows])


def load_data(args, task: str) -> Dataset:
    """The data of one task: synthetic, or the texts of a file."""
    if args.data == "synthetic":
        generator, size = temporal_order, args.synthetic_size
        if task == "generate":  # which takes longer to learn, and less time for each
            generator, size = sorting, 3 * size
        parts = [generator(size // n, [args.seed, n]) for n in (1, 5, 2)]
    else:
        texts, labels = (np.array(column, object) for column in read_table(args.data))
        numbers = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
        rest, test = common.split_indices(numbers, 0.1, args.seed)
        keep, held = common.split_indices(numbers[rest], 0.1, args.seed)
        parts = [(texts[i.numpy()], labels[i.numpy()]) for i in (rest[keep], rest[held], test)]
    # A symbol seen once teaches little by itself; taken as unknown, it trains that embedding.
    counts = Counter("".join(parts[0][0]))
    symbols = ["", "", "\n", *sorted(s for s in counts if counts[s] > 1 and s != "\n")]
    classes, encoded = sorted(set(parts[0][1])) if task == "classify" else [], []
    for texts, answers in parts:
        if task == "classify":
            targets = torch.tensor([classes.index(answer) for answer in answers])
        else:
            targets, _ = encode([answer + "\n" for answer in answers], symbols)
            targets[targets == PAD] = IGNORE
        encoded.append(Part(*encode(texts, symbols), targets))
    return Dataset(task, symbols, classes, *encoded)


def batches(lengths, size: int, groups: int) -> list:
    """Indices of batches in random order, each of `groups` groups of sequences of like length.

    lengths: int64 (N,). A group ends where the length changes, if it is at least half full.
    """
    order = (lengths + torch.rand(len(lengths))).argsort()  # at random within a length
    ordered, cuts, full = lengths[order].tolist(), [0], max(2, size // groups)
    for i in range(2, len(ordered) - 1):  # batch norm needs two sequences in a batch, at least
        if i - cuts[-1] >= (full if ordered[i] == ordered[i - 1] else max(2, full // 2)):
            cuts.append(i)
    chunks = np.split(order.numpy(), cuts[1:])
    chunks = [torch.from_numpy(chunks[i]) for i in torch.randperm(len(chunks))]
    return [torch.cat(chunks[i:i + groups]) for i in range(0, len(chunks), groups)]


def take(part: Part, indices, device) -> Part:
    """A batch, cut to its longest sequence."""
    longest, targets = int(part.lengths[indices].max()), part.targets[indices]
    targets = targets[:, :longest + 1] if targets.dim() > 1 else targets
    inputs = part.inputs[indices, :longest]
    return Part(inputs.to(device), part.lengths[indices], targets.to(device))


# ---------------------------------------------------------------- Model


class Recurrent:
    """The layers of an RNN, LSTM or GRU, every step of them computed by the class's `step`.

    The class of torch.nn behind it only creates the parameters; arguments, results and state
    dicts are those of torch.nn. inputs: (T, N, input_size) or a PackedSequence; state: (layers *
    directions, N, H), for the LSTM two of it, by default zeros. Returns the hidden states of the
    last layer (T, N, directions * H) and the state of each sequence after its own last step.
    """

    recorded = None  # a list put here receives the state and the gates of every step

    def forward(self, inputs, state=None):
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
                below = F.dropout(x, self.dropout, self.training) if i else x
            # What the inputs contribute is known beforehand: one large product, not T small ones.
            steps = F.linear(below, weight_ih, bias_ih).split(sizes)
            now, outputs = [s[i] for s in state], [None] * len(sizes)
            for t in reversed(range(len(sizes))) if i % directions else range(len(sizes)):
                n = sizes[t]  # the first n sequences have this step; the others keep their state
                new, gates = self.step(steps[t], [s[:n] for s in now], weight_hh, bias_hh)
                now = [torch.cat([s, old[n:]]) if n < len(old) else s for s, old in zip(new, now)]
                outputs[t] = new[0]
                if self.recorded is not None:
                    self.recorded.append((now, gates))
            final.append(now)
            x = torch.cat([x, torch.cat(outputs)], 1) if i % directions else torch.cat(outputs)
        state = tuple(torch.stack(tensors) for tensors in zip(*final))
        state = state if self.mode == "LSTM" else state[0]
        if packed:
            return inputs._replace(data=x), self.permute_hidden(state, inputs.unsorted_indices)
        x = x.view(*inputs.shape[:2], -1)
        return x.transpose(0, 1) if self.batch_first else x, state


class RNN(Recurrent, nn.RNN):
    """A plain recurrent network (Elman, 1990)."""

    def step(self, x, state, weight, bias):
        """One step; x: W_ih x + b_ih, (N, gates * H) -> the new state, and its gates by name."""
        hidden, = state  # (N, H)
        return (torch.tanh(x + F.linear(hidden, weight, bias)),), {}


class LSTM(Recurrent, nn.LSTM):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate: Gers et al., 2000)."""

    def step(self, x, state, weight, bias):
        hidden, cell = state  # (N, H) each
        i, f, g, o = (x + F.linear(hidden, weight, bias)).chunk(4, 1)
        i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
        cell = f * cell + i * torch.tanh(g)
        hidden = o * torch.tanh(cell)
        return (hidden, cell), {"input gate": i, "forget gate": f, "output gate": o}


class GRU(Recurrent, nn.GRU):
    """Gated recurrent unit (Cho et al., 2014), with the reset gate after the product with W_hn."""

    def step(self, x, state, weight, bias):
        hidden, = state  # (N, H)
        x_r, x_z, x_n = x.chunk(3, 1)
        h_r, h_z, h_n = F.linear(hidden, weight, bias).chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        hidden = n + z * (hidden - n)  # = (1 - z) n + z h, with one product less
        return (hidden,), {"reset gate": r, "update gate": z}


CELLS = {"torch": {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN},
         "scratch": {"lstm": LSTM, "gru": GRU, "rnn": RNN}}


def recurrent(cell, backend, hidden, layers, dropout, bidirectional=False) -> nn.Module:
    """Layers of a cell whose bias log(time) keeps what it holds for times from 1 to 100 steps.

    Chrono initialization: Tallec and Ollivier, 2018.
    """
    module = CELLS[backend][cell](hidden, hidden, layers, dropout=dropout if layers > 1 else 0.0,
                                  bidirectional=bidirectional)
    for name, bias in module.named_parameters():
        if name.startswith("bias_hh") and cell != "rnn":
            keep = torch.empty(hidden).uniform_(1, 100).log()
            bias.data[hidden:2 * hidden] = keep  # the LSTM's forget gate, the GRU's update gate
            if cell == "lstm":
                bias.data[:hidden] = -keep  # the input gate; GRU has one gate for the two
    return module


def final_state(layers, x, lengths):
    """The state after the last step of each sequence of x (T, N, hidden), none of it padding."""
    if int(lengths.min()) < len(x):
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    return layers(x)[1]


class RNNClassifier(nn.Module):
    """Embedding or Linear, recurrent layers, the last valid step, BatchNorm, Dropout, Linear.

    inputs: int64 (N, T), numbers of symbols, or float (N, T, symbols) if `continuous`, padded at
    the end; lengths: int64 (N,), on the CPU -> logits: float (N, classes). The rest is Seq2Seq's.
    """

    def __init__(self, symbols: int, classes: int, cell="lstm", backend="torch", hidden: int = 64,
                 layers: int = 1, dropout=0.0, bidirectional=False, continuous=False):
        super().__init__()
        self.input = (nn.Linear if continuous else nn.Embedding)(symbols, hidden)
        self.dropout = nn.Dropout(dropout)
        self.layers = recurrent(cell, backend, hidden, layers, dropout, bidirectional)
        width = 2 * hidden if bidirectional else hidden
        self.batch_norm, self.output = nn.BatchNorm1d(width), nn.Linear(width, classes)

    def last_valid_step(self, inputs, lengths):
        """The last hidden state of each sequence (N, hidden); of both ends if bidirectional."""
        x = self.dropout(self.input(inputs.transpose(0, 1)))  # (T, N, hidden)
        if not self.layers.bidirectional:
            # No packing, which makes the library several times slower on the CPU: padding comes
            # too late to change the last valid step.
            return self.layers(x)[0][lengths - 1, torch.arange(len(lengths))]
        state = final_state(self.layers, x, lengths)
        hidden = state[0] if isinstance(state, tuple) else state  # (layers * 2, N, hidden)
        return torch.cat([hidden[-2], hidden[-1]], 1)

    def forward(self, inputs, lengths, targets=None, teacher_forcing=None):
        # Bands of lengths, each a tenth above the one before, go through the layers one by one:
        # with little padding in any of them, batch norm still sees many lengths at once.
        bands, order = (lengths.float().log() / 0.1).floor(), lengths.argsort()
        _, counts = bands[order].unique_consecutive(return_counts=True)
        last = [self.last_valid_step(inputs[band, :int(lengths[band].max())], lengths[band])
                for band in order.split(counts.tolist())]
        last = torch.cat(last)[order.argsort()]
        return self.output(self.dropout(self.batch_norm(last)))


class Seq2Seq(nn.Module):
    """Encoder and decoder of the same cell (Sutskever et al., 2014; Cho et al., 2014).

    inputs, lengths: as above; targets: int64 (N, T) -> logits: float (N, T, symbols). The decoder
    is fed the true symbol with probability `teacher_forcing`, else the one it predicted (scheduled
    sampling, Bengio et al., 2015). With 0 it decodes greedily: of the targets only T matters.
    """

    def __init__(self, symbols: int, cell="lstm", backend="torch", hidden: int = 64,
                 layers: int = 1, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.encoder = recurrent(cell, backend, hidden, layers, dropout)
        self.decoder = recurrent(cell, backend, hidden, layers, dropout)
        self.output = nn.Linear(hidden, symbols)

    def forward(self, inputs, lengths, targets, teacher_forcing: float):
        state = final_state(self.encoder, self.embedding(inputs.t()), lengths)
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


def build(run: dict, **changes) -> nn.Module:
    """The network that a run's options describe, with its best weights if there are any yet."""
    kind = {"classify": RNNClassifier, "generate": Seq2Seq}[run["task"]]
    model = kind(**{**run["options"], **changes})
    if "best" in run:
        model.load_state_dict(run["best"])
    return model.eval()


# ---------------------------------------------------------------- Training


def train(args, data: Dataset, cell: str, runs: dict, folder, device) -> None:
    """Train a cell on a task; `runs` holds all runs so far, for last.pt, and takes this one."""
    common.seed_everything(args.seed)
    options = {"symbols": len(data.symbols), "cell": cell, "backend": args.backend,
               "hidden": args.hidden, "layers": args.layers, "dropout": args.dropout}
    if data.task == "classify":
        options.update(classes=len(data.classes), bidirectional=args.bidirectional)
    run = runs.setdefault(f"{data.task} {cell}", {
        "task": data.task, "cell": cell, "options": options, "symbols": data.symbols,
        "classes": data.classes, "history": []})
    history, model = run["history"], build(run).to(device)
    groups = 4 if data.task == "classify" else 1  # without batch norm, one length a batch will do
    steps = len(batches(data.train.lengths, args.batch_size, groups))
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr)
    schedule = common.warmup_cosine(optimizer, steps, args.epochs * steps)
    dtype = common.select_dtype(args.precision, device)
    scaler = common.gradient_scaler(dtype)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if history:
        with common.using(folder / "last.pt"):
            for name, part in state.items():
                part.load_state_dict(run["last"][name])
    compiled = common.compile_model(model, args.compile)

    for epoch in range(len(history) + 1, args.epochs + 1):
        if history and common.epochs_since_best(history, "validation_accuracy") >= args.patience:
            print(f"no better validation accuracy for {args.patience} epochs: stopping early")
            break
        start = time.perf_counter()
        common.seed_everything(args.seed, epoch)
        decay = (epoch - 1) / max(1, args.epochs - 1) if args.decay_teacher_forcing else 0
        teacher_forcing = args.teacher_forcing * (1 - decay)
        model.train()
        total_loss, seen = torch.zeros((), device=device), 0
        bar = common.progress(batches(data.train.lengths, args.batch_size, groups),
                              f"{data.task} {cell} {epoch}/{args.epochs}")
        for step, indices in enumerate(bar):
            batch = take(data.train, indices, device)
            with common.autocast(device, dtype):
                logits = compiled(*batch, teacher_forcing)  # (N, classes) or (N, T, symbols)
            loss = F.cross_entropy(logits.float().flatten(0, -2), batch.targets.flatten())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            common.clip_gradients(model, args.clip, (epoch - 1) * steps + step + 1, scaler)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total_loss += loss.detach() * len(indices)
            seen += len(indices)
            if step % 10 == 9:
                bar.set_postfix_str(f"loss {total_loss / seen:.3f}", refresh=False)
        row = {"task": data.task, "cell": cell, "epoch": epoch,
               "learning_rate": schedule.get_last_lr()[0], "teacher_forcing": teacher_forcing,
               "train_loss": total_loss.item() / seen,
               "sequences_per_second": seen / (time.perf_counter() - start)}
        row["validation_loss"], _, _, hits = predict_part(model, data.validation, device)
        row["validation_accuracy"] = hits.mean().item()
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        print(f"{data.task} {cell:<4} epoch {epoch:3}/{args.epochs}   train loss "
              f"{row['train_loss']:.4f}   validation loss {row['validation_loss']:.4f}, accuracy "
              f"{row['validation_accuracy']:.2%}   {row['seconds']:.1f} s", flush=True)
        common.write_history(folder / "history.csv", sum((r["history"] for r in runs.values()), []))
        if common.epochs_since_best(history, "validation_accuracy") == 0:
            run["best"] = copy.deepcopy(model.state_dict())
            common.save_checkpoint(folder / "best.pt", {
                "script": "rnn.py", "data": args.data, "metrics": row,
                "runs": {key: {**value, "last": None} for key, value in runs.items()}})
        run["last"] = {name: part.state_dict() for name, part in state.items()}
        common.save_checkpoint(folder / "last.pt", {
            "script": "rnn.py", "options": vars(args), "runs": runs})


# ---------------------------------------------------------------- Evaluation and pictures


def predict_part(model, part: Part, device):
    """Mean loss; predictions and their probabilities, shaped as part.targets; (N,) which are right.

    Symbols are generated without teacher forcing, and right if all of them are, END included.
    """
    model.eval()  # batch norm by its running averages, no dropout
    total, predicted = 0.0, part.targets.clone()
    probabilities = torch.ones(predicted.shape)
    for indices in part.lengths.argsort().split(500):
        batch = take(part, indices, device)
        with torch.no_grad():
            logits = model(*batch, 0.0)
        total += F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), reduction="sum")
        probability, best = F.softmax(logits.cpu(), -1).max(-1)  # (n,) or (n, T)
        where = (indices[:, None], torch.arange(best.shape[1])) if best.dim() > 1 else indices
        predicted[where], probabilities[where] = best, probability
    counted = part.targets != IGNORE
    hits = ((predicted == part.targets) | ~counted).view(len(predicted), -1).all(1).float()
    return float(total) / int(counted.sum()), predicted, probabilities, hits


def spell(target, data) -> str:
    """The name of a class, or the symbols of a sequence up to END."""
    if target.dim() == 0:
        return data.classes[target]
    return "".join(data.symbols[max(i, END)] for i in target.tolist()).split("\n")[0]


def evaluate(args, tasks, runs, folder, device) -> None:
    """Measure the best networks on the test parts; draw the pictures; write summary.json."""
    title, test = f"{', '.join(args.cells)} on {args.data}", {cell: {} for cell in args.cells}
    figure, axes = common.new_figure(len(tasks), 1, (8, 2.4 * len(tasks) + 0.4), f"{title}: test")
    curves, by_length = [], []
    print("\ntask      cell parameters  accuracy  exact match  epochs  seconds  sequences/s")
    for data, axis in zip(tasks, axes.flat):
        groups, metric = data.test.lengths.argsort().chunk(8), METRICS[data.task]
        loss, accuracy, share, answers, hits = {}, {}, {}, {}, {}
        for cell in args.cells:
            run = runs[f"{data.task} {cell}"]
            rows = {name: [row[name] for row in run["history"]] for name in run["history"][0]}
            model = build(run).to(device)
            _, answers[cell], _, hits[cell] = predict_part(model, data.test, device)
            facts = {"parameters": sum(p.numel() for p in model.parameters()), "accuracy": "-",
                     "exact_match": "-", "epochs": len(rows["epoch"]),
                     "seconds": sum(rows["seconds"]),
                     "sequences_per_second": sum(rows["sequences_per_second"]) / len(rows["epoch"])}
            facts[metric] = test[cell][metric] = hits[cell].mean().item()
            test[cell][data.task] = {k: v for k, v in facts.items() if v != "-"}
            print("{:10}{:5}{:10,}{:>10}{:>13}{:8}{:9.1f}{:13.0f}".format(
                data.task, cell, *(f"{v:.2%}" if k == metric else v for k, v in facts.items())))
            loss[cell] = rows["epoch"], rows["train_loss"], ".-"
            accuracy[cell] = rows["epoch"], rows["validation_accuracy"], ".-"
            share[cell] = ([data.test.lengths[group].float().mean() for group in groups],
                           [hits[cell][group].mean() for group in groups], ".-")
        curves += [("epoch", f"{data.task}: training loss", loss),
                   ("epoch", f"{data.task}: right in validation", accuracy)]
        by_length += [("length of the sequence", f"{data.task}: right in the test", share)]
        draw_predictions(axis, data, answers, torch.stack([*hits.values()]))
        if data.task == "classify":
            draw_gates(folder / "gates.png", title, data, runs)
            draw_gradients(folder / "gradients.png", title, data, args, runs)
    common.save_figure(folder / "predictions.png", figure)
    draw_lines(folder / "curves.png", title, curves)
    draw_lines(folder / "lengths.png", title, by_length)
    seconds = sum(row["seconds"] for run in runs.values() for row in run["history"])
    common.write_summary(folder / "summary.json", script="rnn.py", data=args.data,
                         options=vars(args), test=test, seconds=seconds)
    print(f"training took {seconds:.0f} s; pictures and checkpoints are in {args.out}")


def draw_lines(path, title, panels):
    """Panels, two a row: [(x label, y label, {label: (x, y, style)})]; shares linear, else log."""
    rows, columns = (len(panels) + 1) // 2, min(2, len(panels))
    figure, axes = common.new_figure(rows, columns, (5.5 * columns, 3.2 * rows + 0.3), title)
    for axis, (xlabel, ylabel, lines) in zip(axes.flat, panels):
        for label, (x, y, style) in lines.items():
            axis.plot(x, y, style, label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="linear" if "right" in ylabel else "log")
        axis.set_ylim(top=1.01 if "right" in ylabel else None)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    common.save_figure(path, figure)


def draw_predictions(axis, data, answers, hits):
    """A table of eight test sequences, those first that most cells got wrong; errors in red."""
    shown = hits.sum(0).argsort()[:8].tolist()
    rows = [["".join(data.symbols[i] for i in data.test.inputs[k, :50]),
             *(spell(column[k], data) for column in (data.test.targets, *answers.values()))]
            for k in shown]
    colours = [["none", "none", *("none" if hit else "mistyrose" for hit in hits[:, k])]
               for k in shown]
    table = axis.table(rows, colours, colLabels=["sequence", "true", *answers], loc="center",
                       cellLoc="left")
    table.auto_set_column_width([*range(len(rows[0]))])
    axis.axis("off")


def record(model, inputs):
    """The logits of inputs (N, T) without padding, and (state, gates) after each step.

    `model` has backend scratch; the steps are those of its last layer, forwards.
    """
    steps, model.layers.recorded = inputs.shape[1], []
    logits = model(inputs, torch.full((len(inputs),), steps))
    return logits, model.layers.recorded[-steps * (2 if model.layers.bidirectional else 1):][:steps]


def gradient_norms(model, inputs, targets):
    """Norm of the gradient of a sequence's loss at the state after each step: (T,), mean over N."""
    logits, steps = record(model, inputs)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    gradients = torch.autograd.grad(loss, [part for state, _ in steps for part in state])
    squares = torch.stack([gradient.pow(2).sum(1) for gradient in gradients])  # (T * states, N)
    return squares.view(len(steps), -1, len(inputs)).sum(1).sqrt().mean(1)


def draw_gates(path, title, data, runs):
    """The gates of all units along a test sequence of the lower quartile in length."""
    shown, pictures = data.test.lengths.argsort()[len(data.test.lengths) // 4], []
    inputs = data.test.inputs[shown:shown + 1, :data.test.lengths[shown]]  # (1, T)
    for name, run in runs.items():
        if name.startswith("classify"):
            with torch.no_grad():
                _, steps = record(build(run, backend="scratch"), inputs)
            for gate in steps[0][1]:
                values = torch.cat([gates[gate] for _, gates in steps]).t()  # (hidden, T)
                pictures.append((f"{name}: {gate}", values[values.mean(1).argsort()]))
    figure, axes = common.new_figure(len(pictures) or 1, 1, (10, 1.7 * len(pictures) + 0.6), title)
    for axis, (name, values) in zip(axes.flat, pictures):
        image = axis.imshow(values, aspect="auto", vmin=0, vmax=1)
        axis.set(title=name, ylabel="unit", xticks=range(values.shape[1]))
        axis.set_xticklabels([data.symbols[i] for i in inputs[0]], fontsize=7)
        figure.colorbar(image, ax=axis)
    common.save_figure(path, figure)


def draw_gradients(path, title, data, args, runs):
    """The gradient at the state, against the distance to the end, before and after training."""
    longest, lines = data.test.lengths == data.test.lengths.max(), {}
    for colour, cell in zip(("C0", "C1", "C2"), CELLS["torch"]):
        common.seed_everything(args.seed)
        options = {**runs[f"classify {args.cells[0]}"]["options"], "cell": cell}
        versions = {"untrained": {"task": "classify", "options": options}}
        if cell in args.cells:
            versions["trained"] = runs[f"classify {cell}"]
        for label, run in versions.items():
            model = build(run, backend="scratch").double()
            norms = gradient_norms(model, data.test.inputs[longest], data.test.targets[longest])
            style = colour + ("-" if label == "trained" else ":")
            lines[f"{cell}, {label}"] = range(len(norms)), norms.flip(0) / norms[-1], style
    draw_lines(path, title, [("steps before the end", "gradient norm, relative to the end", lines)])


def predict(args, device) -> None:
    """Print `text <tab> answer <tab> probability` for each text of --predict."""
    path, texts = Path(args.out, "best.pt"), args.predict
    runs = common.load_checkpoint(path, "rnn.py")["runs"].values()
    with common.using(path):  # of the runs that fit --tasks and --cells best, the most accurate
        run = max(runs, key=lambda run: (run["task"] == args.tasks[0], run["cell"] in args.cells,
                                         max(r["validation_accuracy"] for r in run["history"])))
        data = Dataset(run["task"], run["symbols"], run["classes"], None, None, None)
        model = build(run).to(device)
    if texts == ["-"]:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        texts = sys.stdin.read().splitlines()
    inputs, lengths = encode(texts or [""], data.symbols)
    # The targets' shape alone counts: one class, or a symbol more than the inputs have.
    targets = torch.zeros_like(inputs[:, 0] if data.classes else F.pad(inputs, (0, 1)))
    _, answers, probabilities, _ = predict_part(model, Part(inputs, lengths, targets), device)
    for text, target, probability in zip(texts, answers, probabilities):
        print(f"{text}\t{spell(target, data)}\t{probability.prod():.4f}")


# ---------------------------------------------------------------- Command line


def build_parser():
    parser = common.option_parser(
        "rnn.py", __doc__, "synthetic, or a CSV or TSV file with columns text and label",
        data="synthetic", out="runs/rnn", epochs=12, batch_size=128, lr=3e-3, weight_decay=0.01,
        clip=1.0, patience=10)
    group = parser.add_argument_group("options of the RNN")
    whole, share = common.number(int, 1), common.number(float, 0, 1)
    tasks, cells = list(METRICS), list(CELLS["torch"])
    group.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, metavar="TASK",
                       help="classify, generate [both; own data: classify]")
    group.add_argument("--cells", nargs="+", choices=cells, default=cells[:2], metavar="CELL",
                       help="lstm, gru, rnn (a plain one, with tanh) [lstm gru]")
    group.add_argument("--backend", choices=list(CELLS), default="torch",
                       help="torch: the library's cells; scratch: those of this file [%(default)s]")
    group.add_argument("--hidden", type=whole, default=64, metavar="N",
                       help="width of the state and of the embedding [%(default)s]")
    group.add_argument("--layers", type=whole, default=1, metavar="N",
                       help="recurrent layers on top of each other [%(default)s]")
    group.add_argument("--dropout", type=share, default=0.0, metavar="SHARE",
                       help="share of a layer's inputs zeroed in training [%(default)s]")
    group.add_argument("--bidirectional", action="store_true",
                       help="classify by both ends of a sequence")
    group.add_argument("--teacher-forcing", type=share, default=1.0, metavar="SHARE",
                       help="share of true symbols that the decoder is fed [%(default)s]")
    group.add_argument("--decay-teacher-forcing", action="store_true",
                       help="lower that in a line to 0 in the last epoch")
    group.add_argument("--synthetic-size", type=common.number(int, 100), default=4000, metavar="N",
                       help="strings to learn to classify; 3 times as many to sort [%(default)s]")
    group.add_argument("--predict", nargs="+", metavar="TEXT",
                       help="answer texts by best.pt in --out; - reads one a line from stdin")
    return parser


def main() -> None:
    args = common.parse_options(build_parser(), fixed=(
        "data", "seed", "tasks", "cells", "hidden", "layers", "dropout", "bidirectional",
        "synthetic_size"))
    device = common.select_device(args.device)
    common.keep_freed_memory()
    if args.predict:
        predict(args, device)
        return
    tasks = [load_data(args, task) for task in args.tasks
             if task == "classify" or args.data == "synthetic"]
    with common.run_folder(args.out, args.resume) as folder:
        runs = common.load_checkpoint(folder / "last.pt", "rnn.py")["runs"] if args.resume else {}
        for data in tasks:
            print(f"{data.task}, {args.data}: {len(data.train.lengths)} sequences to train on, "
                  f"{len(data.validation.lengths)} to validate, {len(data.test.lengths)} to test; "
                  f"{len(data.symbols) - 3} symbols; on {device}")
            for cell in args.cells:
                train(args, data, cell, runs, folder, device)
        evaluate(args, tasks, runs, folder, device)


if __name__ == "__main__":
    common.run_main(main)
