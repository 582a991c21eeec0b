"""transformer.py: its layers against PyTorch's own, its decoding, its data, its command line."""

import json
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import Started
from torch import nn

import common
import transformer
from transformer import BOS, EOS, PAD, UNK, Transformer, Vocabulary

CPU = torch.device("cpu")
SMALL = ("--synthetic-size", 300, "--d-model", 16, "--d-ff", 32, "--heads", 2, "--layers", 1)


def small_model(seed=0):
    """A model of 12 tokens whose biases and norms matter, too."""
    torch.manual_seed(seed)
    model = Transformer(12, max_length=10, d_model=16, d_ff=24)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def padded_source():
    torch.manual_seed(1)
    source = torch.randint(4, 12, (3, 7))
    source[1, 5:] = PAD
    source[2, 2:] = PAD
    return source


# ---------------------------------------------------------------- Model


def test_attention_is_that_of_pytorch():
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    mask = torch.ones(5, 5).tril().bool()
    mask[:, 3:] = False
    output, weights = transformer.attention(query, key, value, mask)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 5))
    assert ((weights > 0) == mask).all()
    if hasattr(F, "scaled_dot_product_attention"):
        expected = F.scaled_dot_product_attention(query, key, value, mask)
        assert torch.allclose(output, expected, atol=1e-6)


THEIR_NAMES = {
    "self_attention": "self_attn", "self_attention.output": "self_attn.out_proj",
    "cross_attention": "multihead_attn", "cross_attention.output": "multihead_attn.out_proj",
    "feed_forward.0": "linear1", "feed_forward.2": "linear2",
    "norm1": "norm1", "norm2": "norm2", "norm3": "norm3"}


def by_their_names(layer, read):
    """{torch.nn's name: read(parameter)}; it has one projection where we have three."""
    state = {}
    for name, module in layer.named_modules():
        for kind in ("weight", "bias"):
            if hasattr(module, "query"):
                parts = [getattr(part, kind) for part in (module.query, module.key, module.value)]
                state[f"{THEIR_NAMES[name]}.in_proj_{kind}"] = torch.cat(list(map(read, parts)))
            elif name in THEIR_NAMES:
                state[f"{THEIR_NAMES[name]}.{kind}"] = read(getattr(module, kind))
    return state


@pytest.mark.parametrize("side", ("encoder", "decoder"))
def test_a_layer_is_that_of_torch_nn(side):
    """Outputs, and the gradients of inputs and weights, with padding and a causal mask."""
    kind = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}[side]
    if "norm_first" not in kind.__init__.__code__.co_varnames:
        pytest.skip("this PyTorch has no pre-norm layers")
    layer = getattr(small_model(), side)[0]
    theirs = kind(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
    theirs.load_state_dict(by_their_names(layer, lambda parameter: parameter.detach()))
    padding = padded_source() == PAD
    mask = ~padding[:, None, None, :]
    memory = torch.randn(3, 7, 16)
    inputs = [memory.clone().requires_grad_(), memory.clone().requires_grad_()]
    if side == "encoder":
        outputs = [layer(inputs[0], mask), theirs(inputs[1], src_key_padding_mask=padding)]
        weights = torch.randn(3, 7, 16) * ~padding[..., None]  # nobody looks at padding
    else:
        target = torch.randn(3, 5, 16)
        causal = torch.ones(5, 5).tril().bool()
        outputs = [layer(target, inputs[0], causal, mask),
                   theirs(target, inputs[1], tgt_mask=~causal, memory_key_padding_mask=padding)]
        weights = torch.randn(3, 5, 16)
    for output in outputs:
        (output * weights).sum().backward()
    assert torch.allclose(outputs[0] * weights, outputs[1] * weights, atol=1e-5)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    gradients = by_their_names(layer, lambda parameter: parameter.grad)
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5), name


def test_padding_and_later_tokens_change_nothing():
    model = small_model()
    source = padded_source()
    target = torch.randint(4, 12, (3, 6))
    logits = model(source, target)
    assert torch.allclose(logits[2:], model(source[2:, :2], target[2:]), atol=1e-5)
    changed = target.clone()
    changed[:, 4:] = UNK
    after = model(source, changed)
    assert torch.allclose(logits[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(logits[:, 4], after[:, 4], atol=1e-3)


def test_positions_are_by_the_paper_s_formula():
    table = transformer.sinusoidal_positions(40, 16)
    for position, i in ((0, 0), (7, 2), (39, 7)):
        angle = position / 10000**(2 * i / 16)
        expected = torch.tensor([math.sin(angle), math.cos(angle)])
        assert torch.allclose(table[position, 2 * i:2 * i + 2], expected, atol=1e-5)


def test_source_target_and_output_share_one_embedding():
    shapes = [parameter.shape for parameter in small_model().parameters()]
    assert [shape for shape in shapes if 12 in shape] == [(12, 16)]


# ---------------------------------------------------------------- Decoding


@torch.no_grad()
def search_without_cache(model, source, beam):
    """Beam search for one source in plain Python, each step from the beginning."""
    beams = [(0.0, [])]
    for _ in range(len(model.positions)):
        candidates = []
        for total, tokens in beams:
            if EOS in tokens:
                candidates.append((total, tokens))
                continue
            logits = model(source, torch.tensor([[BOS, *tokens]]))[0, -1]
            for token, value in enumerate(F.log_softmax(logits, 0).tolist()):
                if token not in (PAD, BOS, UNK):
                    candidates.append((total + value, [*tokens, token]))
        beams = sorted(candidates, key=lambda row: row[0] / len(row[1]), reverse=True)[:beam]
    return beams[0]


@pytest.mark.parametrize("beam", (1, 3))
def test_search_with_the_cache_is_search_without(beam):
    model = small_model(seed=9)
    model.positions *= 2  # so that some targets end early, and some never
    torch.manual_seed(3)
    source = torch.randint(4, 12, (6, 7))
    source[1, 5:] = source[2, 2:] = source[5, 1:] = PAD
    tokens, log_probabilities = transformer.beam_search(model, source, beam)
    rows = [[token for token in row if token != PAD] for row in tokens.tolist()]
    expected = [search_without_cache(model, source[i:i + 1], beam) for i in range(6)]
    assert rows == [row for _, row in expected]
    assert log_probabilities.tolist() == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert len(set(map(len, rows))) >= 2


def test_beam_search_does_not_prefer_short_targets(monkeypatch):
    """Label smoothing leaves <eos> a little probability at every position. 60 tokens of 0.9 each
    are less probable than one wrong <eos>, and yet are what is to be written.
    """
    model = small_model()
    model.positions = torch.zeros(100, 16)

    def decode(newest, memory, source_mask, cache, position):
        probabilities = torch.full((len(newest), 1, 12), 0.1 / 11)
        probabilities[:, :, 5 if position < 60 else EOS] = 0.9
        return probabilities.log()
    monkeypatch.setattr(model, "decode", decode)
    assert 0.9**61 < 0.1 / 11
    tokens, log_probabilities = transformer.beam_search(model, torch.tensor([[4, EOS]] * 2), beam=4)
    assert tokens.tolist() == [[5] * 60 + [EOS]] * 2
    assert log_probabilities.tolist() == pytest.approx([61 * math.log(0.9)] * 2, rel=1e-3)


@pytest.mark.parametrize("a, b, distance", (
    ("abc", "abc", 0), ("kitten", "sitting", 3), ("", "ab", 2), ("ab", "ba", 2)))
def test_edit_distance(a, b, distance):
    assert transformer.edit_distance(a, b) == transformer.edit_distance(b, a) == distance


# ---------------------------------------------------------------- Training and evaluation


def test_label_smoothing_is_cross_entropy_with_smoothed_targets():
    logits = torch.randn(4, 5)
    labels = torch.tensor([1, 4, 2, 3])
    expected = F.cross_entropy(logits, labels)
    assert torch.allclose(transformer.cross_entropy(logits, labels), expected)
    smoothed = torch.full((4, 5), 0.2 / 5)
    smoothed[range(4), labels] += 0.8
    expected = -(smoothed * F.log_softmax(logits, 1)).sum(1).mean()
    assert torch.allclose(transformer.cross_entropy(logits, labels, 0.2), expected)


def test_a_small_model_learns_to_reverse():
    """Three letters of five, from examples of the task."""
    torch.manual_seed(0)
    model = Transformer(9, max_length=8, d_model=32, layers=1, d_ff=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        source = torch.randint(4, 9, (64, 4))
        source[:, 3] = EOS
        target = torch.cat([source[:, :3].flip(1), source[:, 3:]], 1)
        logits = model(source, transformer.shift_right(target))
        loss = transformer.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written, _ = transformer.beam_search(model.eval(), source)
    assert (written[:, :4] == target).all(1).sum() >= 60


@pytest.mark.filterwarnings("ignore:with .* training steps")
def test_the_training_loss_is_that_of_measure(tmp_path):
    """In one batch, with a negligible step: shifted targets, and no loss over padding."""
    options = [*SMALL, "--epochs", 1, "--batch-size", 300, "--lr", "1e-9", "--label-smoothing", 0,
               "--precision", "float32", "--out", tmp_path]
    args = transformer.build_parser().parse_args(list(map(str, options)))
    args.checksum = 0
    data = transformer.load_data(args)
    row, = transformer.train(args, data._replace(validation=data.train), tmp_path, CPU)
    assert row["train_loss"] == pytest.approx(row["validation_loss"], rel=1e-4)
    accuracy = pytest.approx(row["validation_token_accuracy"], abs=1e-3)
    assert row["train_token_accuracy"] == accuracy


def test_measure_takes_the_nearest_of_several_targets(monkeypatch):
    pairs = [("a", "xy"), ("a", "z"), ("b", "yyy"), ("b", "x")]
    answers = {"a": ("z", 0.9), "b": ("yy", 0.5)}
    monkeypatch.setattr(transformer, "write_targets",
                        lambda model, vocabulary, sources, *_: [answers[s] for s in sources])
    vocabulary = Vocabulary("abxyz")
    model = small_model().train()
    metrics, outputs = transformer.measure(model, vocabulary, pairs, CPU)
    assert not model.training  # no dropout
    assert outputs == [("a", "z", "z", 0.9), ("b", "yyy", "yy", 0.5)]
    assert metrics["exact_match"] == 1 / 2
    assert metrics["error_rate"] == 1 / 4  # one "y" is missing; the nearest have 1 + 3 tokens
    source = vocabulary.encode([source for source, _ in pairs], CPU)
    target = vocabulary.encode([target for _, target in pairs], CPU)
    logits = small_model()(source, transformer.shift_right(target)).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten(), ignore_index=PAD)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)


# ---------------------------------------------------------------- Data


@pytest.mark.parametrize("task, source, target", (
    ("reverse", "abca", "acba"), ("copy", "abca", "abca"), ("sort", "bcaab", "aabbc"),
    ("add", "59+71", "211")))
def test_tasks(task, source, target):
    assert transformer.TASKS[task](source) == target
    pairs = transformer.synthetic_pairs(task, 300, 2, 6, seed=5)
    assert pairs != transformer.synthetic_pairs(task, 300, 2, 6, seed=6)
    assert len(dict(pairs)) == 300
    for source, target in pairs:
        assert target == transformer.TASKS[task](source)
        assert all(2 <= len(part) <= 6 for part in source.split("+"))


def test_batches_hold_every_pair_once_with_others_of_its_length(monkeypatch):
    rng = random.Random(0)
    pairs = [("a" * rng.randint(1, 9), "b" * rng.randint(1, 9)) for _ in range(500)]
    batches = transformer.similar_length_batches(pairs, 16, 0, 1)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    for batch in batches:
        assert 15 <= len(batch) <= 16
        assert len({len(pairs[i][0]) for i in batch}) <= 2
    other = transformer.similar_length_batches(pairs, 16, 0, 2)
    assert set(map(frozenset, other)) != set(map(frozenset, batches))
    # Three processes share every batch.
    monkeypatch.setattr(common, "WORLD", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(common, "RANK", rank)
        shares.append(transformer.similar_length_batches(pairs, 16, 0, 1))
    for batch, *parts in zip(batches, *shares):
        assert sorted(batch) == sorted(i for part in parts for i in part)
    with pytest.raises(common.UserError, match="fewer training pairs than processes"):
        transformer.similar_length_batches(pairs[:2], 16, 0, 1)


def test_long_texts_are_evaluated_in_smaller_batches():
    rows = list(range(250))
    for max_length, size in ((41, 100), (501, 49), (99999, 1)):
        model = Transformer(8, max_length, d_model=4, heads=1, layers=1, d_ff=4)
        batches = transformer.evaluation_batches(model, rows)
        assert sum(batches, []) == rows and max(map(len, batches)) == size


def test_vocabulary_keeps_its_own_tokens_apart_from_the_texts():
    vocabulary = Vocabulary(["<eos>", "a", "b"])
    encoded = vocabulary.encode([("<eos>", "a", "never"), ("b",)], CPU)
    assert encoded.tolist() == [[4, 5, UNK, EOS], [6, EOS, PAD, PAD]]
    assert vocabulary.decode([4, 5, EOS, 6]) == ("<eos>", "a")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(path, *options):
    arguments = ["--data", path, *map(str, options)]
    return transformer.load_data(transformer.build_parser().parse_args(arguments))


ROWS = [(f"in {i}", f"out {i}") for i in range(20)]


@pytest.mark.parametrize("content", (
    "Target, SOURCE\r\n" + "".join(f'"{b}",{a}\r\n' for a, b in ROWS),
    "\ufefftarget,n,source\n" + "".join(f'"{b}",1," {a}  "\n' for a, b in ROWS)))
def test_a_table_is_read_by_the_names_of_its_columns(tmp_path, content):
    path = write(tmp_path / "pairs", content)
    data = load(path, "--source-tokens", "words")
    pairs = {(tuple(a.split()), tuple(b)) for a, b in ROWS}
    assert set(data.train + data.validation + data.test) == pairs
    assert data.longest == len("out 10")


def test_all_targets_of_a_source_are_in_one_set(tmp_path):
    lines = [f"{a}\t{b}{end}" for end in ("", "x", "x") for a, b in ROWS]
    path = write(tmp_path / "pairs.tsv", "source\ttarget\n" + "\n".join(lines))
    data = load(path, "--source-tokens", "words", "--target-tokens", "words")
    sets = [{source for source, _ in pairs} for pairs in (data.train, data.validation, data.test)]
    assert [len(sources) for sources in sets] == [16, 2, 2]
    assert len(set.union(*sets)) == 20
    assert len(data.train) == 48


def test_target_words_that_do_not_recur_are_a_warning(tmp_path):
    path = write(tmp_path / "pairs.csv",
                 "source,target\n" + "".join(f"day {i},2026-{i}\n" for i in range(100)))
    with pytest.warns(UserWarning, match="10 of 10 validation targets contain a token that"):
        load(path, "--target-tokens", "words")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path)


@pytest.mark.parametrize("content, message", (
    ("source\ttarget\n" + "a\tb\n" * 20, "at least 10 different sources are needed"),
    ("".join(f"{a}\t{b}\n" for a, b in ROWS), "must name the columns source and target"),
    ("source\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS) + "long one\t" + "x" * 300,
     "the source or target of 'long one' has 300 tokens; shorten it, or raise --max-length")))
def test_files_that_cannot_be_used(tmp_path, content, message):
    path = write(tmp_path / "pairs.tsv", content)
    with pytest.raises(common.UserError) as error:
        load(path)
    assert message in str(error.value) and f"--data {path}" in str(error.value)


# ---------------------------------------------------------------- Command line


@pytest.mark.parametrize("options, message", (
    (("--data", "nowhere.csv"), "nowhere.csv"),
    (("--d-model", 9, "--heads", 3), "--d-model must be even, and a multiple of --heads"),
    (("--source-tokens", "words"), "synthetic strings have no words; add --data FILE"),
    (("--data", "mine/a.tsv", "--out", "mine"), "mine/a.tsv and mine, where the run writes"),
    (("--predict", "a"), "train first")))
def test_mistakes_are_one_line(options, message, run):
    done = run("transformer.py", *options, status=2)
    assert done.stderr.startswith("transformer.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and done.stdout == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run in out/."""
    folder = tmp_path_factory.mktemp("trained")
    done = Started(folder, "transformer.py", *SMALL, "--epochs", 3, "--out", "out").wait()
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_writes_what_the_design_says(trained):
    out = trained / "out"
    assert {path.name for path in out.iterdir()} == {
        "last.pt", "best.pt", "history.csv", "summary.json", "predictions.tsv", "curves.png",
        "attention.png"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["script"] == "transformer.py" and summary["data"] == "synthetic"
    test = summary["test"]
    assert {"exact_match", "token_accuracy", "error_rate", "loss", "greedy"} <= set(test)
    header, *rows = (out / "history.csv").read_text().splitlines()
    assert {"gradient_norm", "clipped", "validation_exact_match"} <= set(header.split(","))
    assert len(rows) == 3


@pytest.mark.parametrize("part", ("validation", "test"))
def test_resume_refuses_other_pairs_to_evaluate_on(run, tmp_path, part):
    table = "source,target\n" + "".join(f"{i},{i}\n" for i in range(100, 140))
    path = write(tmp_path / "pairs.csv", table)
    changed = "".join(getattr(load(path), part)[0][0])  # the source of a pair
    run("transformer.py", *SMALL, "--data", path, "--epochs", 1)
    write(tmp_path / "pairs.csv", table.replace(f",{changed}", ",000"))
    done = run("transformer.py", "--resume", "--epochs", 2, status=2)
    assert "was started with other data" in done.stderr


def predict(run, trained, *texts, **settings):
    """Return the cells of each line, and standard error."""
    done = run("transformer.py", "--out", trained / "out", "--predict", *texts, **settings)
    return [line.split("\t") for line in done.stdout.splitlines()], done.stderr


def test_predict_answers_each_text_in_a_line(trained, run):
    lines, warnings = predict(run, trained, "abc", " x \t ü")
    assert [line[0] for line in lines] == ["abc", "x ü"]
    assert all(0 < float(probability) <= 1 for _, _, probability in lines)
    assert warnings.count("warning") == 1 and "never seen in training" in warnings
    assert "ü" in warnings


def test_predict_names_tokens_that_only_targets_have(run, tmp_path):
    path = write(tmp_path / "pairs.csv",
                 "source,target\n" + "".join(f"{i},X{i}\n" for i in range(100, 120)))
    run("transformer.py", *SMALL, "--data", path, "--epochs", 1)
    assert "never seen in training: ['X']" in run("transformer.py", "--predict", "X0").stderr


def test_predict_reads_lines_whatever_they_are_batched_with(trained, run):
    many = ["abcdefgh"[:i % 8 + 1] for i in range(1200)]
    lines, warnings = predict(run, trained, "-", stdin="\ufeff" + "\r\n".join(many))
    assert [line[0] for line in lines] == many and warnings == ""
    assert len({target for _, target, _ in lines}) <= 8


def test_predict_says_what_is_wrong(trained, run):
    # The longest training text has 20 tokens; twice as many can be read.
    lines, message = predict(run, trained, "a" * 40)
    assert len(lines) == 1 and message == ""
    lines, message = predict(run, trained, "-", stdin="ok\n" + "a" * 41, status=2)
    assert lines == []
    assert "--predict: a text has 41 tokens, and the model takes up to 40;" in message


def test_own_pairs_of_words(run, tmp_path):
    rows = [f"in {a} {b},{b} {a}\n" for a in "abcdef" for b in "uvwxyz"]
    path = write(tmp_path / "pairs.csv", "source,target\n" + "".join(rows))
    kinds = ("--source-tokens", "words", "--target-tokens", "words")
    trained = run("transformer.py", *SMALL, *kinds, "--data", path, "--epochs", 1, "--heads", 1)
    assert "fewer than 30 examples" in trained.stderr
    summary = json.loads((tmp_path / "runs" / "transformer" / "summary.json").read_text())
    assert summary["data"] == path
    text = (tmp_path / "runs/transformer/predictions.tsv").read_text(encoding="utf-8")
    listed = [line.split("\t") for line in text.splitlines()[1:]]
    assert len(listed) == 4 and "\n".join(text.splitlines()[1:4]) in trained.stdout
    expected = dict(row[:-1].split(",") for row in rows)
    assert all(expected[source] == target for source, target, *_ in listed)
    tested = {" ".join(source) for source, _ in load(path, *kinds).test}
    assert {source for source, *_ in listed} == tested
    done = run("transformer.py", "--predict", *(row[0] for row in listed), "in  a u")
    *lines, last = (line.split("\t") for line in done.stdout.splitlines())
    assert lines == [[source, *prediction] for source, _, *prediction in listed]
    assert last[0] == "in a u"
