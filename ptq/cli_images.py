"""The commands that work on images: `ptq synthesize` and `ptq similarity`."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ptq.artifact import MANIFEST, check_free, versions, whole_folder
from ptq.errors import PluginError, SpecError
from ptq.gallery import to_pixels, write_curve, write_pictures, write_sheet
from ptq.loading import load_model
from ptq.pictures import Fit, Pictures, open_pictures
from ptq.report import Section, print_sections
from ptq.run import checked_shape, normalization
from ptq.similarity import Similarity
from ptq.sources import data_similarity, synthesize
from ptq.terminal import plain_console, shown


def sized(data: str, args: argparse.Namespace) -> str:
    """The data source's text with what the options beside it say: `--count`, `--resize`, `--crop`."""
    wanted = {"count": getattr(args, "count", None)}
    if data.partition(":")[0] == "images":
        wanted |= {"resize": args.resize, "crop": args.crop}
    given = [f"{key}={v}" for key, v in wanted.items() if v is not None]
    return data + (("," if ":" in data else ":") + ",".join(given) if given else "")


def labelled(
    path: Path | None, args: argparse.Namespace, shape: Sequence[int], mean: float | Iterable[float] | None,
    std: float | Iterable[float] | None,
) -> Pictures | None:  # fmt: skip
    """The pictures at `path`, brought to the input's size as `--resize` and `--crop` say.

    Raises:
        CalibrationError: there are none.
    """
    if path is None:
        return None
    channels, height, width = checked_shape(shape)
    stated = normalization(mean, std, channels)
    return open_pictures(path, (channels, height, width), *stated, Fit(args.resize, args.crop))


def common(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that making images takes, from the command line."""
    if args.input_shape is None:
        raise SpecError("the input shape is missing; give --input-shape C,H,W, as in --input-shape 3,224,224")
    return {
        "input_shape": args.input_shape, "effort": args.effort, "mean": args.mean, "std": args.std, "seed": args.seed or 0,
        "device": args.device, "cache": args.cache,
    }  # fmt: skip


def run_synthesize(args: argparse.Namespace) -> int:
    """Writes images, pictures, contact sheet, loss curve and a manifest into one folder."""
    options = common(args)
    check_free(args.output, args.force)
    stated = normalization(args.mean, args.std, args.input_shape[0])
    model = load_model(args.model, args.arch, trust_pickle=args.trust_pickle)
    teachers = further(args)
    console = plain_console(stderr=True)
    with shown(args.quiet, console) as feedback:
        made = synthesize(model, sized(args.data or "auto", args), teachers=teachers, feedback=feedback, **options)
    pixels, beyond = to_pixels(made.images, *stated)
    clipped = max(made.clipped, beyond)
    with whole_folder(args.output, args.force) as folder:
        np.savez_compressed(folder / "images.npz", x=made.images.numpy())
        write_pictures(pixels, folder / "pictures")
        write_sheet(pixels, folder / "contact.png")
        plotted = write_curve(made.curve, folder) if made.curve else True
        whole = len(made.curve) == 0 or made.curve[0][0] == 1
        facts = {
            "source": made.source, "model": args.model.name, "seed": options["seed"], "images": len(made.images),
            "input_shape": list(args.input_shape), "mean": args.mean, "std": args.std, "clipped": clipped,
            "seconds": made.seconds, "notes": list(made.notes), "versions": versions(),
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(facts, indent=1))
    elif not args.quiet:
        console.print(f"{len(made.images)} images of {made.source} in {made.seconds:.1f} s, written to {args.output}")
        scaled = "" if args.mean else " (scaled alike to fit: no normalization was stated)"
        console.print(
            f"pictures: {100 * clipped:.2f} % of their values lay outside of valid pixels and were clipped{scaled}"
        )
        if not whole or (not made.curve and args.cache):
            console.print("the loss curve lacks what was found in the cache")
        if not plotted:
            console.print("no loss.png: matplotlib is not installed (extra 'plots'); loss.csv holds the curve")
    return 0


def further(args: argparse.Namespace) -> list[nn.Module]:
    """The networks of `--with` and `--with-arch`.

    Raises:
        SpecError: more architectures than files.
    """
    files, archs = args.with_models or [], args.with_arch or []
    if len(archs) > len(files):
        raise SpecError(
            f"{len(archs)} --with-arch given for {len(files)} --with; each belongs to the file at its place"
        )
    archs = [*archs, *[args.arch] * (len(files) - len(archs))]
    return [load_model(file, arch, trust_pickle=args.trust_pickle) for file, arch in zip(files, archs)]


def run_similarity(args: argparse.Namespace) -> int:
    """Prints J_KL of each image set, and relative to the reference's where one is given."""
    options = common(args)
    model = load_model(args.model, args.arch, trust_pickle=args.trust_pickle)
    found: dict[str, Similarity] = {}
    with shown(args.quiet or args.json, plain_console(stderr=True)) as feedback:
        texts: list[str] = [*([args.reference] if args.reference else []), *args.sets]
        for text in dict.fromkeys(texts):
            found[text] = data_similarity(model, _data(text, args), feedback=feedback, **options)
    reference = found[args.reference].mean if args.reference else None
    if args.json:
        rows = {
            name: {
                "j_kl": s.mean, "relative": None if reference is None else s.mean / reference, "images": s.images,
                "layers": dict(s.layers), "odd_layers": list(s.odd),
            }
            for name, s in found.items()
        }  # fmt: skip
        print(json.dumps(rows, indent=1))
    else:
        print_sections(plain_console(), _tables(found, reference, args.layers))
    return 0


def _data(text: str, args: argparse.Namespace) -> str:
    """An image set of the command line: a path as pictures, anything else as a data source."""
    if not Path(text).exists():
        kind = text.partition(":")[0]
        if "/" in kind or "." in kind:
            raise PluginError(f"{text} is neither a file, a folder nor a data source")
        return sized(text, args)
    if args.count:
        return sized(f"images:path={text}", args)
    number = len(open_pictures(Path(text), args.input_shape, None, None))
    return sized(f"images:path={text}", args) + f",count={number}"


def _tables(found: dict[str, Similarity], reference: float | None, layers: bool) -> list[Section]:
    heads = ["images", ">number", ">J_KL", *([">of reference"] if reference is not None else [])]
    rows = [
        [name, str(s.images), f"{s.mean:.4g}", *([f"{s.mean / reference:.2f}"] if reference is not None else [])]
        for name, s in found.items()
    ]
    sections = [Section("Data similarity: small looks like the training data", heads, rows)]
    if layers:
        names = list(next(iter(found.values())).layers)
        table = [[name, *(f"{s.layers[name]:.4g}" for s in found.values())] for name in names]
        sections.append(Section("Per layer", ["layer", *(f">{name}" for name in found)], table))
    odd = sorted({name for s in found.values() for name in s.odd})
    if odd:
        sections.append(
            Section(
                "Layers with channels that were constant in training: those are left out", ["layer"], [[n] for n in odd]
            )
        )
    return sections
