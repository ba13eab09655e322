"""What integer runtimes and accelerators demand of a QDQ file: one integer grid, rendered as each of them wants it.

container    bytes that hold activation codes: unsigned, or signed, 128 lower with a zero point 128 lower
narrow       fewer than 8 bits of activations: a Clip of the codes, a Clip of the real values, types of 4 and 2 bits, or not at all
weights      up to 4 bits: packed and widened by a Cast, packed, or as bytes
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ptq.graph.integer_kernels import stored_shift
from ptq.graph.plan import QuantPlan
from ptq.quant.affine import QParams
from ptq.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Profile:
    """A target. summary: what it is for. container, narrow, weights: see the module's text; biases: int32 codes or float.

    zero_points: whether activations may have some other than the container's least value or 0. symmetric_weights: whether
    weights may not. power_of_two: whether scales must be. literal: whether its files are verified as they are written,
    without onnxruntime's optimizations, which break on them (signed codes before a max pool; types of 4 and 2 bits). placement, ties:
    which tensors have codes, and which share a grid, see `PlanRules`. fill_channels: whether a convolution of three channels
    reads a fourth, of zeros: onnxruntime's kernels are up to twice as fast then (for 7, 11, 15 … the Pad would cost more).
    compact: whether scales and biases of layers with narrow weights are stored in 16 bits, and what follows from others is computed
    in the file, once, as onnxruntime does when it opens it.
    """

    summary: str
    container: Literal["unsigned", "signed"] = "unsigned"
    narrow: Literal["clip codes", "clip values", "native", "none"] = "clip codes"
    weights: Literal["cast", "packed", "bytes"] = "cast"
    biases: Literal["int32", "float"] = "int32"
    zero_points: bool = True
    symmetric_weights: bool = False
    power_of_two: bool = False
    literal: bool = False
    placement: Literal["everywhere", "inputs"] = "everywhere"
    ties: Literal["moves", "pools"] = "moves"
    fill_channels: bool = False
    compact: bool = False

    def objections(self, plan: QuantPlan) -> Iterator[str]:
        """What of a plan the target cannot do: which layer or value, why, and the remedy."""
        for path, spec in plan.weights.items():
            if self.symmetric_weights and not spec.symmetric:
                yield f"layer {path}: its weights have zero points; add --weights symmetric"
            if self.power_of_two and not spec.power_of_two:
                yield f"layer {path}: its scales are no powers of two; add --scales power_of_two"
        for value, spec in plan.values.items():
            if not self.zero_points and not (spec.signed and spec.symmetric):
                yield f"value {value}: its codes are unsigned or have a zero point; add --activations signed"
            if self.narrow == "none" and spec.bits < 8:
                yield f"value {value}: {spec.bits} bits; activations have 8 there, as in --bits w4a8"
            if self.power_of_two and not spec.power_of_two:
                yield f"value {value}: its scale is no power of two; add --scales power_of_two"

    def shift(self, q: QParams) -> int:
        """What the file adds to an activation's codes and zero point."""
        return stored_shift(q) - (0 if self.container == "unsigned" else 128)

    def native_width(self, spec: QuantSpec) -> int:
        """Bits of the type that holds an activation's codes."""
        return 8 if self.narrow != "native" else next(width for width in (2, 4, 8) if spec.bits <= width)

    def weight_width(self, spec: QuantSpec) -> int:
        """Bits of the type that holds a weight's codes. Types of 2 bits are for files that need nothing older than opset 25."""
        widths = (2, 4, 8) if self.narrow == "native" else (8,) if self.weights == "bytes" else (4, 8)
        return next(width for width in widths if spec.bits <= width)


PROFILES: dict[str, Profile] = {
    "ort": Profile("onnxruntime on CPUs: bytes, packed weights, every layer in an integer kernel", fill_channels=True, compact=True),
    "openvino": Profile("OpenVINO: as ort, weights without zero points", symmetric_weights=True),
    "tensorrt": Profile(
        "TensorRT: signed codes without zero points before weighted layers, float biases", container="signed", narrow="clip values",
        weights="bytes", biases="float", zero_points=False, symmetric_weights=True, literal=True, placement="inputs",
    ),
    "qnn": Profile("Qualcomm QNN: 8-bit activations, 4-bit weights as such", narrow="none", weights="packed", symmetric_weights=True),
    "tflite": Profile(
        "LiteRT rules: signed codes, weights within ±127, one grid across pools and resizing (not its fixed grid of sigmoids)",
        container="signed", narrow="none", weights="bytes", symmetric_weights=True, ties="pools",
    ),
    "stm32": Profile(
        "STM32 Neural-ART: signed activation codes, symmetric weights", container="signed", narrow="none",
        symmetric_weights=True,
    ),
    "pot": Profile(
        "shifts only: powers of two, symmetric", container="signed", narrow="clip codes", weights="bytes",
        zero_points=False, symmetric_weights=True, power_of_two=True,
    ),
    "native": Profile("types of 4 and 2 bits for whatever fits them", narrow="native", weights="packed", literal=True),
}  # fmt: skip
