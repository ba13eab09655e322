"""What collects the nodes and initializers of one ONNX graph."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from ptq.exporters._profiles import PROFILES, Profile
from torch import fx

# Types of fewer than 8 bits, by width and sign.
PACKED = {
    (4, True): TensorProto.INT4, (4, False): TensorProto.UINT4, (2, True): TensorProto.INT2, (2, False): TensorProto.UINT2,
}  # fmt: skip


def tensor_name(node: fx.Node) -> str:
    """The name of a node's tensor in the file."""
    name = node.meta["value"] or f"{node.name}.raw"
    return f"{name}.value" if name in ("input", "output") else name  # those two are the file's own


class Builder:
    """Collects nodes and initializers of one ONNX graph of version `opset`; `names` maps each FX node to its (float) tensor."""

    def __init__(self, gm: fx.GraphModule, profile: Profile = PROFILES["ort"], opset: int = 21) -> None:
        self.gm, self.profile, self.opset = gm, profile, opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.names: dict[fx.Node, str] = {}

    def add(self, op: str, inputs: list[str], output: str, *, named: bool = True, **attributes: Any) -> str:
        """Appends a node and returns the name of its output: a number unless it is to be `named`."""
        output, name = (output, f"{output}/{op}") if named else (f"c.{len(self.nodes)}", None)
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        """Adds an initializer and returns its name."""
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def value(self, name: str) -> np.ndarray:
        """What an initializer holds."""
        return numpy_helper.to_array(self.initializers[name])

    def packed(self, name: str, codes: np.ndarray, bits: int = 4, signed: bool = True) -> str:
        """Adds an initializer of a type of 4 or 2 bits, two or four codes a byte, the first in the lowest bits."""
        flat = codes.astype(np.int64).reshape(-1) & (2**bits - 1)
        flat = np.append(flat, np.zeros(-flat.size % (8 // bits), dtype=np.int64)).reshape(-1, 8 // bits)
        raw = (flat << (bits * np.arange(8 // bits))).sum(1).astype(np.uint8).tobytes()
        self.initializers[name] = helper.make_tensor(name, PACKED[bits, signed], codes.shape, raw, raw=True)
        return name

    def module(self, node: fx.Node) -> Any:
        """The module a node calls."""
        return self.gm.get_submodule(str(node.target))

    def inputs(self, node: fx.Node) -> list[str]:
        """The tensors a node reads, in argument order (x + x reads one twice)."""
        flat: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), lambda n: flat.append(n))
        return [self.names[n] for n in flat]
