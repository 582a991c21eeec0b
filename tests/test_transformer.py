"""transformer.py: its layers against PyTorch's own, its decoding, its data, its command line."""

import csv
import json
import math
import random
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import common
import transformer
from transformer import BOS, EOS, PAD, UNK, Transformer, Vocabulary

TINY = ("--synthetic-size", 400, "--d-model", 16, "--d-ff", 32, "--heads", 2, "--layers", 1)


def small_model(**options):
    torch.manual_seed(0)
    settings = dict(vocabulary=12, d_model=16, heads=4, layers=2, d_ff=24, max_length=10)
    model = Transformer(**dict(settings, **options))
    for parameter in model.parameters():  # biases and norms, too, should matter
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def padded_source():
    torch.manual_seed(1)
    source = torch.randint(4, 12, (3, 7))
    source[1, 5:], source[2, 2:] = PAD, PAD
    return source, (source != PAD)[:, None, None, :]


# ---------------------------------------------------------------- Model


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("padding", (False, True))
def test_plain_and_fused_attention_agree(causal, padding):
    if not common.FUSED_ATTENTION:
        pytest.skip("this PyTorch has no fused attention")
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    mask = torch.ones(5, 5).tril().bool() if causal else torch.ones(5, 5).bool()
    if padding:
        mask = mask & torch.tensor([True, True, True, False, False])
    plain, weights = transformer.scaled_dot_product_attention(query, key, value, mask)
    assert torch.allclose(plain, F.scaled_dot_product_attention(query, key, value, mask), atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 5))
    assert (weights[..., ~mask] == 0).all()


def test_the_two_paths_of_the_model_agree(monkeypatch):
    model = small_model()
    source, mask = padded_source()
    target = torch.randint(4, 12, (3, 6))
    fused = model(source, target, mask)
    monkeypatch.setattr(common, "FUSED_ATTENTION", False)
    assert torch.allclose(fused, model(source, target, mask), atol=1e-5)


def reference_layer(layer, pre_norm):
    """torch.nn's layer with the weights of ours."""
    kind = (nn.TransformerDecoderLayer if isinstance(layer, transformer.DecoderLayer)
            else nn.TransformerEncoderLayer)
    norm_first = {"norm_first": True} if pre_norm else {}
    reference = kind(16, 4, 24, dropout=0.0, **norm_first)
    state = {}
    for name, ours in (("self_attn", "self_attention"), ("multihead_attn", "cross_attention")):
        if hasattr(layer, ours):
            attention = getattr(layer, ours)
            state[f"{name}.in_proj_weight"] = attention.in_proj.weight
            state[f"{name}.in_proj_bias"] = attention.in_proj.bias
            state[f"{name}.out_proj.weight"] = attention.out_proj.weight
            state[f"{name}.out_proj.bias"] = attention.out_proj.bias
    modules = {"linear1": layer.feed_forward[0], "linear2": layer.feed_forward[-1]}
    modules.update({f"norm{i}": norm for i, norm in enumerate(layer.norms, 1)})
    for name, module in modules.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = module.weight, module.bias
    reference.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return reference, state


@pytest.mark.parametrize("pre_norm", (False, True))
@pytest.mark.parametrize("side", ("encoder", "decoder"))
def test_a_layer_is_that_of_torch_nn(side, pre_norm):
    """Outputs and the gradients of inputs and weights, padding and causal masks included."""
    if pre_norm and "norm_first" not in nn.TransformerEncoderLayer.__init__.__code__.co_varnames:
        pytest.skip("this PyTorch has no pre-norm layers")
    layer = getattr(small_model(pre_norm=pre_norm), side)[0].train()
    reference, state = reference_layer(layer, pre_norm)
    source, mask = padded_source()
    padding, future = source == PAD, torch.ones(5, 5).triu(1).bool()
    memory = torch.randn(3, 7, 16, requires_grad=True)
    x = torch.randn(3, 5, 16, requires_grad=True)
    their_memory, their_x = (tensor.detach().transpose(0, 1).requires_grad_()
                             for tensor in (memory, x))
    if side == "encoder":
        ours = layer(memory, mask)
        theirs = reference(their_memory, src_key_padding_mask=padding)
        weights = torch.randn(3, 7, 16) * ~padding[..., None]  # nobody looks at padding
        inputs = [(memory, their_memory)]
    else:
        ours = layer(x, {"source": layer.cross_attention.project(memory, 1, 2)}, mask)
        theirs = reference(their_x, their_memory, tgt_mask=future, memory_key_padding_mask=padding)
        weights = torch.randn(3, 5, 16)
        inputs = [(memory, their_memory), (x, their_x)]
    assert torch.allclose(ours, theirs.transpose(0, 1), atol=1e-5)
    (ours * weights).sum().backward()
    (theirs.transpose(0, 1) * weights).sum().backward()
    for mine, other in inputs:
        assert torch.allclose(mine.grad, other.grad.transpose(0, 1), atol=1e-5)
    gradients = dict(reference.named_parameters())
    for name, parameter in state.items():
        assert torch.allclose(parameter.grad, gradients[name].grad, atol=1e-5), name


@pytest.mark.parametrize("pre_norm", (False, True))
def test_padding_and_later_tokens_change_nothing(pre_norm):
    model = small_model(pre_norm=pre_norm)
    source, mask = padded_source()
    target = torch.randint(4, 12, (3, 6))
    logits = model(source, target, mask)
    alone = model(source[2:, :2], target[2:])
    assert torch.allclose(logits[2:], alone, atol=1e-5)
    changed = target.clone()
    changed[:, 4:] = UNK
    assert torch.allclose(logits[:, :4], model(source, changed, mask)[:, :4], atol=1e-6)
    assert not torch.allclose(logits[:, 4], model(source, changed, mask)[:, 4], atol=1e-3)


def test_positional_encoding_by_the_papers_formula():
    table = transformer.sinusoidal_positions(40, 16)
    for position, i in ((0, 0), (7, 2), (39, 7)):
        angle = position / 10000**(2 * i / 16)
        assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_the_output_shares_the_embedding():
    names = {name for name, _ in small_model().named_parameters()}
    assert sum("embedding" in name for name in names) == 1
    assert not any(name.startswith("output") for name in names)


# ---------------------------------------------------------------- Decoding


def search_without_cache(model, source, mask, beam):
    """Beam search for one source in plain Python, each step from the beginning."""
    limit = len(model.positions) - 1
    beams = [(0.0, 0.0, [])]

    def ranked(total, tokens):
        return total / ((5 + len(tokens)) / 6)**0.6
    for _ in range(limit):
        candidates = []
        for score, total, tokens in beams:
            if tokens and tokens[-1] == EOS:
                candidates.append((score, total, tokens))
                continue
            logits = model(source, torch.tensor([[BOS, *tokens]]), mask)[0, -1]
            for token, value in enumerate(F.log_softmax(logits, 0).tolist()):
                if token not in (PAD, BOS):
                    new = tokens + [token]
                    candidates.append((ranked(total + value, new), total + value, new))
        beams = sorted(candidates, key=lambda entry: -entry[0])[:beam]
    best = beams[0]
    return best[0], best[1], best[2][:-1] if best[2][-1] == EOS else best[2]


@pytest.mark.parametrize("pre_norm", (False, True))
@pytest.mark.parametrize("beam", (1, 3))
def test_search_with_the_cache_is_search_without(beam, pre_norm):
    model = small_model(pre_norm=pre_norm)
    model.embedding.weight.data[EOS] *= 1.5  # so that some end early
    with torch.no_grad():
        torch.manual_seed(3)
        source = torch.randint(4, 12, (6, 7))
        source[1, 5:], source[2, 2:], source[5, 1:] = PAD, PAD, PAD
        mask = (source != PAD)[:, None, None, :]
        found = transformer.beam_search(model, source, mask, beam)
        for i in range(len(source)):
            row, row_mask = source[i:i + 1], mask[i:i + 1]
            expected = search_without_cache(model, row, row_mask, beam)
            if beam > 1:
                expected = max(expected, search_without_cache(model, row, row_mask, 1))
            assert found[i][2] == expected[2]
            assert found[i][:2] == pytest.approx(expected[:2], abs=1e-4)


def test_the_cache_gives_the_logits_of_the_whole_prefix():
    model = small_model(max_length=70)
    source, mask = padded_source()
    target = torch.randint(4, 12, (3, 70))
    with torch.no_grad():
        whole = model(source, target, mask)
        caches = model.encode(source, mask)
        steps = [model.decode(target[:, t:t + 1], caches, mask, t) for t in range(70)]
    assert torch.allclose(whole, torch.cat(steps, 1), atol=1e-5)


def test_a_beam_is_never_worse_than_greedy():
    model = small_model()
    source = torch.randint(4, 12, (50, 6))
    greedy = transformer.beam_search(model, source)
    wider = transformer.beam_search(model, source, beam=4)
    assert all(b[0] >= a[0] for a, b in zip(greedy, wider))
    assert any(b[0] > a[0] + 0.1 for a, b in zip(greedy, wider))


@pytest.mark.parametrize("beam, positions", ((1, 3), (3, 2)))
def test_sources_that_have_ended_leave_the_batch_and_change_nothing(beam, positions, monkeypatch):
    model, sizes = small_model(max_length=40), []
    model.embedding.weight.data[EOS] *= 2.5  # so that, with positions that matter more,
    model.positions *= positions  # most end after 9 to 34 tokens and some never do
    torch.manual_seed(0)
    source = torch.randint(4, 12, (30, 6))
    source[::2, 3:] = PAD
    mask = (source != PAD)[:, None, None, :]
    alone = [transformer.beam_search(model, source[i:i + 1], mask[i:i + 1], beam)[0]
             for i in range(30)]
    lengths = {len(row) for *_, row in alone}
    assert 40 in lengths and len(lengths) >= 3
    decode = model.decode

    def count(tokens, *rest):
        sizes.append(len(tokens))
        return decode(tokens, *rest)
    monkeypatch.setattr(model, "decode", count)
    together = transformer.beam_search(model, source, mask, beam)
    assert [row for *_, row in together] == [row for *_, row in alone]
    for ours, theirs in zip(together, alone):
        assert ours[:2] == pytest.approx(theirs[:2], abs=1e-4)
    assert max(sizes) == 30 * beam and sizes[-1] <= 30 * beam / 2


@pytest.mark.parametrize("a, b, distance", (
    ("", "", 0), ("abc", "abc", 0), ("kitten", "sitting", 3), ("", "ab", 2), ("ab", "ba", 2)))
def test_edit_distance(a, b, distance):
    assert transformer.edit_distance(a, b) == transformer.edit_distance(b, a) == distance


def test_cross_entropy_counts_no_padding():
    logits = torch.randn(2, 3, 5)
    tokens = torch.tensor([[1, 4, 2], [3, PAD, PAD]])
    kept = tokens != PAD
    loss, count, right = transformer.cross_entropy(logits, tokens)
    assert torch.allclose(loss, F.cross_entropy(logits[kept], tokens[kept]))
    assert count == 4 and right == (logits.argmax(-1) == tokens)[kept].sum()
    smoothed = transformer.cross_entropy(logits, tokens, 0.2)[0].item()
    spread = torch.full((4, 5), 0.2 / 5)
    spread[range(4), tokens[kept]] += 0.8
    expected = -(spread * F.log_softmax(logits[kept], -1)).sum(1).mean()
    assert smoothed == pytest.approx(expected.item(), abs=1e-6)


# ---------------------------------------------------------------- Data


@pytest.mark.parametrize("task, source, target", (
    ("reverse", "abca", "acba"), ("copy", "abca", "abca"), ("sort", "bcaab", "aabbc"),
    ("add", "59+71", "211"), ("add", "9+9", "81")))
def test_tasks(task, source, target):
    answer, low, high, _ = transformer.TASKS[task]
    assert answer(source) == target
    pairs = transformer.synthetic_pairs(task, 300, low, high, seed=5)
    assert pairs == transformer.synthetic_pairs(task, 300, low, high, seed=5)
    assert pairs != transformer.synthetic_pairs(task, 300, low, high, seed=6)
    assert len(pairs) == 300
    for source, targets in pairs.items():
        assert "".join(targets[0]) == answer("".join(source))
        parts = "".join(source).split("+")
        assert all(low <= len(part) <= high for part in parts)
        if task == "add":
            assert "".join(targets[0])[::-1] == str(sum(int(part[::-1]) for part in parts))


def test_batches_hold_every_pair_once_within_the_budget():
    random.seed(0)
    pairs = [(torch.ones(random.randint(1, 9)), torch.ones(random.randint(1, 9)))
             for _ in range(500)]
    counts = set()
    for shuffle in (False, True, True):
        result = transformer.batches(pairs, 100, shuffle)
        assert sorted(i for batch in result for i in batch) == list(range(500))
        for batch in result:
            widths = [max(len(pairs[i][side]) for i in batch) for side in (0, 1)]
            assert len(batch) * sum(widths) <= 100
            assert len({len(pairs[i][0]) for i in batch}) <= 2
        counts.add(len(result))
    assert len(counts) == 1
    assert transformer.batches(pairs, 1) and transformer.batches([], 5) == [[]]


def test_vocabulary_keeps_its_own_tokens_apart_from_the_texts():
    vocabulary = Vocabulary({"b", "a", "<eos>"})
    source, target = vocabulary.encode(["<eos>", "a", "never"], ["b"])
    assert source.tolist() == [4, 5, UNK, EOS] and target.tolist() == [BOS, 6, EOS]
    assert all(tensor.dtype == torch.int64 for tensor in (source, target))
    assert vocabulary.tokens[4] == "<eos>"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


ROWS = [(f"in {i}", f"out {i}") for i in range(20)]


@pytest.mark.parametrize("content", (
    "\n".join(map("\t".join, ROWS)) + "\n",
    "\r\n".join(map(",".join, ROWS)),
    "\ufefftarget,n,source\n" + "".join(f'"{b}",1,"{a}"\n' for a, b in ROWS),
    "source\ttarget\n\n" + "".join(f"{a}\t {b}  \n" for a, b in ROWS)))
def test_read_pairs(tmp_path, content):
    pairs = transformer.read_pairs(write(tmp_path / "pairs", content), ("words", "chars"), 50)
    assert pairs == {tuple(a.split()): [tuple(b)] for a, b in ROWS}


def test_several_targets_of_a_source_stay_together(tmp_path):
    lines = [f"{a}\t{b}{again}" for again in ("", "x", "x") for a, b in ROWS]
    path = write(tmp_path / "pairs.tsv", "\n".join(lines))
    pairs = transformer.read_pairs(path, ("words", "words"), 50)
    assert pairs[("in", "3")] == [("out", "3"), ("out", "3x")]
    parser = common.option_parser("x", "", "", data=path, out="", epochs=1, batch_size=1, lr=1,
                                  weight_decay=0, clip=0, patience=1)
    parser.set_defaults(source_tokens="words", target_tokens="words", max_length=50)
    data = transformer.load_data(parser.parse_args([]))
    parts = [set(part) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len(set.union(*parts)) == 20
    assert all(len(targets) == 2 for targets in data.test.values())


@pytest.mark.parametrize("content, words", (
    ("a,b\n", "1 different"), ("", "0 different"), ("source,target\n", "0 different"),
    ("ab\ncd\n", "line 1"), ("a\tb\nc\n", "line 2"), ("a\tb\nc\t \n", "line 2"),
    (b"a\tb\nc\t\xff\n", "line 2 is not UTF-8"), ("a\tb\nc\t" + "d" * 51, "line 2 has more"),
    ("a,b\n" + "x" * 200000 + ",y\n", "field larger")))
def test_bad_files(tmp_path, content, words):
    path = write(tmp_path / "pairs", content)
    with pytest.raises(common.UserError) as error:
        transformer.read_pairs(path, ("chars", "chars"), 50)
    assert words in str(error.value) and path in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", (
    ("--data", "nowhere.csv"), ("--d-model", 30), ("--d-model", 9, "--heads", 3), ("--heads", 0),
    ("--task", "divide"), ("--predict", "a"), ("--resume",), ("--dropout", 1), ("--data", ".")))
def test_bad_options(options, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["transformer.py", *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        common.run_main(transformer.main)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("transformer.py: error: ") and message.count("\n") == 1


# ---------------------------------------------------------------- Command line


STOPPED = """
import os, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import common, transformer
save = common.save_checkpoint
def save_and_stop(path, checkpoint):
    save(path, checkpoint)
    if path.name == "last.pt":
        os.kill(os.getpid(), signal.SIGTERM)
common.save_checkpoint = save_and_stop
common.run_main(transformer.main)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a short run in out/, and the same in stopped/, sent SIGTERM after an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    for out, how, status in (("out", [], 0), ("stopped", ["-c", STOPPED], 143)):
        command = [sys.executable, *how, str(ROOT / "transformer.py"), *map(str, TINY), "--epochs",
                   "3", "--out", out]
        done = subprocess.run(command, cwd=str(folder), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, timeout=300)
        assert done.returncode == status, done.stdout
        assert ("--resume" in done.stdout) == (status == 143)
        if status == 0:  # the other one names the script by its whole path
            assert max(map(len, done.stdout.splitlines())) <= 80
    return folder


def test_a_run_writes_what_the_design_says(trained):
    names = {path.name for path in (trained / "out").iterdir()}
    assert names == {"last.pt", "best.pt", "history.csv", "summary.json", "curves.png",
                     "attention.png", "positions.png", "length.png"}
    summary = json.loads((trained / "out" / "summary.json").read_text())
    assert summary["script"] == "transformer.py" and summary["data"] == "synthetic reverse"
    assert {"exact_match", "token_accuracy", "error_rate", "beam", "longer"} <= set(summary["test"])
    assert summary["test"]["beam"]["worse"] == 0
    with open(str(trained / "out" / "history.csv")) as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert summary["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in rows))


def test_resume_ends_with_the_same_weights_bit_for_bit(trained, run):
    history = (trained / "stopped" / "history.csv").read_text().splitlines()
    assert len(history) == 2  # the header and one epoch
    run("transformer.py", "--out", trained / "stopped", "--resume")
    one, two = (torch.load(str(trained / name / "last.pt")) for name in ("out", "stopped"))
    assert len(two["history"]) == 3
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    done = run("transformer.py", "--out", trained / "stopped", "--resume", "--layers", 2, status=2)
    assert "--layers" in done.stderr


def test_predict(trained, run):
    out = ("--out", trained / "out")
    done = run("transformer.py", *out, "--predict", "abc", "x  y")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["abc", "x y"]
    assert all(len(line) == 3 and 0 <= float(line[2]) <= 1 for line in lines)
    assert done.stderr.count("never seen") == 1
    many = "".join(f"{'abcdefgh'[:i % 8 + 1]}\n" for i in range(3000))
    done = run("transformer.py", *out, "--beam", 1, "--predict", "-", stdin=many)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == many.split()
    assert len({tuple(line) for line in lines}) == 8  # the same whatever it is batched with
    for stdin, words in (("ok\n" + "a" * 500, "line 2 has 500"), ("a\n\nb", "line 2 has 0")):
        done = run("transformer.py", *out, "--predict", "-", stdin=stdin, status=2)
        assert words in done.stderr and done.stdout == ""


def test_predict_runs_freely_alone(trained, monkeypatch, capsys):
    """No pass under teacher forcing, which predictions do not need."""
    monkeypatch.setattr(Transformer, "forward", None)
    monkeypatch.setattr(sys, "argv", ["transformer.py", "--out", str(trained / "out"),
                                      "--predict", "abc"])
    transformer.main()
    assert capsys.readouterr().out.startswith("abc\t")


def test_predict_gives_back_bytes_that_are_not_utf8(trained):
    done = subprocess.run([sys.executable, str(ROOT / "transformer.py"), "--out", "out",
                           "--predict", "-"], cwd=str(trained), input=b"a\n\xff\n",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert [line.split(b"\t")[0] for line in done.stdout.splitlines()] == [b"a", b"\xff"]


@pytest.mark.parametrize("task", ("copy", "sort", "add"))
def test_every_task_trains(run, tmp_path, task):
    run("transformer.py", *TINY, "--task", task, "--epochs", 1, "--heads", 1, "--post-norm",
        "--beam", 2, "--out", "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["data"] == f"synthetic {task}" and summary["test"]["beam"]["width"] == 2


def test_own_data(run, tmp_path):
    rows = [(f"in {a} {b}", f"{b} {a}") for a in "abcdef" for b in "uvwxyz"]
    path = write(tmp_path / "pairs.csv", "".join(f"{a},{b}\n" for a, b in rows))
    run("transformer.py", *TINY, "--data", path, "--source-tokens", "words", "--target-tokens",
        "words", "--epochs", 2, "--batch-size", 8, "--out", "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["data"] == path
    done = run("transformer.py", "--out", "out", "--predict", "in  a u")
    assert done.stdout.startswith("in a u\t")


def test_a_small_model_learns_to_copy(tmp_path):
    """Training itself works: 2 to 4 letters of 5, learned by heart nowhere, in seconds."""
    torch.manual_seed(0)
    model = Transformer(9, d_model=32, heads=4, layers=1, d_ff=64, dropout=0, max_length=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        source = torch.randint(4, 9, (64, 4))
        source[:, 3] = EOS
        target = torch.cat([torch.full((64, 1), BOS), source], 1)
        loss = transformer.cross_entropy(model(source, target[:, :-1]), target[:, 1:])[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = transformer.beam_search(model.eval(), source)
    assert sum(row[2] == tokens[:3] for row, tokens in zip(found, source.tolist())) >= 60


def test_the_code_in_the_document_is_the_script_s():
    code = {line.strip() for line in (ROOT / "transformer.py").read_text().splitlines()}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "transformer.md").read_text(), re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(blocks) >= 5 and [line for line in lines if line not in code] == []
