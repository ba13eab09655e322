"""Bit widths and integer grids: `BitConfig` ("w4a4") and `QuantSpec` (one tensor's grid)."""

import re
from dataclasses import dataclass

from ptq.errors import SpecError

EDGES = ("brecq", "qdrop", "all")


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one tensor is quantized: uniform affine, `real = scale * (code - zero_point)`.

    A symmetric signed grid is narrow (−127…127 at 8 bits), so that a weight and its negative are both on it; the
    asymmetric signed grid uses every code (−8…7 at 4 bits). `axis` is the dimension with one scale per index, or None
    for one scale in all.

    Raises:
        SpecError: `bits` outside 2…8.
    """

    bits: int
    signed: bool
    symmetric: bool
    axis: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"{self.bits} bits asked for; integer grids have 2 to 8 bits")

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


@dataclass(frozen=True, slots=True)
class PlanRules:
    """Where which width goes.

    edges: "brecq" keeps 8 bits (`BitConfig.edge`) for the first and last layer's weights, the first layer's output and
        the last layer's input; "qdrop" is the same without the first output; "all" gives every layer the low width.
        (BRECQ, QDrop and AIT/GDFQ settings; GENIE, appendix C.)
    adds: bits of the tensors that enter no convolution or linear layer (they only feed additions and pools).
    asymmetric_below: weights narrower than this many bits get a zero point per channel, as GENIE-M does; wider ones
        are symmetric, which integer kernels run faster.

    Raises:
        SpecError: an unknown edge setting, or `adds` outside 2…8.
    """

    edges: str = "brecq"
    adds: int = 8
    asymmetric_below: int = 5

    def __post_init__(self) -> None:
        if self.edges not in EDGES:
            raise SpecError(f"unknown edge setting {self.edges!r}; known: {', '.join(EDGES)}")
        if not 2 <= self.adds <= 8:
            raise SpecError(f"{self.adds} bits asked for tensors that feed additions; widths are 2 to 8 bits")
