"""common.py: schedule, early stopping, clipping, checkpoints, run folders, tables and images."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import common

# ---------------------------------------------------------------- Training


def test_learning_rate_rises_linearly_and_falls_along_a_cosine():
    rates = [common.warmup_cosine(progress, 0.2) for progress in (0.05, 0.1, 0.2, 0.6, 1.0, 1.5)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 0.5, 0.0, 0.0])
    assert common.warmup_cosine(0.0, 0.0) == 1.0


def test_scheduler_follows_the_schedule_step_by_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    args = Namespace(epochs=5, warmup=0.2)
    scheduler = common.make_scheduler(optimizer, args, steps=40)
    for step in range(200):
        expected = 3.0 * common.warmup_cosine((step + 0.5) / 200, 0.2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()
    with pytest.warns(UserWarning, match="with 195 training steps the model may learn little"):
        common.make_scheduler(optimizer, args, steps=39)


def history(*accuracies):
    return [{"accuracy": accuracy} for accuracy in accuracies]


def test_epochs_since_best_counts_from_the_first_maximum():
    def score(row):
        return row["accuracy"]
    assert common.epochs_since_best(history(1, 3, 2, 3, 1), score) == 3
    assert common.epochs_since_best(history(1, 2), score) == 0


def test_early_stopping_waits_for_patience_and_for_the_end_of_the_warm_up(capsys):
    def run(warmup):
        args, rows = Namespace(epochs=20, patience=3, warmup=warmup, seed=0), []
        for _ in common.epochs_to_train(args, rows, lambda row: row["accuracy"]):
            rows.append({"accuracy": 0.5})
        return len(rows)
    assert run(warmup=0.0) == 4  # the first one, and three without improvement
    assert run(warmup=0.5) == 11
    assert "early stopping: no improvement on validation for 3 epochs" in capsys.readouterr().out


def test_each_epoch_has_its_own_random_numbers_also_when_resumed():
    def draw(done):
        args, rows, drawn = Namespace(epochs=4, patience=9, warmup=0, seed=7), history(*done), []
        for _ in common.epochs_to_train(args, rows, lambda row: row["accuracy"]):
            drawn.append(torch.rand(1).item())
            rows.append({"accuracy": len(rows)})
        return drawn
    whole = draw([])
    assert len(set(whole)) == 4
    assert draw([0, 1]) == whole[2:]


def test_clip_gradients_scales_to_the_limit_and_returns_the_old_norm():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in layer.parameters()]
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in before))
    assert common.clip_gradients(layer, math.inf).item() == pytest.approx(norm)
    assert all(p.grad.equal(g) for p, g in zip(layer.parameters(), before))
    assert common.clip_gradients(layer, 0.5).item() == pytest.approx(norm)
    for parameter, gradient in zip(layer.parameters(), before):
        assert torch.allclose(parameter.grad, gradient * 0.5 / norm, atol=1e-4)


def test_weight_decay_is_for_matrices_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decayed, others = common.parameter_groups(model, 0.1)
    assert [p.dim() for p in decayed["params"]] == [4] and decayed["weight_decay"] == 0.1
    assert [p.dim() for p in others["params"]] == [1, 1, 1] and others["weight_decay"] == 0.0


def test_means_are_those_over_the_steps():
    steps = [{"loss": torch.tensor(x), "high": torch.tensor(x > 1)} for x in (1.0, 2.0, 6.0)]
    assert common.means(steps) == {"loss": 3.0, "high": pytest.approx(2 / 3)}


def test_a_precision_that_the_device_lacks_is_found_before_a_run_begins(monkeypatch):
    monkeypatch.setattr(common, "CPU_HAS_BFLOAT16", False)
    args = Namespace(device="cpu", precision="auto")
    assert common.select_device(args) == torch.device("cpu")
    args.precision = "bfloat16"
    with pytest.raises(common.UserError) as caught:
        common.select_device(args)
    assert str(caught.value) == ("--precision bfloat16: this device, or this version of PyTorch, "
                                 "is not known to support it; use auto")


@pytest.mark.skipif(common.VERSION < (1, 10), reason="no torch.autocast")
@pytest.mark.parametrize("precision, cpu_gains, dtype", [
    ("auto", True, torch.bfloat16), ("auto", False, torch.float32),
    ("bfloat16", False, torch.bfloat16), ("float32", True, torch.float32)])
def test_bfloat16_is_used_where_the_device_has_it_and_gains(monkeypatch, precision, cpu_gains,
                                                            dtype):
    monkeypatch.setattr(common, "CPU_HAS_BFLOAT16", True)
    with common.autocast(precision, torch.device("cpu"), cpu_gains):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_batches_of_an_epoch_are_full_shuffled_and_dealt_out(monkeypatch):
    batches = common.shuffled_batches(11, 4, 0, 1)
    assert batches.shape == (2, 4) and len(set(batches.flatten().tolist())) == 8
    assert not batches.equal(common.shuffled_batches(11, 4, 0, 2))
    monkeypatch.setattr(common, "WORLD", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        shares.append(common.shuffled_batches(11, 4, 0, 1))
    assert torch.stack(shares, 2).flatten(1).equal(batches)
    with pytest.raises(common.UserError, match="a step needs at least 4 training examples"):
        common.shuffled_batches(11, 3, 0, 1)


def test_report_counts_by_class_and_knows_classes_without_examples():
    predicted, labels = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0])
    report = common.classification_report(predicted, labels, ["a", "b", "c"])
    assert report["accuracy"] == report["largest_class"] == 0.75
    assert report["per_class"] == {"a": pytest.approx(2 / 3), "b": 1.0, "c": None}
    assert report["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_predictions_are_listed_with_the_most_probable_mistakes_first(tmp_path, capsys):
    common.write_predictions(tmp_path, ["caf\udce9", "b", "c", "d"], list("xxyy"), list("xyxx"),
                             [0.9, 0.6, 0.51239, 0.7])
    rows = ["input\ttarget\tprediction\tprobability", "d\ty\tx\t0.7", "b\tx\ty\t0.6",
            "c\ty\tx\t0.5124", "caf\udce9\tx\tx\t0.9"]
    written = (tmp_path / "predictions.tsv").read_bytes().decode("utf-8", "surrogateescape")
    assert written.splitlines() == rows
    assert "\n".join(rows[1:4]) in capsys.readouterr().out


# ---------------------------------------------------------------- Checkpoints and run folders


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"script": "x.py", "weights": torch.arange(3.0)})
    assert common.load_checkpoint(path, "x.py")["weights"].tolist() == [0, 1, 2]
    assert os.listdir(str(tmp_path)) == ["last.pt"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, error, step):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"script": "x.py", "epoch": 1})

    class FailingFile(io.FileIO):  # ends half-way: Ctrl-C, or the disk is full
        def write(self, data):
            super().write(bytes(data)[:len(data) // 2])
            raise error

    def fail(*_):
        raise error
    if step == "write":
        monkeypatch.setattr(common, "open", FailingFile, raising=False)
    else:
        monkeypatch.setattr(common.os, step, fail)
    with pytest.raises(error):
        common.save_checkpoint(path, {"script": "x.py", "epoch": 2, "weights": torch.rand(500)})
    assert common.load_checkpoint(path, "x.py")["epoch"] == 1


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def spoil(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-100])
    elif how == "flipped bit":
        with zipfile.ZipFile(str(path)) as archive:
            entry = max(archive.infolist(), key=lambda entry: entry.file_size)  # the weights
        position = entry.header_offset + 30 + len(entry.filename) + 200
        path.write_bytes(content[:position] + bytes([content[position] ^ 1])
                         + content[position + 1:])
    elif how == "no archive":
        path.write_bytes(b"text")


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "no archive"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, how):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"script": "x.py", "weights": torch.rand(500)})
    spoil(path, how)
    with pytest.raises(common.UserError, match="last.pt is damaged or not a checkpoint: "):
        common.load_checkpoint(path, "x.py")


@pytest.mark.skipif(common.VERSION < (2, 0), reason="older versions of PyTorch run code")
def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    common.save_checkpoint(tmp_path / "last.pt", {"script": "x.py", "weights": Payload()})
    with pytest.raises(common.UserError, match="is damaged or not a checkpoint"):
        common.load_checkpoint(tmp_path / "last.pt", "x.py")
    assert not (tmp_path / "ran").exists()


def test_missing_and_foreign_checkpoints_are_one_line(tmp_path):
    with pytest.raises(common.UserError, match="there is no .*last.pt; train first"):
        common.load_checkpoint(tmp_path / "last.pt", "x.py")
    common.save_checkpoint(tmp_path / "last.pt", {"script": "cnn.py"})
    with pytest.raises(common.UserError, match="was written by cnn.py, not by x.py"):
        common.load_checkpoint(tmp_path / "last.pt", "x.py")


def test_the_best_epoch_and_the_last_one_are_kept(tmp_path):
    model = nn.Linear(1, 1)
    history = []
    for epoch, accuracy in enumerate([0.5, 0.9, 0.7], start=1):
        nn.init.constant_(model.weight, epoch)
        history.append({"epoch": epoch, "accuracy": accuracy})
        common.save_epoch(tmp_path, Namespace(script="x.py", checksum=0), history, {"model": model},
                          {"model": model.state_dict()}, lambda row: row["accuracy"])
    best = common.load_checkpoint(tmp_path / "best.pt", "x.py")
    last = common.load_checkpoint(tmp_path / "last.pt", "x.py")
    assert best["metrics"] == history[1] and best["model"]["weight"].item() == 2
    assert last["history"] == history and last["model"]["weight"].item() == 3
    assert (tmp_path / "history.csv").read_text() == "epoch,accuracy\n1,0.5\n2,0.9\n3,0.7\n"


def test_a_loss_that_is_not_finite_writes_nothing(tmp_path):
    with pytest.raises(common.UserError, match="the loss or its gradient is not finite"):
        common.save_epoch(tmp_path, Namespace(), [{"epoch": 1, "loss": math.nan}], {}, {}, max)
    assert os.listdir(str(tmp_path)) == []


def hold(args):
    """Enter a run folder, and write a checkpoint there."""
    with common.run_folder(args) as folder:
        (folder / "best.pt").write_text(args.note)
    return folder


@pytest.mark.parametrize("out", ["run", "run/", "link"])
def test_an_earlier_run_is_moved_aside_and_a_link_stays_one(tmp_path, monkeypatch, out):
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    hold(Namespace(out=out, resume=False, subfolders=["."], note="old"))
    assert hold(Namespace(out=out, resume=True, subfolders=["."], note="old")) == tmp_path / "run"
    with pytest.warns(UserWarning, match=f"--out {out} held another run, which is now in ") as seen:
        hold(Namespace(out=out, resume=False, subfolders=["."], note="new"))
    moved = Path(str(seen[0].message).split(" now in ")[1])
    assert (moved / "best.pt").read_text() == "old"
    assert (tmp_path / "run" / "best.pt").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_that_holds_more_than_a_run_is_never_moved(tmp_path, monkeypatch, out):
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / "best.pt").write_text("")
    with pytest.raises(common.UserError, match="holds more than a run"):
        hold(Namespace(out=out, resume=False, subfolders=["."], note="new"))
    assert (tmp_path / "best.pt").exists()


def test_a_folder_in_use_is_refused_by_any_name_and_leaves_no_file(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    args = Namespace(out=str(tmp_path / "link"), resume=False, subfolders=["."])
    for _ in range(2):  # the folder is free again when the run has ended
        with common.run_folder(args):
            with pytest.raises(common.UserError, match="another run is using this folder"):
                common.lock(tmp_path / "run", [])
    assert os.listdir(str(tmp_path / "run")) == []


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.warns(UserWarning, match="cannot be locked"):
        common.lock(tmp_path, [])


INTERRUPTED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import common
from argparse import Namespace
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
def main():
    with common.run_folder(Namespace(out="my run", resume=False, subfolders=["."])) as folder:
        (folder / "last.pt").touch()
        os.kill(os.getpid(), {signal})
        time.sleep(9)
common.run_main(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_continue(tmp_path, number):
    script = tmp_path / "x.py"
    script.write_text(INTERRUPTED.format(root=str(ROOT), signal=int(number)))
    done = subprocess.run([sys.executable, "x.py"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == ("warning: interrupted; continue with: python x.py --out 'my run' "
                           "--resume\n")


PRINTING = """
import sys
sys.path.insert(0, {root!r})
import common
def main():
    for i in range(100000):
        print(i)
common.run_main(main)
"""


def test_output_that_nobody_reads_ends_quietly(tmp_path):
    (tmp_path / "x.py").write_text(PRINTING.format(root=str(ROOT)))
    process = subprocess.Popen([sys.executable, str(tmp_path / "x.py")], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 2


NOTEBOOK = """
import io, sys
sys.path.insert(0, {root!r})
import common
sys.stdout = io.StringIO()  # which, as in a notebook, has no reconfigure()
common.run_main(lambda: print("done"))
sys.stderr.write(sys.stdout.getvalue())
"""


def test_a_notebook_has_another_stdout(tmp_path):
    (tmp_path / "x.py").write_text(NOTEBOOK.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, str(tmp_path / "x.py")], stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert (done.returncode, done.stderr) == (0, "done\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "x.py").write_text(PRINTING.format(root=str(ROOT)))
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(tmp_path / "x.py")], stdout=full,
                              stderr=subprocess.PIPE, universal_newlines=True)
    assert done.stderr == "x.py: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("name, status", [("RANK", 0), ("WORLD_SIZE", 2)])
def test_variables_that_torchrun_did_not_set_are_ignored_or_one_line(tmp_path, name, status):
    (tmp_path / "x.py").write_text(PRINTING.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, str(tmp_path / "x.py")], env={**os.environ, name: "2"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == status
    if status == 0:
        assert done.stdout.endswith("\n99999\n") and done.stderr == ""
    else:
        assert done.stderr.startswith("x.py: error: WORLD_SIZE is set, but not by torchrun: ")
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


# ---------------------------------------------------------------- Tables and texts


def table(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return common.read_table(str(path), ("text", "label"))


@pytest.mark.parametrize("text", [
    'text,label\n"a, b",x\nc,y\n',
    '\ufeffLABEL , Text\r\nx,"a, b"\r\ny,c\r\n',
    'id,text,label\n1, "a, b", x\n2,c,y\n\n',
    '"label"\t"text"\nx\ta, b\ny\tc\n',
    "label\ttext\n x\u00a0\t a,  b\ny\tc\n",
    '\ufeffid;Text;Label\r\n1;a, b;x\r\n2;"c";y\r\n;;\r\n',  # Excel's, in many countries
])
def test_tables_are_read_by_the_names_of_their_columns(tmp_path, text):
    assert table(tmp_path / "t.csv", text) == [("a, b", "x"), ("c", "y")]


@pytest.mark.parametrize("text, message", [
    ("text,class\nb,y\n", "line 1: the columns are text, class (the first line must name the "
                          "columns text and label; commas, semicolons or tabs separate them)"),
    ("", "line 0: the columns are missing (the first line must name the columns"),
    ("label,text\nx,My order, which\n", "line 2: 3 cells, but 2 in the first line; in a CSV file, "
                                        "a text that contains a separator or a line break needs"),
    ("text,label\na,x\nb\n", "line 3: 1 cells, but 2 in the first line"),
    ("text,label\n,x\n", "there are no rows below the header"),
    (b"PK\x03\x04\xff\xfe", ": not a text file in UTF-8 (is it .xlsx or .gz?)"),
    ('text,label\n"a,x\n', "line 2: unexpected end of data"),
])
def test_a_table_that_does_not_fit_is_one_line(tmp_path, text, message):
    with pytest.raises(common.UserError) as caught:
        table(tmp_path / "t.csv", text)
    assert message in str(caught.value)


def test_quotation_marks_in_a_tsv_file_are_kept(tmp_path):
    rows = table(tmp_path / "t.tsv", 'text\tlabel\n"a" b\tx\n5" disc\ty\n')
    assert rows == [('"a" b', "x"), ('5" disc', "y")]


def test_rows_with_an_empty_cell_are_skipped_and_told(tmp_path):
    text = "text,id,label\na,1,x\n ,2,y\nb,,x\nc,4,\n"
    with pytest.warns(UserWarning, match=r"skipped 2 row\(s\) .* lines \[3, 5\]"):
        assert table(tmp_path / "t.csv", text) == [("a", "x"), ("b", "x")]


def test_composed_and_decomposed_letters_are_the_same():
    assert common.clean_text("cafe\u0301 \t\n au\u00a0lait ") == "caf\u00e9 au lait"


def test_equal_contents_are_in_the_same_tenth_and_groups_are_spread_evenly():
    contents = [i % 300 for i in range(900)]
    groups = [content % 3 for content in contents]
    part = common.split_tenths(contents, groups, seed=0)
    assert all(len(set(part[content::300].tolist())) == 1 for content in range(300))
    for group in range(3):
        counts = part[:300][torch.tensor(groups[:300]) == group].bincount(minlength=10)
        assert counts.tolist() == [10] * 10
    assert not part.equal(common.split_tenths(contents, groups, seed=1))


def test_prediction_inputs_come_from_arguments_or_lines(monkeypatch):
    assert common.prediction_inputs(["one", "-"]) == ["one", "-"]
    # Only a line feed ends a line: other separators of Unicode may be part of a text.
    stdin = Namespace(buffer=io.BytesIO("\ufeffone\r\n \ntwo\u2028three\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert common.prediction_inputs(["-"]) == ["one", "two\u2028three"]


# ---------------------------------------------------------------- Images


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(str(path), **options)
    return str(path)


def test_an_image_is_fitted_and_cropped_about_its_center(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    image = common.read_image(save(tmp_path / "a.png", pixels), 8)
    assert image.shape == (8, 8, 3) and image.min() > 200


def test_transparent_pixels_become_white(tmp_path):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[2:6, 2:6, 3] = 255
    palette = Image.new("P", (8, 8))
    palette.putpalette([90, 90, 90, 0, 0, 0])
    palette.paste(1, (2, 2, 6, 6))
    palette.info["transparency"] = 0  # the number of a color
    for image in (Image.fromarray(ink), Image.fromarray(ink).convert("LA"), palette):
        path = str(tmp_path / f"{image.mode}.png")
        image.save(path)
        pixels = common.read_image(path, 8)
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[4, 4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_per_channel_are_refused(tmp_path, kind):
    ramp = np.linspace(1000, 30000, 64).reshape(8, 8).astype(kind)
    with pytest.raises(common.UserError, match="more than 8 bits per channel; convert"):
        common.read_image(save(tmp_path / "a.tiff", ramp), 8)


def test_a_large_photograph_is_read_like_its_pixels(tmp_path):
    y, x = np.mgrid[:1200, :1600]
    pixels = np.stack([x // 7, y // 5, (x + y) // 11], -1).astype(np.uint8)
    path = save(tmp_path / "a.jpg", pixels, quality=95)
    expected = Image.open(path).convert("RGB").crop((200, 0, 1400, 1200))
    expected = np.asarray(expected.resize((32, 32), Image.BICUBIC)).astype(int)
    assert abs(common.read_image(path, 32) - expected).mean() < 4


@pytest.mark.parametrize("kind", ("jpg", "png", "tif"))
def test_an_orientation_is_applied_once(tmp_path, kind):
    """With orientation 6 the top left corner is shown at the top right."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32] = 255
    exif = Image.Exif()
    exif[274] = 6
    path = str(tmp_path / f"a.{kind}")
    Image.fromarray(pixels).save(path, **({"tiffinfo": {274: 6}} if kind == "tif" else
                                          {"exif": exif.tobytes()}))
    image = common.read_image(path, 64)
    assert image[8, 56].min() > 240 and image[8, 8].max() < 15 > image[56, 56].max()


def test_a_broken_exif_record_costs_the_orientation_alone(tmp_path):
    # The second one has an orientation, and a description (0x10E) that is a fraction.
    entries = b"\x01\x0e\0\x05\0\0\0\x01\0\0\0\0" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    for exif in (b"broken", b"\0\0\0\x08\0\x02" + entries + b"\0\0\0\0"):
        path = save(tmp_path / "a.jpg", np.full((8, 8, 3), 90, np.uint8),
                    exif=b"Exif\0\0MM\0*" + exif)
        assert common.read_image(path, 8).shape == (8, 8, 3)


def test_an_image_with_damaged_pixels_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    path = Path(save(tmp_path / "a.png", noise))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(common.UserError, match="a.png cannot be read as an image: "):
        common.read_image(str(path), 8)


def test_files_that_are_no_images_are_named_and_skipped(tmp_path):
    good = save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    for name in ("b.heic", "c.png"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / "d.png").symlink_to("gone.png")  # not a file
    paths = common.image_files(str(tmp_path))
    assert len(paths) == 3
    with pytest.warns(UserWarning) as seen:
        images, kept = common.read_images(paths, 8)
    assert len(images) == 1 and paths[kept[0]] == good
    messages = "\n".join(str(warning.message) for warning in seen)
    assert "b.heic cannot be read as an image: " in messages
    assert "2 of 3 files cannot be read" in messages


def test_heic_files_are_read_if_the_package_for_them_is_installed(tmp_path, monkeypatch):
    calls = []
    package = Namespace(register_heif_opener=lambda: calls.append("registered"))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    common.read_images([save(tmp_path / "a.png", np.eye(8, dtype=np.uint8))], 8)
    assert calls == ["registered"]


def test_hidden_files_are_left_out_and_links_are_followed(tmp_path):
    for name in ("photos/a/1.png", "photos/a/.checkpoints/1.png", "photos/__MACOSX/a/._1.png",
                 "photos/[b]/2.png", "more/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "photos" / "c").symlink_to(str(tmp_path / "more"))
    files = common.image_files(str(tmp_path / "photos"))
    assert [Path(file).name for file in files] == ["2.png", "1.png", "3.png"]
    assert common.image_files(str(tmp_path / "photos" / "[b]")) == files[:1]


def test_images_that_do_not_fit_into_memory_are_one_line():
    with pytest.raises(common.UserError, match=r"99,999 images of 30000 x 30000 pixels take .* GB"):
        common.read_images(["x"] * 99999, 30000)


def test_no_image_is_in_two_sets():
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).repeat(2, 2, 2, 3)
    labels = torch.arange(120) % 2
    sets = {"train": (images, labels)}
    common.make_disjoint_sets(sets, seed=0)
    values = {use: set(images[:, 0, 0, 0].tolist()) for use, (images, _) in sets.items()}
    assert sorted(sum(map(list, values.values()), [])) == list(range(60))
    assert len(values["test"]) == len(values["val"]) == 6
    given = {"train": (images[:60], labels[:60]), "test": (images[50:70], labels[50:70])}
    common.make_disjoint_sets(given, seed=0)
    assert len(given["test"][0]) == 20 and len(given["train"][0]) + len(given["val"][0]) == 40


def test_a_set_with_fewer_than_two_images_of_its_own_is_an_error():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 2, 2, 3)
    labels = torch.arange(6) % 2
    with pytest.raises(common.UserError, match="fewer than two images are left for the val set"):
        same = {name: (images, labels) for name in ("train", "val", "test")}
        common.make_disjoint_sets(same, seed=0)
    with pytest.raises(common.UserError, match="fewer than two images are left for the test set"):
        # Three images, each twice: one for each set.
        common.make_disjoint_sets({"train": (images[:3].repeat(2, 1, 1, 1), labels)}, seed=0)


@pytest.mark.parametrize("seed", range(10))
def test_copies_of_an_image_count_once_in_validation_and_test(seed):
    values = torch.arange(100, dtype=torch.uint8)
    values = torch.cat([values, values.new_zeros(900)])  # one of the images is there 901 times
    images = values.view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
    sets = {"train": (images, torch.zeros(1000, dtype=torch.int64))}
    common.make_disjoint_sets(sets, seed)
    sizes = [len(sets[name][0]) for name in ("train", "val", "test")]
    assert sizes[1:] == [10, 10] and sizes[0] in (80, 980)


def test_a_title_of_any_folder_name_is_drawn(tmp_path):
    figure, _ = common.new_figure(1, 1, (2, 2), "caf\udce9 for $5, not $6")  # \udce9: not UTF-8
    figure.savefig(tmp_path / "a.png")
    assert figure.texts[0].get_text() == r"caf? for \$5, not \$6"


def test_the_summary_is_strict_json(tmp_path):
    args = Namespace(script="cnn.py", data="synthetic", clip=math.inf)
    common.write_summary(tmp_path, args, [{"seconds": 1.5}], {})
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["options"]["clip"] == "inf" and summary["seconds"] == 1.5


def test_what_is_written_must_be_apart_from_the_data(tmp_path):
    for data, out in (("photos", "photos"), ("photos", "photos/runs"), ("runs/photos", "runs")):
        with pytest.raises(common.UserError, match="must be apart"):
            common.check_apart(data, out)
    common.check_apart("photos", "runs")
