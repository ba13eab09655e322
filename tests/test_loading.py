"""Every kind of file a user may hand over, and the one line each bad one gets."""

import io
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ptq.errors import ModelError
from ptq.graph.blocks import split
from ptq.graph.ops import weighted_nodes
from ptq.graph.trace import trace
from ptq.loading import build_arch, load_model
from tests.zoo import SHAPE, build, images

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
    def forward(self, x):
        return self.conv(x).mean((2, 3))

def broken():
    raise RuntimeError("no network today")

def leaves():
    raise SystemExit(0)

number = 3
def three():
    return 3
"""


@pytest.fixture
def arch(tmp_path):
    """A file that defines networks."""
    (tmp_path / "nets_here.py").write_text(NETS)
    return str(tmp_path / "nets_here.py")


@pytest.fixture
def weights(arch, tmp_path):
    """A state dict on disk."""
    model = build_arch(f"{arch}:Net")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt", model


def test_state_dict(weights, arch):
    path, model = weights
    loaded = load_model(path, f"{arch}:Net")
    assert torch.equal(loaded.conv.weight, model.conv.weight) and not loaded.training


def test_checkpoints_as_training_scripts_write_them(weights, arch, tmp_path):
    _, model = weights
    state = model.state_dict()
    parallel = {f"module.{k}": v for k, v in state.items()}
    compiled = {f"module._orig_mod.{k}": v for k, v in state.items()}
    averaged = AveragedModel(model).state_dict()
    for content in (
        {"state_dict": state, "epoch": 3},
        {"model": parallel},
        parallel,
        compiled,
        averaged,
        {"ema": state},
    ):
        torch.save(content, tmp_path / "c.pt")
        assert torch.equal(load_model(tmp_path / "c.pt", f"{arch}:Net").conv.weight, model.conv.weight)
    save_file(state, str(tmp_path / "c.safetensors"))
    assert torch.equal(load_model(tmp_path / "c.safetensors", f"{arch}:Net").conv.weight, model.conv.weight)


def test_a_prefix_that_is_the_networks_own_stays(tmp_path):
    (tmp_path / "wrapped.py").write_text(
        NETS + "\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.module = Net()\n    def forward(self, x):\n        return self.module(x)\n"
    )
    arch = f"{tmp_path / 'wrapped.py'}:Own"
    torch.save(build_arch(arch).state_dict(), tmp_path / "own.pt")
    assert load_model(tmp_path / "own.pt", arch).module.conv.weight.shape == (4, 3, 3, 3)


def test_networks_are_float32_and_may_lie_beside_what_they_import(tmp_path):
    (tmp_path / "beside_them.py").write_text(NETS)
    (tmp_path / "importing.py").write_text("from beside_them import Net\n\ndef half():\n    return Net().half()\n")
    arch = f"{tmp_path / 'importing.py'}:half"
    torch.save(build_arch(arch).state_dict(), tmp_path / "half.pt")
    loaded = load_model(tmp_path / "half.pt", arch)
    assert loaded.conv.weight.dtype == torch.float32 and str(tmp_path) not in sys.path


def test_a_network_in_a_checkpoint(tmp_path):
    torch.save({"model": nn.Sequential(nn.Conv2d(3, 4, 3)), "epoch": 3}, tmp_path / "c.pt")
    assert isinstance(load_model(tmp_path / "c.pt", trust_pickle=True), nn.Sequential)
    with pytest.raises(ModelError, match="trust-pickle"):
        load_model(tmp_path / "c.pt")


def test_literal_arguments(arch):
    assert build_arch(f"{arch}:Net(6)").conv.out_channels == build_arch(f"{arch}:Net(width=6)").conv.out_channels == 6


def test_packages_and_torchvision():
    assert isinstance(build_arch("torch.nn:Identity"), nn.Identity)
    pytest.importorskip(
        "torchvision", exc_type=ImportError, reason="torchvision does not import with this build of torch"
    )
    assert isinstance(build_arch("torchvision:resnet18(num_classes=7)").fc, nn.Linear)


def test_pickled_module_only_on_trust(tmp_path):
    torch.save(nn.Conv2d(3, 4, 3), tmp_path / "whole.pt")
    with pytest.raises(ModelError, match=r"unpickling runs code.*state_dict.*--trust-pickle"):
        load_model(tmp_path / "whole.pt")
    assert isinstance(load_model(tmp_path / "whole.pt", trust_pickle=True), nn.Conv2d)


class _Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_hostile_pickles_do_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Bomb()))
    torch.save({"a": _Bomb()}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(ModelError):
            load_model(name, "torch.nn:Identity")
    assert not (tmp_path / "exploded").exists()


def _archive(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name in names:
            z.writestr(name, b"x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a file of PyTorch weights"),
        (b"hello, world, this is text", "not a file of PyTorch weights"),
        (bytes(range(256)) * 20, "not a file of PyTorch weights"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a file of PyTorch weights"),
        (_archive("m/code/a.py", "m/constants.pkl", "m/data.pkl"), "TorchScript"),
        (_archive("m/archive_format", "m/models/model.json"), "torch.export archive"),
        (_archive("word/document.xml"), "not a file of PyTorch weights"),
    ],
)
def test_files_of_another_kind(content, says, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as e:
        load_model(path, "torch.nn:Identity")
    assert str(path) in str(e.value)


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_export_archive(name, tmp_path):
    """Needs trust; then its graph has the layers, and computes the scores, of the network itself."""
    net, path = build(name), tmp_path / "m.pt2"
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (images(2),), dynamic_shapes=batch), path)
    with pytest.raises(ModelError, match=r"torch\.export archive.*--trust-pickle"):
        load_model(path)
    ours, theirs = trace(load_model(path, trust_pickle=True), SHAPE), trace(net, SHAPE)
    assert [str(n.target) for n in weighted_nodes(ours)] == [str(n.target) for n in weighted_nodes(theirs)]
    assert [b.layers for b in split(ours)] == [b.layers for b in split(theirs)]
    assert torch.equal(ours(images(5)), theirs(images(5)))


def test_damaged_export_archive(tmp_path):
    (tmp_path / "m.pt2").write_bytes(_archive("m/archive_format", "m/models/model.json"))
    with pytest.raises(ModelError, match=r"m\.pt2 is not a torch\.export archive that this torch reads"):
        load_model(tmp_path / "m.pt2", trust_pickle=True)


@pytest.mark.parametrize("cut", [10, 400, -30])
def test_truncated_file(cut, weights, arch):
    path, _ = weights
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="damaged"):
        load_model(path, f"{arch}:Net")


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError, match="nothing is there"):
        load_model(tmp_path / "none.pt")
    with pytest.raises(ModelError, match="not a file"):
        load_model(tmp_path)


def test_weights_without_architecture(weights):
    with pytest.raises(ModelError, match=r"weights only; name the code .* --arch"):
        load_model(weights[0])


def test_weights_that_do_not_fit(weights, arch, tmp_path):
    with pytest.raises(ModelError, match=r"do not fit .*: 2 of another shape, first 'conv\.weight'"):
        load_model(weights[0], f"{arch}:Net(9)")
    torch.save({"other": torch.zeros(2)}, tmp_path / "o.pt")
    with pytest.raises(ModelError, match=r"2 missing, first 'conv\.weight'; 1 unexpected, first 'other'"):
        load_model(tmp_path / "o.pt", f"{arch}:Net")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "o.pt")
    with pytest.raises(ModelError, match="not a state dict"):
        load_model(tmp_path / "o.pt", f"{arch}:Net")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (":Nothing", "has no 'Nothing'"),
        (":broken", "no network today"),
        (":leaves", "failed: SystemExit: 0"),
        (":number", "not callable"),
        (":three", "not a torch.nn.Module"),
        (":Net(width=open)", "arguments must be literals"),
        (":Net(", "not understood"),
        ("", "not understood"),
    ],
)
def test_bad_architectures(what, says, arch):
    with pytest.raises(ModelError, match=says):
        build_arch(arch + what)


def test_missing_modules():
    with pytest.raises(ModelError, match="cannot be imported"):
        build_arch("no.such.package:Net")
    with pytest.raises(ModelError, match="is not a file"):
        build_arch("nowhere.py:Net")


class Viewed(nn.Module):
    """Its batch size is in its view, once it is exported for one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(x.shape[0], -1))


def test_an_archive_of_a_fixed_batch_says_so(tmp_path):
    torch.export.save(torch.export.export(Viewed().eval(), (images(1),)), tmp_path / "m.pt2")
    with pytest.raises(ModelError, match=r"exported for 1 images at a time.*Dim\('batch'\)"):
        trace(load_model(tmp_path / "m.pt2", trust_pickle=True), SHAPE)


def test_complex_weights(arch, tmp_path):
    state = {"conv.weight": torch.zeros(4, 3, 3, 3, dtype=torch.complex64), "conv.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"complex numbers, first 'conv\.weight'"):
        load_model(tmp_path / "m.pt", f"{arch}:Net")


def test_weights_without_the_counters_that_nothing_reads(tmp_path):
    """Old checkpoints, and what other programs wrote, have no `num_batches_tracked`."""
    model = build("residual")
    torch.save({k: v for k, v in model.state_dict().items() if "num_batches" not in k}, tmp_path / "old.pt")
    loaded = load_model(tmp_path / "old.pt", f"{Path(__file__).parent / 'zoo.py'}:Residual")
    assert torch.equal(loaded(images()), model(images()))
