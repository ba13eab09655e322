"""The integer addition against onnxruntime's, on every pair of codes."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from ptq.graph.integer_kernels import IntegerAdd
from ptq.quant.affine import QParams, dequantize
from ptq.spec import QuantSpec

_ALL = torch.arange(256, dtype=torch.int32)
_A, _B = _ALL.repeat_interleave(256), _ALL.repeat(256)


def _runtime(grids: list[tuple[np.float32, int]]) -> torch.Tensor:
    """Codes of QLinearAdd for all 65,536 pairs."""
    names = ["a_scale", "a_zero", "b_scale", "b_zero", "y_scale", "y_zero"]
    stored = []
    for k, (scale, zero) in enumerate(grids):
        stored.append(helper.make_tensor(names[2 * k], TensorProto.FLOAT, [], [float(scale)]))
        stored.append(helper.make_tensor(names[2 * k + 1], TensorProto.UINT8, [], [zero]))
    node = helper.make_node(
        "QLinearAdd", ["a", *names[:2], "b", *names[2:4], *names[4:]], ["y"], domain="com.microsoft"
    )
    values = [helper.make_tensor_value_info(name, TensorProto.UINT8, [65536]) for name in ("a", "b", "y")]
    graph = helper.make_graph([node], "add", values[:2], values[2:], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (codes,) = session.run(None, {"a": _A.numpy().astype(np.uint8), "b": _B.numpy().astype(np.uint8)})
    return torch.from_numpy(codes.astype(np.int32))


@pytest.mark.parametrize("seed", range(40))
def test_every_pair_of_codes(seed: int):
    rng = np.random.default_rng(seed)
    grids = [(np.float32(rng.uniform(0.005, 0.2)), 2 * int(rng.integers(0, 128))) for _ in range(3)]
    spec = QuantSpec(8, False, False)
    a, b, y = (QParams(torch.tensor(s), torch.tensor(z, dtype=torch.int32), spec) for s, z in grids)
    ours = IntegerAdd(a, b, y, (0, 255))(dequantize(_A, a), dequantize(_B, b))
    codes = torch.round(ours / y.scale).to(torch.int32) + y.zero_point
    assert int((codes != _runtime(grids)).sum()) == 0
