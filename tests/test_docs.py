"""The documents and the code stay in step: commands, names, links and pictures."""

import importlib
import inspect
import json
import re
import shlex
import statistics

import pytest
from conftest import ROOT

DOCUMENTS = sorted(path.name for path in ROOT.glob("*.md"))
SCRIPTS = [name[:-3] for name in DOCUMENTS if name != "README.md"]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text):
    """The command lines `python X.py ...` in a document's bash blocks and inline code."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S)
             for line in block.replace("\\\n", " ").splitlines()] + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        for command in re.split(r"&&|[|<>]", line):
            words = shlex.split(command, comments=True)
            if len(words) > 1 and words[0] == "python" and words[1][:-3] in SCRIPTS:
                yield words[1][:-3], words[2:]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_parse_with_the_script_s_own_options(name):
    found = list(commands(text_of(name)))
    assert found
    for script, options in found:
        if options != ["--help"]:
            importlib.import_module(script).build_parser().parse_args(options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_and_classes_that_a_document_names_exist(script):
    module, common = importlib.import_module(script), importlib.import_module("common")
    names = set(re.findall(r"`(?:common\.)?([A-Za-z_]\w*)\(\)`", text_of(script + ".md")))
    assert names
    assert [name for name in names if not hasattr(module, name) and not hasattr(common, name)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        assert (ROOT / (file or name)).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", text_of(file or name), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]


def test_every_figure_is_used():
    text = "".join(text_of(name) for name in DOCUMENTS)
    assert [p.name for p in (ROOT / "figures").glob("*") if f"figures/{p.name}" not in text] == []


@pytest.mark.parametrize("script", [*SCRIPTS, "common"])
def test_public_functions_have_type_hints(script):
    module, bare = importlib.import_module(script), []
    functions = [function for part in vars(module).values() if inspect.isclass(part)
                 for name, function in vars(part).items() if name[0] != "_"]
    for function in filter(inspect.isfunction, [*vars(module).values(), *functions]):
        hints = inspect.signature(function)
        every = [value.annotation for name, value in hints.parameters.items() if name != "self"]
        if function.__module__ == script and hints.empty in [*every, hints.return_annotation]:
            bare.append(function.__qualname__)
    assert bare == []


# ---------------------------------------------------------------- Figures

RESULTS = {result["command"]: result["measured"] for result in (
    json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("tests/results/*.json"))}


NUMBER = re.compile(r"(?<![A-Za-z]-)(?<![\w.,])(\d[\d,]*(?:\.\d+)?)( %)?")  # not that of CIFAR-10


def tables(text):
    """Of each row of a table of results: what was measured by the command in it, or by those that
    the paragraph before the table names; and the row without it."""
    for before, table in re.findall(r"((?:[^\n|]+\n)*)\n((?:\|.*\n)+)", text):
        named = re.findall(r"`(python [\w/]+\.py[^`]*)`", before.replace("\n", " "))
        named = [command for command in named if command in RESULTS or "benchmark" in command]
        for row in table.splitlines()[2:]:
            own = re.findall(r"`(python \w+\.py[^`]*)`", row)
            if own or named:
                yield own or named, NUMBER.findall(re.sub(r"`[^`]*`", "", row))


def values(measured):
    """All numbers in a nest of results; of those of several turns their median, too."""
    if isinstance(measured, list) and measured and isinstance(measured[0], dict):
        measured = {key: [turn[key] for turn in measured] for key in measured[0]}
    if isinstance(measured, dict):
        measured = list(measured.values())
    if isinstance(measured, list):
        if measured and all(isinstance(value, (int, float)) for value in measured):
            yield statistics.median(measured)
        for part in measured:
            yield from values(part)
    elif isinstance(measured, (int, float)):
        yield measured


def stands_for(written, percent, value) -> bool:
    """Whether a number in a text, such as 1,230 or 0.054 or 85.3 %, is this value, rounded."""
    digits = written.replace(",", "")
    zeros = len(digits) - len(digits.rstrip("0")) if "." not in digits else 0
    unit = 10.0 ** (zeros - len(digits.partition(".")[2]))
    return abs((100 * value if percent else value) - float(digits)) <= 0.501 * unit


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_in_tables_are_those_that_were_measured(name):
    for commands, numbers in tables(text_of(name)):
        if numbers:
            missing = [command for command in commands if command not in RESULTS]
            assert not missing, f"run python tests/record.py {missing[0]}"
        known = [value for command in commands for value in values(RESULTS.get(command))]
        for written, percent in numbers:
            assert any(stands_for(written, percent, value) for value in known), (
                written, commands)


def test_a_figure_that_was_not_measured_is_noticed():
    assert stands_for("85.3", " %", 0.8529) and not stands_for("85.4", " %", 0.8529)
    assert stands_for("1,230", "", 1234.4) and not stands_for("1,240", "", 1234.4)
    assert list(values({"a": [1, 5, 3], "b": {"c": 0.5, "d": "x"}})) == [3, 1, 5, 3, 0.5]
    assert list(values([{"a": 1}, {"a": 2}])) == [1.5, 1, 2]
    text = "`python tests/benchmark.py cnn`, twice:\n\n| a | b |\n|---|---|\n| `x 4` | 3 |\n"
    assert list(tables(text)) == [(["python tests/benchmark.py cnn"], [("3", "")])]


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing(script, capsys):
    importlib.import_module(script)
    assert capsys.readouterr().out == ""
