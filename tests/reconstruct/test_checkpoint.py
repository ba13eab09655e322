"""A reconstruction that is stopped goes on from the block it was in, and ends as if it had not been."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ptq
from ptq import plugins
from ptq.contracts import Feedback
from tests.zoo import SHAPE, build, images

STEPS = 6
METHODS = [n for n in plugins.names("reconstructors") if plugins.load("reconstructors", n)().steps > 0]


class _Kill(Exception):
    """Stands for the end of the process."""


def _quantized(
    cache: Path | None, feedback: Feedback | None = None, net: str = "residual", method: str = "genie_m", **more: object
) -> ptq.QuantizedModel:  # fmt: skip
    given = {"bits": "w4a4", "rounding": f"{method}:steps={STEPS},batch_size=4"} | more
    return ptq.quantize(build(net), data=images(), input_shape=SHAPE, cache=cache, feedback=feedback, **given)  # pyright: ignore[reportArgumentType]


def _listening(until: Callable[[int], bool] = lambda done: False) -> tuple[Feedback, list[int]]:
    heard: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "reconstruction":
            heard.append(done)
            if until(done):
                raise _Kill

    return Feedback(progress), heard


def _same(a: ptq.QuantizedModel, b: ptq.QuantizedModel) -> bool:
    found, wanted = a.graph.state_dict(), b.graph.state_dict()
    timeless = [[{k: v for k, v in block.items() if k != "seconds"} for block in m.manifest.blocks] for m in (a, b)]
    return (
        list(found) == list(wanted)
        and all(torch.equal(v, wanted[k]) for k, v in found.items())
        and timeless[0] == timeless[1]
    )


@pytest.mark.parametrize("net", ["residual", "concat", "depthwise"])
@pytest.mark.parametrize("method", METHODS)
def test_goes_on_from_the_block_it_was_in(method: str, net: str, tmp_path: Path):
    expected = _quantized(None, net=net, method=method)
    feedback, _ = _listening(lambda done: done == 2 * STEPS + 3)  # in the middle of the third block
    with pytest.raises(_Kill):
        _quantized(tmp_path, feedback, net, method)
    feedback, heard = _listening()
    assert _same(_quantized(tmp_path, feedback, net, method), expected)
    assert heard[:2] == [STEPS, 2 * STEPS], "two blocks were there"
    assert heard[2:] == list(range(2 * STEPS + 1, heard[-1] + 1)), "the others were trained, step by step"


def test_what_is_there_is_not_trained_again(tmp_path: Path):
    first = _quantized(tmp_path)
    feedback, heard = _listening()
    assert _same(_quantized(tmp_path, feedback), first)
    assert heard == [STEPS * (k + 1) for k in range(len(first.manifest.blocks))]


@pytest.mark.parametrize(
    "more", [{"seed": 1}, {"bits": "w3a4"}, {"rounding": "genie_m:steps=5,batch_size=4"}, {"ranges": "minmax"}, {"adds": 4},
             {"layers": ("fc=w8",)}, {"precision": "bfloat16"}],
    ids=str,
)  # fmt: skip
def test_blocks_of_another_run_are_not_taken(more: dict[str, object], tmp_path: Path):
    _quantized(tmp_path)
    assert _same(_quantized(tmp_path, **more), _quantized(None, **more))


def test_a_damaged_block_is_trained_again(tmp_path: Path):
    first = _quantized(tmp_path)
    for file in sorted(tmp_path.rglob("blocks/*.pt"))[:1]:
        file.write_bytes(file.read_bytes()[:-100])
    feedback, heard = _listening()
    assert _same(_quantized(tmp_path, feedback), first)
    assert heard[:STEPS] == list(range(1, STEPS + 1))


def test_nearest_rounding_keeps_nothing(tmp_path: Path):
    ptq.quantize(build("residual"), "w4a4", images(), rounding="nearest", input_shape=SHAPE, cache=tmp_path)
    assert not list(tmp_path.rglob("*.pt"))
