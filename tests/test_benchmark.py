"""The benchmark runs and computes what it prints. No time is asserted."""

import argparse
import json
import sys

import benchmark
import pytest
import torch
from PIL import Image

MODERN = benchmark.flop_registry is not None  # PyTorch 2.1


@pytest.fixture
def measure(run):
    """What a program returns, in a process of its own, for it stands in for methods of PyTorch."""
    def start(script, program, examples=100):
        done = run("tests/benchmark.py", script, "--measure", program, "--examples", examples)
        return json.loads(done.stdout)
    return start


@pytest.mark.parametrize("script, examples, unit, cells", [
    ("cnn", 128, "images", [""]), ("gan", 64, "images", [""]),
    ("rnn", 100, "strings", ["lstm: ", "gru: "]), ("transformer", 100, "target tokens", [""])])
def test_our_loop_is_measured_as_a_whole_and_in_its_steps(measure, script, examples, unit, cells):
    found = measure(script, "ours", examples)
    for cell in cells:
        step, epoch = (found[f"{cell}{part}, {unit} a second"] for part in ("step", "whole epoch"))
        assert step > epoch > 0
        share = found[f"{cell}share of the epoch outside the step"]
        assert share == pytest.approx(1 - epoch / step)
        assert (f"{cell}GFLOP/s" in found) == MODERN


@pytest.mark.parametrize("script, program, unit", [
    ("cnn", "usual", "images"), ("gan", "usual", "images"),
    ("rnn", "bare, random lengths", "strings"), ("rnn", "bare, our batches", "strings"),
    pytest.param("transformer", "usual", "target tokens", marks=pytest.mark.skipif(
        not MODERN, reason="torch.nn.Transformer has no norm_first"))])
def test_the_usual_way_has_the_same_quantities(measure, script, program, unit):
    cell = "gru: " if script == "rnn" else ""
    found = measure(script, program)
    assert found[f"{cell}step, {unit} a second"] > 0
    assert found[f"{cell}whole epoch, {unit} a second"] > 0


@pytest.mark.skipif(not MODERN, reason="PyTorch 2.1 counts operations")
def test_operations_are_counted_forward_and_backward():
    x, weight = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True)
    counter = benchmark.Operations()
    with counter:
        (x @ weight).sum().backward()
    assert counter.total == 2 * 2 * 3 * 4 * 5  # of x no gradient is asked for


def test_little_of_the_rnn_s_steps_is_padding(measure):
    assert 0 < measure("rnn", "our batches")["share of padding"] < 0.1


def test_ratios_are_taken_turn_by_turn():
    runs = {"ours": [{"gru: step": 6.0, "share": 0.1}, {"gru: step": 8.0, "share": 0.2}],
            "usual": [{"gru: step": 2.0, "share": 0.1}, {"gru: step": 1.0, "share": 0.1}],
            "matrix product": [{"step": 12.0}, {"step": 4.0}]}
    assert benchmark.ratios(runs) == {"ours / usual: gru: step": [3.0, 8.0],
                                      "ours / matrix product: gru: step": [0.5, 2.0]}


def test_programs_take_turns_and_the_table_has_their_medians(monkeypatch, capsys):
    calls = []

    def fake(name, turn):
        calls.append((turn, name))
        return {"speed": 10.0 * turn + (3 if name == "ours" else 1)}
    monkeypatch.setattr(benchmark, "in_child", fake)
    monkeypatch.setattr(benchmark, "PROGRAMS", {"cnn": {"ours": None, "usual": None}})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "cnn", "--turns", "3"])
    benchmark.main()
    assert calls == [(turn, name) for turn in range(3) for name in ("ours", "usual")]
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = {line[:62].strip(): line[62:].split() for line in lines}
    assert rows["ours: speed"] == ["13", "3", "23"]
    assert rows["ours / usual: speed"] == ["1.18", "1.1", "3"]
    sys.argv.append("--json")
    benchmark.main()
    found = json.loads(capsys.readouterr().out)
    assert found["runs"]["usual"] == [{"speed": 1.0}, {"speed": 11.0}, {"speed": 21.0}]
    assert found["ratios"]["ours / usual: speed"] == [3.0, 13 / 11, 23 / 21]
    assert found["turns"] == 3


def test_time_and_memory_of_a_command_are_its_own():
    # More than this process has, from which the child starts.
    code = "x = bytearray(2000 * 2**20); x[::4096] = x[::4096]"
    seconds, mebibytes = benchmark.start("-c", code)
    assert seconds > 0 and 2000 < mebibytes < 2400
    with pytest.raises(SystemExit, match="broken"):
        benchmark.start("-c", "raise ValueError('broken')")


def test_accuracy_stops_at_the_goal(tmp_path, monkeypatch):
    for i in range(24):
        file = tmp_path / ("train", "test")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * i, 0, 255 * (i // 2 % 2))).save(str(file))
    monkeypatch.setattr(benchmark, "GOAL", 0.01)
    monkeypatch.setattr(benchmark, "SCHEDULES", (1, 2))
    monkeypatch.setattr(benchmark.common, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(benchmark.cnn, "predict_logits", benchmark.cnn.predict_logits)
    args = argparse.Namespace(data=str(tmp_path), examples=50000, turn=0)
    for program in benchmark.PROGRAMS["cnn-accuracy"].values():
        found = program(args)
        assert found["epochs"] == 1 and found["test accuracy"] >= 0.01
        assert found["seconds of training"] > 0
