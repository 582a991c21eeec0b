"""The benchmark runs and computes what it prints. No time is asserted."""

import json
import sys

import benchmark
import pytest
import torch

OLD = torch.__version__.startswith(("1.7", "1.8", "1.9"))  # no norm_first, no label smoothing
SMALL = {"cnn": 128, "gan": 64, "rnn": 200, "transformer": 128}
QUANTITIES = {"cnn": ["images a second"], "gan": ["images a second"],
              "rnn": ["lstm: strings a second", "gru: strings a second"],
              "transformer": ["pairs a second"], "decoding": ["tokens a second"]}


@pytest.mark.parametrize("what", list(QUANTITIES))
def test_ours_and_the_usual_way_are_measured(monkeypatch, what):
    if OLD and what == "transformer":
        pytest.skip("torch.nn.Transformer has no norm_first")
    monkeypatch.setattr(benchmark, "EXAMPLES", SMALL)
    monkeypatch.setattr(benchmark.gan, "VALIDATION_SAMPLES", benchmark.FEW)
    programs = benchmark.MEASURES[what](["--device", "cpu"])
    assert list(programs) == QUANTITIES[what]
    for ours, usual in programs.values():
        assert ours() > 0 and usual() > 0


def test_photographs_are_read_either_way():
    (ours, usual), = benchmark.measure_images([], count=2, size=(400, 300)).values()
    assert ours() > 0 and usual() > 0


def test_turns_are_taken_and_the_table_has_their_ratios(monkeypatch, capsys):
    calls = []

    def program(name, *rates):
        remaining = iter(rates)
        return lambda: calls.append(name) or next(remaining)
    programs = {"speed": (program("ours", 3, 12, 20), program("usual", 1, 2, 10))}
    monkeypatch.setitem(benchmark.MEASURES, "cnn", lambda options: dict(programs))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "cnn"])
    benchmark.main()
    assert calls == 3 * ["ours", "usual"]
    rows = {line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["ours, speed"] == ["12", "3", "20"]
    assert rows["ratio, speed"] == ["3.00", "2.00", "6.00"]
    programs["speed"] = program("ours", 3), program("usual", 1)
    sys.argv += ["--json", "--turns", "1"]
    benchmark.main()
    found = json.loads(capsys.readouterr().out)
    assert found["turns"] == 1 and found["ratio"] == {"speed": [3.0]}
