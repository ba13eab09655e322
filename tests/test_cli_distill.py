"""`ptq distill` and `quantize --distill` as a user meets them."""

import json
from pathlib import Path

import pytest
import torch

import ptq
from ptq.cli import main
from ptq.contracts import Feedback
from tests.zoo import ZOO

FILE = Path(__file__).parent / "zoo.py"
ARCH = f"{FILE}:Residual"
SHORT = ["--epochs", "2", "--steps", "2", "--batch", "4"]
TEACHER = ["--teacher", "model.pt", "--arch", ARCH, "--input-shape", "3,16,16", "--mean", "0.5", "--std", "0.25"]
GENIE = ["--data", "genie:steps=2,count=8,batch_size=4"]


@pytest.fixture
def quantized(work):
    """The folder with `out/`, a quantized network, in it."""
    given = ["model.pt", "--arch", ARCH, "--input-shape", "3,16,16", "--mean", "0.5", "--std", "0.25", "--bits", "w3a4"]
    assert main(["quantize", *given, *GENIE, "--rounding", "nearest", "-o", "out", "--quiet"]) == 0
    return work


def _student(*extra: str, out: str = "made") -> int:
    given = ["distill", *TEACHER, "--student-arch", f"{FILE}:SharedReLU", "-o", out, *SHORT, *extra]
    return main(given if "--data" in extra else [*given, *GENIE])


def test_a_folder_is_trained_further(quantized, capsys):
    assert main(["distill", "out", "--arch", ARCH, *SHORT, "--report-on", "val.npz"]) == 0
    shown = capsys.readouterr().out
    for word in ("Epochs", "mean over epochs", "variance", "onnxruntime", "distilled", "passed"):
        assert word in shown, word
    before, after = (json.loads(Path(f, "manifest.json").read_text())["manifest"] for f in ("out", "out-distilled"))
    assert after["metrics"]["proof"]["passed"] and after["metrics"]["proof"]["differing_outputs"] == 0
    assert after["recipe"]["distill"].startswith("epochs=2,steps=2,batch_size=4")
    assert {k: v["scale"] for k, v in after["ranges"].items()} == {k: v["scale"] for k, v in before["ranges"].items()}
    assert not torch.equal(
        ptq.load("out").graph(torch.ones(1, 3, 16, 16)), ptq.load("out-distilled").graph(torch.ones(1, 3, 16, 16))
    )
    assert sorted(p.name for p in Path().iterdir()) == ["model.pt", "out", "out-distilled", "val.npz"]
    again = ["quantize", "model.pt", *TEACHER[2:], "--recipe", "out-distilled/manifest.json", "-o", "again", "--quiet"]
    assert main(again) == 2 and "trained further" in capsys.readouterr().err  # by a command of its own


def test_in_the_run_that_quantizes(work, capsys):
    given = [
        "model.pt",
        "--arch",
        ARCH,
        "--input-shape",
        "3,16,16",
        "--bits",
        "w3a4",
        *GENIE,
        "--rounding",
        "nearest",
    ]
    told = ["--mean", "0.5", "--std", "0.25", "--report-on", "val.npz"]
    assert main(["quantize", *given, *told, "-o", "out", "--distill", "epochs=1,steps=2,batch_size=4"]) == 0
    shown = capsys.readouterr().out
    assert "Epochs" in shown and "mean over epochs" in shown
    course = json.loads(Path("out/manifest.json").read_text())["manifest"]["metrics"]["course"]
    assert [row["epoch"] for row in course["epochs"]] == [1] and course["mean"] == course["epochs"][0]["top1"]
    assert (
        main(["quantize", "model.pt", "--arch", ARCH, "--recipe", "out/manifest.json", "-o", "again", "--quiet"]) == 0
    )
    for name in ("tensors.safetensors", "model.onnx"):
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()
    assert json.loads(Path("out/manifest.json").read_text())["manifest"]["recipe"]["distill"].startswith("epochs=1")


def test_another_architecture(work, capsys):
    assert _student("--report-on", "val.npz") == 0
    assert "at the end" in capsys.readouterr().out
    assert {p.name for p in Path("made").iterdir()} == {"student.pt", "distillation.json", "manifest.json"}
    facts = json.loads(Path("made/distillation.json").read_text())
    assert [row["epoch"] for row in facts["course"]["epochs"]] == [1, 2] and facts["top1"] is not None
    student = ZOO["shared_relu"]()
    student.load_state_dict(torch.load("made/student.pt", weights_only=True))
    assert _student("--student", "made/student.pt", "--quiet", out="further") == 0
    assert not Path("made.progress").exists()


def test_and_then_it_is_quantized(work, capsys):
    assert _student("--then", "w4a4", "--rounding", "nearest", "--report-on", "val.npz") == 0
    shown = capsys.readouterr().out
    for word in ("teacher", "student, float", "onnxruntime", "passed", "variance"):
        assert word in shown, word
    assert {"student.pt", "model.onnx", "distillation.json", "report.md"} <= {p.name for p in Path("made").iterdir()}
    assert main(["eval", "made", "--val", "val.npz", "--json"]) == 0
    assert ptq.load("made").manifest.recipe["target"] == "onnx_qdq"
    recipe = [
        "quantize",
        "made/student.pt",
        "--arch",
        f"{FILE}:SharedReLU",
        "--recipe",
        "made/manifest.json",
        "-o",
        "other",
    ]
    assert main(recipe) == 2, "its images were made from the teacher"
    assert (
        main(["distill", "made", "--arch", f"{FILE}:SharedReLU", *SHORT, *GENIE, "--quiet"]) == 0
    )  # the teacher is now the student that was quantized


def test_images_that_suit_a_further_network_are_made_with_it_again(work, capsys):
    torch.save(ZOO["residual"]().state_dict(), "other.pt")
    assert _student("--with", "other.pt", "--then", "w8a8", "--rounding", "nearest", "--quiet") == 0
    again = ["distill", "made", "--arch", f"{FILE}:SharedReLU", *SHORT, *("--quiet", "-o", "again")]
    capsys.readouterr()
    assert main(again) == 2 and "1 further networks" in capsys.readouterr().err
    assert main([*again, "--with", "other.pt", "--with-arch", ARCH]) == 0


def test_fresh_weights_depend_on_the_seed(work):
    for seed, out in (("1", "a"), ("1", "b"), ("2", "c")):
        assert _student("--seed", seed, "--quiet", "--data", "gaussian:teacher_bn=running", out=out) == 0
    a, b, c = (Path(f, "student.pt").read_bytes() for f in "abc")
    assert a == b and a != c


def test_a_command_given_again_goes_on(work, monkeypatch):
    assert _student("--quiet", out="whole") == 0
    steps: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "distillation":
            steps.append(done)
            if len(steps) == 3:
                raise KeyboardInterrupt

    class _Shown:
        def __init__(self, quiet, console) -> None: ...

        def __enter__(self) -> Feedback:
            return Feedback(progress)

        def __exit__(self, *args) -> None: ...

    monkeypatch.setattr("ptq.cli_distill.shown", _Shown)
    assert _student("--quiet") == 130
    assert not Path("made").exists() and Path("made.progress").is_dir()
    assert _student("--quiet") == 0
    # One epoch of two steps was whole: it is told as done, the second is made again.
    assert steps == [1, 2, 3, 2, 3, 4]
    assert Path("made/student.pt").read_bytes() == Path("whole/student.pt").read_bytes()
    assert not Path("made.progress").exists()


_NEW = ("distill", *TEACHER, "--student-arch", f"{FILE}:SharedReLU", "-o", "made", "--quiet")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("distill",), "name what shall learn"),
        (("distill", "out", "--arch", ARCH, "--student-arch", ARCH), "only one of them can learn"),
        (("distill", "nowhere"), "holds no manifest.json"),
        (("distill", "--student-arch", ARCH, "-o", "made"), "--teacher is missing"),
        (("distill", "out", "--arch", ARCH, "--then", "w4a4"), "--then given"),
        (("distill", "out", "--arch", ARCH, "--teacher", "none.pt"), "nothing is there"),
        (("quantize", "model.pt", *TEACHER[2:], "--report-on", "val.npz", "-o", "made", "--quiet"), "ask for one by distill"),
        (("distill", "out", "--arch", ARCH, "--report-on", "nowhere"), "neither a folder nor a file"),
        (("distill", "out", "--arch", ARCH, "--training", "epoch=1"), "did you mean 'epochs'"),
        (("distill", "out", "--arch", ARCH, "--data", "gaussian:teacher_bn=batch"), "cannot normalize by the batch"),
        ((*_NEW, "--report-on", "nowhere"), "neither a folder nor a file"),
        ((*_NEW, "--epochs", "-1"), "at least 0"),
        ((*_NEW, "--data", "genie", "--training", "feed=pool"), "fixed set"),
        ((*_NEW, "--then", "w9a4"), "2 to 8"),
        ((*_NEW, "--rounding", "nearest"), "without --then"),
        ((*_NEW, "--target", "tensorrt"), "without --then"),
        (("distill", "out", "--arch", ARCH, "-n", "7"), "without --data"),
        (("distill", "out"), "is code: name it by --arch"),
        ((*_NEW, "--data", "nayer", "--restore", "bn_stats"), "restore"),
        ((*_NEW, "--data", "images:nowhere"), "neither a folder nor a file"),
        ((*_NEW, "--then", "w8a8", "--target", "npu"), "known: onnx_qdq"),
        ((*_NEW, "--student", "none.pt"), "nothing is there"),
        ((*_NEW[:-4], f"{FILE}:Plain", "-o", "made", "--data", "gaussian"), "no BatchNorm"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(args, says, quantized, capsys):
    capsys.readouterr()
    before = sorted(p.name for p in Path().iterdir())
    assert main(list(args)) == 2
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], shown.err
    assert shown.out == "" and sorted(p.name for p in Path().iterdir()) == before


def test_a_teacher_that_is_gone_is_asked_for(quantized, capsys):
    Path("model.pt").rename("moved.pt")
    capsys.readouterr()
    assert main(["distill", "out", "--arch", ARCH, *SHORT]) == 2
    assert "--teacher MODEL" in capsys.readouterr().err
    assert main(["distill", "out", "--arch", ARCH, "--teacher", "moved.pt", *SHORT, "--quiet", "-o", "there"]) == 0


@pytest.mark.parametrize("args", [("distill", "out", "--arch", ARCH), (*_NEW, "--then", "w4a4", *SHORT, *GENIE)])
def test_what_the_target_cannot_do_is_said_before_any_training(args, quantized, capsys, monkeypatch):
    monkeypatch.setattr("ptq.distillation.train", lambda job: pytest.fail("trained"))
    assert main([*args, "--target", "tensorrt"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "tensorrt cannot take this plan" in line
    assert sorted(p.name for p in Path().iterdir()) == ["model.pt", "out", "val.npz"]
