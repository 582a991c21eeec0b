"""rnn.py: the cells against torch.nn, padding, tasks, training, resume, own data, prediction."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import common
import rnn

PAIRS = [(rnn.LSTM, nn.LSTM), (rnn.GRU, nn.GRU), (rnn.RNN, nn.RNN)]
SMALL = ["--epochs", 2, "--synthetic-size", 200, "--hidden", 8, "--batch-size", 16]


def tensors(state):
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["padded", "batch first", "packed", "packed, sorted"])
def test_cells_equal_those_of_the_library(ours, theirs, dtype, tolerance, bidirectional, form):
    torch.manual_seed(0)
    options = {"bidirectional": bidirectional, "batch_first": form == "batch first"}
    library = theirs(5, 7, 2, **options).to(dtype)
    own = ours(5, 7, 2, **options).to(dtype)
    own.load_state_dict(library.state_dict())
    lengths = [9, 8, 8, 3, 1] if form == "packed, sorted" else [3, 9, 1, 8, 8]
    x = torch.randn(9, 5, 5, dtype=dtype)
    directions = 2 if bidirectional else 1
    initial = tuple(torch.randn(2 * directions, 5, 7, dtype=dtype)
                    for _ in range(2 if theirs is nn.LSTM else 1))
    results = []
    for module in (library, own):
        x_leaf = x.clone().requires_grad_()
        state = tuple(s.clone().requires_grad_() for s in initial)
        inputs = x_leaf.transpose(0, 1) if form == "batch first" else x_leaf
        if form.startswith("packed"):
            inputs = pack_padded_sequence(inputs, lengths, enforce_sorted="sorted" in form)
        outputs = []
        for given in (None, state if len(state) > 1 else state[0]):
            output, final = module(inputs, given)
            if form.startswith("packed"):
                output = pad_packed_sequence(output)[0]
            outputs += [output, *tensors(final)]
        sum((o * torch.linspace(-1, 1, o.numel(), dtype=dtype).view(o.shape)).sum()
            for o in outputs).backward()
        gradients = [x_leaf.grad, *(s.grad for s in state), *(p.grad for p in module.parameters())]
        results.append([*outputs, *gradients])
    for one, other in zip(*results):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * max(1, one.abs().max())


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_state_dicts_go_either_way(ours, theirs):
    one, other = ours(3, 4, 2, bidirectional=True), theirs(3, 4, 2, bidirectional=True)
    assert {k: v.shape for k, v in one.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()}
    one.load_state_dict(other.state_dict())
    other.load_state_dict(one.state_dict())


def test_dropout_lies_between_the_layers_alone():
    one, two = rnn.LSTM(3, 4, 1), rnn.LSTM(3, 400, 2, dropout=0.5)
    x = torch.randn(5, 6, 3)
    assert torch.equal(one(x)[0], one(x)[0])
    assert not torch.equal(two(x)[0], two(x)[0])
    assert torch.equal(two.eval()(x)[0], two(x)[0])


@pytest.mark.parametrize("cell", [rnn.LSTM, rnn.GRU, rnn.RNN])
def test_gradcheck_of_the_cells(cell):
    module = cell(2, 3).double()
    x = torch.randn(4, 2, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda inputs: module(inputs)[0], (x,))


@pytest.mark.parametrize("backend", ["torch", "scratch"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
def test_classifier_padded_equals_alone(backend, cell, bidirectional, continuous):
    torch.manual_seed(0)
    model = rnn.RNNClassifier(6, 3, cell, backend, 8, 2, bidirectional=bidirectional,
                              continuous=continuous).eval()
    lengths = torch.tensor([4, 9, 1, 7])
    inputs = torch.randn(4, 9, 6) if continuous else torch.randint(3, 6, (4, 9))
    with torch.no_grad():
        together = model(inputs, lengths)
        for i, n in enumerate(lengths.tolist()):
            alone = model(inputs[i:i + 1, :n], lengths[i:i + 1])
            assert torch.allclose(together[i:i + 1], alone, atol=1e-6)
        changed = inputs.clone()
        changed[0, 4:] = changed[1, 4:]  # another padding
        assert torch.allclose(model(changed, lengths), together, atol=1e-6)


def part_of(texts):
    vocabulary = ["", "", "\n", *"abcde"]
    inputs, lengths = rnn.encode(texts, vocabulary, rnn.PAD)
    return rnn.Part(inputs, lengths, None), len(vocabulary)


def test_frequent_ngrams_come_three_times_and_hold_no_padding():
    part, base = part_of(["abc", "abd", "ab", "cd", "cdab"])
    a, b = 3, 4
    start = rnn.END * base + a
    known = rnn.frequent_ngrams(part, base).tolist()
    assert known[:-1] == [start, a * base + b, start * base + b]  # ^a, ab and ^ab


def test_ngrams_end_at_their_step_and_unknown_ones_add_nothing():
    torch.manual_seed(0)
    part, base = part_of(3 * ["abcdeabcde"])
    embedding = rnn.NgramEmbedding(base, 4, rnn.frequent_ngrams(part, base), 0.5).eval()
    inputs = part.inputs[:1].t()
    assert embedding(inputs).abs().max() == 0  # at first
    with torch.no_grad():
        embedding.embedding.weight[:-1].normal_()
    before = embedding(inputs)
    assert not torch.equal(before[1], before[6])  # the same symbols, but one at the start
    changed = inputs.clone()
    changed[4] = 3
    steps = (embedding(changed) != before).any(2).flatten()
    assert torch.where(steps)[0].tolist() == [4, 5, 6, 7, 8]  # up to five symbols together
    assert embedding(changed)[4].abs().max() == 0  # nothing known there


@pytest.mark.parametrize("bidirectional", [False, True])
def test_classifier_with_ngrams_padded_equals_alone(bidirectional):
    torch.manual_seed(0)
    part, base = part_of(3 * ["abcdeabcde", "abcdeabcd", "cde", "a"])
    model = rnn.RNNClassifier(base, 3, hidden=8, bidirectional=bidirectional,
                              known=rnn.frequent_ngrams(part, base)).eval()
    with torch.no_grad():
        for part_of_it in (model.longer, model.votes):
            part_of_it.embedding.weight[:-1].normal_()
        together = model(part.inputs, part.lengths)
        for i, n in enumerate(part.lengths.tolist()):
            alone = model(part.inputs[i:i + 1, :n], part.lengths[i:i + 1])
            assert torch.allclose(together[i:i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "scratch"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("teacher_forcing", [0.0, 1.0])
def test_generation_padded_equals_alone(backend, cell, teacher_forcing):
    torch.manual_seed(0)
    model = rnn.Seq2Seq(8, cell, backend, 16, 2).eval()
    lengths = torch.tensor([4, 9, 1, 7])
    inputs, targets = torch.randint(3, 8, (4, 9)), torch.randint(3, 8, (4, 10))
    with torch.no_grad():
        together = model(inputs, lengths, targets, teacher_forcing)
        for i, n in enumerate(lengths.tolist()):
            alone = model(inputs[i:i + 1, :n], lengths[i:i + 1], targets[i:i + 1, :n + 1],
                          teacher_forcing)
            assert torch.allclose(together[i:i + 1, :n + 1], alone, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_both_backends_start_and_learn_alike(cell):
    results = []
    for backend in ("torch", "scratch"):
        common.seed_everything(3)
        model = rnn.RNNClassifier(6, 3, cell, backend, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(5):
            inputs = torch.randint(3, 6, (8, 12), generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(model(inputs, torch.full((8,), 12)), inputs[:, 0] - 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(loss.item())
    assert results[0] == pytest.approx(results[1], abs=1e-5)


def test_teacher_forcing_feeds_true_or_predicted_symbols():
    torch.manual_seed(0)
    model = rnn.Seq2Seq(7, hidden=8).eval()
    inputs, lengths = torch.randint(3, 7, (4, 5)), torch.full((4,), 5)
    targets, others = torch.randint(3, 7, (2, 4, 6))
    with torch.no_grad():
        greedy = model(inputs, lengths, targets, 0.0)
        assert torch.equal(greedy, model(inputs, lengths, others, 0.0))  # targets are not looked at
        forced = model(inputs, lengths, targets, 1.0)
        almost = model(inputs, lengths, targets, 1 - 1e-9)  # step by step, every symbol forced
        assert torch.allclose(forced, almost, atol=1e-6)
        own = model(inputs, lengths, greedy.argmax(2), 1.0)  # forced with what it would predict
        assert torch.allclose(own, greedy, atol=1e-6)


def test_batch_norm_and_loss_never_see_padding():
    model = rnn.RNNClassifier(6, 3, hidden=8).train()
    lengths = torch.tensor([2, 5, 4])
    one = torch.randint(3, 6, (3, 5))
    other = one.clone()
    other[0, 2:] = 4
    assert torch.allclose(model(one, lengths), model(other, lengths), atol=1e-6)
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[3, 2, rnn.IGNORE], [4, 4, 2]])
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    logits[0, 2] = 100 * torch.randn(7)
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, -2), targets.flatten()))


def test_temporal_order():
    texts, labels = rnn.temporal_order(2000, 0)
    assert rnn.temporal_order(2000, 0) == (texts, labels)
    assert rnn.temporal_order(2000, 1) != (texts, labels)
    assert len(set(labels)) == 8
    assert min(map(len, texts)) == 20 and max(map(len, texts)) == 100
    for text, label in zip(texts, labels):
        places = [i for i, symbol in enumerate(text) if symbol in "XY"]
        assert "".join(text[i] for i in places) == label and len(places) == 3
        assert text[0] == "E" and text[-1] == "B" and set(text[1:-1]) <= set("abcdXY")


def test_sorting():
    texts, answers = rnn.sorting(500, 0)
    assert [sorted(text) for text in texts] == [list(answer) for answer in answers]
    assert min(map(len, texts)) == 8 and max(map(len, texts)) == 16


@pytest.mark.parametrize("count, size", [(2, 64), (3, 1), (65, 64), (9000, 64), (7, 2), (99, 500)])
@pytest.mark.parametrize("groups", [1, 4])
def test_batches_hold_everything_once_and_little_padding(count, size, groups):
    lengths = torch.randint(20, 101, (count,))
    chunks = rnn.batches(lengths, size, groups)
    assert sorted(torch.cat(chunks).tolist()) == list(range(count))
    assert all(2 <= len(chunk) <= groups * max(size // groups, 3) for chunk in chunks)
    if count == 9000 and groups == 1:
        padded = sum(len(chunk) * int(lengths[chunk].max()) for chunk in chunks)
        assert 1 - int(lengths.sum()) / padded < 0.02


@pytest.mark.parametrize("bidirectional, most", [(False, 0.1), (True, 0)])
def test_layers_see_little_padding_however_lengths_are_mixed(bidirectional, most):
    model, computed = rnn.RNNClassifier(6, 3, hidden=4, bidirectional=bidirectional), []
    model.layers.register_forward_hook(lambda _, inputs, output: computed.append(
        inputs[0].shape[0] * inputs[0].shape[1]))
    lengths = torch.randint(20, 101, (500,))
    model(torch.randint(3, 6, (500, 100)), lengths)
    assert 0 <= 1 - int(lengths.sum()) / sum(computed) <= most


def write_table(path, rows, header=("text", "label")):
    with open(str(path), "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if str(path).endswith(".tsv") else ",").writerows(
            [header, *rows])
    return path


def words(count=60):
    return [(("ab" if i % 2 else "xyz") * (1 + i % 4), "odd" if i % 2 else "even, class")
            for i in range(count)]


def test_vocabulary_comes_from_the_training_part_alone(tmp_path):
    rows = [(text + chr(0x4e00 + i), label) for i, (text, label) in enumerate(words())]
    path = write_table(tmp_path / "a.tsv", rows)
    data = rnn.load_data(Namespace(data=str(path), seed=0, ngrams=False), "classify")
    assert data.symbols[3:] == list("abxyz")  # the characters that come once are unknown
    assert data.answers == ["even, class", "odd"]
    sizes = [len(part.lengths) for part in (data.train, data.validation, data.test)]
    assert sum(sizes) == 60 and sizes[1:] == [6, 6]
    for part in (data.train, data.validation, data.test):
        last = part.inputs[torch.arange(len(part.lengths)), part.lengths - 1]
        assert (last == rnn.UNKNOWN).all()


@pytest.mark.parametrize("header, row", [
    (("label", "text"), ("c", "xx")), (("text", "label"), ("xx", "c")),
    (("xx", "c", "more"), ("xx", "c", "z")), (("id", "label", "text"), ("1", "c", "xx"))])
def test_columns_by_name_or_else_the_first_two(tmp_path, header, row):
    path = write_table(tmp_path / "a.csv", 5 * [row] + 5 * [[v + "2" for v in row]], header)
    data = rnn.load_data(Namespace(data=str(path), seed=0, ngrams=False), "classify")
    assert data.symbols[3:] == ["2", "x"] and data.answers == ["c", "c2"]
    assert rnn.spell(data.train.targets[0], data.answers) == "c"


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), (b"", "rows of classes"), (b"text,label\n", "rows of classes"),
    (b"text,label\nx,a\ny\n", "line 3"), (b"\xff\xfe\x00bad", "UTF-8"), (b"text\nx\n", "line 1"),
    (b"text,label\na,b\na,b\na,b\na,c\n", "rows of c"),
    (b"review,stars\na,b\na,b\na,b\na,c\na,c\na,c\n", "rows of stars"),
    (b"text,label\na,b\na,b\na,b\n", "classes")])
def test_bad_tables_are_one_line(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.csv").write_bytes(content)
    done = run("rnn.py", "--data", "a.csv", status=2)
    assert done.stderr.startswith("rnn.py: error: --data a.csv") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "runs" / "rnn" / "last.pt").exists()


def test_default_job_small(run, tmp_path):
    done = run("rnn.py", *SMALL, "--cells", "lstm", "gru", "rnn")
    out = tmp_path / "runs" / "rnn"
    for name in ("last.pt", "best.pt", "history.csv", "summary.json", "curves.png", "gates.png",
                 "gradients.png", "predictions.png"):
        assert (out / name).stat().st_size > 0, name
    summary = json.loads((out / "summary.json").read_text())
    assert summary["script"] == "rnn.py" and summary["data"] == "synthetic"
    assert set(summary["test"]) == {"lstm", "gru", "rnn"}
    for cell in summary["test"].values():
        assert 0 <= cell["accuracy"] <= 1 and 0 <= cell["exact_match"] <= 1
    assert len((out / "history.csv").read_text().splitlines()) == 1 + 3 * 2 * 2
    assert max(map(len, done.stdout.splitlines())) <= 80
    table = done.stdout[done.stdout.index("task      cell"):].splitlines()
    assert len(table) >= 7 and table[1].startswith("classify  lstm")
    line = run("rnn.py", "--predict", "EaXbYcXdB").stdout
    assert line.startswith("EaXbYcXdB\t") and line.count("\t") == 2
    line = run("rnn.py", "--tasks", "generate", "--predict", "31415").stdout
    assert line.startswith("31415\t") and line.count("\n") == 1
    beside = run("rnn.py", "--tasks", "generate", "--predict", "31415", 5 * "31415").stdout
    assert beside.split("\n")[0] + "\n" == line  # probability included


def weights(out):
    runs = common.load_checkpoint(out / "last.pt", "rnn.py")["runs"]
    return {(name, key): value for name, run in runs.items()
            for key, value in run["last"]["model"].items()}


def test_resume_is_bit_for_bit_and_loses_no_run(run, tmp_path):
    run("rnn.py", *SMALL, "--out", "whole", "--dropout", 0.1, "--teacher-forcing", 0.5,
        "--ngrams")
    program = ("import rnn, common, sys\n"
               "saved, save = [], common.save_checkpoint\n"
               "def stop(path, checkpoint):\n"
               "    save(path, checkpoint)\n"
               "    saved.append(path.name)\n"
               "    if saved.count('last.pt') == STOP:\n"
               "        raise KeyboardInterrupt\n"
               "common.save_checkpoint = stop\n"
               "common.run_main(rnn.main)\n")
    for stop, options in ((3, ["--dropout", "0.1", "--teacher-forcing", "0.5",
                               "--ngrams", *map(str, SMALL)]), (4, ["--resume"])):
        path = tmp_path / "job.py"
        path.write_text(program.replace("STOP", str(stop)))
        done = subprocess.run([sys.executable, str(path), "--out", "parts", *options],
                              cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=300,
                              env={**os.environ, "PYTHONPATH": os.path.dirname(common.__file__)})
        assert done.returncode == 130, done.stderr
        assert "--resume" in done.stdout
    run("rnn.py", "--out", "parts", "--resume")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() and len({name for name, _ in one}) == 4
    assert all(torch.equal(one[key], other[key]) for key in one)
    summaries = [json.loads((tmp_path / out / "summary.json").read_text())["test"]
                 for out in ("whole", "parts")]
    for cell in ("lstm", "gru"):
        for metric in ("accuracy", "exact_match"):
            assert summaries[0][cell][metric] == summaries[1][cell][metric]


def test_own_data_and_prediction(run, tmp_path):
    write_table(tmp_path / "a.csv", words(120))
    run("rnn.py", "--data", "a.csv", "--epochs", 15, "--hidden", 16, "--batch-size", 16,
        "--bidirectional", "--layers", 2, "--ngrams")
    summary = json.loads((tmp_path / "runs/rnn/summary.json").read_text())
    assert summary["data"] == "a.csv"
    assert max(cell["accuracy"] for cell in summary["test"].values()) == 1.0
    done = run("rnn.py", "--predict", "-", stdin="abab\nxyzxyz\n\n\u4e2d\u6587\n")
    lines = done.stdout.split("\n")
    assert [line.split("\t")[:2] for line in lines[:2]] == [
        ["abab", "odd"], ["xyzxyz", "even, class"]]
    assert len(lines) == 5 and all(line.count("\t") == 2 for line in lines[:4])
    probability = float(lines[0].split("\t")[2])
    assert 0.5 < probability <= 1
    assert run("rnn.py", "--predict", "abab").stdout == lines[0] + "\n"
    assert run("rnn.py", "--predict", "-", stdin="").stdout == ""


def test_a_loss_that_is_not_finite_stops_the_run(run):
    done = run("rnn.py", *SMALL, "--lr", 1e9, "--weight-decay", 1e9, "--clip", 0, "--tasks",
               "classify", status=2)
    assert done.stderr.count("\n") == 1
    assert re.fullmatch(r"rnn.py: error: the loss or its gradient is not finite at step \d; try a "
                        r"lower --lr or a --clip \(what was saved up to the last whole epoch is "
                        r"good\)\n", done.stderr)


def test_early_stopping(run, tmp_path):
    done = run("rnn.py", *SMALL, "--epochs", 9, "--lr", 0, "--patience", 2, "--cells", "gru",
               "--tasks", "classify")
    assert "stopping early" in done.stdout
    assert len((tmp_path / "runs/rnn/history.csv").read_text().splitlines()) < 9


@pytest.mark.parametrize("options, message", [
    (["--cells", "elman"], "--cells"), (["--teacher-forcing", "2"], "--teacher-forcing"),
    (["--predict", "abc"], "best.pt"), (["--resume"], "last.pt"), (["--hidden", "0"], "--hidden")])
def test_mistakes_are_one_line(run, options, message):
    done = run("rnn.py", *options, status=2)
    assert done.stderr.startswith("rnn.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_sigterm_ends_cleanly(tmp_path):
    process = subprocess.Popen([sys.executable, rnn.__file__, "--synthetic-size", "300"],
                               cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True)
    for line in process.stdout:
        if "lstm  1/" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume" in stdout and "Traceback" not in stderr


def test_gradient_at_the_last_state_is_that_of_the_head():
    torch.manual_seed(0)
    for cell in ("lstm", "gru", "rnn"):
        model = rnn.RNNClassifier(6, 3, cell, "scratch", 4).double().eval()
        inputs, targets = torch.randint(3, 6, (3, 5)), torch.tensor([0, 1, 2])
        norms = rnn.gradient_norms(model, inputs, targets)
        assert norms.shape == (5,) and (norms > 0).all()
        model.batch_norm.running_var.fill_(2.0)
        norms = rnn.gradient_norms(model, inputs, targets)
        # After the last step the loss depends on the hidden state through the head alone.
        state = model.layers.past[-1][0]
        leaf = state[0].detach().requires_grad_()
        gradient, = torch.autograd.grad(
            F.cross_entropy(model.output(model.batch_norm(leaf)), targets, reduction="sum"), leaf)
        if cell != "lstm":
            assert norms[-1].item() == pytest.approx(gradient.norm(dim=1).mean().item())
