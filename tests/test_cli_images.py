"""`ptq synthesize` and `ptq similarity`, and what `ptq quantize` takes from them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ptq
from ptq.cli import main
from ptq.gallery import to_pixels, write_sheet
from tests.zoo import build

ARCH = f"{Path(__file__).parent / 'zoo.py'}:Residual"
BASE = ("model.pt", "--arch", ARCH, "--input-shape", "3,16,16")
STATED = ("--mean", "0.5", "--std", "0.25")
SOURCE = ("--data", "genie:steps=3,batch_size=4")


def synthesize(*extra: str, out: str = "images") -> int:
    return main(["synthesize", *BASE, *SOURCE, "-n", "6", "-o", out, *extra])


def test_synthesize_writes_images_pictures_sheet_and_curve(work, capsys):
    assert synthesize(*STATED) == 0
    folder = Path("images")
    names = {p.name for p in folder.iterdir()}
    assert {"images.npz", "pictures", "contact.png", "loss.csv", "manifest.json"} <= names
    x = np.load(folder / "images.npz")["x"]
    assert x.shape == (6, 3, 16, 16) and x.dtype == np.float32 and np.isfinite(x).all()
    pictures = sorted((folder / "pictures").iterdir())
    assert [p.name for p in pictures] == [f"{k:05}.png" for k in range(6)]
    # The pictures are the images: the same pixels, to half a step of rounding.
    pixels = np.load(folder / "images.npz")["x"]
    for k, picture in enumerate(pictures):
        with Image.open(picture) as opened:
            pixels[k] = np.asarray(opened).transpose(2, 0, 1)
    assert np.abs(pixels / 255 - (x * 0.25 + 0.5)).max() <= 0.5 / 255 + 1e-6
    with (folder / "loss.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "loss"] and [int(r[0]) for r in rows[1:]] == list(range(1, 7))
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["images"] == 6 and facts["source"].startswith("genie:") and 0 <= facts["clipped"] < 1
    assert "6 images" in capsys.readouterr().err


def test_same_seed_same_bytes_and_images_serve_as_data(work):
    assert synthesize("--quiet", out="a") == synthesize("--quiet", out="b") == 0
    assert synthesize("--quiet", "--seed", "1", out="c") == 0
    a, b, c = (np.load(f"{name}/images.npz")["x"] for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    command = ["quantize", *BASE, "--rounding", "nearest", "--ranges", "lp", "--quiet", "--bits", "w8a8"]
    assert main([*command, "--data", "images:a/images.npz", "-o", "from_file"]) == 0
    assert main([*command, "--data", "genie:steps=3,batch_size=4,count=6", "-o", "at_once"]) == 0
    ranges = [ptq.load(name).manifest.ranges for name in ("from_file", "at_once")]
    # But for the input's own grid: of synthetic images, the extremes say little.
    inside = [{k: v for k, v in r.items() if k != "x"} for r in ranges]
    assert inside[0] == inside[1]


def test_without_normalization_pictures_are_scaled_and_it_says_so(work, capsys):
    assert synthesize() == 0
    assert "no normalization was stated" in capsys.readouterr().err.replace("\n", " ")
    assert len(list(Path("images/pictures").iterdir())) == 6


def test_cache_and_force(work, capsys):
    assert synthesize("--quiet", "--cache", "kept") == 0
    assert len(list(Path("kept").rglob("*.pt"))) == 2
    assert synthesize("--quiet", "--cache", "kept") == 2
    assert "--force" in capsys.readouterr().err
    assert synthesize("--quiet", "--cache", "kept", "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert not Path("images/loss.csv").exists()  # nothing was made again


def test_further_networks(work, capsys):
    torch.save(build("residual").state_dict(), "other.pt")
    assert synthesize("--quiet", "--with", "other.pt", "--with-arch", ARCH) == 0
    assert (
        main(["quantize", *BASE, *SOURCE, "--rounding", "nearest", "--quiet", "--with", "other.pt", "-o", "out"]) == 0
    )
    assert ptq.load("out").manifest.recipe["further_teachers"] == 1
    distill = ["distill", "out", "--arch", ARCH, "--epochs", "1", "--steps", "2", "--batch", "4", "--quiet"]
    capsys.readouterr()
    assert main(distill) == 2 and "--with" in capsys.readouterr().err
    assert main([*distill, "--with", "other.pt"]) == 0


def test_similarity_table_and_json(work, capsys):
    Path("pictures").mkdir()
    for k in range(4):
        Image.fromarray(np.full((16, 16, 3), 60 * k, np.uint8)).save(f"pictures/{k}.png")
    assert main(["similarity", *BASE, *STATED, "val.npz", "pictures", "gaussian:count=32", "--layers", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("val.npz", "pictures", "gaussian", "layers.0.bn1", "input"))
    given = ["val.npz", "gaussian:count=32", "--reference", "val.npz", "--json"]
    assert main(["similarity", *BASE, *STATED, *given]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["val.npz"]["relative"] == 1 and rows["val.npz"]["images"] == 20
    # The net's statistics are those of normal noise.
    assert rows["gaussian:count=32"]["relative"] < 0.5 and "input" in rows["val.npz"]["layers"]


def test_resize_and_crop(work):
    rng = np.random.default_rng(0)
    Path("large").mkdir()
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(f"large/{k}_x.png")
    command = [
        "quantize",
        *BASE,
        *STATED,
        "--data",
        "images:large",
        "--rounding",
        "nearest",
        "--quiet",
        "--bits",
        "w8a8",
    ]
    assert main([*command, "-o", "plain"]) == 0
    assert main([*command, "--resize", "20", "--crop", "16", "-o", "cropped", "--val", "large"]) == 0
    assert "resize=20,crop=16" in ptq.load("cropped").manifest.recipe["data"]
    assert ptq.load("cropped").manifest.ranges != ptq.load("plain").manifest.ranges


@pytest.mark.parametrize(
    ("says", "args"),
    [
        ("neither a file", ("similarity", *BASE, *STATED, "nowhere/pictures")),
        ("unknown calibrator 'geni'", ("similarity", *BASE, *STATED, "geni")),
        ("--mean and --std", ("similarity", *BASE, "val.npz")),
        ("did you mean 'genie'", ("synthesize", *BASE, "--data", "geni", "-o", "out")),
        ("--input-shape", ("synthesize", "model.pt", "--arch", ARCH, "-o", "out")),
        ("--with-arch", ("synthesize", *BASE, "--with-arch", ARCH, "-o", "out")),
        ("not a file", ("synthesize", *BASE, "--with", "nothing.pt", "-o", "out")),
        ("at least 1", ("synthesize", *BASE, "--data", "zeroq", "-n", "0", "-o", "out")),
        ("one of running, batch", ("synthesize", *BASE, "--data", "gaussian:teacher_bn=both", "-o", "out")),
        ("crop 40 is larger", ("similarity", *BASE, *STATED, "val.npz", "--resize", "20", "--crop", "40")),
        ("crop 40 is larger", ("similarity", *BASE, *STATED, "val.npz", "--crop", "40")),
    ],
)
def test_errors_are_one_line_and_leave_nothing(work, capsys, says: str, args: tuple[str, ...]):
    before = sorted(p.name for p in Path().iterdir())
    assert main([*args, "--quiet"]) == 2
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], shown.err
    assert shown.out == "" and sorted(p.name for p in Path().iterdir()) == before


def test_list_says_needs_cost_and_paper(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("needs", "cost", "paper", "vae_replay", "classes", "nothing", "4000"))


def test_pixels_are_honest_about_clipping():
    images = torch.tensor([0.0, 0.5, 1.0, 1.5]).view(4, 1, 1, 1)
    pixels, clipped = to_pixels(images, torch.zeros(1), torch.ones(1))
    assert pixels.reshape(-1).tolist() == [0, 128, 255, 255] and clipped == 0.25


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (7, 3), (150, 3), (5, 4)])
def test_contact_sheet(tmp_path: Path, count: int, channels: int):
    write_sheet(np.zeros((count, 8, 8, channels), np.uint8), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        width, height = sheet.size
    shown = min(count, 100)
    across = int(np.ceil(np.sqrt(shown)))
    assert width == across * (8 * 4 + 2) and height == -(-shown // across) * (8 * 4 + 2)
