"""The documents and the code stay in step: commands, names, links and pictures."""

import importlib
import re
import shlex

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


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing(script, capsys):
    importlib.import_module(script)
    assert capsys.readouterr().out == ""
