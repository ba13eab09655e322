"""Training in bfloat16: only where grids are narrow, without a trace in the result's types, and no worse."""

import pytest
import torch
from torch import Tensor, fx, nn

from ptq.contracts import Feedback
from ptq.errors import SpecError
from ptq.pipeline import quantize
from ptq.precision import pays
from ptq.quant.fake_quant import weight_grid
from ptq.reconstruct import _loop
from ptq.reconstruct._loop import BlockReport, reconstruct_blocks
from ptq.reconstruct._precision import in_bfloat16
from ptq.reconstruct.genie_m import GenieM
from tests.stages import prepare
from tests.zoo import ZOO, images

_CPU = torch.device("cpu")


def _run(net: str, bits: str, precision: str) -> tuple[fx.GraphModule, list[BlockReport]]:
    made = prepare(net, bits)
    method = GenieM(steps=60, batch_size=8)
    return reconstruct_blocks(
        made.teacher, made.student, images(), method, seed=0, device=_CPU, feedback=Feedback(), precision=precision
    )


def _state(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gm.state_dict().items()}


def test_grids_of_eight_bits_are_trained_in_float32():
    exact, _ = _run("residual", "w8a8", "float32")
    rough, _ = _run("residual", "w8a8", "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(_state(exact).values(), _state(rough).values(), strict=True))


@pytest.mark.parametrize("net", ZOO)
def test_narrow_blocks_are_trained_in_bfloat16_and_end_as_well(net: str):
    exact, wanted = _run(net, "w4a4", "float32")
    rough, found = _run(net, "w4a4", "bfloat16")
    assert {v.dtype for v in _state(rough).values()} == {v.dtype for v in _state(exact).values()}
    assert not any(m._forward_hooks for m in rough.modules())
    assert not all(torch.equal(a, b) for a, b in zip(_state(exact).values(), _state(rough).values(), strict=True))
    # Both are trained for a few steps from the same start; measured differences are within 15 %.
    assert sum(r.error for r in found) < 1.3 * sum(r.error for r in wanted)


def test_layers_give_float32_inside_and_lose_their_hooks():
    made = prepare("plain", "w4a4")
    layers = [m for m in made.student.modules() if isinstance(m, nn.Conv2d) and _bits(m) == 4]
    block = nn.Sequential(*layers[:1])
    x = torch.randn(2, layers[0].in_channels, 8, 8)
    with in_bfloat16(layers[:1], wanted=True) as half, torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert half
        out = block(x)
    assert out.dtype == torch.float32 and not layers[0]._forward_hooks
    assert not torch.equal(out, block(x))  # it was computed in bfloat16
    with in_bfloat16(layers[:1], wanted=False) as half:
        assert not half


def _bits(layer: nn.Module) -> int | None:
    grid = weight_grid(layer)
    return None if grid is None else grid.spec.bits


def test_auto_is_float32_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch):
    """By what the processor is, never by a clock: a busy machine would give other bytes."""
    for able, wanted in (({}, False), ({"avx512_bf16": True, "amx_bf16": False}, False), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert pays("auto", _CPU) is wanted
        assert not pays("float32", _CPU) and pays("bfloat16", _CPU)
    assert not pays("auto", torch.device("cuda"))
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not pays("auto", _CPU)


def test_an_unknown_precision_is_refused_at_once():
    with pytest.raises(SpecError, match="'half' asked for; known: auto, float32, bfloat16"):
        quantize(nn.Conv2d(3, 3, 1), "w4a4", images(), input_shape=(3, 8, 8), precision="half")


def test_the_pipeline_hands_the_precision_on(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(_loop, "pays", lambda precision, device: bool(asked.append(precision)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    qm = quantize(
        model.eval(), "w4a4", torch.randn(4, 3, 8, 8), input_shape=(3, 8, 8), rounding="nearest", precision="float32"
    )
    assert asked == ["float32"] and qm.manifest.recipe["precision"] == "float32"
