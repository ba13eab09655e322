"""Pictures from folders and arrays, with and without labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ptq.errors import CalibrationError
from ptq.pictures import open_pictures

SHAPE = (3, 8, 8)
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])


def _pixels(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def _expected(pixels: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


def test_npz_of_pixels_and_labels(tmp_path):
    np.savez(tmp_path / "p.npz", x=_pixels(), y=np.arange(5))
    pictures = open_pictures(tmp_path / "p.npz", SHAPE, MEAN, STD)
    parts = list(pictures.batches(2))
    assert [len(x) for x, _ in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([x for x, _ in parts]), _expected(_pixels()))
    assert torch.equal(torch.cat([y for _, y in parts]), torch.arange(5))


def test_float_arrays_are_taken_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    np.save(tmp_path / "p.npy", x)
    pictures = open_pictures(tmp_path / "p.npy", SHAPE, None, None)
    assert torch.equal(pictures.read(torch.arange(3)), torch.from_numpy(x)) and pictures.labels is None


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_folder_with_a_class_per_sub_folder(tmp_path):
    for k, name in enumerate(("dog/a.png", "cat/b.png", "dog/c.png")):
        _write(tmp_path / name, _pixels()[k])
    pictures = open_pictures(tmp_path, SHAPE, MEAN, STD)
    assert pictures.labels.tolist() == [0, 1, 1]  # cat, dog, dog
    assert torch.equal(pictures.read(torch.tensor([0])), _expected(_pixels()[1:2]))


def test_class_numbers_in_file_names(tmp_path):
    for name in ("0007_x.png", "0002_y.png"):
        _write(tmp_path / name, _pixels()[0])
    assert open_pictures(tmp_path, SHAPE, MEAN, STD).labels.tolist() == [2, 7]
    _write(tmp_path / "nameless.png", _pixels()[0])
    assert open_pictures(tmp_path, SHAPE, MEAN, STD).labels is None


def test_pictures_of_another_size_are_resized_and_cropped(tmp_path):
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255  # the middle third is white: all that is left after the crop
    _write(tmp_path / "wide.png", wide)
    x = open_pictures(tmp_path, SHAPE, torch.zeros(3), torch.ones(3)).read(torch.tensor([0]))
    assert tuple(x.shape) == (1, *SHAPE) and float(x[..., 1:-1].min()) == 1.0


def test_bad_inputs_say_what_is_wrong(tmp_path):
    def fails(path: Path, says: str, mean=MEAN) -> None:
        with pytest.raises(CalibrationError, match=says):
            open_pictures(path, SHAPE, mean, STD).read(torch.tensor([0]))

    fails(tmp_path / "none", "neither a folder nor a file")
    fails(tmp_path, "no pictures")
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    fails(tmp_path / "a.npz", "not a readable")
    np.savez(tmp_path / "b.npz", images=_pixels())
    fails(tmp_path / "b.npz", "no array 'x'; it has images")
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    fails(tmp_path / "c.npy", "not a readable")
    np.savez(tmp_path / "d.npz", x=_pixels(), y=np.arange(3))
    fails(tmp_path / "d.npz", "5 pictures and labels")
    np.savez(tmp_path / "e.npz", x=_pixels())
    fails(tmp_path / "e.npz", "--mean and --std", mean=None)
    np.save(tmp_path / "f.npy", np.zeros((2, 3, 9, 9), dtype=np.float32))
    fails(tmp_path / "f.npy", r"shape \(3, 9, 9\)")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "x.png").write_bytes(b"no picture")
    fails(tmp_path / "g", "cannot be read as a picture")


def test_grey_of_16_bits(tmp_path):
    """Scaled, not cut off: 65535 is white and 257 is the darkest grey of 8 bits."""
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 257
    Image.fromarray(ramp).save(tmp_path / "0.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "1.tif")
    pictures = open_pictures(tmp_path, SHAPE, torch.zeros(3), torch.ones(3))
    shown = (255 * pictures.read(torch.tensor([0]))).round().int()
    assert torch.equal(shown[0, 0], torch.arange(64, dtype=torch.int32).view(8, 8))
    with pytest.raises(CalibrationError, match="32 bits"):
        pictures.read(torch.tensor([1]))


def test_folders_of_classes_keep_their_numbers(tmp_path):
    """One without pictures counts; hidden ones, as notebooks leave them, do not."""
    for name in ("cat", "dog", "eel", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    for name in ("cat", "eel", ".ipynb_checkpoints"):
        Image.fromarray(_pixels(1)[0]).save(tmp_path / name / "0.png")
    pictures = open_pictures(tmp_path, SHAPE, MEAN, STD)
    assert pictures.labels is not None and pictures.labels.tolist() == [0, 2]


def test_folders_named_by_numbers_are_these_classes(tmp_path):
    for name in ("0", "2", "10"):
        (tmp_path / name).mkdir()
        Image.fromarray(_pixels(1)[0]).save(tmp_path / name / "picture.png")
    pictures = open_pictures(tmp_path, SHAPE, MEAN, STD)
    assert pictures.labels is not None and sorted(pictures.labels.tolist()) == [0, 2, 10]


def test_names_that_tell_the_time_are_no_classes(tmp_path):
    Image.fromarray(_pixels(1)[0]).save(tmp_path / "20261122033000123456.png")
    pictures = open_pictures(tmp_path, SHAPE, MEAN, STD)
    assert len(pictures) == 1 and pictures.labels is None


@pytest.mark.parametrize("name", ["p.npz", "p.npy"])
def test_damaged_arrays_get_one_line(name: str, tmp_path):
    path, rng = tmp_path / name, np.random.default_rng(0)
    (np.savez_compressed if name.endswith("z") else np.save)(path, _pixels())
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(rng.integers(min(len(whole), 300)))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            open_pictures(path, SHAPE, MEAN, STD)
        except CalibrationError as e:
            assert str(path) in str(e)
            refused += 1
    assert refused > 20
