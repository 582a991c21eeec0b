"""Train and compare LSTM, GRU and, on one task, a plain RNN, on the same batches.

  python rnn.py                         two synthetic tasks: classify and generate
  python rnn.py --data reviews.csv --tokens words
                                        your own texts: columns text and label
  python rnn.py --predict "some text"   classify texts with the best of the trained models

Plots and checkpoints go to runs/rnn (--out). rnn.md explains every part.
"""

from __future__ import annotations

import re
import time
import zlib
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import common

# Every vocabulary begins with these three. END is also the first input of a decoder.
SPECIAL = ["<pad>", "<unk>", "<end>"]
PAD, UNKNOWN, END = range(3)
LONGEST = 400  # a longer text is cut to this many tokens

# ---------------------------------------------------------------- Data


class SequenceSet(NamedTuple):
    """The sequences of a training, validation or test set, or of a batch.

    The fields are in the order of a model's arguments.
    """

    inputs: Tensor  # int64 (N, longest): tokens, and PAD after the end of a sequence
    lengths: Tensor  # int64 (N,), always on the CPU
    # To classify: int64 (N, 1), classes. To generate: int64 (N, longest + 1), as many tokens as in
    # the input, then END and PAD.
    targets: Tensor


class Dataset(NamedTuple):
    task: str  # classify or generate
    checksum: int
    vocabulary: list  # the tokens
    answers: list  # what each target number stands for: class names, or the tokens
    train: SequenceSet
    validation: SequenceSet
    test: SequenceSet
    test_texts: list  # as they were read, before they are split into tokens


def temporal_order(count: int, seed: int) -> list:
    """Return strings of random letters, with an X or Y in three places, and their classes: the
    order of those three.

    Problem 6b of Hochreiter and Schmidhuber, 1997, with 80 to 100 symbols, and without its start
    and end symbols.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(80, 101, count):
        symbols = rng.choice(list("abcd"), length)
        order = rng.choice(list("XY"), 3)
        places = length * rng.uniform((0.1, 0.33, 0.66), (0.2, 0.43, 0.76))
        # The last place is 24 to 34 % before the end: to be remembered for 19 steps or more.
        symbols[places.astype(int)] = order
        rows.append(("".join(symbols), "".join(order)))
    return rows


def sorting(count: int, seed: int) -> list:
    """Return strings of 8 to 16 digits, and the same digits sorted."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(8, 17, count):
        digits = rng.choice(list("0123456789"), length)
        rows.append(("".join(digits), "".join(sorted(digits))))
    return rows


def tokenize(texts: list, tokens: str) -> list:
    """Split each text into a tuple of characters (tokens "chars"), or of lower-case words and
    punctuation marks ("words").

    Texts of more than LONGEST tokens are cut, with a warning. Characters are the better choice for
    scripts without spaces between words, or with vowels or accents as separate signs.
    """
    sequences = texts
    if tokens == "words":
        # In Python, the lower case of the Turkish letter I with a dot is "i" and another dot.
        sequences = [re.findall(r"\w+|[^\w\s]", text.lower().replace("i\u0307", "i"))
                     for text in texts]
    cut = sum(len(sequence) > LONGEST for sequence in sequences)
    if cut:
        common.warn(f"{cut} of {len(texts)} texts have more than {LONGEST} {tokens}; the rest of "
                    "each is not read")
    return [tuple(sequence[:LONGEST]) for sequence in sequences]


def build_vocabulary(sequences: list, tokens: str) -> list:
    """Return the SPECIAL tokens, and all that occur at least twice in the training set."""
    counts = Counter()
    for sequence in sequences:
        counts.update(sequence)
    # Tokens that occur once are read as UNKNOWN, so that its embedding is trained, too.
    known = sorted(token for token in counts if counts[token] > 1)
    print(f"vocabulary: {len(known):,} {tokens} that occur at least twice in the training set; "
          f"{len(counts) - len(known):,} others are read as <unk>")
    return SPECIAL + known


def encode(sequences: list, vocabulary: list) -> list:
    """Return the indices of the tokens, int64 (length,), for each sequence."""
    index = {token: i for i, token in enumerate(vocabulary)}
    encoded = []
    for sequence in sequences:
        numbers = [index.get(token, UNKNOWN) for token in sequence]
        # An empty text becomes one <unk>: the model needs a last step.
        encoded.append(torch.tensor(numbers or [UNKNOWN]))
    return encoded


def describe_classes(labels: list, training: list) -> list:
    """Print the number of texts in each class; return the classes.

    training: which of the labels are in the training set, as indices.
    """
    counts = Counter(labels)
    classes = sorted(counts)
    shown = [f"{name} {counts[name]:,}" for name in classes[:100]]
    print(f"{len(classes)} classes:", ", ".join(shown))
    if len(classes) < 2:
        raise common.UserError(f"--data: at least two classes are needed; all are {classes[0]}")
    missing = sorted(set(classes) - {labels[i] for i in training})
    if missing:
        raise common.UserError("--data: at least three different texts of each class are needed; "
                               f"there are too few of {', '.join(missing[:20])}")
    return classes


def load_data(args: Namespace, task: str) -> Dataset:
    """Load the data of a task: synthetic strings, or the texts and labels of a file."""
    if args.data != "synthetic":
        common.check_apart(args.data, args.out)
        rows = common.read_table(args.data, ("text", "label"))
    elif task == "classify":
        rows = temporal_order(args.synthetic_size, args.seed)
    else:  # sorting needs more examples; its strings are short
        rows = sorting(5 * args.synthetic_size, args.seed)
    labels = [label for _, label in rows]
    sequences = tokenize([text for text, _ in rows], args.tokens)
    # The tenth that each text is in, int64 (N,): 0 is the test set, 1 the validation set. Equal
    # texts are in the same tenth, so that none is in two sets.
    tenths = common.split_tenths(sequences, labels, args.seed)
    training = torch.where(tenths > 1)[0].tolist()
    vocabulary = build_vocabulary([sequences[i] for i in training], args.tokens)
    if task == "classify":
        answers = describe_classes(labels, training)
        targets = torch.tensor([[answers.index(label)] for label in labels])
    else:
        answers = vocabulary
        targets = encode([[*label, SPECIAL[END]] for label in labels], vocabulary)
        targets = pad_sequence(targets, batch_first=True)  # pads with 0, which is PAD
    encoded = encode(sequences, vocabulary)
    lengths = torch.tensor([len(numbers) for numbers in encoded])
    inputs = pad_sequence(encoded, batch_first=True)
    sets = [SequenceSet(inputs[part], lengths[part], targets[part])
            for part in (tenths > 1, tenths == 1, tenths == 0)]
    texts = [text for (text, _), tenth in zip(rows, tenths) if tenth == 0]  # of the test set
    return Dataset(task, zlib.crc32(repr(rows).encode()), vocabulary, answers, *sets, texts)


def groups(task: str, lengths: Tensor) -> list:
    """Return the indices of sequences that may be in one batch, one tensor per group."""
    if task == "classify":
        # All of them: the classifier uses the last step before the padding. Sorted by length, so
        # that measure() pads little.
        return [lengths.argsort()]
    # Those of equal length, so that the encoder's last state is after the last token of each.
    return [torch.where(lengths == length)[0] for length in lengths.unique()]


def epoch_batches(data: Dataset, args: Namespace, epoch: int) -> list:
    """Return the indices of each batch of an epoch, in random order.

    The last, incomplete batch of each group is dropped, unless it is the only one.
    """
    batches = []
    for i, group in enumerate(groups(data.task, data.train.lengths)):
        places = common.shuffled_batches(len(group), args.batch_size, args.seed, epoch, i)
        batches.extend(group[places])  # places in the group: a row for each batch
    order = np.random.default_rng((args.seed, epoch)).permutation(len(batches))
    return [batches[i] for i in order]


def get_batch(sequences: SequenceSet, indices: Tensor, device: torch.device) -> SequenceSet:
    """Return the sequences with these indices, cut to the longest of them."""
    lengths = sequences.lengths[indices]
    longest = lengths.max()
    # Targets are one token longer (END). A class, of width 1, stays as it is.
    return SequenceSet(sequences.inputs[indices, :longest].to(device), lengths,
                       sequences.targets[indices, :longest + 1].to(device))


# ---------------------------------------------------------------- Model


class Recurrent:
    """Recurrent layers, one on top of the other; a subclass says what one step computes.

    A mixin: `class LSTM(Recurrent, nn.LSTM)` takes parameters and attributes (num_layers, mode,
    all_weights, ...) from nn.LSTM and replaces its forward(), for one direction only.

    step(from_input, from_state, state) gets W_ih x_t + b_ih and W_hh h_(t-1) + b_hh, each
    (N, gates * H), and the state before the step, a list of tensors (N, H). It returns the state
    after it, and for plots the gate that says how much of the state is kept.
    """

    def forward(self, inputs: Tensor, state: Any = None) -> tuple:
        """inputs: float (T, N, input_size); state: (layers, N, H), for the LSTM a tuple of two,
        hidden states and cells; zeros if None. Returns the hidden states of the last layer
        (T, N, H), and the last state of all layers.
        """
        is_lstm = self.mode == "LSTM"
        if state is None:
            zeros = inputs.new_zeros(self.num_layers, inputs.shape[1], self.hidden_size)
            state = (zeros, zeros) if is_lstm else zeros
        parts = state if is_lstm else (state,)  # from here on (hidden, cell) or (hidden,)
        x = inputs
        last = []
        self.trace = []  # for plots: trace[layer][step] is (state, gate) after the step
        for layer, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(self.all_weights):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            # The input products do not depend on the state, so one matrix product serves all steps.
            products = F.linear(x, weight_ih, bias_ih)  # (T, N, gates * H)
            layer_state = [part[layer] for part in parts]  # [hidden, cell] or [hidden]: (N, H) each
            steps = []  # the state and the gate after each step
            for from_input in products:  # of one step: (N, gates * H)
                from_state = F.linear(layer_state[0], weight_hh, bias_hh)  # (N, gates * H)
                layer_state, gate = self.step(from_input, from_state, layer_state)
                steps.append((layer_state, gate))
            x = torch.stack([after[0] for after, _ in steps])  # the hidden states: (T, N, H)
            last.append(layer_state)
            self.trace.append(steps)
        final = tuple(torch.stack(part) for part in zip(*last))  # (layers, N, H) each
        return x, final if is_lstm else final[0]


class RNN(Recurrent, nn.RNN):
    """A plain recurrent network, after Elman, 1990."""

    def step(self, from_input: Tensor, from_state: Tensor, state: list) -> tuple:
        hidden = torch.tanh(from_input + from_state)
        return [hidden], None


class LSTM(Recurrent, nn.LSTM):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; forget gate: Gers et al., 2000)."""

    def step(self, from_input: Tensor, from_state: Tensor, state: list) -> tuple:
        hidden, cell = state
        i, f, g, o = (from_input + from_state).chunk(4, dim=1)  # (N, H) each
        i = torch.sigmoid(i)  # input gate
        f = torch.sigmoid(f)  # forget gate
        g = torch.tanh(g)  # candidate
        o = torch.sigmoid(o)  # output gate
        cell = f * cell + i * g
        hidden = o * torch.tanh(cell)
        return [hidden, cell], f


class GRU(Recurrent, nn.GRU):
    """Gated recurrent unit (Cho et al., 2014), with the reset gate after the product with W_hn."""

    def step(self, from_input: Tensor, from_state: Tensor, state: list) -> tuple:
        [hidden] = state
        x_r, x_z, x_n = from_input.chunk(3, dim=1)  # (N, H) each
        h_r, h_z, h_n = from_state.chunk(3, dim=1)
        r = torch.sigmoid(x_r + h_r)  # reset gate
        z = torch.sigmoid(x_z + h_z)  # update gate
        n = torch.tanh(x_n + r * h_n)  # candidate
        hidden = (1 - z) * n + z * hidden
        return [hidden], z


BACKENDS = {"torch": {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN},
            "scratch": {"lstm": LSTM, "gru": GRU, "rnn": RNN}}


def make_layers(hidden: int, dropout: float, cell: str = "lstm", backend: str = "torch",
                layers: int = 2, chrono_max: float = 100) -> nn.Module:
    """Create recurrent layers. Units of LSTM and GRU at first keep their state for about 1 to
    `chrono_max` steps: chrono initialization (Tallec and Ollivier, 2018).
    """
    # Dropout acts between layers; a single layer has none.
    module = BACKENDS[backend][cell](hidden, hidden, layers, dropout=dropout if layers > 1 else 0.0)
    for name, parameter in module.named_parameters():
        if name.startswith("bias_hh") and cell != "rnn":
            # A gate of sigmoid(log(t)) = 1 - 1 / (t + 1) keeps for about t steps.
            log_steps = torch.empty(hidden).uniform_(1, chrono_max).log()
            # The bias of the LSTM's forget gate, or of the GRU's update gate.
            parameter.data[hidden:2 * hidden] = log_steps
            if cell == "lstm":
                parameter.data[:hidden] = -log_steps  # the input gate: 1 minus the forget gate
    return module


class RNNClassifier(nn.Module):
    """Embedding, recurrent layers, the hidden state of the last step, batch norm, linear layer.

    inputs: int64 (N, T), padded at the end; lengths: int64 (N,). Returns float (N, answers).
    `recurrent`: arguments of make_layers(). forward() accepts and ignores what only Seq2Seq needs.
    """

    def __init__(self, vocabulary_size: int, answers: int, hidden: int = 64, dropout: float = 0.0,
                 **recurrent: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden)
        # Small vectors at first: those of rare words are hardly trained, and large random ones
        # would be noise that the layers memorize.
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = make_layers(hidden, dropout, **recurrent)
        self.batch_norm = nn.BatchNorm1d(hidden)  # train() sets its momentum
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, answers)

    def forward(self, inputs: Tensor, lengths: Tensor, *not_used: Any) -> Tensor:
        x = self.dropout(self.embedding(inputs.t()))  # (T, N, hidden)
        states, _ = self.layers(x)  # (T, N, hidden)
        # The last valid step of each sequence. Padding comes after it, and cannot change it.
        last = states[lengths - 1, torch.arange(len(lengths))]  # (N, hidden)
        return self.output(self.dropout(self.batch_norm(last)))  # (N, answers)


class Seq2Seq(nn.Module):
    """An encoder and a decoder of the same cell (Sutskever et al., 2014; Cho et al., 2014).

    inputs: int64 (N, S), all of one length, so lengths is not used; targets: int64 (N, T). Returns
    float (N, T, answers).

    The decoder is fed the true token with probability `teacher_forcing`, else the one that it
    predicted (scheduled sampling, Bengio et al., 2015). With 0, only the length of targets is used.
    """

    def __init__(self, vocabulary_size: int, answers: int, hidden: int = 64, dropout: float = 0.0,
                 **recurrent: Any):
        super().__init__()
        # PyTorch's initial vectors, of standard deviation 1, are kept: no digit is rare, and with
        # small vectors the model learns to sort less well.
        self.embedding = nn.Embedding(vocabulary_size, hidden)
        self.encoder = make_layers(hidden, dropout, **recurrent)
        self.decoder = make_layers(hidden, dropout, **recurrent)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, answers)

    def decode(self, tokens: Tensor, state: Any) -> tuple:
        """Logits (T, N, answers) after each of the tokens (T, N), and the state after the last."""
        x = self.dropout(self.embedding(tokens))  # (T, N, hidden)
        states, state = self.decoder(x, state)  # (T, N, hidden)
        return self.output(self.dropout(states)), state

    def forward(self, inputs: Tensor, lengths: Tensor, targets: Tensor,
                teacher_forcing: float) -> Tensor:
        x = self.dropout(self.embedding(inputs.t()))  # (S, N, hidden)
        _, state = self.encoder(x)
        # The decoder's inputs if each is the true token: END, then all targets but the last.
        fed = F.pad(targets, (1, 0), value=END).t()[:-1]  # (T, N)
        if teacher_forcing == 1:
            # All inputs of the decoder are known beforehand: all steps in one call.
            logits, _ = self.decode(fed, state)  # (T, N, answers)
            return logits.transpose(0, 1)  # (N, T, answers)
        # Otherwise one step at a time: an input may be the prediction of the step before.
        token = fed[:1]  # (1, N): END
        steps = []
        for following in targets.t():
            logits, state = self.decode(token, state)  # (1, N, answers)
            steps.append(logits)
            forced = torch.rand(following.shape, device=following.device) < teacher_forcing
            token = torch.where(forced, following, logits.argmax(2))  # (1, N)
        return torch.cat(steps).transpose(0, 1)  # (N, T, answers)


MODELS = {"classify": RNNClassifier, "generate": Seq2Seq}

# ---------------------------------------------------------------- Training


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of classes, logits (N, answers), or of tokens, logits
    (N, T, answers), which are flattened to (N * T, answers).

    No target is padding, since batches of tokens have sequences of one length (see groups()).
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def score(row: dict) -> tuple:
    """Return what epochs are compared by: validation accuracy, then the lower validation loss."""
    return row["validation_accuracy"], -row["validation_loss"]


def train(args: Namespace, data: Dataset, cell: str, folder: Path, device: torch.device) -> list:
    """Train a cell on a task; keep its last and its best epoch in `folder`. Return the history."""
    # All cells begin with the same seed, and see the same batches.
    torch.manual_seed(args.seed)
    options = {"vocabulary_size": len(data.vocabulary), "answers": len(data.answers),
               "hidden": args.hidden, "dropout": args.dropout, "cell": cell,
               "backend": args.backend, "layers": args.layers, "chrono_max": args.chrono_max}
    model = MODELS[data.task](**options).to(device)
    if data.task == "classify":
        # The running statistics average over about 2 / momentum batches, here over 4 batches or
        # 128 texts, whichever is more: long enough for a good estimate, but not so long that the
        # initial statistics still count at the end of the few steps of a small data set.
        model.batch_norm.momentum = min(0.5, args.batch_size / common.WORLD / 64)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, args.weight_decay), lr=args.lr,
                                  **common.FUSED)
    steps = len(epoch_batches(data, args, 0))
    scheduler = common.make_scheduler(optimizer, args, steps)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = []
    if args.resume and (folder / "last.pt").is_file():
        history = common.load_last(folder, args, state)
    ddp_model = common.wrap_model(model, args, device)
    autocast = common.autocast(args.precision, device, cpu_gains=False)
    folder.mkdir(parents=True, exist_ok=True)

    for epoch in common.epochs_to_train(args, history, score):
        start = time.perf_counter()
        model.train()
        metrics = []
        label = f"{data.task} {cell:4} epoch {epoch:2}/{args.epochs}"
        for indices in common.progress_bar(epoch_batches(data, args, epoch), label):
            batch = get_batch(data.train, indices, device)
            with autocast:
                logits = ddp_model(*batch, args.teacher_forcing)  # (N, answers) or (N, T, answers)
            loss = cross_entropy(logits.float(), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            norm = common.clip_gradients(model, args.clip)
            optimizer.step()
            scheduler.step()
            metrics.append({"train_loss": loss.detach(), "gradient_norm": norm,
                            "clipped": norm > args.clip})
        validation = common.on_first_process(measure, model, data.task, data.validation, device)
        row = {"epoch": epoch, **common.means(metrics),
               "validation_loss": validation["loss"],
               "validation_accuracy": validation["accuracy"],
               "seconds": time.perf_counter() - start}
        history.append(row)
        print("{label}  loss: training {train_loss:.3f}, validation {validation_loss:.3f}; "
              "accuracy {validation_accuracy:.2%}  {seconds:.1f} s".format(label=label, **row),
              flush=True)
        # Saved if this epoch is the best so far. "options" are here the arguments of the model; in
        # last.pt, those of the command line.
        best = {"model": model.state_dict(), "options": options, "task": data.task,
                "vocabulary": data.vocabulary, "answers": data.answers, "tokens": args.tokens}
        common.save_epoch(folder, args, history, state, best, score)
    return history


# ---------------------------------------------------------------- Evaluation and plots

# The color and line style of each cell, in Matplotlib's short form.
STYLES = {"lstm": "C0-", "gru": "C1--", "rnn": "C2:"}


@torch.no_grad()
def measure(model: nn.Module, task: str, sequences: SequenceSet, device: torch.device) -> dict:
    """Return the loss, the predictions (shaped as the targets), the probability of each, and the
    accuracy of whole answers and of tokens. A decoder is fed its own predictions, as at inference.
    """
    model.eval()  # batch norm by its running statistics, no dropout
    loss = 0.0
    count = 0
    predicted = sequences.targets.clone()  # the padding stays: it is no mistake
    probabilities = torch.zeros(len(predicted))
    for group in groups(task, sequences.lengths):
        for indices in group.split(500):
            batch = get_batch(sequences, indices, device)
            logits = model(*batch, 0.0)
            loss += cross_entropy(logits, batch.targets, reduction="sum").item()
            count += batch.targets.numel()
            # (N,) each, of classes, or (N, T), of tokens; `shape` is (N, 1) or (N, T).
            log_probability, likeliest = F.log_softmax(logits, dim=-1).max(-1)
            shape = batch.targets.shape
            predicted[indices, :shape[1]] = likeliest.view(shape).cpu()
            probabilities[indices] = log_probability.view(shape).sum(1).exp().cpu()
    mistakes = predicted != sequences.targets
    return {"loss": loss / count, "predicted": predicted, "probabilities": probabilities,
            "accuracy": 1 - mistakes.any(1).double().mean().item(),
            "token_accuracy": 1 - mistakes.sum().item() / count}


def load_model(path: Path, device: torch.device) -> tuple:
    """Return the model saved at `path`, and its checkpoint."""
    checkpoint = common.load_checkpoint(path, "rnn.py")
    model = MODELS[checkpoint["task"]](**checkpoint["options"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), checkpoint


def evaluate(args: Namespace, data: Dataset, histories: dict, folder: Path,
             device: torch.device) -> dict:
    """Measure the best model of each cell on the test set; draw the plots of a task. Return
    {cell: test metrics}.
    """
    title = f"{data.task} on {args.data}"
    results = {}
    accuracies = {}
    for cell, history in histories.items():
        cell_folder = folder / f"{data.task}-{cell}"
        model, _ = load_model(cell_folder / "best.pt", device)
        print(f"\n{data.task} {cell}, best epoch, on the test set:")
        test = measure(model, data.task, data.test, device)
        if data.task == "classify":
            results[cell] = common.classification_report(
                test["predicted"].flatten(), data.test.targets.flatten(), data.answers)
            common.print_report(results[cell])
        else:
            results[cell] = {"exact_match": test["accuracy"],
                             "token_accuracy": test["token_accuracy"]}
            print("exact match {accuracy:.2%}, tokens {token_accuracy:.2%}".format(**test))
        common.write_predictions(
            cell_folder, data.test_texts, answer_texts(data, data.test.targets),
            answer_texts(data, test["predicted"]), test["probabilities"].tolist())
        accuracies[cell] = [row["validation_accuracy"] for row in history]
        # A decoder is validated on its own predictions, but trained with teacher forcing: its
        # validation loss may be much higher without overfitting.
        figure, _ = common.plot_history(history, args, f"{cell}, {title}", {
            "loss": {"training": "train_loss", "validation": "validation_loss"},
            "fraction correct": {"validation": "validation_accuracy"},
            "gradient norm": {"before clipping": "gradient_norm"}})
        figure.savefig(cell_folder / "curves.png")
    plot_cells(folder / f"{data.task}.png", title, accuracies, xlabel="epoch",
               ylabel="fraction correct (validation)", ylim=(0, 1.02))
    if data.task == "classify":
        look_inside(data, list(histories), folder, args.seed, title)
    return results


def answer_texts(data: Dataset, numbers: Tensor) -> list:
    """Return a text for each row of `numbers`, int64 (N, length), which are targets or predictions:
    the name of the class, or the tokens up to END.
    """
    if data.task == "classify":
        return [data.answers[i] for i in numbers.flatten()]
    texts = ["".join(data.answers[i] for i in row) for row in numbers]
    return [text.partition(SPECIAL[END])[0] for text in texts]


def plot_cells(path: Path, title: str, curves: dict, **settings: Any) -> None:
    """Plot {name: values at 1, 2, ...}, a curve each, and call axis.set(**settings).

    The first word of a name is the cell. Curves with "untrained" in their names are pale.
    """
    figure, ((axis,),) = common.new_figure(1, 1, (10, 4), title)
    # A line style for each cell: dashed or dotted, a curve hides none that was drawn before it.
    for name, values in curves.items():
        style = STYLES[name.split()[0]]
        alpha = 0.4 if "untrained" in name else 1
        axis.plot(range(1, len(values) + 1), values, style, alpha=alpha, label=name)
    axis.set(**settings)
    # Labels are turned if one is longer than a character (two: "$" is escaped), as words are.
    if any(len(label) > 2 for label in settings.get("xticklabels", [])):
        axis.tick_params(axis="x", rotation=90)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path)


def look_inside(data: Dataset, cells: list, folder: Path, seed: int, title: str) -> None:
    """Plot how far back gradients reach, and how open the forget or update gate is at a token."""
    lengths = data.test.lengths
    # Only the longest texts, which need no padding: often few, and thirty at most.
    indices = torch.where(lengths == lengths.max())[0][:30]
    batch = get_batch(data.test, indices, "cpu")
    # The text whose length is nearest to 60 tokens. At most 80 are shown: their labels must fit.
    nearest = (lengths - 60).abs().argmin()  # no dimensions; [nearest, None] is a batch of one
    text = data.test.inputs[nearest, :lengths[nearest]]  # (T,)
    norms = {}
    gates = {}
    for cell in cells:
        checkpoint = common.load_checkpoint(folder / f"classify-{cell}/best.pt", "rnn.py")
        # Created as in train(): with the weights that training began with. The layers are those of
        # this file, which keep a trace; their weights have the same names. In double precision,
        # since a gradient that vanishes would be 0 in single precision.
        torch.manual_seed(seed)
        checkpoint["options"]["backend"] = "scratch"
        model = RNNClassifier(**checkpoint["options"]).double().eval()
        norms[f"{cell} untrained"] = gradient_norms(model, batch)
        model.load_state_dict(checkpoint["model"])
        norms[f"{cell} trained"] = gradient_norms(model, batch)
        if cell != "rnn":
            model(text[None], lengths[nearest, None])  # (1, T) and (1,)
            opened = torch.cat([gate for _, gate in model.layers.trace[0]])  # (T, hidden)
            unit = opened.std(0, unbiased=False).argmax()  # the one whose gate moves most
            gates[f"{cell} gate"] = opened[:80, unit].detach()
    plot_cells(folder / "gradients.png", title, norms, xlabel="steps before the end",
               ylabel="gradient norm / that at the end", yscale="log")
    names = [common.escape_dollars(data.vocabulary[i][:20]) for i in text[:80]]
    if gates:
        plot_cells(folder / "gates.png", title, gates, xticks=range(1, len(names) + 1),
                   xticklabels=names, ylabel="forget or update gate of a unit of layer 1")


def gradient_norms(model: RNNClassifier, batch: SequenceSet) -> Tensor:
    """Return the norm of the loss's gradient at 1, 2, ..., T - 1 steps before the end: (T - 1,).

    The gradient is with respect to the first layer's cell (LSTM) or hidden state (GRU, RNN). Each
    norm is a mean over the sequences, divided by that at the last step.

    The model has backend scratch; the sequences, to classify, all have T steps.
    """
    loss = cross_entropy(model(*batch), batch.targets, reduction="sum")
    # The last part of a state: the LSTM's cell, or the only hidden state. T times (N, H).
    states = [state[-1] for state, _ in model.layers.trace[0]]
    gradients = torch.stack(torch.autograd.grad(loss, states))  # (T, N, H)
    norms = gradients.norm(dim=2).mean(1)  # (T,)
    return (norms / norms[-1]).flip(0)[1:]


@torch.no_grad()
def predict(args: Namespace, device: torch.device) -> None:
    """Print `text <tab> class <tab> probability` for each text of --predict."""
    # Of the classifiers in --out, the one with the best validation accuracy.
    paths = [Path(args.out, f"classify-{cell}/best.pt") for cell in args.cells or BACKENDS["torch"]]
    found = [path for path in paths if path.is_file()]
    # If none is found, load_model() says which is missing.
    loaded = [load_model(path, device) for path in found or paths]
    # "metrics" is the row of the history that save_epoch() puts into best.pt.
    model, checkpoint = max(loaded, key=lambda pair: score(pair[1]["metrics"]))
    texts = [common.clean_text(text) for text in common.prediction_inputs(args.predict)]
    sequences = tokenize(texts, checkpoint["tokens"])
    unknown = sorted(set().union(*sequences).difference(checkpoint["vocabulary"]))
    if unknown:
        common.warn(f"not in the vocabulary, read as <unk>: {unknown[:20]}")
    for text, numbers in zip(texts, encode(sequences, checkpoint["vocabulary"])):
        logits = model(numbers[None].to(device), torch.tensor([len(numbers)]))  # (1, answers)
        probability, label = F.softmax(logits, dim=1).max(1)
        print(f"{text}\t{checkpoint['answers'][label]}\t{probability.item():.4f}")


# ---------------------------------------------------------------- Command line


def build_parser() -> common.ArgumentParser:
    # Each training has a subfolder for its checkpoints, such as classify-lstm. float32: matrices
    # this small hardly gain from bfloat16; and on a GPU, autocast runs torch.nn's recurrent layers
    # in float16, whatever its own type is.
    subfolders = [f"{task}-{cell}" for task in MODELS for cell in BACKENDS["torch"]]
    parser = common.option_parser("rnn.py", __doc__, out="runs/rnn", epochs=10, batch_size=128,
                                  lr=5e-3, warmup=0.1, weight_decay=0.01, clip=1.0, patience=5,
                                  precision="float32", subfolders=subfolders)
    count = common.number(int, 1)
    probability = common.number(float, 0, 1)
    add = parser.add_argument_group("options of the RNN").add_argument
    add("--data", default="synthetic", help="synthetic, or a CSV or TSV of text and label")
    add("--synthetic-size", type=common.number(int, 100), default=2500,
        help="synthetic strings, all sets; five times as many to sort")
    add("--tokens", choices=["chars", "words"], default="chars", help="what texts are split into")
    add("--tasks", choices=list(MODELS), nargs="+", default=list(MODELS),
        help="tasks to train; --data FILE supports classify only")
    add("--cells", choices=list(BACKENDS["torch"]), nargs="+",
        help="cells to compare (default: lstm, gru; also rnn to classify synthetic strings)")
    add("--backend", choices=list(BACKENDS), default="torch",
        help="cells of torch.nn or of rnn.py")
    add("--hidden", type=count, default=64, help="units of a layer, and width of the embedding")
    add("--layers", type=count, default=2, help="recurrent layers")
    add("--dropout", type=probability, default=0.1, help="dropout probability")
    add("--chrono-max", type=common.number(float, 1), default=100,
        help="longest initial time scale of a unit, in steps (chrono initialization)")
    add("--teacher-forcing", type=probability, default=1.0,
        help="probability that a decoder is fed the true token, not the one it predicted")
    add("--predict", nargs="+", metavar="TEXT", help="classify texts; - reads them from stdin")
    return parser


def choose_cells(args: Namespace) -> dict:
    """Return {task: cells to train on it}. Raises UserError for options that exclude each other."""
    cells = {"classify": ["lstm", "gru", "rnn"], "generate": ["lstm", "gru"]}
    if args.data != "synthetic":
        cells = {"classify": ["lstm", "gru"]}
    elif args.tokens == "words":
        raise common.UserError("--tokens words: synthetic strings have no words; add --data FILE")
    # dict.fromkeys() drops cells that are named twice.
    chosen = {task: dict.fromkeys(args.cells or cells[task])
              for task in args.tasks if task in cells}
    if not chosen:
        raise common.UserError("--tasks generate needs synthetic data; leave out --data")
    return chosen


def main() -> None:
    args = common.parse_options(build_parser())
    device = common.select_device(args)
    if args.predict:
        predict(args, device)
        return
    cells = choose_cells(args)
    datasets = [load_data(args, task) for task in cells]
    test = {}
    rows = []  # of all histories
    with common.run_folder(args) as folder:
        for data in datasets:
            args.checksum = data.checksum  # load_last() refuses other data
            common.describe_sets(f"{data.task} on {args.data}", device, data.train.lengths,
                                 data.validation.lengths, data.test.lengths)
            histories = {}
            for cell in cells[data.task]:
                histories[cell] = train(args, data, cell, folder / f"{data.task}-{cell}", device)
                rows += histories[cell]
            if common.RANK == 0:
                for cell, results in evaluate(args, data, histories, folder, device).items():
                    test.setdefault(cell, {}).update(results)
        if common.RANK == 0:
            common.write_summary(folder, args, rows, test)
            print(f"\nplots and checkpoints are in {args.out}")


if __name__ == "__main__":
    common.run_main(main)
