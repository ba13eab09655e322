"""`distill` and `distill_quantized` from Python: laws, resuming, what is refused."""

import copy
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq import plugins
from ptq.augment import mix_up
from ptq.contracts import Feedback, make_rng
from ptq.distilling import loop
from ptq.errors import SpecError
from ptq.quant.fake_quant import ActFakeQuant
from tests.zoo import SHAPE, build, images

SHORT = "epochs=2,steps=2,batch_size=4,warmup=2,first_rounds=1,rounds=1"
NAYER, REPLAY = "nayer:batch_size=4,steps=1,latent=8", "vae_replay:latent=8,memory_latent=4"
SOURCES = [
    NAYER,
    REPLAY,
    "gaussian",
    "genie:steps=1,count=8,batch_size=4",
]  # a pool, a stream with state, one without, a set
STATED = {"input_shape": SHAPE, "mean": (0.5,) * 3, "std": (0.25,) * 3}  # nothing is to be fitted then
RESTORE = "bn_stats:steps=1,count=4,batch_size=4"


def _labelled(count: int = 40) -> tuple[Tensor, Tensor]:
    """Noise, with the teacher's answers as labels."""
    x = images(count, seed=3)
    return x, build("residual")(x).argmax(1)


def _restored(data) -> dict[str, Tensor]:
    by_batch = isinstance(data, str) and data.startswith("gaussian") and "running" not in data
    return {"restore": RESTORE} if by_batch else {}


def _distilled(data="gaussian", training: str = SHORT, student: nn.Module | None = None, **options) -> ptq.Distilled:
    given = {"training": training} | _restored(data) | STATED | options
    return ptq.distill(build("residual"), build("shared_relu") if student is None else student, data, **given)


def _quantized(bits: str = "w2a4", **options) -> ptq.QuantizedModel:
    return ptq.quantize(build("residual"), bits, images(32), rounding="nearest", **STATED, **options)


def _same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("data", SOURCES)
def test_same_seed_same_student_and_nobody_else_changes(data: str):
    teacher, student = build("residual"), build("shared_relu").train()
    before = copy.deepcopy((teacher.state_dict(), student.state_dict()))
    state = torch.get_rng_state()
    made = [
        ptq.distill(teacher, student, data, training=SHORT, seed=seed, **_restored(data), **STATED)
        for seed in (1, 1, 2)
    ]
    assert _same(made[0].student, made[1].student) and not _same(made[0].student, made[2].student)
    assert torch.equal(made[0].images, made[1].images) and torch.equal(torch.get_rng_state(), state)
    for network, old in zip((teacher, student), before):
        assert all(torch.equal(v, old[k]) for k, v in network.state_dict().items())
    assert student.training and not made[0].student.training
    assert all(bool(torch.isfinite(v).all()) for v in made[0].student.state_dict().values())


def test_no_epoch_changes_nothing():
    student = build("shared_relu")
    made = _distilled("genie:steps=2,count=8,batch_size=4", "epochs=0", student)
    assert _same(made.student, student) and made.course.rows == ()
    qm = _quantized()
    again = ptq.distill_quantized(build("residual"), qm, training="epochs=0")
    assert _same(again.student, qm.student) and torch.equal(again.graph(images()), qm.graph(images()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_networks_learn_the_same():
    data, training = "genie:steps=1,count=8,batch_size=4", f"{SHORT},lr=0.01"
    plain, compiled = _distilled(data, training), _distilled(data, f"{training},compile=true")
    for row, other in zip(plain.course.rows, compiled.course.rows, strict=True):
        assert other.loss == pytest.approx(row.loss, rel=1e-3)


def test_a_compiler_that_is_missing_is_one_line(monkeypatch):
    def broken(module: nn.Module):
        def run(x: Tensor):
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(SpecError, match=r"torch\.compile fails: no compiler; leave compile out"):
        _distilled("gaussian", f"{SHORT},compile=true")


class _Stop(Exception):
    """Stands for the end of the process."""


def _stopped_after(steps: int) -> Feedback:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "distillation" and done >= steps:
            raise _Stop

    return Feedback(progress)


@cache
def _whole(data: str, training: str) -> ptq.Distilled:
    return _distilled(data, training, report_on=_labelled())


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("data", SOURCES)
def test_killed_anywhere_it_ends_with_the_same_student(data: str, steps: int, tmp_path: Path):
    three = SHORT.replace("epochs=2", "epochs=3")
    whole = _whole(data, three)
    with pytest.raises(_Stop):
        _distilled(data, three, report_on=_labelled(), cache=tmp_path, feedback=_stopped_after(steps))
    heard: list[int] = []
    again = _distilled(
        data,
        three,
        report_on=_labelled(),
        cache=tmp_path,
        feedback=Feedback(loss=lambda step, loss: heard.append(step)),
    )
    assert _same(again.student, whole.student) and torch.equal(again.images, whole.images)
    assert again.course == whole.course
    if "gaussian" in data:  # no other source of losses: epochs that were whole are not repeated
        assert heard[0] == 2 * ((steps - 1) // 2) + 1


@pytest.mark.parametrize("data", [None, NAYER, REPLAY])
def test_a_quantized_student_is_resumed_too(data, tmp_path: Path):
    qm, given = _quantized(), {"training": SHORT}
    whole = ptq.distill_quantized(build("residual"), qm, data, **given)
    with pytest.raises(_Stop):
        ptq.distill_quantized(build("residual"), qm, data, cache=tmp_path, feedback=_stopped_after(3), **given)
    again = ptq.distill_quantized(build("residual"), qm, data, cache=tmp_path, **given)
    assert _same(again.student, whole.student) and not _same(again.student, qm.student)


@pytest.mark.parametrize("data", [NAYER, REPLAY, "genie:steps=1,count=8,batch_size=4"])
def test_a_training_that_was_whole_gives_the_same_again(data: str, tmp_path: Path):
    """Its images too: where the run was killed in what follows, they are what the student is quantized with."""
    first, again = (_distilled(data, cache=tmp_path) for _ in range(2))
    assert torch.equal(first.images, again.images) and len(again.images) and _same(first.student, again.student)
    qm = _quantized()
    first, again = (
        ptq.distill_quantized(build("residual"), qm, data, training=SHORT, cache=tmp_path) for _ in range(2)
    )
    assert torch.equal(first.images, again.images) and _same(first.student, again.student)


def test_statistics_are_part_of_what_was_trained(tmp_path: Path):
    """Of a fixed set of images, too."""
    for way in ("running", "batch"):
        data, more = f"gaussian:count=32,teacher_bn={way}", {"restore": RESTORE} if way == "batch" else {}
        given = {"training": "epochs=1,steps=2,batch_size=8,feed=set,lr=0.01", **more}
        kept, fresh = (_distilled(data, **given, **place).student for place in ({"cache": tmp_path}, {}))
        assert _same(kept, fresh)


def test_other_settings_do_not_resume(tmp_path: Path):
    first = _distilled(cache=tmp_path)
    assert not _same(_distilled(cache=tmp_path, seed=1).student, first.student)
    other = _distilled(training=SHORT + ",lr=0.5", cache=tmp_path)
    assert not _same(other.student, first.student) and _same(_distilled(cache=tmp_path).student, first.student)
    ordinary, slow = build("shared_relu"), build("shared_relu")
    for module in slow.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.9
    made = [_distilled(REPLAY, student=student, cache=tmp_path).student for student in (ordinary, slow)]
    assert not _same(*made)


def test_the_curve_of_other_pictures_is_not_taken_for_these(tmp_path):
    x, y = _labelled()
    for labels in (y, (y + 1) % 10):
        found = _distilled(report_on=(x, labels), cache=tmp_path)
        assert found.course.accuracies == _distilled(report_on=(x, labels)).course.accuracies


@pytest.mark.parametrize("data", [None, NAYER, REPLAY, "gaussian:count=32"])
def test_a_distilled_network_exports_with_frozen_ranges(data, tmp_path: Path):
    qm = _quantized("w3a4")
    before = copy.deepcopy(qm.student.state_dict())
    out = ptq.distill_quantized(build("residual"), qm, data, training=SHORT)
    assert all(torch.equal(v, before[k]) for k, v in qm.student.state_dict().items())
    for path, module in qm.student.named_modules():
        if isinstance(module, ActFakeQuant):
            assert torch.equal(out.student.get_submodule(path).scale, module.scale)
    assert ptq.export(out, "onnx_qdq", tmp_path / "m.onnx")["differing_outputs"] == 0
    out.save(tmp_path / "out")
    loaded = ptq.load(tmp_path / "out")
    assert torch.equal(loaded.graph(images()), out.graph(images()))
    assert len(out.manifest.metrics["course"]["epochs"]) == 2 and "distill" in out.manifest.recipe


def test_training_brings_a_quantized_student_closer():
    qm = _quantized()
    out = ptq.distill_quantized(build("residual"), qm, training="epochs=2,steps=40,batch_size=32,warmup=5,pad=-1")
    x = images(64, seed=9)  # neither saw them
    teacher = build("residual")(x).detach()
    distance = [float((m.graph(x) - teacher).square().mean()) for m in (qm, out)]
    assert distance[1] < 0.5 * distance[0]


def test_in_the_run_that_quantizes(tmp_path: Path):
    together = _quantized(distill=SHORT)
    apart = ptq.distill_quantized(build("residual"), _quantized(), images(32), training=SHORT)
    assert _same(together.student, apart.student)
    assert together.manifest.recipe["distill"].startswith("epochs=2,") and "course" in together.manifest.metrics
    assert ptq.export(together, "onnx_qdq", tmp_path / "m.onnx")["differing_outputs"] == 0


def test_targets_are_what_the_teacher_makes_of_the_mixture(monkeypatch):
    """MixUp: what the loss is handed as target is the teacher's output on the very images that the student saw."""
    seen: list[tuple[Tensor, Tensor]] = []
    real = loop._loss

    def spy(job, x):
        seen.append((x.clone(), job.teacher(x)[0]))
        return real(job, x)

    monkeypatch.setattr(loop, "_loss", spy)
    set_of = images(16).clamp(-2, 2)  # valid pixels
    _distilled(set_of, "epochs=1,steps=1,batch_size=16,pad=-1,mix=1")
    rng = make_rng(0, "distillation/epoch 0")
    drawn = set_of[torch.randint(16, (16,), generator=rng)]
    x, target = seen[0]
    assert torch.allclose(x, mix_up(drawn, 1.0, rng)) and not torch.allclose(x, drawn)
    assert torch.allclose(target, build("residual")(x), atol=1e-5)


def test_a_course_is_reported_and_chosen_by_nobody():
    x, y = _labelled()
    told = _distilled(report_on=(x, y))
    silent, wrong = _distilled(), _distilled(report_on=(x, (y + 1) % 10))
    assert _same(told.student, silent.student) and _same(told.student, wrong.student)
    course = told.course
    assert len(course.accuracies) == 2 and silent.course.mean is None and silent.top1 is None
    assert course.mean == pytest.approx(sum(course.accuracies) / 2)
    assert course.variance == pytest.approx((course.accuracies[0] - course.accuracies[1]) ** 2 / 4)
    assert course.best == max(course.accuracies)
    right = (told.student(x).argmax(1) == y).float().mean()
    assert told.top1 == pytest.approx(100 * float(right))


def test_a_student_learns():
    """Noise under batch statistics, enough steps for two small networks to agree; then one image at a time."""
    x = images(256, seed=4)
    teacher, student = build("residual"), build("shared_relu")
    made = _distilled(
        "gaussian",
        "epochs=2,steps=60,batch_size=64,lr=0.01",
        student,
        restore=images(320, seed=8),
        report_on=_labelled(100),
    )
    wanted = teacher(x).detach()
    apart = [float((m(x).detach() - wanted).square().mean() / wanted.var()) for m in (student, made.student)]
    alone = torch.cat([made.student(one) for one in x.split(1)])
    assert apart[1] < 0.5 * apart[0] and torch.allclose(alone, made.student(x), atol=1e-4)


def test_bfloat16_and_compilation_are_asked_for():
    plain, short = _distilled(), _distilled(training=SHORT + ",precision=bfloat16")
    assert not _same(plain.student, short.student)  # it is another arithmetic
    assert _same(
        plain.student, _distilled(training=SHORT + ",precision=float32").student
    )  # and on the CPU not the automatic one


def test_dropout_draws_from_the_runs_seed():
    students = [_distilled("gaussian:teacher_bn=running", student=_WithDropout()).student for _ in range(2)]
    assert _same(*students)


class _WithDropout(nn.Sequential):
    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 10))


def test_images_that_are_held_need_no_further_networks():
    qm = ptq.quantize(
        build("residual"), "w4a4", images(8), rounding="nearest", teachers=[build("shared_relu")], **STATED
    )
    made = ptq.distill_quantized(build("residual"), qm, training=SHORT)
    assert made.images is not None and qm.images is not None and torch.equal(made.images, qm.images)
    assert made.manifest.recipe["distill_further_teachers"] == 0


class _Own:
    """A source that somebody brings as an object."""

    needs, paper, teacher_bn, synthetic, presets, count, batch_size = (), "", "running", True, {}, 8, 8

    def batches(self, ctx):
        yield images(8)


def test_images_of_an_own_source_are_held():
    qm = ptq.quantize(build("residual"), "w8a8", _Own(), rounding="nearest", **STATED)
    made = ptq.distill_quantized(build("residual"), qm, training=SHORT)
    assert torch.equal(made.images, qm.images)


def test_a_recipe_says_what_the_images_were():
    qm = ptq.quantize(build("residual"), "w8a8", "genie:count=8,steps=1", rounding="nearest", **STATED)
    made = ptq.distill_quantized(build("residual"), qm, training=SHORT)
    assert made.manifest.recipe["distill_data"] == qm.manifest.recipe["data"]
    assert made.manifest.recipe["distill_data"].startswith("genie:")


@pytest.mark.parametrize(
    "data", ["nayer:count=8,latent=8,steps=1", "vae_replay:count=8,latent=8,memory_latent=4,steps=1"]
)
def test_a_recipe_says_how_images_are_made_in_training(data: str):
    """A source whose paper makes other images for a student than for calibration."""
    qm = ptq.quantize(build("residual"), "w8a8", data, rounding="nearest", **STATED)
    told = qm.manifest.recipe["data"]
    for training in (False, True):
        found, wanted = (plugins.build("calibrators", text, "standard", training=training) for text in (told, data))
        assert found == wanted
    assert plugins.build("calibrators", data, "standard", training=True) != plugins.build(
        "calibrators", data, "standard"
    )


def test_images_from_python_are_not_in_the_folder(tmp_path: Path):
    _quantized().save(tmp_path / "out")
    with pytest.raises(SpecError, match="name data"):
        ptq.distill_quantized(build("residual"), ptq.load(tmp_path / "out"), training=SHORT)
