"""What collects the nodes and initializers of one ONNX graph."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from ptq.exporters._profiles import PROFILES, Profile
from torch import fx


class Builder:
    """Collects nodes and initializers of one ONNX graph; `names` maps each FX node to its (float) tensor."""

    def __init__(self, gm: fx.GraphModule, profile: Profile = PROFILES["ort"]) -> None:
        self.gm, self.profile = gm, profile
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.names: dict[fx.Node, str] = {}

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Appends a node and returns the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        """Adds an initializer and returns its name."""
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def int4(self, name: str, codes: np.ndarray) -> str:
        """Adds an INT4 initializer, two codes a byte, the first in the low half."""
        return self.four_bits(name, codes, True)

    def four_bits(self, name: str, codes: np.ndarray, signed: bool) -> str:
        """Adds an INT4 or UINT4 initializer, packed likewise."""
        flat = codes.astype(np.int8).reshape(-1)
        flat = np.append(flat, np.int8(0)) if flat.size % 2 else flat
        packed = ((flat[0::2] & 0xF) | ((flat[1::2] & 0xF) << 4)).astype(np.uint8)
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        self.initializers[name] = helper.make_tensor(name, kind, codes.shape, packed.tobytes(), raw=True)
        return name

    def module(self, node: fx.Node) -> Any:
        """The module a node calls."""
        return self.gm.get_submodule(str(node.target))

    def inputs(self, node: fx.Node) -> list[str]:
        """The tensors a node reads, in argument order (x + x reads one twice)."""
        flat: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), lambda n: flat.append(n))
        return [self.names[n] for n in flat]
