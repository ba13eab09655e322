"""Steps of a float region: what they compute, and what no file can make them do."""

import json

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.errors import ArtifactError, ModelError
from ptq.graph.float_region import FloatRegion, is_move, operation
from ptq.integrity import sealed
from tests.zoo import SHAPE, images

X = ("value", 0)


def test_steps_build_on_each_other():
    steps = (
        ("topk.default", (X, 2, 1), ()), ("getitem", (("value", 1), 1), ()), ("gather.default", (X, 1, ("value", 2)), ()),
        ("mul.Tensor", (("value", 3), ("constant", 0)), ()), ("expand.default", (("value", 4), (("batch", 1), -1)), ()),
    )  # fmt: skip
    region = FloatRegion(steps, (((2,), "float32"),))
    region.constant_0 = torch.tensor([1.0, 10.0])
    x = torch.rand(3, 5)
    assert torch.equal(region(x), x.sort(1, descending=True).values[:, :2] * torch.tensor([1.0, 10.0]))
    assert region.names == ["topk", "gather", "mul"]


def test_gradients_pass():
    region = FloatRegion((("cumsum.default", (X, 1), ()), ("exp.default", (("value", 1),), ())), ())
    x = torch.rand(2, 3, requires_grad=True)
    region(x).sum().backward()
    assert x.grad is not None and bool((x.grad > 0).all())


@pytest.mark.parametrize(
    ("steps", "moves"),
    [
        ([("roll.default", (X, (1,), (1,)), ())], True),
        ([("pad.default", (X, (1, 1)), ())], True),
        ([("pad.default", (X, (1, 1), ("text", "constant"), 0.0), ())], True),
        ([("pad.default", (X, (1, 1), ("text", "constant"), 1.0), ())], False),
        ([("pad.default", (X, (1, 1), ("text", "reflect")), ())], False),
        ([("pad.default", (X, (-1, 1)), ())], False),
        ([("cumsum.default", (X, 1), ())], False),
    ],
)
def test_what_only_moves(steps: list, moves: bool):
    assert is_move(tuple(steps), 1, 0) == moves
    assert not is_move(tuple(steps), 2, 0) and not is_move(tuple(steps), 1, 1)


# Reads or writes what is not its own, is random, or is no operation at all.
FORBIDDEN = [
    "from_file.default", "save.default", "warn.default", "add_.Tensor", "relu_.default", "add.out", "set_.source_Tensor",
    "rand_like.default", "native_dropout.default", "bernoulli.default", "nonzero.default", "masked_select.default",
    "empty.memory_format", "as_strided.default", "item.default", "_local_scalar_dense.default", "_cudnn_rnn.default",
    "record_stream.default", "sym_size.int", "size.default", "cumsum", "cumsum.nothing", "__class__.default", "cumsum.__call__",
    "cumsum.default.redispatch", "", ".", "os.system", "../x.default", "load.default", "resize.default", "manual_seed.default",
    "lstm.data",
]  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_may_not_be_called(name: str):
    with pytest.raises(ModelError, match=r"operation aten\.") as caught:
        operation(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (("scaled_dot_product_attention.default", (X, X, X, None, 0.5), ()),),
        (("scaled_dot_product_attention.default", (X, X, X), (("dropout_p", 0.5),)),),
        (("lstm.input", (X, (X, X), (X, X, X, X), True, 1, 0.5, True, False, False), ()),),
        (("gru.input", (X, X, (X, X, X, X), True, 1, 0.5), (("train", True),)),),
        (("cumsum.default", (X, 1), (("device", "cuda"),)),),
        (("cumsum.default", "X", ()),),
        (("zeros_like.default", (X,), (("dtype", ("dtype", "os")),)),),
    ],
)
def test_damaged_steps(steps: tuple):
    with pytest.raises(ModelError):
        FloatRegion(steps, ())(torch.rand(2, 3))


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).cumsum(1).amax((2, 3))


def _edited(folder, change) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(next(row for row in data["graph"] if row["op"] == "float_region")["fields"])
    path.write_text(json.dumps(sealed(data, [])))


HOSTILE = {
    "there is no operation": lambda f: f["steps"][0].__setitem__(0, "system.default"),
    "does more, or less": lambda f: f["steps"].__setitem__(0, ["from_file.default", [["text", "/etc/passwd"]], []]),
    "writes into a tensor": lambda f: f["steps"][0].__setitem__(0, "cumsum_.default"),
    "without a step": lambda f: f.__setitem__("steps", []),
    "no dtype": lambda f: f.__setitem__("tensors", [[[1], "os"]]),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(message: str, tmp_path):
    qm = ptq.quantize(Summed(), "w8a8", images(), input_shape=SHAPE, rounding="nearest")
    qm.save(tmp_path / "net")
    again = ptq.load(tmp_path / "net")
    assert torch.equal(again.graph(images(4)), qm.graph(images(4)))
    _edited(tmp_path / "net", HOSTILE[message])
    with pytest.raises(ArtifactError, match=message) as caught:
        ptq.load(tmp_path / "net")
    assert "\n" not in str(caught.value)
