"""The command line as a user meets it: results, one-line errors, exit status, nothing left behind."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ptq
from ptq.cli import main
from ptq.reconstruct import _loop
from tests.zoo import build

ARCH = f"{Path(__file__).parent / 'zoo.py'}:Residual"
QUICK = ["--data", "genie:steps=3,count=8,batch_size=4", "--rounding", "genie_m:steps=3"]


def quantize(*extra: str, out: str = "out", bits: str = "w4a4") -> int:
    """`ptq quantize` on the residual net."""
    given = ["model.pt", "--arch", ARCH, "--input-shape", "3,16,16", "--bits", bits, "-o", out]
    return main(["quantize", *given, *(extra if "--data" in extra else (*QUICK, *extra))])


def test_quantize_writes_a_whole_verified_folder(work, capsys):
    assert quantize("--mean", "0.5", "--std", "0.25", "--val", "val.npz") == 0
    assert {p.name for p in Path("out").iterdir()} == {
        "manifest.json",
        "plan.json",
        "tensors.safetensors",
        "model.onnx",
        "report.md",
    }
    shown = capsys.readouterr()
    for word in ("layers.0", "onnxruntime", "nearest", "genie_m", "float", "passed", "7 of 7"):
        assert word in shown.out, word
    data = json.loads(Path("out/manifest.json").read_text())["manifest"]
    assert data["metrics"]["proof"]["passed"] and set(data["metrics"]["top1"]) == {
        "float",
        "nearest",
        "genie_m",
        "onnxruntime",
    }
    assert data["recipe"]["data"].startswith("genie:") and "steps=3" in data["recipe"]["data"]
    assert "fold_error" in data["metrics"] and data["metrics"]["fold_error"] < 1e-5
    assert "## Blocks" in Path("out/report.md").read_text()


def test_eval_runs_simulation_and_file_side_by_side(work, capsys):
    quantize("--mean", "0.5", "--std", "0.25", "--quiet")
    assert main(["eval", "out", "--val", "val.npz", "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    assert top1["simulation"] == top1["model.onnx"]


def test_json_is_all_that_is_printed(work, capsys):
    assert quantize("--json", "--quiet") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["proof"]["passed"] and shown.err == ""


def test_quiet_prints_nothing(work, capsys):
    assert quantize("--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_recipe_repeats_a_run_bit_for_bit(work):
    assert quantize("--quiet", "--seed", "5") == 0
    given = ["model.pt", "--arch", ARCH, "--recipe", "out/manifest.json", "-o", "again", "--quiet"]
    assert main(["quantize", *given]) == 0
    for name in ("tensors.safetensors", "model.onnx"):
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()


def test_a_recipe_has_its_target(work):
    asked = (
        "--target",
        "tensorrt",
        "--bits",
        "w8a8",
        "--weights",
        "symmetric",
        "--activations",
        "signed",
        "--set",
        "fc=w8a8",
    )
    assert quantize("--quiet", *asked) == 0
    again = ["quantize", "model.pt", "--arch", ARCH, "--recipe", "out/manifest.json", "--quiet", "-o"]
    assert main([*again, "again"]) == 0
    assert Path("out/model.onnx").read_bytes() == Path("again/model.onnx").read_bytes()
    assert main([*again, "by_plan", "--plan", "out/plan.json"]) == 0, "what --set said is in the plan"


def test_export_of_a_saved_network(work, capsys):
    quantize("--quiet", "--target", "none")
    assert not Path("out/model.onnx").exists()
    assert main(["export", "out"]) == 0
    assert Path("out/model.onnx").is_file()


def test_what_was_verified_is_not_overwritten_by_an_export_for_another_target(work, capsys):
    quantize("--quiet", "--weights", "symmetric", "--mean", "0.5", "--std", "0.25")
    before = Path("out/model.onnx").read_bytes()
    assert main(["export", "out", "--target", "tensorrt"]) == 1
    assert "quantize it again" in capsys.readouterr().err
    assert main(["export", "out", "--target", "openvino", "--vectors", "2"]) == 0
    shown = capsys.readouterr().out
    assert "layers in integer kernels" in shown and "outputs that differ in any bit" in shown
    assert Path("out/model.onnx").read_bytes() == before
    record = json.loads(Path("out/model.openvino.proof.json").read_text())
    assert (
        record["proof"]["passed"] and record["target"] == "openvino" and set(record["files"]) == {"model.openvino.onnx"}
    )
    moves = [row for row in json.loads(Path("out/vectors/index.json").read_text())["layers"] if row["op"] == "move"]
    assert moves and all(row["geometry"] for row in moves)
    assert main(["eval", "out", "--val", "val.npz", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["top1"]) == {"simulation", "model.onnx", "model.openvino.onnx"}


@pytest.mark.parametrize("name", ["model.onnx", "model.openvino.onnx"])
def test_eval_runs_no_file_but_that_which_was_verified(work, name: str, capsys):
    quantize("--quiet", "--weights", "symmetric")
    assert main(["export", "out", "--target", "openvino"]) == 0
    path = Path("out", name)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(bytes(whole))
    assert main(["eval", "out", "--val", "val.npz"]) == 2
    assert "is not the file that was written" in capsys.readouterr().err
    if name == "model.onnx":
        path.unlink()
        assert main(["eval", "out", "--val", "val.npz"]) == 2
        assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-3", "100000"])
def test_golden_vectors_on_images_that_there_are(work, count: str, capsys):
    quantize("--quiet", "--target", "none")
    assert main(["export", "out", "--vectors", count]) == 2
    assert f"on {count} images asked for" in capsys.readouterr().err and not Path("out/model.onnx").exists()


def test_inspect_says_what_a_target_cannot_do(work, capsys):
    given = ["inspect", "model.pt", "--arch", ARCH, "--input-shape", "3,16,16", "--bits", "w4a8", "--target", "qnn"]
    assert main(given) == 1
    assert "its weights have zero points; add --weights symmetric" in capsys.readouterr().err
    assert main([*given, "--weights", "symmetric"]) == 0


def test_inspect_prints_the_plan_and_writes_nothing(work, capsys):
    before = sorted(work.iterdir())
    assert main(["inspect", "model.pt", "--arch", ARCH, "--input-shape", "3,16,16", "--bits", "w4a4"]) == 0
    shown = capsys.readouterr().out
    for word in ("layers.0.conv1", "int4", "uint4", "int8 per channel", "float"):
        assert word in shown, word
    assert sorted(work.iterdir()) == before


def test_list_names_every_plugin(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for word in ("genie", "gaussian", "images", "genie_m", "nearest", "onnx_qdq"):
        assert word in shown, word


def test_pictures_as_data(work):
    assert (
        quantize("--data", "images:val.npz", "--mean", "0.5", "--std", "0.25", "--rounding", "nearest", "--quiet") == 0
    )


def _complaint(capsys, status: int, *args: str) -> str:
    """The one line that a failing command prints; it leaves the folder as it was."""
    before = sorted(p.name for p in Path().iterdir())
    assert main(list(args)) == status
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert shown.out == "" and sorted(p.name for p in Path().iterdir()) == before
    return lines[0]


_BASE = ("quantize", "model.pt", "--arch", ARCH, "-o", "out", "--input-shape", "3,16,16", "--quiet")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((*_BASE, "--bits", "w9a4"), "2 to 8"),
        ((*_BASE, "--bits", "four"), "w4a4"),
        ((*_BASE, "--data", "geni"), "did you mean 'genie'?"),
        ((*_BASE, "--data", "genie:step=3"), "did you mean 'steps'?"),
        ((*_BASE, "--data", "genie:steps=many"), "not a valid int"),
        ((*_BASE, "--data", "images"), "images:PATH"),
        ((*_BASE, "--data", "images:nowhere"), "neither a folder nor a file"),
        ((*_BASE, "--rounding", "best"), "known: adaround, brecq, genie_m, nearest, qdrop"),
        ((*_BASE, "--target", "npu"), "known: onnx_qdq, ort, openvino, tensorrt"),
        ((*_BASE, "--mean", "0", "--std", "1", "--val", "strange.npz"), "label 77 found; the network has 10 classes"),
        ((*_BASE, "--mean", "0.5"), "mean and std belong together"),
        ((*_BASE, "--mean", "0,0", "--std", "1,1"), "one number per channel"),
        ((*_BASE, "--adds", "9"), "2 to 8"),
        ((*_BASE, "--plan", "plan.json", "--weights", "symmetric"), "--weights and a plan given"),
        ((*_BASE, "--plan", "nowhere.json"), "nowhere.json cannot be read: No such file"),
        ((*_BASE, "--rounding", "genie_m:drop=2"), "option drop=2.0 of genie_m: 0 to 1 is needed"),
        ((*_BASE, "--data", "zeroq:lr=-1"), "option lr=-1.0 of zeroq: 0 or more is needed"),
        ((*_BASE, "--device", "cuda:99"), "not there"),
        ((*_BASE[:-3], "--quiet"), "--input-shape"),
        ((*_BASE, "--input-shape", "3,0,16"), "channels, height, width"),
        ((*_BASE, "--input-shape", "4,16,16"), "check the input shape"),
        ((*_BASE, "--val", "nowhere"), "neither a folder nor a file"),
        ((*_BASE, "--val", "val.npz"), "--mean and --std"),
        ((*_BASE, "--recipe", "val.npz"), "not a manifest"),
        (("quantize", "none.pt", *_BASE[2:]), "nothing is there"),
        (("eval", "nowhere", "--val", "val.npz"), "holds no manifest.json"),
        (("export", "nowhere"), "holds no manifest.json"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(args, says, work, capsys):
    held = np.load("val.npz")
    np.savez("strange.npz", x=held["x"], y=np.full_like(held["y"], 77))
    assert says in _complaint(capsys, 2, *args)


def test_existing_folders_are_refused_before_any_work(work, capsys):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years")
    assert "exists" in _complaint(capsys, 2, *_BASE)
    assert "not written by this program" in _complaint(capsys, 2, *_BASE, "--force")
    assert quantize("--quiet", out="fresh") == 0
    assert quantize("--quiet", "--force", out="fresh") == 0


def test_network_without_batch_norm_names_what_works(work, capsys):
    torch.save(build("plain").state_dict(), "plain.pt")
    arch = ARCH.replace("Residual", "Plain")
    given = ("--arch", arch, "--input-shape", "3,16,16", "--quiet", "-o", "out")
    assert "'--data gaussian'" in _complaint(capsys, 2, "quantize", "plain.pt", *given, *QUICK)
    assert main(["quantize", "plain.pt", *given, "--data", "gaussian:count=8", "--rounding", "nearest"]) == 0


def test_failed_gate_is_status_1_and_keeps_the_work(work, capsys, monkeypatch):
    from ptq.exporters.onnx_qdq import OnnxQdq

    # The verdict alone is spoilt here; tests of the gate itself tamper with files.
    monkeypatch.setattr(OnnxQdq, "verify", _spoil(OnnxQdq.verify))
    assert quantize("--quiet") == 1
    assert "does not compute what was simulated: spoilt" in capsys.readouterr().err
    assert not Path("out").exists()
    assert json.loads(Path("out.failed/manifest.json").read_text())["manifest"]["metrics"]["proof"]["passed"] is False


def _spoil(verify):
    return lambda *args: verify(*args) | {"passed": False, "failure": "spoilt"}


@pytest.mark.parametrize("passed", [True, False])
def test_an_exporter_that_says_no_more_than_it_must(passed: bool, work, capsys, monkeypatch):
    found = {"passed": passed, "failure": None if passed else "not today"}
    monkeypatch.setattr("ptq.exporters.onnx_qdq.OnnxQdq.verify", lambda *args: found)
    assert quantize() == (0 if passed else 1)
    shown = capsys.readouterr()
    assert ("passed" in shown.out) if passed else ("not today" in shown.err and Path("out.failed").is_dir())


def test_interrupted_run_leaves_no_output_and_goes_on(work, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ptq.exporters.onnx_qdq.OnnxQdq.export", interrupt)
        assert quantize("--quiet") == 130
    assert sorted(p.name for p in work.iterdir()) == ["model.pt", "out.progress", "val.npz"]
    trained = []
    step = _loop._step
    monkeypatch.setattr(_loop, "_step", lambda *args: trained.append(1) or step(*args))
    assert quantize("--quiet") == 0 and not trained, "every block was there"
    assert sorted(p.name for p in work.iterdir()) == ["model.pt", "out", "val.npz"]
    assert quantize("--quiet", out="anew") == 0 and trained
    assert Path("out/model.onnx").read_bytes() == Path("anew/model.onnx").read_bytes()


def test_run_that_is_told_to_stop_leaves_no_output(work, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ptq.exporters.onnx_qdq.OnnxQdq.export", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert quantize("--quiet") == 143
    assert "told to stop" in capsys.readouterr().err
    assert sorted(p.name for p in work.iterdir()) == ["model.pt", "out.progress", "val.npz"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "ptq", "--help"], capture_output=True, text=True, check=True)
    assert "quantize" in done.stdout


def test_folders_beside_the_output_that_others_made_stay(work, capsys, monkeypatch):
    for name in ("out.progress", "out.failed"):
        Path(name).mkdir()
        Path(name, "mine.txt").write_text("years")
    from ptq.exporters.onnx_qdq import OnnxQdq

    assert quantize("--quiet") == 0
    assert [p.name for p in Path("out.progress").iterdir()] == ["mine.txt"]
    with monkeypatch.context() as patched:
        patched.setattr(OnnxQdq, "verify", _spoil(OnnxQdq.verify))
        assert quantize("--quiet", "--force") == 1
    assert [p.name for p in Path("out.failed").iterdir()] == ["mine.txt"] and Path(
        "out.failed-2/manifest.json"
    ).is_file()


def test_a_terminal_that_lacks_characters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert main(["list"]) == 0
    sys.stdout.flush()
    assert b"genie" in sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_none_is_an_answer_from_python_too(work):
    with pytest.raises(ptq.SpecError, match="'nearest' is rounding without training"):
        ptq.quantize(build("residual"), "w4a4", "gaussian:count=8", input_shape=(3, 16, 16), rounding=None)  # type: ignore[arg-type]
    qm = ptq.quantize(
        build("residual"), "w4a4", "gaussian:count=8", input_shape=np.array([3, 16, 16]), rounding="nearest", finish="none",
        target="none", layers="fc=w8", mean=0.5, std=0.25,
    )  # fmt: skip
    assert (
        qm.manifest.recipe["finish"] is None
        and qm.manifest.recipe["layers"] == ["fc=w8"]
        and qm.manifest.mean == (0.5,) * 3
    )


@pytest.mark.parametrize("where", ["demo", "my demo"])
def test_the_demo_runs_the_command_it_shows(where: str, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from ptq import demo

    monkeypatch.setattr(demo, "train", lambda x, y: build("residual"))
    ran, said = [], []
    demo.run_demo(tmp_path / where, lambda words: ran.extend(words) or 0, said.append)
    assert shlex.split(said[-1].strip().removeprefix("$ "))[1:] == ran and str(tmp_path / where / "model.pt") in ran
