"""What tests of written files share."""

import pytest

import ptq
from tests.zoo import SHAPE, build, images


@pytest.fixture(scope="module")
def quantized():
    """A tiny network at some widths, quantized once, by nearest rounding on noise."""
    made: dict[tuple[str, str], ptq.QuantizedModel] = {}

    def get(name: str, bits: str) -> ptq.QuantizedModel:
        if (name, bits) not in made:
            made[name, bits] = ptq.quantize(build(name), bits, images(), input_shape=SHAPE, rounding="nearest")
        return made[name, bits]

    return get
