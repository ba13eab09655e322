"""Saved networks: whole or not at all, bit-equal when loaded, one line when damaged."""

import json
from dataclasses import replace

import pytest
import torch

import ptq
from ptq.artifact import check_written, whole_file, whole_folder, write_plan
from ptq.integrity import sealed
from tests.zoo import SHAPE, ZOO, build, images


@pytest.mark.parametrize("bits", ("w4a4", "w8a8", "w4"))
@pytest.mark.parametrize("name", sorted(ZOO))
def test_loaded_network_runs_bit_equal(name, bits, tmp_path):
    qm = ptq.quantize(build(name), bits, images()[:16], input_shape=SHAPE, rounding="nearest")
    qm.save(tmp_path / "out")
    again = ptq.load(tmp_path / "out")
    assert torch.equal(again.graph(images()), qm.graph(images()))
    assert (again.plan, again.manifest) == (qm.plan, qm.manifest)
    for path, (codes, q) in again.integer_weights().items():
        assert torch.equal(codes, qm.integer_weights()[path][0])
        assert q.spec.qmin <= int(codes.min()) and int(codes.max()) <= q.spec.qmax


@pytest.fixture
def saved(tmp_path):
    """A saved network and its folder."""
    qm = ptq.quantize(build("plain"), "w4a4", images()[:16], input_shape=SHAPE, rounding="nearest")
    qm.save(tmp_path / "out")
    return qm, tmp_path / "out"


def test_same_run_same_bytes(tmp_path):
    def write(name):
        qm = ptq.quantize(
            build("residual"), "w4a4", images()[:16], input_shape=SHAPE, rounding="genie_m:steps=5", seed=3
        )
        qm.save(tmp_path / name)
        return (tmp_path / name / "tensors.safetensors").read_bytes()

    assert write("a") == write("b")


def test_weights_are_integers_on_disk(saved):
    from safetensors.torch import load_file

    tensors = load_file(str(saved[1] / "tensors.safetensors"))
    kinds = {k: v.dtype for k, v in tensors.items()}
    assert all(kinds[f"{path}.parametrizations.weight.original"] == torch.int8 for path in saved[0].plan.weights)
    assert all(v == torch.int32 for k, v in kinds.items() if k.endswith("bias.original"))


def test_calibration_images_are_not_saved(saved):
    assert {p.name for p in saved[1].iterdir()} == {"manifest.json", "plan.json", "tensors.safetensors"}


def test_folders_are_not_overwritten_by_accident(saved, tmp_path):
    qm, folder = saved
    with pytest.raises(ptq.ArtifactError, match="exists"):
        qm.save(folder)
    qm.save(folder, overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ptq.ArtifactError, match="not written by this program"):
        qm.save(tmp_path / "precious", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ptq.ArtifactError, match="is a file"):
        qm.save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    qm.save(tmp_path / "empty")


def test_a_link_stays_a_link(saved, tmp_path):
    qm, _ = saved
    (tmp_path / "there").mkdir()
    for name, end in (("link", "there"), ("dangling", "not_yet"), ("again", "out")):
        (tmp_path / name).symlink_to(end)
        qm.save(tmp_path / name, overwrite=name == "again")
        assert (tmp_path / name).is_symlink() and (tmp_path / end / "manifest.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "dangling", "link", "not_yet", "out", "there"]


def test_whoever_reads_one_file_reads_all(saved):
    assert len({file.stat().st_mode for file in saved[1].iterdir()}) == 1


def test_what_python_exports_is_vouched_for(saved):
    qm, folder = saved
    ptq.export(qm, "onnx_qdq", folder / "model.onnx")
    assert check_written(folder, folder / "model.onnx")
    _flip(folder / "model.onnx")
    with pytest.raises(ptq.ArtifactError, match="is not the file"):
        check_written(folder, folder / "model.onnx")


def test_interrupted_writing_leaves_what_was_there(saved, tmp_path):
    before = (saved[1] / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt), whole_folder(saved[1], overwrite=True) as partial:
        (partial / "manifest.json").write_text("half")
        raise KeyboardInterrupt
    assert (saved[1] / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_appear_whole_or_not_at_all(saved, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "file", ptq.ArtifactError) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(ptq.ArtifactError, match="cannot be written"):
        write_plan(saved[0].plan, tmp_path / "file" / "plan.json")
    with pytest.raises(ptq.ExportError, match="cannot be written"):
        ptq.export(saved[0], "onnx_qdq", tmp_path / "file" / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]
    write_plan(saved[0].plan, tmp_path / "new" / "plan.json")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["plan.json"]


def _edit(folder, change, seal=True):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    files = [folder / name for name in data.pop("files")]
    path.write_text(json.dumps(sealed(data, files) if seal else data))


def _flip(path):
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "not a manifest"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: _edit(f, lambda d: d["manifest"].update(schema=99)), "schema 99"),
        (lambda f: _edit(f, lambda d: d.pop("plan")), "does not hold a network"),
        (lambda f: _edit(f, lambda d: d["manifest"].update(input_shape="abc")), "three numbers"),
        (lambda f: _edit(f, lambda d: d["manifest"].update(recipe=None)), "three numbers"),
        (lambda f: _edit(f, lambda d: next(iter(d["plan"]["weights"].values())).update(bits=4.5)), "a whole number"),
        (lambda f: _edit(f, lambda d: d["graph"][1].update(op="no_such_op")), "does not hold a network"),
        (lambda f: _edit(f, lambda d: d["graph"].pop(2)), "does not hold a network"),
        (lambda f: (f / "tensors.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "tensors.safetensors").write_bytes(b"\x00" * 40), "is not the file that was written"),
        (lambda f: _flip(f / "tensors.safetensors"), "is not the file that was written"),
        (
            lambda f: _edit(f, lambda d: d["graph"][1]["fields"].update(stride=[2, 2]), seal=False),
            "was changed or damaged",
        ),
        (lambda f: _edit(f, lambda d: d["plan"].clear(), seal=False), "was changed or damaged"),
    ],
)
def test_damaged_artifacts_get_one_line(damage, says, saved):
    damage(saved[1])
    with pytest.raises(ptq.ArtifactError, match=says) as e:
        ptq.load(saved[1])
    assert "\n" not in str(e.value)


def test_a_file_with_a_seal_of_its_own_that_holds_no_tensors(saved):
    (saved[1] / "tensors.safetensors").write_bytes(b"\x00" * 40)
    _edit(saved[1], lambda d: None)
    with pytest.raises(ptq.ArtifactError, match="cannot be read"):
        ptq.load(saved[1])


def test_an_artifact_without_checksums_is_read(saved):
    _edit(saved[1], lambda d: [d.pop("sha256")], seal=False)
    path = saved[1] / "manifest.json"
    assert "files" not in json.loads(path.read_text())
    assert torch.equal(ptq.load(saved[1]).graph(images()), saved[0].graph(images()))


def test_files_that_nothing_vouches_for(saved):
    (saved[1] / "other.onnx").write_bytes(b"anything")
    assert not check_written(saved[1], saved[1] / "other.onnx")
    (saved[1] / "other.proof.json").write_text("[]")
    with pytest.raises(ptq.ArtifactError, match="cannot be read"):
        check_written(saved[1], saved[1] / "other.onnx")


def test_a_folder_is_known_whatever_the_path_to_it(saved, tmp_path, monkeypatch):
    """No missing folder on the way hides what there is."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    for path in ("missing/../precious", "missing/.."):
        with pytest.raises(ptq.ArtifactError, match="exists"):
            saved[0].save(path)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_what_comes_meanwhile_stays(tmp_path):
    """A folder that takes the name while the work is done: it stays, and so does the work."""
    with pytest.raises(ptq.ArtifactError, match=r"The result is in .*out-2"), whole_folder(tmp_path / "out") as partial:
        (partial / "result").write_text("hours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*") if p.is_file()) == ["out/thesis.txt"]
    assert (tmp_path / "out-2" / "result").read_text() == "hours"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-2"]


def test_names_of_files_need_not_be_text(saved, tmp_path):
    qm = replace(saved[0], manifest=replace(saved[0].manifest, source="model\udcff.pt"))
    qm.save(tmp_path / "named")
    assert ptq.QuantizedModel.load(tmp_path / "named").manifest.source == "model?.pt"
