"""Bit widths and integer grids: `BitConfig` ("w4a4"), `Override` ("fc=w8") and `QuantSpec` (one tensor's grid)."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ptq.errors import SpecError

EDGES = ("brecq", "qdrop", "all")
WEIGHTS = ("auto", "symmetric", "asymmetric")
ACTIVATIONS = ("unsigned", "signed")
SCALES = ("free", "power_of_two")
PLACEMENTS = ("everywhere", "inputs")
TIES = ("moves", "pools")
PRECISIONS = ("auto", "float32", "bfloat16")  # of training; see `ptq.quantize`


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one tensor is quantized: uniform affine, `real = scale * (code - zero_point)`.

    A symmetric signed grid is narrow (−127…127 at 8 bits), so that a weight and its negative are both on it; the
    asymmetric signed grid uses every code (−8…7 at 4 bits). `axis` is the dimension with one scale per index, or None
    for one scale in all. `power_of_two`: scales are powers of two, so that hardware rescales by shifts.

    Raises:
        SpecError: `bits` outside 2…8.
    """

    bits: int
    signed: bool
    symmetric: bool
    axis: int | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SpecError(f"{self.bits} bits asked for; integer grids have 2 to 8 bits, a whole number")
        if not (isinstance(self.signed, bool) and isinstance(self.symmetric, bool)):
            raise SpecError(f"signed={self.signed!r}, symmetric={self.symmetric!r} given; each is true or false")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


_BITS = re.compile(r"w(\d+)(?:a(\d+))?(?:e(\d+))?")


@dataclass(frozen=True, slots=True)
class BitConfig:
    """Bit widths of a network: `weight`, `act` (None: activations stay float), `edge` (first and last layer).

    Raises:
        SpecError: a width outside 2…8.
    """

    weight: int
    act: int | None = None
    edge: int = 8

    def __post_init__(self) -> None:
        for what, bits in (("weight", self.weight), ("activation", self.act), ("edge", self.edge)):
            if bits is not None and not 2 <= bits <= 8:
                raise SpecError(f"{what} width {bits} asked for; widths are 2 to 8 bits, as in w4a4, w8a8 or w4")

    @classmethod
    def parse(cls, text: str) -> "BitConfig":
        """Reads "w4a4", "w8" (weights only) or "w2a4e8" (first and last layer 8 bits).

        Raises:
            SpecError: the text is not of that form, or a width is outside 2…8.
        """
        match = _BITS.fullmatch(text.strip().lower())
        if match is None:
            raise SpecError(f"bit widths {text!r} not understood; write w<weights>a<activations>, as in w4a4, or w4")
        weight, act, edge = match.groups()
        return cls(int(weight), int(act) if act else None, int(edge) if edge else 8)

    def __str__(self) -> str:
        act = "" if self.act is None else f"a{self.act}"
        edge = "" if self.edge == 8 else f"e{self.edge}"
        return f"w{self.weight}{act}{edge}"


_WIDTHS = re.compile(r"(?:w(\d+))?(?:a(\d+))?")


@dataclass(frozen=True, slots=True)
class Override:
    """Widths of the layers whose module path matches `pattern` (`*`, `?`, `[…]` as in file names).

    weight: of the layer's weights; act: of the tensor that enters it; None leaves what the rules say. skip: the layer stays
    float, and so do tensors that nothing else reads.

    Raises:
        SpecError: a width outside 2…8.
    """

    pattern: str
    weight: int | None = None
    act: int | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        for bits in (self.weight, self.act):
            if bits is not None and not 2 <= bits <= 8:
                raise SpecError(f"{bits} bits asked for {self.pattern!r}; widths are 2 to 8 bits")

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Reads "layer3.*=w8a8", "fc=w8" or "features.0=a8"; "fc=float" skips.

        Raises:
            SpecError: the text is not of that form.
        """
        pattern, _, widths = (part.strip() for part in text.rpartition("="))
        if pattern and widths.lower() == "float":
            return cls(pattern, skip=True)
        match = _WIDTHS.fullmatch(widths.lower())
        if not pattern or match is None or not widths:
            raise SpecError(
                f"override {text!r} not understood; write LAYER=w<weights>a<activations>, as in 'layer3.*=w8a8'"
            )
        weight, act = match.groups()
        return cls(pattern, int(weight) if weight else None, int(act) if act else None)

    def __str__(self) -> str:
        if self.skip:
            return f"{self.pattern}=float"
        widths = "".join(f"{kind}{bits}" for kind, bits in (("w", self.weight), ("a", self.act)) if bits is not None)
        return f"{self.pattern}={widths}"

    def matches(self, path: str) -> bool:
        """Whether it is for the layer at a module path."""
        return fnmatchcase(path, self.pattern)


@dataclass(frozen=True, slots=True)
class PlanRules:
    """Where which width goes.

    edges: "brecq" keeps 8 bits (`BitConfig.edge`) for the first and last layer's weights, the first layer's output and
        the last layer's input; "qdrop" is the same without the first output; "all" gives every layer the low width.
        (BRECQ, QDrop and AIT/GDFQ settings; GENIE, appendix C. Differs: "all" has the low width between layers without an
        activation function too, where GDFQ leaves floats, which an integer runtime cannot.)
    adds: bits of the tensors that enter no convolution or linear layer (they only feed additions and pools).
    weights: "symmetric", "asymmetric" (a zero point per channel), or "auto": asymmetric below `asymmetric_below` bits, as
        GENIE-M does; wider ones symmetric, which integer kernels run faster.
    activations: "unsigned" codes, with a zero point where a tensor has negative values, or "signed": symmetric about 0.
    scales: "free", or "power_of_two": every scale, which training then leaves alone.
    overrides: widths of single layers; of several that match, the last counts.
    placement: "everywhere": every tensor has codes, so that integer kernels follow one another; or "inputs": only what enters
        convolutions and linear layers, and one of two addends, as TensorRT fuses them.
    ties: which values share one grid: "moves": a value that is only moved, its source's, and the parts of a concatenation; or
        "pools": average pools and bilinear resizing as well, as LiteRT demands.

    Raises:
        SpecError: an unknown setting, or `adds` outside 2…8.
    """

    edges: str = "brecq"
    adds: int = 8
    weights: str = "auto"
    activations: str = "unsigned"
    scales: str = "free"
    overrides: tuple[Override, ...] = ()
    asymmetric_below: int = 5
    placement: str = "everywhere"
    ties: str = "moves"

    def __post_init__(self) -> None:
        for what, given, known in (
            ("edge", self.edges, EDGES), ("weight", self.weights, WEIGHTS), ("activation", self.activations, ACTIVATIONS),
            ("scale", self.scales, SCALES), ("placement", self.placement, PLACEMENTS),
            ("tie", self.ties, TIES),
        ):  # fmt: skip
            if given not in known:
                raise SpecError(f"unknown {what} setting {given!r}; known: {', '.join(known)}")
        if not 2 <= self.adds <= 8:
            raise SpecError(f"{self.adds} bits asked for tensors that feed additions; widths are 2 to 8 bits")

    def symmetric(self, bits: int) -> bool:
        """Whether weights of that width have no zero point."""
        return bits >= self.asymmetric_below if self.weights == "auto" else self.weights == "symmetric"


_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BUDGET = re.compile(r"auto:(size|bops)=([0-9.]+)\s*([kmgt]?)(b?)(?:,a(\d+))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """What mixed precision has to meet: `amount` bytes of weights ("size"), or bit operations an image ("bops").

    act: width of the activations under a size; under bops they are chosen too.
    """

    kind: str
    amount: float
    act: int = 8

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads "auto:size=1.2MB", "auto:size=300KB,a4" (activations at 4 bits) or "auto:bops=2.5G".

        Raises:
            SpecError: the text is not of that form.
        """
        match = _BUDGET.fullmatch(text.strip())
        if (
            match is None
            or match[2].count(".") > 1
            or match[2] == "."
            or (match[1].lower() == "bops" and (match[4] or match[5]))
        ):
            raise SpecError(
                f"budget {text!r} not understood; write auto:size=1.2MB, auto:size=300KB,a4 or auto:bops=2.5G"
            )
        act = int(match[5]) if match[5] else 8
        if not 2 <= act <= 8:
            raise SpecError(f"{act} bits asked for activations; widths are 2 to 8 bits")
        return cls(match[1].lower(), float(match[2]) * _UNITS[match[3].upper()], act)

    def __str__(self) -> str:
        return f"auto:bops={self.amount:.0f}" if self.kind == "bops" else f"auto:size={self.amount:.0f}B,a{self.act}"


_REPAIRS = ("equalize", "bias", "analytic_bias", "statistics")


@dataclass(frozen=True, slots=True)
class Repair:
    """What is mended beside rounding.

    equalize: channels of neighbouring layers are rescaled before anything is quantized (`ptq.graph.equalize`).
    bias: after rounding, what each channel's mean lost goes to its bias: "images", measured on the calibration images;
        "analytic", from BatchNorm parameters; or "none". statistics: deviations too, by the weight scales
        (`ptq.reconstruct._repair`).
    """

    equalize: bool = False
    bias: str = "none"
    statistics: bool = False

    def __post_init__(self) -> None:
        if self.bias not in ("none", "images", "analytic") or (self.statistics and self.bias != "images"):
            raise SpecError(
                f"bias={self.bias!r}, statistics={self.statistics} given; bias is none, images or analytic, "
                "and statistics goes with images"
            )

    @classmethod
    def parse(cls, text: str) -> "Repair":
        """Reads "equalize+bias", "analytic_bias", "statistics" or "none".

        Raises:
            SpecError: an unknown repair, or two that exclude each other.
        """
        parts = [part.strip() for part in text.split("+")]
        if parts == ["none"]:
            return cls()
        for part in parts:
            if part not in _REPAIRS:
                raise SpecError(f"unknown repair {part!r}; known: {', '.join(_REPAIRS)}, joined by +, or none")
        measured = "bias" in parts or "statistics" in parts
        if measured and "analytic_bias" in parts:
            raise SpecError(f"repair {text!r} corrects biases twice; analytic_bias goes with equalize alone")
        bias = "images" if measured else "analytic" if "analytic_bias" in parts else "none"
        return cls("equalize" in parts, bias, "statistics" in parts)

    def __str__(self) -> str:
        named = {"images": "" if self.statistics else "bias", "analytic": "analytic_bias", "none": ""}
        parts = ["equalize" * self.equalize, named[self.bias], "statistics" * self.statistics]
        return "+".join(filter(None, parts)) or "none"
