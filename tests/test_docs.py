"""The documents and the code stay in step: commands, names, links, figures and results."""

import importlib
import inspect
import json
import re
import shlex
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from PIL import Image

import cnn
import common

DOCUMENTS = sorted(path.name for path in ROOT.glob("*.md"))
SCRIPTS = [name[:-3] for name in DOCUMENTS if name != "README.md"]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text):
    """(script, options) of each `python X.py ...` in a document's bash blocks and inline code."""
    lines = re.findall(r"`([^`\n]+)`", text)
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        lines += block.replace("\\\n", " ").splitlines()
    for line in lines:
        for command in re.split(r"&&|[|<>]", line):
            words = shlex.split(command, comments=True)
            if words[:1] == ["python"] and len(words) > 1 and words[1][:-3] in SCRIPTS:
                yield words[1][:-3], words[2:]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_parse_with_the_script_s_own_options(name):
    found = list(commands(text_of(name)))
    assert found
    for script, options in found:
        if options != ["--help"]:
            importlib.import_module(script).build_parser().parse_args(options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_that_a_guide_names_exist_and_have_its_defaults(script):
    actions = {}
    for action in importlib.import_module(script).build_parser()._actions:
        actions.update({flag: action for flag in action.option_strings})
    text = text_of(f"{script}.md")
    named = set(re.findall(r"`(--[a-z0-9-]+)", text)) - {"--letters"}  # of tests/judge_texts.py
    assert named and named <= set(actions)
    for flag, default in re.findall(r"`(--[a-z-]+)`\|([\d.]+)\|", text):
        assert actions[flag].default == float(default), flag


def test_the_readme_names_the_options_that_resume_may_change():
    text = text_of("README.md").partition("You may change\n")[2].partition("If the run used")[0]
    named = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", text)}
    assert named == common.RESUMABLE - {"compile", "resume", "predict", "sample"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_that_a_document_names_exist(script):
    modules = [importlib.import_module(script), importlib.import_module("common")]
    names = set(re.findall(r"`(?:common\.)?([A-Za-z_]\w*)\(\)`", text_of(f"{script}.md")))
    assert names
    missing = {name for name in names if not any(hasattr(module, name) for module in modules)}
    assert missing == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_figures_exist(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        file, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        assert (ROOT / (file or name)).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", text_of(file or name), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in anchors, target


def test_the_readme_uses_each_model_from_python(run, tmp_path):
    for script, options in TINY.items():
        if script == "rnn":
            options = options.replace("--cells gru", "--cells lstm")
        run(f"{script}.py", *options.split(), "--epochs", 1)
    Image.new("RGB", (50, 40), "red").save(str(tmp_path / "cat.jpg"))
    section = text_of("README.md").partition("\n## From Python\n")[2].partition("\n## ")[0]
    program, = re.findall(r"```py\n(.*?)```", section, re.S)
    (tmp_path / "program.py").write_text(program + "print(images.shape)\n")
    done = run(tmp_path / "program.py", env={"PYTHONPATH": str(ROOT)})
    label, order, target, shape = done.stdout.splitlines()
    assert label in cnn.SHAPES and len(order) == 3
    assert target.startswith("(") and shape == "torch.Size([9, 28, 28, 1])"


def stripped(text):
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("script", SCRIPTS)
def test_excerpts_are_lines_of_the_code(script):
    code = stripped((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    excerpts = re.findall(r"```python\n(.*?)```", text_of(f"{script}.md"), re.S)
    assert len(excerpts) > 3
    shared = stripped((ROOT / "common.py").read_text(encoding="utf-8"))
    for excerpt in map(stripped, excerpts):
        assert excerpt in code or excerpt in shared, excerpt


def test_every_figure_is_used():
    text = "".join(text_of(name) for name in DOCUMENTS)
    figures = [path.name for path in (ROOT / "figures").glob("*") if path.suffix != ".py"]
    assert [name for name in figures if f"figures/{name}" not in text] == []


def test_importing_prints_nothing_and_imports_nothing_slow():
    code = (f"import sys, {', '.join(SCRIPTS)}; "
            "print(*{'matplotlib', 'torchvision'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), stdout=subprocess.PIPE,
                          check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_public_functions_have_type_hints(name):
    module = importlib.import_module(name)
    bare = []
    classes = filter(inspect.isclass, list(vars(module).values()))
    for scope in [module, *classes]:
        for function in filter(inspect.isfunction, list(vars(scope).values())):
            if function.__module__ == name and function.__name__[0] not in "_<":
                hinted = {*function.__annotations__, "self"}
                if not hinted >= {*inspect.signature(function).parameters, "return"}:
                    bare.append(function.__qualname__)
    assert bare == []


# ---------------------------------------------------------------- Numbers in tables

RESULTS = {}
for path in ROOT.glob("tests/results/*.json"):
    result = json.loads(path.read_text(encoding="utf-8"))
    RESULTS[result["command"]] = result["measured"]


def measured(results):
    """All numbers in a nest of results; of a run's summary, those of its test and its seconds."""
    if isinstance(results, (int, float)):
        return [results]
    if isinstance(results, dict) and "test" in results:
        results = [results["test"], results["seconds"]]
    if isinstance(results, dict):
        results = list(results.values())
    if not isinstance(results, list):
        return []
    return [number for part in results for number in measured(part)]


def is_rounded(written, percent, value):
    """Whether a number in a text, such as "1,230", "0.054" or "85.3", is this value, rounded."""
    digits = written.replace(",", "")
    unit = 10.0 ** -len(digits.partition(".")[2])
    if "." not in digits and not percent:
        unit = 10.0 ** (len(digits) - len(digits.rstrip("0")))
    return abs((100 * value if percent else value) - float(digits)) <= 0.501 * unit


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_beside_a_command_are_those_that_were_measured(script):
    rows = re.findall(r"^\|.*`(python [^`]*\.py[^`]*)`(.*)$", text_of(f"{script}.md"), re.M)
    assert rows
    for command, rest in rows:
        known = measured(RESULTS.get(command))
        numbers = re.findall(r"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?)( %)?", rest)
        assert known or not numbers, f"run python tests/record.py {command}"
        for number in numbers:
            assert any(is_rounded(*number, value) for value in known), (number, command)


def ratios(results):
    """The lists of ratios, one of each turn, in a nest of results of the benchmark."""
    found = []
    for key, value in results.items():
        if isinstance(value, dict):
            found += ratios(value)
        elif key.startswith("ratio"):
            found.append(value)
    return found


def test_speedups_in_the_readme_are_those_that_were_measured():
    known = []
    for path in ROOT.glob("tests/results/benchmark*.json"):
        known += ratios(json.loads(path.read_text(encoding="utf-8"))["measured"])
    speed = text_of("README.md").partition("\n## Speed\n")[2].partition("\n## ")[0]
    written = re.findall(r"([\d.]+) \(([\d.]+)-([\d.]+)\)", speed)
    assert len(written) > 10
    for numbers in written:
        assert any(all(is_rounded(number, "", value) for number, value
                       in zip(numbers, (statistics.median(turns), min(turns), max(turns))))
                   for turns in known), numbers


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_in_the_readme_are_those_that_were_measured(script):
    row = re.search(rf"^\| \[`{script}\.py`\].*\[`{script}\.md`\].*$", text_of("README.md"), re.M)
    result = re.sub(r"\(.*?\)", "", row.group().split("|")[4])
    known = []
    for command, values in RESULTS.items():
        if command.startswith(f"python {script}.py"):
            known += measured(values)
    numbers = re.findall(r"(\d[\d,]*(?:\.\d+)?)( %)?", result)
    assert numbers
    for number in numbers:
        assert any(is_rounded(*number, value) for value in known), number


@pytest.mark.parametrize("name, command, columns", [
    ("cnn.md", "python cnn.py --data cifar10_jpeg --limit 10000", "test accuracy, and its mean"),
    ("gan.md", "python gan.py --data mnist --limit 3000 --width 32 --epochs 30",
     "Fréchet distance, mean coverage and mean of sure digits")])
def test_numbers_beside_options_are_those_that_were_measured(name, command, columns):
    found, = (results[columns] for key, results in RESULTS.items()
              if key.startswith(f"{command}, with these options"))
    rows = re.findall(r"^\| ?`?(default options|--[a-z][^`|]*)`? ?\|(.* %.*)$", text_of(name), re.M)
    assert [options for options, _ in rows] == list(found)
    for options, rest in rows:
        numbers = re.findall(r"([\d.]+)( %)?", rest)
        assert len(numbers) == len(found[options])
        for number, value in zip(numbers, found[options]):
            assert is_rounded(*number, value), (options, number, value)


def test_a_number_that_was_not_measured_is_noticed():
    assert is_rounded("85.3", " %", 0.8529) and not is_rounded("85.4", " %", 0.8529)
    assert is_rounded("1,230", "", 1234.4) and not is_rounded("1,240", "", 1234.4)
