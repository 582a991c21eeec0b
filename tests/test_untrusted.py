"""Files that nobody vouches for: damaged and hostile checkpoints, odd folders of images, odd
tables. Each is put to use, or refused in one line that names it.
"""

import copy
import functools
import importlib
import io
import os
import random
import signal
import struct
import sys
import zlib

import pytest
import torch
from conftest import CHILDREN, in_child
from PIL import Image

import common
import gan

SCRIPTS = ["cnn", "rnn", "gan", "transformer"]
TRAIN = {"cnn": "--data synthetic --synthetic-size 100 --widths 2 2 2 --hidden 2",
         "rnn": "--synthetic-size 100 --hidden 2 --tasks classify --cells gru",
         "gan": "--data synthetic --synthetic-size 500 --width 1 --latent 2",
         "transformer": "--synthetic-size 100 --d-model 2 --d-ff 2 --heads 1 --layers 1 --beam 1"}
# What reads best.pt in --out, and what reads last.pt.
USE = {"best.pt": {"cnn": "--predict image.png", "rnn": "--predict ab", "gan": "--sample 2",
                   "transformer": "--predict ab"}, "last.pt": dict.fromkeys(SCRIPTS, "--resume")}
BOTH = pytest.mark.parametrize("file", list(USE))
EACH = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(autouse=True)
def no_hang():
    """Whatever waits for a minute fails."""
    def stop(number, frame):
        raise TimeoutError
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(60)
        yield
        signal.alarm(0)
    else:
        yield


def call(name, options) -> bytes:
    """What a script prints, run in this process. Raises UserError or SystemExit."""
    script, stdout = importlib.import_module(name), io.TextIOWrapper(io.BytesIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "keep_freed_memory", lambda: None)
        patch.setattr(sys, "argv", [name + ".py", *options])
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(signal, "signal", lambda *_: None)
        main = script.main
        try:
            common.run_main(main)
        finally:
            stdout.flush()
    return stdout.buffer.getvalue()


def refusal(capsys, name, options) -> str:
    """The one line with which a script ends; nothing, if it ends well."""
    capsys.readouterr()
    try:
        call(name, options)
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2 and message.count("\n") == 1, message
        assert message.startswith(f"{name}.py: error: ")
        return message
    return ""


# ---------------------------------------------------------------- Checkpoints


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory):
    """A folder, from now on the working directory, with a run of each script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        patch.setattr(common, "save_figure", lambda path, figure: None)
        patch.setattr(gan, "glyphs", functools.lru_cache()(gan.glyphs))
        Image.new("RGB", (9, 9)).save("image.png")
        for name in SCRIPTS:
            call(name, [*TRAIN[name].split(), "--epochs", "1", "--out", name])
        yield


@pytest.fixture
def use(capsys):
    """use("cnn", "best.pt", content): what cnn.py says of this content of its best.pt."""
    def attempt(name, file, content):
        path = os.path.join(name, file)
        with open(path, "rb") as original:
            whole = original.read()
        try:
            if isinstance(content, bytes):
                with open(path, "wb") as damaged:
                    damaged.write(content)
            else:
                torch.save(content, path)
            message = refusal(capsys, name, ["--out", name, *USE[file][name].split()])
        finally:
            with open(path, "wb") as original:
                original.write(whole)
        assert not message or path in message, message
        return message
    return attempt


def load(name, file):
    with open(os.path.join(name, file), "rb") as content:
        return torch.load(content, map_location="cpu")


@BOTH
@EACH
def test_a_good_checkpoint_is_used(use, name, file):
    assert use(name, file, load(name, file)) == ""


class Payload:
    """Pickled, this is an order to create a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.skipif(not common.SAFE_LOADING, reason="this PyTorch cannot promise it")
@BOTH
@EACH
def test_a_checkpoint_runs_no_code(use, name, file):
    assert "is damaged or does not fit" in use(name, file, {**load(name, file), "x": Payload()})
    assert not os.path.exists("trap")


@BOTH
@EACH
def test_a_truncated_checkpoint_is_refused(use, name, file):
    with open(os.path.join(name, file), "rb") as content:
        whole = content.read()
    for tenth in range(10):
        assert "is damaged or does not fit" in use(name, file, whole[:len(whole) * tenth // 10])


def same(a, b) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else type(a) is type(b) and a == b


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    original, path, chance = load("transformer", "best.pt"), tmp_path / "best.pt", random.Random(0)
    with open("transformer/best.pt", "rb") as file:
        content = bytearray(file.read())
    refused = 0
    for _ in range(400):
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            assert same(original, common.load_checkpoint(path, "transformer.py")), bit
        except common.UserError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 50


@BOTH
@EACH
def test_another_script_s_checkpoint_is_refused(use, name, file):
    other = SCRIPTS[SCRIPTS.index(name) - 1]
    message = f"{file} was written by {other}.py, not by {name}.py"
    assert message in use(name, file, load(other, file))


def without(parts: dict):
    return [{key: value for key, value in parts.items() if key != other} for other in parts]


def replaced(checkpoint, path, value):
    """A copy with another value at a path of keys."""
    checkpoint = copy.deepcopy(checkpoint)
    inner = functools.reduce(lambda part, key: part[key], path[:-1], checkpoint)
    inner[path[-1]] = value
    return checkpoint


def place(name, file):
    """Keys that lead to where a checkpoint has its weights, and to what surrounds them."""
    run = ("runs", "classify gru") if name == "rnn" else ()
    if file == "best.pt":
        return run, (*run, "best" if name == "rnn" else "model")
    inner = (*run, "last") if name == "rnn" else ()
    return run, (*inner, "generator" if name == "gan" else "model")


@BOTH
@EACH
def test_another_version_s_checkpoint_is_refused(use, name, file):
    checkpoint = load(name, file)
    run, _ = place(name, file)
    for lacking in without(checkpoint):
        assert use(name, file, lacking) or name == "rnn" and set(lacking) >= {"script", "runs"}
    for lacking in without(functools.reduce(dict.get, run, checkpoint)) if run else ():
        assert use(name, file, replaced(checkpoint, run, lacking))
    options = [*run, "options"] if run else ["model_options"]
    if file == "last.pt":
        options = ["options"]
    values = functools.reduce(dict.get, options, checkpoint)
    for lacking in without(values):
        message = use(name, file, replaced(checkpoint, options, lacking))
        assert message or file == "best.pt"  # a default may be what was left out
    for unknown in {**values, "unknown": 1}, {**values, "": None}, [], 1:
        assert use(name, file, replaced(checkpoint, options, unknown))
    for option in ("epochs", "lr", "precision", "compile", "resume") if file == "last.pt" else ():
        for value in "many", [1, 2], {}, -1:
            message = use(name, file, replaced(checkpoint, [*options, option], value))
            assert message or option == "resume"  # which is set anew in any case


@BOTH
@EACH
def test_weights_of_another_shape_are_refused(use, name, file):
    checkpoint, (_, path) = load(name, file), place(name, file)
    weights = functools.reduce(dict.get, path, checkpoint)
    key = next(key for key, tensor in weights.items() if tensor.dim() > 1)
    for wrong in (weights[key][1:], weights[key].flatten(), 1, None):
        assert use(name, file, replaced(checkpoint, [*path, key], wrong))
    for lacking in (*without(weights)[:3], {**weights, "unknown": weights[key]}, {}, None):
        assert use(name, file, replaced(checkpoint, path, lacking))


@pytest.mark.parametrize("name, path", [
    ("cnn", ["classes"]), ("transformer", ["tokens"]), ("rnn", ["runs", "classify gru", "symbols"]),
    ("rnn", ["runs", "classify gru", "answers"])])
def test_a_list_of_names_of_another_length_is_refused(use, name, path):
    checkpoint = load(name, "best.pt")
    names = functools.reduce(dict.get, path, checkpoint)
    for wrong in names[1:], [*names, "more"], [], None, 1:
        assert use(name, "best.pt", replaced(checkpoint, path, wrong))


@EACH
def test_a_run_on_other_data_is_not_resumed(use, name):
    run, _ = place(name, "last.pt")
    message = use(name, "last.pt", replaced(load(name, "last.pt"), [*run, "data"], 12345))
    assert "is of a run on other data; start a new run" in message


# ---------------------------------------------------------------- Images


def png(width, height) -> bytes:
    """A PNG file that says it is this large, with the pixels of one row."""
    def chunk(kind, data):
        ends = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return ends[0] + kind + data + ends[1]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(1 + 3 * width))) + chunk(b"IEND", b""))


def read_odd_images(folder, results):
    """In a child: read the folder; how many images of each class, and how much memory it took."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts, classes = common.load_image_folder(str(folder), 32, 3)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    side, _ = gan.folder_format(str(folder))
    results.put((classes, parts["train"][1].bincount().tolist(), side, grown))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the files of POSIX")
def test_odd_images_are_read_or_skipped_in_little_memory(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 30)).save(str(tmp_path / name / "good.png"))
    odd = tmp_path / "a"
    whole = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(whole, "JPEG")
    (odd / "truncated.jpg").write_bytes(whole.getvalue()[:5000])
    (odd / "empty.png").write_bytes(b"")
    (odd / "text.png").write_text("no image")
    (odd / "bomb.png").write_bytes(png(60000, 60000))
    Image.new("1", (10000, 10000)).save(str(odd / "large.png"))
    # These three can be read.
    Image.new("RGB", (1, 1)).save(str(odd / "1x1.png"))
    Image.new("RGB", (1, 10**6)).save(str(odd / "tall.png"))
    Image.new("RGB", (50, 50)).save(os.fsdecode(os.fsencode(str(odd)) + b"/\xff\xfe.png"))
    (odd / "itself.png").symlink_to(odd / "itself.png")
    (odd / "again").symlink_to(tmp_path)
    os.mkfifo(str(odd / "pipe.png"))
    results = CHILDREN.Queue()
    child = in_child(read_odd_images, tmp_path, results)
    classes, counts, side, grown = results.get(timeout=100)
    child.join()
    assert (classes, counts) == (["a", "b"], [4, 1])
    assert side == 28  # the middle one of 1, 1, 30, 30, 50, 300 and 10,000, down to a multiple of 4
    assert grown < 300 * 1024  # KiB; the largest image alone would take 10 GiB


# ---------------------------------------------------------------- Tables


LONG = "x" * 10**7
TABLES = {
    "NUL": ("text,label\na\0b,x\nc,y\n", None),
    "long field": (f"text,label\n{LONG},x\n", "line 2: field larger than field limit (131072)"),
    "long line": (f"text,label\na,x,{LONG}\n", "line 2: field larger than field limit (131072)"),
    "open quote": ('text,label\n"a,x\nb,y\n', "line 3: unexpected end of data"),
    "odd quote": ('text,label\n"a"b,x\n', "line 2: ',' expected after '\"'"),
    "empty": ("", "too few rows of classes"),
    "blank": ("\n\r\n \n", "line 3 needs a text, a tab or comma, and a label"),
    "one column": ("text\na\n", "line 1 needs a text, a tab or comma, and a label")}


@pytest.mark.parametrize("kind", list(TABLES))
def test_odd_tables_are_one_line(capsys, tmp_path, kind):
    content, expected = TABLES[kind]
    path = tmp_path / "table.csv"
    path.write_bytes(content.encode())
    message = refusal(capsys, "rnn", ["--data", str(path), "--out", str(tmp_path / "run")])
    assert len(message) < 300 and (expected is None or expected in message), message
    assert f"--data {path}: " in message


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r", "\n\r\n"])
def test_any_line_ends_and_a_byte_order_mark_are_read(tmp_path, start, ends):
    path = tmp_path / "table.csv"
    lines = ["text,label", '"a ""quoted"", text",x', "b,y", ""]
    path.write_bytes((start + ends.join(lines)).encode())
    rows = common.read_table(str(path), ("text", "label"))
    assert [cells for _, cells in rows] == [['a "quoted", text', "x"], ["b", "y"]]
