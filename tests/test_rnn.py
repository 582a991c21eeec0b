"""rnn.py: the cells against torch.nn, padding, the data, training, own texts, prediction."""

import csv
import json
import random

import pytest
import torch
import torch.nn.functional as F

import common
import rnn

CELLS = ["lstm", "gru", "rnn"]
CPU = torch.device("cpu")
SMALL = ["--epochs", 2, "--synthetic-size", 200, "--hidden", 8, "--batch-size", 16]


# ---------------------------------------------------------------- Cells


def outputs_and_gradients(module, x, state):
    """What a layer returns with a state of zeros and with `state`, and the gradients of all."""
    x = x.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    outputs = []
    for given in (None, tuple(state) if len(state) == 2 else state[0]):
        output, final = module(x, given)
        outputs += [output, *(final if isinstance(final, tuple) else [final])]
    sum(output.pow(3).sum() for output in outputs).backward()
    return outputs + [leaf.grad for leaf in (x, *state, *module.parameters())]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_cells_equal_those_of_the_library(cell, layers, dtype, tolerance):
    torch.manual_seed(0)
    library = rnn.BACKENDS["torch"][cell](5, 7, layers).to(dtype)
    scratch = rnn.BACKENDS["scratch"][cell](5, 7, layers).to(dtype)
    scratch.load_state_dict(library.state_dict())
    x = torch.randn(9, 4, 5, dtype=dtype)
    state = [torch.randn(layers, 4, 7, dtype=dtype) for _ in range(2 if cell == "lstm" else 1)]
    expected = outputs_and_gradients(library, x, state)
    for one, other in zip(expected, outputs_and_gradients(scratch, x, state)):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * max(1, one.abs().max())
    library.load_state_dict(scratch.state_dict())


def test_one_step_of_each_cell_by_hand():
    one = torch.ones(1, 1)
    (hidden, cell), forget = rnn.LSTM.step(None, torch.tensor([[1.0, 3.0, 1.5, 1.0]]),
                                           torch.zeros(1, 4), [0.5 * one, 2 * one])
    assert [hidden.item(), cell.item(), forget.item()] == pytest.approx(
        [0.7225, 2.5669, 0.9526], abs=1e-4)
    (hidden,), update = rnn.GRU.step(None, torch.tensor([[0.0, 2.0, 1.0]]),
                                     torch.tensor([[0.0, 0.0, 0.5]]), [0.5 * one])
    assert [hidden.item(), update.item()] == pytest.approx([0.5415, 0.8808], abs=1e-4)


def test_chrono_initialization_sets_the_gates_that_keep():
    for cell in ("lstm", "gru"):
        layers = rnn.make_layers(200, 0.0, cell, chrono_max=50)
        for bias in (layers.bias_hh_l0, layers.bias_hh_l1):
            steps = bias[200:400].exp()
            assert 1 <= steps.min() < 5 and 45 < steps.max() <= 50
        if cell == "lstm":
            assert torch.equal(layers.bias_hh_l0[:200], -layers.bias_hh_l0[200:400])


@pytest.mark.parametrize("backend", ["torch", "scratch"])
@pytest.mark.parametrize("task", list(rnn.MODELS))
def test_dropout_is_at_work_at_every_place_and_only_in_training(backend, task):
    torch.manual_seed(0)
    model = rnn.MODELS[task](8, 8, hidden=16, dropout=0.5, backend=backend).eval()
    batch = [torch.randint(3, 8, (4, 6)), torch.full((4,), 6), torch.randint(3, 8, (4, 7)), 1.0]
    assert torch.equal(model(*batch), model(*batch))
    sizes = []
    model.dropout.register_forward_hook(lambda module, given, out: sizes.append(given[0].shape))
    model(*batch)
    # On the embeddings of the inputs (and of the decoder's), and on the last layer's states.
    assert sizes == {"classify": [(6, 4, 16), (4, 16)],
                     "generate": [(6, 4, 16), (7, 4, 16), (7, 4, 16)]}[task]
    # Between the layers, too.
    layers = [model.layers] if task == "classify" else [model.encoder, model.decoder]
    for place in (model.dropout, *layers):
        place.train()
        assert not torch.equal(model(*batch), model(*batch))
        place.eval()


# ---------------------------------------------------------------- Models


@pytest.mark.parametrize("backend", ["torch", "scratch"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_never_influences_a_classification(backend, cell):
    torch.manual_seed(0)
    model = rnn.RNNClassifier(6, 3, hidden=8, cell=cell, backend=backend)
    lengths = torch.tensor([4, 9, 1, 7])
    inputs = torch.randint(3, 6, (4, 9))
    changed = inputs.clone()
    changed[0, 4:] = changed[1, 4:]
    changed[2, 1:] = rnn.PAD
    assert torch.allclose(model(changed, lengths), model(inputs, lengths), atol=1e-6)  # batch norm
    together = model.eval()(inputs, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = model(inputs[i:i + 1, :n], lengths[i:i + 1])
        assert torch.allclose(together[i:i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "scratch"])
@pytest.mark.parametrize("cell", CELLS)
def test_teacher_forcing_feeds_true_or_predicted_tokens(backend, cell):
    torch.manual_seed(0)
    model = rnn.Seq2Seq(7, 7, hidden=8, cell=cell, backend=backend).eval()
    inputs, lengths = torch.randint(3, 7, (4, 5)), torch.full((4,), 5)
    targets, others = torch.randint(3, 7, (2, 4, 6))
    free = model(inputs, lengths, targets, 0.0)
    assert torch.equal(free, model(inputs, lengths, others, 0.0))  # the targets are not looked at
    forced = model(inputs, lengths, targets, 1.0)
    step_by_step = model(inputs, lengths, targets, 1 - 1e-9)
    assert torch.allclose(forced, step_by_step, atol=1e-6)
    assert not torch.allclose(forced, free, atol=1e-3)
    own = model(inputs, lengths, free.argmax(2), 1.0)  # forced with what it would predict
    assert torch.allclose(own, free, atol=1e-6)


# ---------------------------------------------------------------- Data


def test_temporal_order():
    rows = rnn.temporal_order(2000, 0)
    assert rnn.temporal_order(2000, 0) == rows != rnn.temporal_order(2000, 1)
    assert len({order for _, order in rows}) == 8
    assert {len(text) for text, _ in rows} == set(range(80, 101))
    for text, order in rows:
        places = [i for i, symbol in enumerate(text) if symbol in "XY"]
        assert "".join(text[i] for i in places) == order and len(places) == 3
        assert places[-1] < 0.76 * len(text) and set(text) <= set("abcdXY")


def test_sorting():
    rows = rnn.sorting(500, 0)
    assert all("".join(sorted(text)) == answer for text, answer in rows)
    assert {len(text) for text, _ in rows} == set(range(8, 17))


def write_table(path, rows):
    with open(str(path), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def read_predictions(folder):
    lines = (folder / "predictions.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


def options(*words):
    return rnn.build_parser().parse_args([str(word) for word in words])


def test_sets_are_apart_and_the_vocabulary_is_that_of_the_training_set(tmp_path):
    # Each text twice, with a character of its own: known only where both copies are in training.
    rows = [(f"{'ab' if i % 2 else 'xyz'} {chr(0x4e00 + i)}", "ab"[i % 2]) for i in range(100)]
    table = write_table(tmp_path / "a.csv", 2 * rows)
    data = rnn.load_data(options("--data", table), "classify")
    assert len(data.vocabulary) == 3 + 6 + 80 and data.answers == ["a", "b"]
    for part, count in ((data.train, 160), (data.validation, 20), (data.test, 20)):
        assert part.targets.flatten().bincount().tolist() == [count / 2, count / 2]
        last = part.inputs[torch.arange(count), part.lengths - 1]
        unknown = last == rnn.UNKNOWN
        assert not unknown.any() if part is data.train else unknown.all()


def test_words():
    assert rnn.tokenize(["It's  GOOD, \u00c9t\u00e9!", ""], "words") == [
        ("it", "'", "s", "good", ",", "\u00e9t\u00e9", "!"), ()]
    # The small letter of the Turkish \u0130 is i.
    assert rnn.tokenize(["\u0130yi F\u0130LM"], "words") == rnn.tokenize(["iyi film"], "words")
    assert rnn.tokenize(["Ab c"], "chars") == [("A", "b", " ", "c")]


def test_batches_of_sorting_hold_one_length_and_all_strings_but_the_ends():
    args = options("--synthetic-size", 300, "--batch-size", 20)
    data = rnn.load_data(args, "generate")
    batches = rnn.epoch_batches(data, args, 1)
    assert all(len(set(data.train.lengths[batch].tolist())) == 1 for batch in batches)
    used = torch.cat(batches)
    assert len(used) == len(used.unique()) > 0.85 * len(data.train.lengths)
    answers = [rnn.get_batch(data.train, batch, CPU).targets for batch in batches]
    assert all((answer[:, -1] == rnn.END).all() for answer in answers)
    assert not any((answer == rnn.PAD).any() for answer in answers)
    assert [batch.tolist() for batch in batches] != [
        batch.tolist() for batch in rnn.epoch_batches(data, args, 2)]


@pytest.mark.parametrize("rows, message", [
    ([("a", "x"), ("b", "y"), ("c", "y"), ("d", "y")], "there are too few of x"),
    ([("a", "x"), ("b", "x"), ("c", "x")], "at least two classes are needed; all are x"),
    (3 * [("a", "x")] + [("b", "y"), ("c", "y"), ("d", "y")], "there are too few of x"),
    ([], "no rows below the header"),
    ([("My order, please", "x"), ("My", "order", "x")], "line 3")])
def test_bad_tables_are_one_line_and_leave_no_run(run, tmp_path, rows, message):
    write_table(tmp_path / "a.csv", rows)
    done = run("rnn.py", "--data", "a.csv", status=2)
    assert done.stderr.startswith("rnn.py: error: --data") and done.stderr.count("\n") == 1
    assert message in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words, message", [
    (["--cells", "elman"], "--cells"), (["--teacher-forcing", 2], "--teacher-forcing"),
    (["--predict", "abc"], "best.pt"), (["--resume"], "last.pt"), (["--hidden", 0], "--hidden"),
    (["--tokens", "words"], "--data FILE"), (["--data", "nowhere.csv"], "nowhere.csv"),
    (["--data", "nowhere.csv", "--tasks", "generate"], "leave out --data"),
    (["--data", "mine/a.csv", "--out", "mine"], "mine/a.csv and mine, where the run writes")])
def test_mistakes_are_one_line(run, words, message):
    done = run("rnn.py", *words, status=2)
    assert done.stderr.startswith("rnn.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


# ---------------------------------------------------------------- Training and evaluation


def test_rare_words_are_learned(run, tmp_path):
    rng = random.Random(0)
    rows = []
    for i in range(1200):  # 3 of 150 words that tell the class, 7 of 1,500 that do not
        words = [f"{'np'[i % 2]}{rng.randrange(150)}" for _ in range(3)]
        words += [f"x{rng.randrange(1500)}" for _ in range(7)]
        rng.shuffle(words)
        rows.append((" ".join(words), "np"[i % 2]))
    write_table(tmp_path / "a.csv", rows)
    run("rnn.py", "--data", "a.csv", "--tokens", "words", "--cells", "gru", "--hidden", 32,
        "--layers", 1, "--chrono-max", 10, "--epochs", 4)
    test = json.loads((tmp_path / "runs" / "rnn" / "summary.json").read_text())["test"]
    assert test["gru"]["accuracy"] > 0.9  # with embeddings of standard deviation 1, below 0.8


def test_default_job_small(run, tmp_path):
    done = run("rnn.py", *SMALL)
    assert "8 classes: " in done.stdout
    out = tmp_path / "runs" / "rnn"
    files = ["classify.png", "generate.png", "gradients.png", "gates.png"]
    for training in ("classify-lstm", "classify-gru", "classify-rnn", "generate-lstm",
                     "generate-gru"):
        files += [f"{training}/{name}" for name in ("last.pt", "best.pt", "curves.png")]
        header, *rows = (out / training / "history.csv").read_text().splitlines()
        assert len(rows) == 2 and {"gradient_norm", "clipped"} <= set(header.split(","))
    assert all((out / name).stat().st_size > 0 for name in files)
    test = json.loads((out / "summary.json").read_text())["test"]
    assert [set(test[cell]) >= {"accuracy", "exact_match"} for cell in CELLS] == [True, True, False]
    again = run("rnn.py", "--resume")
    assert "epoch  2/" not in again.stdout and again.stdout.count("resumed after epoch 2") == 5
    assert json.loads((out / "summary.json").read_text())["test"] == test
    line = run("rnn.py", "--predict", "abXcdYacXbdac", "--cells", "gru").stdout
    assert line.startswith("abXcdYacXbdac\t") and line.count("\t") == 2


def test_runs_of_other_scripts_are_not_those_of_rnn(tmp_path):
    """A folder of all runs is no run of rnn.py, though some of its subfolders have a dash."""
    names = ["classify-lstm", "classify-gru", "classify-rnn", "generate-lstm", "generate-gru"]
    for name in [*names, "cnn-20261128-170000", "words-large", "gan"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    args = rnn.build_parser().parse_args(["--out", str(tmp_path)])
    assert sorted(path.parent.name for path in common.find_files(args, "*.pt")) == sorted(names)


def test_a_measure_counts_whole_answers_and_tokens():
    torch.manual_seed(0)
    model = rnn.Seq2Seq(7, 7, hidden=8)
    lengths = torch.tensor([5, 5, 3, 5])
    sequences = rnn.SequenceSet(torch.randint(3, 7, (4, 5)), lengths, torch.ones(4, 6).long())
    measured = rnn.measure(model, "generate", sequences, CPU)
    assert not model.training  # no dropout
    logits = model(sequences.inputs[2:3, :3], lengths[2:3], sequences.targets[2:3, :4], 0.0)
    expected = F.softmax(logits, dim=2).max(2).values.prod()
    assert measured["probabilities"][2].item() == pytest.approx(expected.item())
    answers = measured["predicted"]
    answers[0, 2] += 1
    answers[0, 4] += 1
    answers[1, 5] += 1
    result = rnn.measure(model, "generate", sequences._replace(targets=answers), CPU)
    assert result["accuracy"] == 2 / 4
    assert result["token_accuracy"] == pytest.approx(1 - 3 / (6 + 6 + 4 + 6))


def test_predicted_answers_are_listed_up_to_their_end():
    data = rnn.load_data(options("--synthetic-size", 100), "generate")
    numbers = [[data.answers.index(token) for token in ("4", "2", "<end>", "7")],
               [data.answers.index(token) for token in ("4", "2", "7", "7")]]
    assert rnn.answer_texts(data, torch.tensor(numbers)) == ["42", "4277"]
    classes = data._replace(task="classify", answers=["up<end>a", "up<end>b"])
    assert rnn.answer_texts(classes, torch.tensor([[1], [0]])) == ["up<end>b", "up<end>a"]


@pytest.mark.parametrize("cell, states", [("lstm", 2), ("gru", 1), ("rnn", 1)])
def test_gradient_norms_are_those_of_a_loop_over_the_steps(cell, states):
    torch.manual_seed(0)
    model = rnn.RNNClassifier(6, 3, 4, cell=cell, backend="scratch", layers=1).double().eval()
    inputs, targets = torch.randint(3, 6, (1, 5)), torch.tensor([[1]])
    weight_ih, weight_hh, bias_ih, bias_hh = model.layers.all_weights[0]
    state = states * [torch.zeros(1, 4).double()]
    carried = []
    for x in model.embedding(inputs.t()):
        from_state = F.linear(state[0], weight_hh, bias_hh)
        state, _ = model.layers.step(F.linear(x, weight_ih, bias_ih), from_state, state)
        carried.append(state[-1])
    loss = rnn.cross_entropy(model.output(model.batch_norm(state[0])), targets)
    norms = [gradient.norm() for gradient in torch.autograd.grad(loss, carried)]
    expected = torch.stack(norms[-2::-1]) / norms[-1]
    batch = rnn.SequenceSet(inputs, torch.tensor([5]), targets)
    assert torch.allclose(rnn.gradient_norms(model, batch), expected)


@pytest.mark.parametrize("batch_size, momentum", [(128, 0.5), (8, 0.125)])
def test_running_statistics_average_over_enough_texts(tmp_path, monkeypatch, batch_size, momentum):
    made = []

    def make(**options):
        made.append(rnn.RNNClassifier(**options))
        return made[-1]
    monkeypatch.setitem(rnn.MODELS, "classify", make)
    args = rnn.build_parser().parse_args(list(map(str, [*SMALL, "--batch-size", batch_size])))
    rnn.train(args, rnn.load_data(args, "classify"), "gru", tmp_path / "run", torch.device("cpu"))
    assert made[0].batch_norm.momentum == momentum


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(run):
    done = run("rnn.py", *SMALL, "--lr", 1e9, "--weight-decay", 1e9, "--clip", "inf", "--tasks",
               "classify", status=2)
    assert "lower --lr" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- Own texts


def test_own_texts_and_prediction(run, tmp_path):
    rows = []
    for i in range(60):
        rows += [(f"a GOOD film {i}", "up"), (f"Bad, very bad {i}", "thumbs\tdown")]
    write_table(tmp_path / "a.csv", rows)
    done = run("rnn.py", "--data", "a.csv", "--tokens", "words", "--epochs", 6, "--hidden", 16,
               "--batch-size", 16, "--lr", 0.02)
    assert "classes: thumbs down 60, up 60" in done.stdout and "largest class: " in done.stdout
    summary = json.loads((tmp_path / "runs/rnn/summary.json").read_text())
    assert summary["data"] == "a.csv" and set(summary["test"]) == {"lstm", "gru"}
    assert max(test["accuracy"] for test in summary["test"].values()) == 1.0
    assert {"macro_f1", "largest_class", "per_class"} <= set(summary["test"]["gru"])
    done = run("rnn.py", "--predict", "-",
               stdin="\ufeffA good film 3\r\n\nbad, VERY bad 5\nbad, very bad \u4e2d\n")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["A good film 3", "up"], ["bad, VERY bad 5", "thumbs down"],
        ["bad, very bad \u4e2d", "thumbs down"]]
    assert all(0.5 < float(line[2]) <= 1 for line in lines)
    # What is listed is what was measured, and what --predict says.
    for cell in ("lstm", "gru"):
        header, *rows = read_predictions(tmp_path / f"runs/rnn/classify-{cell}")
        assert header == ["input", "target", "prediction", "probability"] and len(rows) == 12
        hits = [target == prediction for _, target, prediction, _ in rows]
        assert sum(hits) / 12 == summary["test"][cell]["accuracy"]
        again = run("rnn.py", "--cells", cell, "--predict", "-",
                    stdin="\n".join(row[0] for row in rows)).stdout
        for row, line in zip(rows, again.splitlines()):
            text, label, probability = line.split("\t")
            assert [text, label] == [row[0], row[2]]
            assert float(probability) == pytest.approx(float(row[3]), abs=1e-3)
    assert "<unk>" in done.stderr and "\u4e2d" in done.stderr and done.stderr.count("\n") == 1
    alone = run("rnn.py", "--predict", "bad, VERY bad 5").stdout
    assert alone == done.stdout.splitlines()[1] + "\n"
    # Of both cells, the one with the better validation accuracy predicts.
    outputs = {}
    for cell in ("lstm", "gru"):
        outputs[cell] = run("rnn.py", "--cells", cell, "--predict", "A good film 3").stdout
    assert outputs["lstm"] != outputs["gru"]
    for cell, accuracy in (("lstm", 2.0), ("gru", 3.0)):
        path = tmp_path / f"runs/rnn/classify-{cell}/best.pt"
        checkpoint = common.load_checkpoint(path, "rnn.py")
        checkpoint["metrics"]["validation_accuracy"] = accuracy
        common.save_checkpoint(path, checkpoint)
        assert run("rnn.py", "--predict", "A good film 3").stdout == outputs[cell]
    assert run("rnn.py", "--predict", "").stdout.startswith("\t")
    assert run("rnn.py", "--predict", "-", stdin="").stdout == ""


def test_long_texts_are_cut_and_counted(run, tmp_path):
    assert rnn.tokenize(["a" * 401], "chars") == [("a",) * 400]
    rows = [(str(i) + "ab" * (150 + i), "xy"[i % 2]) for i in range(60)]
    write_table(tmp_path / "a.csv", rows)
    small = ["--epochs", 1, "--hidden", 4, "--cells", "gru", "--batch-size", 8]
    done = run("rnn.py", "--data", "a.csv", *small)
    assert "10 of 60 texts have more than 400 chars" in done.stderr
    done = run("rnn.py", "--predict", "a" * 401, "b")
    assert "1 of 2 texts have more than 400 chars" in done.stderr
