"""Every known operation can be rebuilt from its fields and written to ONNX."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from ptq.exporters._onnx_ops import EMITTERS
from torch import nn

from ptq.graph.float_region import FloatRegion, MoveRegion
from ptq.graph.layers import (
    AdaptiveAverage,
    AddConstant,
    MulConstant,
    Pad,
    Permute,
    Reshape,
    ResizeBilinear,
    ResizeNearest,
    Slice,
)
from ptq.graph.ops import OPS, Op
from ptq.quant.fake_quant import ActFakeQuant

MODULES = {target: op for target, op in OPS.items() if isinstance(target, type) and target is not ActFakeQuant}
# No argument at its default, so that a field that is left out shows.
EXAMPLES: dict[type, Callable[[], nn.Module]] = {
    nn.Conv2d: lambda: nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), (1, 2), 2, False),
    nn.Linear: lambda: nn.Linear(4, 3, bias=False),
    nn.MaxPool2d: lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True),
    nn.AvgPool2d: lambda: nn.AvgPool2d((3, 2), (2, 1), (1, 0), True, False),
    nn.UpsamplingNearest2d: lambda: nn.UpsamplingNearest2d(scale_factor=3),
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(4, 1e-3),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(4, 1e-3),
    nn.LeakyReLU: lambda: nn.LeakyReLU(0.3),
    nn.GELU: lambda: nn.GELU("tanh"), nn.ELU: lambda: nn.ELU(0.5), nn.PReLU: lambda: nn.PReLU(4),
    nn.LayerNorm: lambda: nn.LayerNorm((4, 3), 1e-3, True, False),
    nn.GroupNorm: lambda: nn.GroupNorm(2, 4, 1e-3, False), nn.Softplus: lambda: nn.Softplus(2.0, 10.0),
    nn.Softmax: lambda: nn.Softmax(2), nn.LogSoftmax: lambda: nn.LogSoftmax(3),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, False, (1, 3)),
    ResizeNearest: lambda: ResizeNearest((5, 7)), ResizeBilinear: lambda: ResizeBilinear((5, 7), True),
    AdaptiveAverage: lambda: AdaptiveAverage((5, 3)), AddConstant: lambda: AddConstant((4, 1, 1)),
    MulConstant: lambda: MulConstant((1, 4, 1)),
    Pad: lambda: Pad((1, 2, 3, 4)), Slice: lambda: Slice(((1, 0, 2, 1),)),
    FloatRegion: lambda: FloatRegion((("add.Tensor", (("value", 0), ("constant", 0)), (("alpha", 2),)),), (((4,), "int64"),)),
    MoveRegion: lambda: MoveRegion((("roll.default", (("value", 0), (2,), (1,)), ()),), ()),
    Reshape: lambda: Reshape((4, 4)), Permute: lambda: Permute((0, 2, 3, 1)),
}  # fmt: skip


def _example(target: type) -> nn.Module:
    return EXAMPLES.get(target, target)()


def test_every_operation_has_an_emitter():
    assert set(EMITTERS) == {op.name for op in OPS.values()} - {"fake_quant"}


def test_names_are_unique():
    assert len({op.name for op in OPS.values()}) == len(OPS)


@pytest.mark.parametrize(("target", "op"), MODULES.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_fields_are_arguments_and_attributes(target: type, op: Op):
    parameters = inspect.signature(target).parameters
    module = _example(target)
    assert [f for f in op.fields if f not in parameters] == []
    assert [f for f in op.fields if not hasattr(module, f)] == []
    named = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in named if p.default is p.empty]
    assert set(required) <= set(op.fields)


@pytest.mark.parametrize(("target", "op"), MODULES.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_fields_rebuild_the_module(target: type, op: Op):
    module = _example(target)

    def field(name: str) -> Any:
        return module.bias is not None if name == "bias" else getattr(module, name)

    again = target(**{name: field(name) for name in op.fields})
    assert repr(again) == repr(module)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert {k: v for k, v in vars(again).items() if isinstance(v, int | float | str | tuple)} == {
        k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple)
    }
