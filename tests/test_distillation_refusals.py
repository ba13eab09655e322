"""What distillation refuses, and in which words; students whose results have unusual forms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.errors import ModelError, ReconstructionError, SpecError
from tests.test_distillation import SHORT, STATED, _distilled, _labelled, _quantized
from tests.zoo import build


class Named(nn.Module):
    """Its scores are in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = build("residual")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(x)}


class Auxiliary(Named):
    """A second head, in training."""

    def forward(self, x: Tensor) -> Any:
        scores = self.body(x)
        return (scores, 2 * scores) if self.training else scores


@pytest.mark.parametrize(
    ("student", "options", "kind", "says"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(784, 10)), {}, ModelError, "the student: .*input shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 7)), {}, ModelError, r"\[B, 7\], its teacher \[B, 10\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), {}, ModelError, "no BatchNorm"),
        (Auxiliary(), {}, ModelError, "2 tensors in training"),
        (None, {"report_on": (torch.zeros(2, 3, 16, 16), torch.tensor([0, 10]))}, ptq.CalibrationError, "has 10 classes"),
        (None, {"report_on": "nowhere"}, ptq.CalibrationError, "neither a folder nor a file"),
        (None, {"report_on": (torch.zeros(2, 3, 16, 16), torch.tensor([-1, 0]))}, ptq.CalibrationError, "class numbers"),
        (None, {"report_on": (torch.zeros(3, 3, 16, 16), torch.zeros(2).long())}, ptq.CalibrationError, "3, 3, 16, 16.*labels"),
        (None, {"report_on": (torch.zeros(2, 3, 16, 16), torch.zeros(2))}, ptq.CalibrationError, "float32"),
        (None, {"report_on": (torch.zeros(0, 3, 16, 16), torch.zeros(0).long())}, ptq.CalibrationError, "at least 1"),
        (None, {"report_on": (None, torch.zeros(0))}, ptq.CalibrationError, "two tensors"),
        (None, {"restore": "nayer:stepp=3"}, ptq.PluginError, "did you mean"),
        (None, {"training": "feed=stream", "data": "genie"}, SpecError, "makes a fixed set"),
        (None, {"training": "epochs=0", "data": "gaussian"}, SpecError, "no images without epochs"),
        (None, {"training": "epochs=two"}, ptq.PluginError, "not a valid int"),
        (None, {"training": SHORT + ",lr=1e30"}, ReconstructionError, "diverged.*lower lr"),
    ],
)  # fmt: skip
def test_what_is_refused(student, options, kind, says):
    with pytest.raises(kind, match=says):
        _distilled(student=student, **options)


def test_batch_statistics_need_a_teacher_with_batch_norm():
    with pytest.raises(ptq.PtqError, match="BatchNorm"):
        ptq.distill(build("plain"), build("residual"), "gaussian", training=SHORT, **STATED)


def test_a_student_that_gives_its_scores_in_a_dictionary():
    x, y = _labelled()
    made = _distilled(student=Named(), report_on=(x, y))
    plain = _distilled(student=Named().body, report_on=(x, y)).student(x)
    assert made.top1 is not None and torch.equal(made.student(x)["out"], plain)


@pytest.mark.parametrize("data", ["nayer:batch_size=4,steps=1,latent=8", "vae_replay:latent=8,memory_latent=4"])
def test_sources_look_at_a_student_that_gives_its_scores_in_a_dictionary(data: str):
    made, plain = (_distilled(data, student=student) for student in (Named(), Named().body))
    assert torch.equal(made.images, plain.images)


def test_pictures_of_bytes_are_brought_into_input_space():
    """As arrays and lists of numbers, too."""
    pixels = torch.randint(256, (20, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    space = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    y = build("residual")(space).argmax(1)
    found = [
        _distilled(report_on=given).course.accuracies
        for given in ((space, y), (pixels, y), [pixels.numpy(), y.tolist()])
    ]
    assert found[0] == found[1] == found[2]


def test_a_width_of_training_that_codes_do_not_gain_from():
    with pytest.raises(SpecError, match="bfloat16"):
        ptq.distill_quantized(build("residual"), _quantized(), training=SHORT + ",precision=bfloat16")


def test_images_that_nothing_is_restored_on():
    """A student of "nayer" learns its own running statistics."""
    with pytest.raises(SpecError, match="restore"):
        ptq.distill(build("residual"), build("residual"), "nayer", restore="bn_stats", training=SHORT, **STATED)


def test_restoring_on_images_that_the_teacher_cannot_give():
    with pytest.raises(ptq.CalibrationError, match="'--restore auto'"):
        ptq.distill(build("plain"), build("residual"), "gaussian", training=SHORT, **STATED)


def test_a_quantized_network_and_its_teacher_belong_together():
    qm = _quantized()
    stranger = build("residual")
    with torch.no_grad():
        for p in stranger.parameters():
            p.copy_(p[torch.randperm(len(p), generator=torch.Generator().manual_seed(1))].flip(-1))
    with pytest.raises(ModelError, match="other weights"):
        ptq.distill_quantized(stranger, qm, training=SHORT)
    with pytest.raises(ModelError, match="no layer"):
        ptq.distill_quantized(build("plain"), qm, training=SHORT)
    with pytest.raises(SpecError, match="normalize by the batch"):
        ptq.distill_quantized(build("residual"), qm, "gaussian:teacher_bn=batch", training=SHORT)
    with pytest.raises(SpecError, match="equalized"):
        ptq.distill_quantized(build("residual"), _quantized(repair="equalize"), training=SHORT)
