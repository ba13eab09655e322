"""Networks that cannot be traced: the message names what and where."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.errors import ModelError
from ptq.graph.trace import trace
from tests.graph.test_trace import Around
from tests.zoo import SHAPE, build


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum() > 0:
            y = -y
        return y


class UnknownFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.rand_like(y)


def _line(net: type, text: str) -> str:
    """ "file.py" and the number of the first line below `forward` of a class that reads `text`."""
    code = net.forward.__code__
    with open(code.co_filename, encoding="utf-8") as f:
        lines = f.read().splitlines()
    return next(str(k) for k in range(code.co_firstlineno, len(lines)) if lines[k - 1].strip() == text)


def test_control_flow_on_data_names_the_line():
    with pytest.raises(ModelError) as caught:
        trace(DataDependent(), SHAPE)
    message = str(caught.value)
    assert f"test_trace_errors.py:{_line(DataDependent, 'if y.sum() > 0:')} `if y.sum() > 0:`" in message
    assert "control flow" in message and "\n" not in message
    assert caught.value.__cause__ is not None


def test_the_line_is_named_in_whatever_folder_it_is(tmp_path: Path):
    """Also in one called torch: only the library's own lines are passed over."""
    file = tmp_path / "torch" / "net.py"
    file.parent.mkdir()
    file.write_text("def forward(net, y):\n    return y if y.sum() > 0 else -y\n", encoding="utf-8")
    space: dict = {}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), space)
    with pytest.raises(ModelError, match=r"net\.py:2 `return y if y\.sum\(\) > 0 else -y`"):
        trace(Around(space["forward"]), SHAPE)


def test_unknown_function_is_named_with_its_line():
    with pytest.raises(ModelError) as caught:
        trace(UnknownFunction(), SHAPE)
    message = str(caught.value)
    assert "unknown operation rand_like" in message and "\n" not in message
    assert message.endswith("nor can it stay in float: aten.rand_like gives random numbers")
    line = _line(UnknownFunction, "return y + torch.rand_like(y)")
    assert f"line {line}" in message and "test_trace_errors.py" in message


def test_unknown_module_is_named_with_path_and_type():
    with pytest.raises(
        ModelError, match=r"unknown module m\.0 of type FractionalMaxPool2d at m_0 \(.*test_trace.*gives random numbers"
    ):
        trace(Around(lambda s, y: s.m[0](y), nn.FractionalMaxPool2d(2, output_size=4)), SHAPE)


def test_a_subclass_of_a_known_module_is_not_taken_for_it():
    class Halved(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand_like(x)

    with pytest.raises(ModelError, match="unknown operation rand_like"):
        trace(Around(lambda s, y: s.m[0](y), Halved()), SHAPE)


# Neither known nor to be left in float: why.
REFUSED = {
    "rand_like gives random numbers": lambda s, y: torch.rand_like(y).cumsum(1),
    "nonzero has a result whose shape depends on the values": lambda s, y: y.flatten()[y.flatten().nonzero()[0]],
    "masked_select has a result whose shape depends": lambda s, y: y + y.masked_select(y > 0).sum(),
    "the result for an image depends on the other images": lambda s, y: y - y.mean(0, keepdim=True),
    "no tensor of numbers with a row per image": lambda s, y: y.cumsum(1).sum(),
    "a size that is no multiple of the batch size": lambda s, y: (
        torch.arange(y.size(0) + 1).cumsum(0)[:-1].view(-1, 1, 1, 1) * y
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_stay_in_float_either(reason: str):
    with pytest.raises(ModelError, match=rf"; nor can it stay in float: .*{reason}") as caught:
        trace(Around(REFUSED[reason]), SHAPE)
    assert "\n" not in str(caught.value)


def test_two_inputs():
    class Net(Around):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x) + self.conv(y)

    with pytest.raises(ModelError, match=r"takes 2 inputs, x, y; one is supported"):
        trace(Net(lambda s, y: y), SHAPE)


@pytest.mark.parametrize(
    "result", [lambda s, y: (y, y.relu()), lambda s, y: [y, y], lambda s, y: {"out": y, "aux": [y]}]
)
def test_more_than_one_output(result: Callable):
    with pytest.raises(ModelError, match="returns 2 tensors; wrap it"):
        trace(Around(result), SHAPE)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 2, 2)])
def test_input_of_another_shape(shape: tuple[int, int, int]):
    given = ", ".join(map(str, shape))
    with pytest.raises(ModelError, match=rf"does not run on input \[B, {given}\]: .*check the input shape"):
        trace(build("plain"), shape)


def test_double_precision_is_converted():
    teacher = trace(build("plain").double(), SHAPE)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


BATCH_FIXED = {
    "at run time": lambda s, y: y.mean((2, 3)).view(2, 8),
    "silently": lambda s, y: y.view(2, -1),
}


@pytest.mark.parametrize("case", BATCH_FIXED)
def test_a_batch_size_fixed_in_the_network(case: str):
    with pytest.raises(ModelError, match="batch size"):
        trace(Around(BATCH_FIXED[case]), SHAPE)


@pytest.mark.parametrize(
    "body", [lambda s, y: s.m[0](y), lambda s, y: s.m[1](y.mean((2, 3)))], ids=["BatchNorm2d", "BatchNorm1d"]
)
def test_a_batch_norm_without_running_statistics(body: Callable):
    """Its result for one image depends on the others in the batch: no exported file computes that."""
    norms = [norm(8, track_running_stats=False) for norm in (nn.BatchNorm2d, nn.BatchNorm1d)]
    with pytest.raises(ModelError, match="running statistics"):
        trace(Around(body, *norms), SHAPE)


def test_what_would_be_computed_wrongly_is_refused():
    with pytest.raises(ModelError, match="does not compute what the original does"):
        trace(Around(lambda s, y: F.dropout(y, training=True)), SHAPE)


UNSUPPORTED = {
    "concatenation with a parameter": lambda s, y: torch.cat([y, torch.ones(2, 8, 16, 16)], 1),
    "which fixes the batch": lambda s, y: y + torch.ones(2, 8, 16, 16),
    r"mean over dimensions \(0, 2, 3\)": lambda s, y: F.prelu(y, y.mean((0, 2, 3))),
    r"index \(0,\)": lambda s, y: y[0],
    "moves the batch dimension": lambda s, y: y.permute(1, 0, 2, 3),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_form_of_a_known_operation(message: str):
    with pytest.raises(ModelError, match=rf"not supported in \w+: .*{message}.*; nor can it stay in float"):
        trace(Around(UNSUPPORTED[message]), SHAPE)


def test_nothing_is_printed_of_what_export_cannot_do_either(capfd):
    with pytest.raises(ModelError):
        trace(DataDependent(), SHAPE)
    assert capfd.readouterr() == ("", "")


def test_half_precision_inside_is_refused():
    def narrowed(net: nn.Module, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net.conv(y[:, :3])
        return y.float()

    with pytest.raises(ModelError, match=r"computes in torch\.bfloat16"):
        trace(Around(narrowed).eval(), SHAPE)


def test_a_network_that_does_not_run_is_not_told_to_be_independent_of_values():
    def refuses(net: nn.Module, y: Tensor) -> Tensor:
        raise RuntimeError("not today")

    with pytest.raises(ModelError, match=r"does not run on input \[B, 3, 16, 16\]: .*: not today$"):
        trace(Around(refuses).eval(), SHAPE)
