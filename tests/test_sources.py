"""Which source serves which network, and images given from Python."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ptq
from ptq import plugins
from ptq.contracts import Feedback
from tests.zoo import SHAPE, build, images

X = images(12)


def _quantized(data, net: str = "residual", **options):
    return ptq.quantize(build(net), "w8a8", data, input_shape=SHAPE, rounding="nearest", **options)


@pytest.mark.parametrize(
    "data",
    [
        X, list(X.split(5)), iter(list(X.split(5))), list(X), TensorDataset(X), TensorDataset(X, torch.zeros(12)),
        DataLoader(TensorDataset(X, torch.zeros(12)), batch_size=5), [(x, 0) for x in X],
    ],
    ids=["tensor", "batches", "iterator", "images", "dataset", "labelled", "loader", "pairs"],
)  # fmt: skip
def test_images_from_python(data):
    assert torch.equal(_quantized(data).images, X)


@pytest.mark.parametrize(
    ("data", "found"),
    [([X.double()], "float64"), ([X[:, :2]], r"\(12, 2, 16, 16\)"), (["a"], "str"), ([X * torch.inf], "not finite")],
)
def test_images_that_do_not_fit(data, found):
    with pytest.raises(ptq.CalibrationError, match=found):
        _quantized(data)


@pytest.mark.parametrize(("net", "chosen"), [("residual", "genie"), ("plain", "inceptionism")])
def test_auto_says_which_and_why(net: str, chosen: str):
    heard = []
    made = ptq.synthesize(
        build(net), "auto:count=4,steps=2", input_shape=SHAPE, feedback=Feedback(note=heard.append), effort="quick"
    )
    assert made.source.startswith(f"{chosen}:count=4,") and "steps=2" in made.source
    assert any(note.startswith(f"data source: {chosen}") and "BatchNorm" in note for note in heard)
    assert list(made.notes) == heard


def test_auto_without_classes_or_batch_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    made = ptq.synthesize(net, "auto:count=4", input_shape=SHAPE)
    assert made.source.startswith("gaussian") and "no BatchNorm and no classes" in made.notes[0]


@pytest.mark.parametrize("name", ["genie", "zeroq", "bn_stats", "dgh", "mix:gaussian+genie"])
def test_a_refusal_names_what_serves(name: str):
    with pytest.raises(ptq.CalibrationError) as e:
        _quantized(name, "plain")
    text = str(e.value)
    assert "BatchNorm" in text and "inceptionism" in text and "nayer" in text and "\n" not in text
    assert "zeroq" not in text.partition("serve it:")[2]


def test_every_teacher_must_serve():
    with pytest.raises(ptq.CalibrationError, match=r"BatchNorm.*inceptionism"):
        ptq.synthesize(build("residual"), "genie:steps=2", input_shape=SHAPE, teachers=[build("plain")])
    made = ptq.synthesize(build("residual"), "auto:steps=2,count=4", input_shape=SHAPE, teachers=[build("plain")])
    assert made.source.startswith("inceptionism")


class _Folder(Dataset):
    """A user's own data set, with a path that is not there, yet."""

    def __init__(self) -> None:
        self.log = Path("nowhere")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return images(4)[index]


def test_a_data_set_has_paths_of_its_own():
    assert torch.equal(ptq.synthesize(build("residual"), _Folder(), input_shape=SHAPE).images, images(4))


class _Bare:
    """A source without options, that somebody brings as an object."""

    needs, paper, teacher_bn, synthetic, presets, count, batch_size = ("BatchNorm",), "", "running", True, {}, 4, 4

    def batches(self, ctx):
        yield images(4)


def test_a_source_without_options_is_refused_by_its_name():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 10))
    with pytest.raises(ptq.CalibrationError, match="_Bare draws on"):
        ptq.synthesize(net, _Bare(), input_shape=SHAPE)
    assert len(ptq.synthesize(build("residual"), _Bare(), input_shape=SHAPE).images) == 4


def test_auto_where_noise_is_all_there_is():
    """Noise is made otherwise for students; "auto" has nothing to say of that."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    qm = ptq.quantize(net, "w8a8", "auto:count=8", rounding="nearest", input_shape=SHAPE)
    assert qm.manifest.recipe["data"].startswith("gaussian:")


def test_options_in_training_are_read_before_any_work():
    made: list[int] = []
    with pytest.raises(ptq.PtqError, match="stps"):
        ptq.quantize(
            build("residual"), "w8a8", "nayer:count=8,steps=1,latent=8,training=(stps=3)", rounding="nearest",
            input_shape=SHAPE, feedback=Feedback(loss=lambda step, value: made.append(step)),
        )  # fmt: skip
    assert not made


def test_similarity_of_batches_in_a_list():
    x = images(8)
    listed, whole = (ptq.data_similarity(build("residual"), data, input_shape=SHAPE) for data in ([x[:4], x[4:]], x))
    assert listed.mean == pytest.approx(whole.mean, rel=1e-4)


def test_within_inference_mode():
    """Everything trains there as it does elsewhere."""

    def made():
        given = ptq.synthesize(build("residual"), "genie:count=4,steps=2", input_shape=SHAPE).images
        return given, ptq.quantize(build("residual"), "w4a4", given, rounding="genie_m:steps=2", input_shape=SHAPE)

    with torch.inference_mode():
        x, qm = made()
        assert torch.is_inference_mode_enabled()
    again, other = made()
    assert torch.equal(x, again) and torch.equal(qm.graph(x), other.graph(x))


@pytest.mark.parametrize("data", ["images:nowhere", Path("photos"), None, 5])
def test_data_that_is_none(data):
    with pytest.raises(ptq.CalibrationError):
        _quantized(data)


def test_batch_statistics_need_two_images_and_leave_none_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    common = {"input_shape": SHAPE, "rounding": "nearest"}
    ptq.quantize(net, "w8a8", "gaussian:teacher_bn=batch,count=9,batch_size=4", **common)
    with pytest.raises(ptq.CalibrationError, match="at least 2 images"):
        ptq.quantize(net, "w8a8", "gaussian:teacher_bn=batch,count=1", **common)


@pytest.mark.parametrize("name", ["inceptionism", "nayer", "vae_replay"])
def test_a_network_that_is_no_classifier(name: str):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(ptq.CalibrationError, match=r"classifier.*genie"):
        ptq.synthesize(net, name, input_shape=SHAPE)


def test_batch_statistics_give_other_ranges_and_nearest_rounding():
    heard = []
    common = {"input_shape": SHAPE, "feedback": Feedback(note=heard.append)}
    net = build("residual")
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.running_mean += 3 * norm.running_var.sqrt()
    before = copy.deepcopy(net.state_dict())
    batch = ptq.quantize(net, "w8a8", "gaussian:count=64,teacher_bn=batch", **common)
    running = ptq.quantize(net, "w8a8", "gaussian:count=64", rounding="nearest", **common)
    assert batch.manifest.recipe["rounding"] == "nearest" and any("batch statistics" in note for note in heard)
    assert torch.equal(batch.images, running.images)
    assert batch.manifest.ranges != running.manifest.ranges
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_mix_is_split_evenly_and_reproducible():
    common = {"input_shape": SHAPE, "seed": 1}
    made = ptq.synthesize(build("residual"), "mix:gaussian+zeroq(steps=2)+genie(steps=2),count=11", **common)
    assert len(made.images) == 11
    again = ptq.synthesize(build("residual"), made.source, **common)
    assert again.source == made.source and torch.equal(again.images, made.images)
    alone = ptq.synthesize(build("residual"), "gaussian:count=4", **common)
    assert not torch.equal(alone.images, made.images[:4])  # a random generator for each source


@pytest.mark.parametrize(
    "text", ["mix", "mix:", "mix:genie+genei", "mix:genie(stepps=3)+gaussian", "mix:genie(steps=3+gaussian"]
)
def test_bad_mixes(text: str):
    with pytest.raises(ptq.PluginError):
        plugins.build("calibrators", text)


def test_mixed_statistics_are_refused():
    with pytest.raises(ptq.CalibrationError, match="cannot be mixed"):
        _quantized("mix:gaussian(teacher_bn=batch)+zeroq(steps=2),count=8")


@pytest.mark.parametrize(
    "name", ["genie:steps=5", "zeroq:steps=5", "bn_stats:steps=5,augment=1", "dgh:steps=10", "nayer:steps=2"]
)
def test_further_teachers_matter(name: str):
    text = name + ",count=6,batch_size=3"
    other = build("residual")
    for norm in [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.running_mean += 0.5
        norm.weight.data *= -1
    alone = ptq.synthesize(build("residual"), text, input_shape=SHAPE)
    both = ptq.synthesize(build("residual"), text, input_shape=SHAPE, teachers=[other])
    assert not torch.equal(alone.images, both.images)


def test_images_suit_both_teachers_better():
    other = build("residual")
    for norm in [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.running_mean += 1.0
    common, text = {"input_shape": SHAPE}, "zeroq:steps=60,count=16"
    alone = ptq.synthesize(build("residual"), text, **common).images
    both = ptq.synthesize(build("residual"), text, teachers=[other], **common).images
    assert ptq.data_similarity(other, both, **common).mean < 0.8 * ptq.data_similarity(other, alone, **common).mean


def test_clipping_is_told():
    made = ptq.synthesize(build("residual"), "gaussian:count=64", input_shape=SHAPE, mean=[0.5] * 3, std=[0.25] * 3)
    # Valid pixels reach from -2 to 2 here: a normal value is outside with probability 0.0455.
    assert made.clipped == pytest.approx(0.0455, abs=0.003) and float(made.images.abs().max()) == 2
    assert ptq.synthesize(build("residual"), "gaussian:count=8", input_shape=SHAPE).clipped == 0


def test_a_network_that_ends_in_a_softmax_is_told_of():
    heard: list[str] = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 10), nn.Softmax(1))
    made = ptq.synthesize(net, "gaussian:count=4", input_shape=SHAPE, feedback=Feedback(note=heard.append))
    assert any("softmax" in note for note in heard) and list(made.notes) == heard
    assert not ptq.synthesize(net[:3], "gaussian:count=4", input_shape=SHAPE).notes


@pytest.mark.parametrize("data", ["images:nowhere", "nayer:embeddings=nowhere.npz", "mix:gaussian+images(nowhere)"])
def test_missing_files_are_told_before_anything_is_traced(data: str):
    with pytest.raises(ptq.CalibrationError, match="nowhere"):
        ptq.synthesize(nn.LSTM(3, 3), data, input_shape=SHAPE)


def test_one_output_is_no_classifier():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    assert ptq.synthesize(net, "auto:count=4", input_shape=SHAPE).source.startswith("gaussian")
    with pytest.raises(ptq.CalibrationError, match="two classes or more"):
        ptq.synthesize(net, "inceptionism:count=4,steps=2", input_shape=SHAPE)
