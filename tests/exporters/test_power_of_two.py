"""With powers of two as scales, no float product rounds: the simulation in float, the file as written, and the integer kernels
come to the same bits, with no tolerance anywhere."""

import numpy as np
import pytest
import torch
from ptq.exporters._parity import open_session

import ptq
from ptq.quant.fake_quant import ActFakeQuant
from ptq.quant.ranges import next_power_of_two
from tests.zoo import SHAPE, ZOO, build, images

# A sigmoid's values lie on no grid; GELU and such neither.
EXACT = [name for name in sorted(ZOO) if name != "squeeze_excite"]


def _is_power_of_two(scale: torch.Tensor) -> bool:
    return bool((torch.frexp(scale.detach()).mantissa == 0.5).all())


@pytest.mark.parametrize("rounding", ["nearest", "genie_m:steps=20", "adaround:steps=20"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a4"])
@pytest.mark.parametrize("name", EXACT)
def test_every_way_to_compute_it_gives_the_same_bits(name, bits, rounding, tmp_path):
    qm = ptq.quantize(
        build(name), bits, images(), input_shape=SHAPE, rounding=rounding, scales="power_of_two", repair="statistics",
        finish="logits:steps=3",
    )  # fmt: skip
    quantizers = [m for m in qm.student.modules() if isinstance(m, ActFakeQuant)]
    assert quantizers and all(_is_power_of_two(m.scale) for m in quantizers)
    assert all(_is_power_of_two(q.scale) for _, q in qm.integer_weights().values())
    path = tmp_path / "m.onnx"
    ptq.export(qm, "onnx_qdq", path, images=images())
    x = images(64, seed=5)
    with torch.no_grad():
        expected = qm.graph(x).numpy()
        assert np.array_equal(qm.student(x).numpy(), expected)
    for literal in (True, False):
        (found,) = open_session(path, literal=literal).run(None, {"input": x.numpy()})
        assert np.array_equal(found, expected), literal


def test_they_are_kept_with_the_network(tmp_path):
    qm = ptq.quantize(build("plain"), "w4a4", images(), input_shape=SHAPE, rounding="nearest", scales="power_of_two")
    qm.save(tmp_path / "out")
    again = ptq.load(tmp_path / "out")
    assert all(spec.power_of_two for spec in (*again.plan.weights.values(), *again.plan.values.values()))
    assert torch.equal(again.graph(images(4)), qm.graph(images(4))) and qm.manifest.recipe["scales"] == "power_of_two"


def test_next_power_of_two():
    values = torch.tensor([0.0, 1e-30, 0.25, 0.2500001, 0.9, 1.0, 1.5, 300.0])
    expected = [0.0, 2.0**-99, 0.25, 0.5, 1.0, 1.0, 2.0, 512.0]
    assert next_power_of_two(values).tolist() == expected
