"""Blocks: where a network is cut, and that the pieces are the whole."""

import pytest
import torch
from torch import Tensor, fx, nn

from ptq.graph.blocks import Block, extract, input_value_node, split
from ptq.graph.ops import output_node, weighted_nodes
from ptq.graph.trace import trace
from tests.stages import assert_unchanged, fingerprint, prepare, values
from tests.zoo import SHAPE, ZOO, images

UNITS = ("block", "layer")


def _stages(name: str) -> dict[str, fx.GraphModule]:
    made, weights_only = prepare(name), prepare(name, "w4")
    return {"teacher": made.teacher, "folded": made.folded, "w4a4": made.student, "w4": weights_only.student}


def _run_blocks(gm: fx.GraphModule, blocks: list[Block], x: Tensor) -> dict[str, Tensor]:
    """All values at block borders, each block run on what the ones before it gave."""
    stem = input_value_node(gm)
    with torch.no_grad():
        known = {stem.meta["value"]: x if stem.op == "placeholder" else gm.get_submodule(str(stem.target))(x)}
        for block in blocks:
            outputs = extract(gm, block.inputs, block.outputs)(*(known[name] for name in block.inputs))
            known |= zip(block.outputs, outputs)
    return known


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ZOO)
def test_blocks_together_compute_the_network(name: str, unit: str, device: torch.device):
    x = images(4, seed=1).to(device)
    for stage, gm in _stages(name).items():
        known = _run_blocks(gm.to(device), split(gm, unit), x)
        with torch.no_grad():
            assert torch.equal(known[output_node(gm).meta["value"]], gm(x)), stage


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ZOO)
def test_the_teacher_runs_along_the_students_blocks(name: str, unit: str):
    made, x = prepare(name), images(4, seed=1)
    known = _run_blocks(made.teacher, split(made.student, unit), x)
    expected = values(made.teacher, x)
    assert len(known) > 1 and all(torch.equal(v, expected[k]) for k, v in known.items())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_in_one_block_in_order(name: str, unit: str):
    for gm in _stages(name).values():
        blocks = split(gm, unit)
        assert [path for b in blocks for path in b.layers] == [str(n.target) for n in weighted_nodes(gm)]
        assert len({b.name for b in blocks}) == len(blocks)
        if unit == "layer":
            assert all(len(b.layers) == 1 for b in blocks)


@pytest.mark.parametrize("name", ZOO)
def test_between_blocks_one_tensor_is_alive(name: str):
    blocks = split(prepare(name).student)
    assert all(len(b.inputs) == len(b.outputs) == 1 for b in blocks)
    assert [b.inputs for b in blocks[1:]] == [b.outputs for b in blocks[:-1]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("residual", ["conv1", "layers.0", "layers.1", "fc"]),
        ("depthwise", ["stem.1", "blocks.0", "blocks.1", "fc"]),
        ("concat", ["stem.0", "mixed.0", "mixed.1", "fc"]),
        ("pre_activation", ["conv", "blocks.0", "blocks.1", "fc"]),
        ("plain", ["conv1", "conv2", "fc1", "fc2"]),
    ],
)
def test_blocks_of_known_nets(name: str, expected: list[str]):
    made = prepare(name)
    assert [b.name for b in split(made.student)] == [b.name for b in split(made.folded)] == expected


def test_merged_across_a_cut_by_their_owner():
    """Depthwise and pointwise, a single tensor between them, but one module around them."""
    (block,) = (b for b in split(prepare("depthwise").student) if b.name == "blocks.0")
    assert block.layers == ("blocks.0.body.0", "blocks.0.body.3")


class _Wide(nn.Module):
    """One module of many convolutions with a shortcut around them all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@pytest.mark.parametrize(("count", "expected"), [(16, 2), (17, 18)])
def test_more_than_16_layers_fall_apart(count: int, expected: int):
    gm = trace(nn.Sequential(_Wide(count), nn.Flatten(), nn.Linear(768, 10)), SHAPE)
    blocks = split(gm)
    assert len(blocks) == expected
    known = _run_blocks(gm, blocks, images(2))
    assert torch.equal(known[output_node(gm).meta["value"]], gm(images(2)))


def test_the_input_may_be_read_again_later():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(7, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.b(self.a(x)), x], 1))

    gm = trace(Net(), SHAPE)
    for unit in UNITS:
        known = _run_blocks(gm, split(gm, unit), images(2))
        assert torch.equal(known[output_node(gm).meta["value"]], gm(images(2)))


def test_one_layer_is_one_block():
    (block,) = split(trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), SHAPE))
    assert (block.layers, block.inputs, block.outputs) == (("0",), ("input_1",), ("_1",))


@pytest.mark.parametrize("name", ZOO)
def test_network_is_unchanged(name: str):
    student = prepare(name).student
    before = fingerprint(student)
    for block in split(student):
        extract(student, block.inputs, block.outputs)
    assert_unchanged(student, before)


def test_extract_shares_parameters():
    student = prepare("residual").student
    block = next(b for b in split(student) if b.name == "layers.1")
    part = extract(student, block.inputs, block.outputs)
    for path in block.layers:
        assert part.get_submodule(path) is student.get_submodule(path)
    owned = {id(p) for p in student.parameters()}
    assert all(id(p) in owned for p in part.parameters())
    assert "fc" not in dict(part.named_modules())
