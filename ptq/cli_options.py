"""The options of the command line, each with its unit and default."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptq.contracts import EFFORTS
from ptq.quant.ranges import RANGES
from ptq.spec import ACTIVATIONS, EDGES, PLACEMENTS, PRECISIONS, SCALES, TIES, WEIGHTS

Command = Callable[[argparse.Namespace], int]


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of `ptq`; `commands` maps each subcommand to the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="ptq", description="Quantizes trained float networks to integers, without data.",
    )  # fmt: skip
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, build, text in (
        ("quantize", _quantize_options, "a trained float network → a verified integer network"),
        (
            "distill",
            _distill_options,
            "train a quantized network, or another architecture, to give what its teacher gives",
        ),
        ("inspect", _inspect_options, "print what would be quantized, and how, without doing it"),
        ("export", _export_options, "write a quantized network for a target, and verify the file"),
        ("synthesize", _synthesize_options, "make calibration images from a network, and look at them"),
        ("similarity", _similarity_options, "how much images look like the training data, to a network"),
        ("eval", _eval_options, "accuracy of a quantized network and of its ONNX file, side by side"),
        (
            "sensitivity",
            _sensitivity_options,
            "what each bit width costs, layer by layer, and plans that meet a budget",
        ),
        ("list", _list_options, "the data sources, rounding methods and targets there are"),
        ("demo", _demo_options, "train a small network on handwritten digits and quantize it"),
    ):
        sub = subparsers.add_parser(name, help=text, description=text)
        build(sub)
        sub.set_defaults(run=commands[name])
        sub.add_argument("--debug", action="store_true", help="show tracebacks and log messages")
    return parser


def _numbers(kind: type) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas") from e

    return parse


def _network_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "model",
        type=Path,
        help="state dict (.pt, .pth, .safetensors); a pickled module or a .pt2 archive with --trust-pickle",
    )
    p.add_argument(
        "--input-shape", type=_numbers(int), metavar="C,H,W", help="channels, height and width in pixels (required)"
    )
    p.add_argument(
        "--arch",
        help="what builds the network: package.module:factory, path/to/file.py:factory, torchvision:resnet18; "
        "literal arguments may follow, file.py:Net(20)",
    )
    p.add_argument("--trust-pickle", action="store_true", help="unpickle a whole module; this runs code from the file")


def _normalization_options(p: argparse.ArgumentParser, default: str = "") -> None:
    p.add_argument(
        "--mean", type=_numbers(float), metavar="M,M,M",
        help="normalization of the inputs, (pixel/255 - mean)/std, per channel" + default,
    )  # fmt: skip
    p.add_argument("--std", type=_numbers(float), metavar="S,S,S", help="see --mean")
    p.add_argument("--resize", type=int, metavar="PIXELS", help="pictures: shorter side; default: as the input needs")
    p.add_argument("--crop", type=int, metavar="PIXELS", help="pictures: side of the square cut from their middle")


def _image_options(p: argparse.ArgumentParser) -> None:
    """Of all commands that make or read calibration images."""
    p.add_argument(
        "--effort",
        choices=EFFORTS,
        default="standard",
        help="images and steps: quick (minutes), standard, full (the papers' numbers); default standard",
    )
    _normalization_options(p)
    p.add_argument("--seed", type=int, help="of every random choice; default 0")
    p.add_argument("--device", default="cpu", help="where the work is done: cpu, cuda, cuda:1; default cpu")
    p.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="keep finished batches and blocks there: a run goes on where it stopped, and none is made again",
    )


def _report_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--report-on", type=Path, metavar="LABELLED",
        help="labelled pictures on which accuracy is told after every epoch of distillation; nothing is ever chosen by them",
    )  # fmt: skip


def _teacher_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--data",
        help="calibration images: auto, genie, gaussian, images:PATH, see ptq list; options follow a colon, "
        "genie:steps=500,count=256; default auto",
    )
    p.add_argument(
        "--with", dest="with_models", action="append", type=Path, metavar="MODEL",
        help="a further network that takes the same inputs: images are made to suit both; may be repeated",
    )  # fmt: skip
    p.add_argument("--with-arch", action="append", metavar="ARCH", help="what builds it; default: as --arch")


def _grid_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="grids of weights; auto: asymmetric below 5 bits, symmetric above; default auto",
    )
    p.add_argument(
        "--activations", choices=ACTIVATIONS,
        help="unsigned codes with a zero point where needed, or signed codes symmetric about 0; default unsigned",
    )  # fmt: skip
    p.add_argument(
        "--scales", choices=SCALES, help="free, or power_of_two, so that hardware rescales by shifts; default free"
    )


def _model_options(p: argparse.ArgumentParser) -> None:
    _network_options(p)
    p.add_argument(
        "--bits",
        help="w<weights>a<activations>, 2 to 8 bits each; w4 leaves activations float; auto:size=1.2MB,a4 or auto:bops=2.5G: "
        "the widths of single layers that meet a budget (quantize only); default w8a8",
    )
    p.add_argument(
        "--edges",
        choices=EDGES,
        help="first and last layer: brecq, qdrop keep 8 bits there, all does not; default brecq",
    )
    p.add_argument("--adds", type=int, metavar="BITS", help="bits of tensors that enter no weighted layer; default 8")
    _grid_options(p)
    p.add_argument(
        "--placement", choices=("auto", *PLACEMENTS),
        help="which tensors have codes: everywhere, or only what enters convolutions and linear layers and one of two addends, "
        "inputs; default auto: as the target wants it",
    )  # fmt: skip
    p.add_argument(
        "--ties", choices=("auto", *TIES),
        help="which values share a grid: those that are only moved or concatenated, moves, or average pools and bilinear resizing "
        "too, pools; default auto: as the target wants it",
    )  # fmt: skip
    p.add_argument(
        "--set", dest="layers", action="append", metavar="LAYER=BITS",
        help="widths of the layers that match, 'layer3.*=w8a8', fc=w8, conv1=a8; may be repeated, the last match counts",
    )  # fmt: skip
    p.add_argument(
        "--skip", dest="layers", action="append", metavar="LAYER", type=lambda name: f"{name}=float",
        help="layers that stay float; * and ? as in file names; may be repeated",
    )  # fmt: skip
    p.add_argument(
        "--plan", type=Path, metavar="FILE", help="every width from the plan.json of an earlier run, in place of --bits"
    )


def _closing_options(p: argparse.ArgumentParser) -> None:
    """Of commands that write a folder."""
    p.add_argument("--force", action="store_true", help="overwrite an output folder of an earlier run")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    p.add_argument("--json", action="store_true", help="print the closing figures as JSON on standard output")


def _quantize_options(p: argparse.ArgumentParser) -> None:
    _model_options(p)
    p.add_argument("-o", "--output", type=Path, required=True, help="folder to write; appears whole or not at all")
    _teacher_options(p)
    _image_options(p)
    p.add_argument(
        "--repair",
        help="equalize (channels of neighbouring layers), bias or analytic_bias (the mean that rounding cost), statistics (its "
        "deviation too), joined by +; default none",
    )
    p.add_argument(
        "--finish", help="a joint pass over all layers after rounding, logits:steps=300; none for none; default none"
    )
    p.add_argument(
        "--distill", nargs="?", const="", metavar="OPTIONS",
        help="train the quantized network afterwards, the float one as its teacher; options as in epochs=20,steps=100; none for "
        "none; default none",
    )  # fmt: skip
    _report_option(p)
    p.add_argument(
        "--cache-memory", type=float, metavar="GB",
        help="host memory for what blocks see, the rest goes to disk; default: a quarter of what is free",
    )  # fmt: skip
    p.add_argument(
        "--precision", choices=PRECISIONS,
        help="in which rounding is trained: float32, bfloat16 for blocks whose weights have at most 4 bits, or auto, the latter on "
        "CPUs with AMX; default auto",
    )  # fmt: skip
    p.add_argument(
        "--rounding", help="genie_m, qdrop, brecq, adaround or nearest, with options likewise; default genie_m"
    )
    p.add_argument(
        "--ranges",
        help=f"how scales are chosen: {', '.join(RANGES)}; percentile:99.9 and lp:2 say more; default lp_best",
    )
    p.add_argument(
        "--target",
        help="ort, openvino, tensorrt, qnn, tflite, stm32, pot, native, or another exporter of ptq list; none writes no file for a "
        "runtime; default onnx_qdq, which is ort",
    )
    p.add_argument(
        "--val", type=Path, help="labelled pictures for top-1: folder or .npz (x, y); never used to choose anything"
    )
    p.add_argument(
        "--recipe",
        type=Path,
        metavar="MANIFEST",
        help="take every option not given here from an earlier run's manifest.json, but for --arch and --device",
    )
    _closing_options(p)


def _distill_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", nargs="?", type=Path, help="what 'ptq quantize -o' wrote: its network is trained further")
    p.add_argument(
        "--teacher", type=Path, metavar="MODEL", help="the trained float network; default: the one the folder was made from"
    )  # fmt: skip
    p.add_argument("--arch", help="what builds the teacher, as for quantize")
    p.add_argument("--student", type=Path, metavar="MODEL", help="weights the student starts from; default: fresh ones")
    p.add_argument("--student-arch", metavar="ARCH", help="what builds the student; default: as --arch")
    p.add_argument("--trust-pickle", action="store_true", help="unpickle whole modules; this runs code from the files")
    p.add_argument("--input-shape", type=_numbers(int), metavar="C,H,W", help="of both networks; not for a folder")
    p.add_argument("-o", "--output", type=Path, help="folder to write; default: the folder's name and -distilled")
    _teacher_options(p)
    _image_options(p)
    p.add_argument("-n", "--count", type=int, metavar="IMAGES", help="of a source that makes a fixed set")
    p.add_argument(
        "--training", default="", metavar="OPTIONS", help="loss=kl,lr=0.1,mix=1 and the like; default: as the paper of the data says"
    )  # fmt: skip
    p.add_argument("--epochs", type=int, help="default: as the effort says")
    p.add_argument("--steps", type=int, help="optimizer steps an epoch; default: as the effort says")
    p.add_argument("--batch", type=int, metavar="IMAGES", help="images a step; default: the paper's")
    p.add_argument(
        "--restore", metavar="DATA", help="after training under the batch's statistics: images to estimate the student's own on; "
        "default bn_stats:count=320",
    )  # fmt: skip
    _report_option(p)
    p.add_argument(
        "--then", metavar="BITS", help="quantize the student of another architecture too, in the same run: w4a4"
    )
    p.add_argument("--rounding", help="of --then, as for quantize; default genie_m")
    p.add_argument("--target", help="as for quantize; default, of a folder, its own, else onnx_qdq, which is ort")
    _closing_options(p)


def _inspect_options(p: argparse.ArgumentParser) -> None:
    _model_options(p)
    p.add_argument("--target", help="as for quantize: the plan is made for it, and what it cannot do is said")


def _export_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, help="what 'ptq quantize -o' wrote")
    p.add_argument(
        "--target", default="onnx_qdq", help="ort, openvino, tensorrt, qnn, tflite, stm32, pot, native, or an exporter of ptq list; "
        "default onnx_qdq, which is ort",
    )  # fmt: skip
    p.add_argument(
        "--vectors", type=int, metavar="IMAGES",
        help="write golden vectors too: what every layer reads, accumulates and yields on so many images, as integers",
    )  # fmt: skip
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file to write; default: model.onnx in the folder or, where that is there, model.TARGET.onnx",
    )


def _eval_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, help="what 'ptq quantize -o' wrote")
    p.add_argument("--val", type=Path, required=True, help="labelled pictures: folder or .npz (x, y)")
    _normalization_options(p, "; default: as stated at quantize")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")


def _synthesize_options(p: argparse.ArgumentParser) -> None:
    _network_options(p)
    p.add_argument("-o", "--output", type=Path, required=True, help="folder to write; appears whole or not at all")
    p.add_argument("-n", "--count", type=int, metavar="IMAGES", help="how many; default: as the effort says")
    _teacher_options(p)
    _image_options(p)
    _closing_options(p)


def _similarity_options(p: argparse.ArgumentParser) -> None:
    _network_options(p)
    p.add_argument(
        "sets", nargs="+", metavar="IMAGES", help="a folder, an .npz or .npy, or a data source, genie:steps=500"
    )
    p.add_argument("--reference", metavar="IMAGES", help="a set whose figure counts as 1, such as training pictures")
    p.add_argument("-n", "--count", type=int, metavar="IMAGES", help="of each set; default: all, or as the effort says")
    p.add_argument("--layers", action="store_true", help="print the figure of every layer too")
    _image_options(p)
    p.add_argument("--quiet", action="store_true", help="show no progress")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")


def _sensitivity_options(p: argparse.ArgumentParser) -> None:
    _network_options(p)
    _teacher_options(p)
    _image_options(p)
    p.add_argument("--widths", type=_numbers(int), default=(2, 3, 4, 6, 8), metavar="B,B,…", help="default 2,3,4,6,8")
    p.add_argument("-n", "--count", type=int, metavar="IMAGES", help="how many; default 256")
    p.add_argument("--ranges", default="lp", help="how scales are chosen, as for quantize; default lp")
    p.add_argument("--edges", choices=EDGES, default="brecq", help="as for quantize, of the plan; default brecq")
    _grid_options(p)
    p.set_defaults(weights="auto", activations="unsigned", scales="free")
    p.add_argument("--target", help="as for quantize: what the plan is to suit; default: any")
    p.add_argument(
        "--bits", help="auto:size=1.2MB,a4 or auto:bops=2.5G: also the plan that meets this budget, written to --output"
    )
    p.add_argument("-o", "--output", type=Path, metavar="FILE", help="plan.json to write, for 'ptq quantize --plan'")
    p.add_argument("--force", action="store_true", help="overwrite that file")
    p.add_argument("--quiet", action="store_true", help="show no progress")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")


def _list_options(p: argparse.ArgumentParser) -> None:
    """Takes no options of its own."""


def _demo_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, nargs="?", default=Path("demo"), help="folder to work in; default demo")
