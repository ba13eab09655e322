"""Reads a float network from a file: weights and the code that builds the network they belong to."""

import ast
import importlib
import importlib.util
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq.errors import ModelError
from ptq.graph.aten import plain

# Where training scripts keep the weights in a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "ema", "model_ema")
_WRAPPED = ("module.", "_orig_mod.")  # DataParallel, torch.compile
_NO_ARCH = "name the code that builds the network with --arch package.module:factory, path/to/file.py:factory or torchvision:resnet18"


def load_model(path: str | Path, arch: str | None = None, *, trust_pickle: bool = False) -> nn.Module:
    """The float network in a file, in eval mode.

    Args:
        path: a state dict (`torch.save(model.state_dict(), …)` or `.safetensors`), a pickled module, or a torch.export archive
            (`.pt2`).
        arch: what builds the network for a state dict: "package.module:factory", "path/to/file.py:factory",
            "torchvision:resnet18"; arguments that are literals may follow, "nets.py:ResNet(20, classes=10)".
        trust_pickle: unpickle a whole module, or read an archive. Unpickling runs whatever code the file contains.

    Raises:
        ModelError: the file is missing, damaged or of another kind, or its weights do not fit the network.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} is not a file" + ("" if path.exists() else ": nothing is there"))
    if _is_exported(path):
        return _exported(path, trust_pickle)
    content = _unnested(_read(path, trust_pickle))
    if isinstance(content, nn.Module):
        return content.float().eval()
    state = _state_dict(path, content)
    if arch is None:
        raise ModelError(f"{path} holds weights only; {_NO_ARCH}")
    model = build_arch(arch)
    _fill(model, _fitting(state, model), path, arch)
    return model.float().eval()


def _is_exported(path: Path) -> bool:
    """Whether the file is a torch.export archive.

    Raises:
        ModelError: it is an archive of another kind.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {name.partition("/")[2] for name in archive.namelist()} | set(archive.namelist())
    except (zipfile.BadZipFile, OSError) as e:
        raise ModelError(f"{path} is a damaged archive: {e}") from e
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        raise ModelError(
            f"{path} is a TorchScript file, whose graph cannot be quantized here; give the network's state dict and --arch"
        )
    return any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in inside)


def _exported(path: Path, trust_pickle: bool) -> nn.Module:
    """The network in a torch.export archive."""
    if not trust_pickle:
        raise ModelError(
            f"{path} is a torch.export archive, and torch reads parts of it by unpickling, which runs code from the file; "
            "if you trust the file, pass --trust-pickle; or give the network's state dict and --arch"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plain(torch.export.load(path).module(check_guards=False)).float()
    except Exception as e:  # a damaged archive can fail anywhere in torch's reader
        raise ModelError(f"{path} is not a torch.export archive that this torch reads: {_line(e)}") from e


def _read(path: Path, trust_pickle: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        with warnings.catch_warnings():  # torch warns of pickles it then refuses; one line is enough
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if trust_pickle:
            return _unpickle(path)
        if (
            "Unsupported global" in str(e)
            or "Unsupported class" in str(e)
            or ("weights_only" in str(e).lower() and "GLOBAL" in str(e))
        ):
            raise ModelError(
                f"{path} is a pickled object, and unpickling runs code from the file; save the weights instead, "
                "torch.save(model.state_dict(), …), and pass --arch; or, if you trust the file, pass --trust-pickle"
            ) from e
        raise ModelError(f"{path} is not a file of PyTorch weights, or it is damaged") from e
    except Exception as e:  # a damaged file can fail anywhere in torch's reader
        raise ModelError(
            f"{path} is not a file of PyTorch weights, or it is damaged: {type(e).__name__}: {_line(e)}"
        ) from e


def _unpickle(path: Path) -> Any:
    try:
        with _importable(Path.cwd()):
            return torch.load(path, map_location="cpu", weights_only=False)
    except (Exception, SystemExit) as e:  # unpickling runs the file's own code, which may raise anything
        raise ModelError(
            f"{path} cannot be unpickled: {type(e).__name__}: {_line(e)}; is the code it was saved with importable?"
        ) from e


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Within it, modules in a folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]


def _unnested(content: Any) -> Any:
    """The weights, or the network, in a checkpoint that holds other things beside them."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping | nn.Module):
            return content[key]
    return content


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{path} holds {_kind(content)}, not a state dict (names → tensors)")
    return {str(name): v for name, v in content.items()}


def _fitting(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights by the network's own names: without what wrappers for training put before them, as far as that is none of it."""
    expected = model.state_dict().keys()
    if "n_averaged" in state and "n_averaged" not in expected:  # torch.optim.swa_utils.AveragedModel
        state = {name: v for name, v in state.items() if name != "n_averaged"}
    while state and not expected & state.keys():
        prefix = next((p for p in _WRAPPED if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): v for name, v in state.items()}
    return state


def _kind(content: Any) -> str:
    return f"a {type(content).__name__}" + (" that is empty" if isinstance(content, Mapping) and not content else "")


def build_arch(arch: str) -> nn.Module:
    """The network that "module:factory" or "file.py:factory(3)" builds, with its initial weights.

    Raises:
        ModelError: no such module or factory, or what it builds is no network.
    """
    where, colon, what = arch.partition(":")
    if arch[1:3] in (":\\", ":/"):  # a Windows drive
        where, colon, what = arch.rpartition(":")
    if not colon or not where or not what:
        raise ModelError(f"architecture {arch!r} not understood; {_NO_ARCH}")
    name, args, kwargs = _parse_call(arch, what)
    factory = _factory(where, name, arch)
    try:
        if where == "torchvision":
            kwargs.setdefault("weights", None)
        model = factory(*args, **kwargs)
    except (Exception, SystemExit) as e:  # the user's code may raise anything
        raise ModelError(f"{arch} failed: {type(e).__name__}: {_line(e)}") from e
    if not isinstance(model, nn.Module):
        raise ModelError(f"{arch} built {_kind(model)}, not a torch.nn.Module")
    return model


def fresh_model(arch: str, seed: int) -> nn.Module:
    """The network that `arch` builds, its initial weights drawn from `seed`; torch's global random state stays as it was.

    Raises:
        ModelError: as `build_arch`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_arch(arch)


def _parse_call(arch: str, what: str) -> tuple[str, list[Any], dict[str, Any]]:
    try:
        tree = ast.parse(what, mode="eval").body
        if isinstance(tree, ast.Call):
            args = [ast.literal_eval(a) for a in tree.args]
            return ast.unparse(tree.func), args, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError) as e:
        raise ModelError(f"architecture {arch!r} not understood: {_line(e)}; arguments must be literals") from e
    return what, [], {}


def _factory(where: str, name: str, arch: str) -> Callable[..., Any]:
    try:
        if where == "torchvision":
            module = importlib.import_module("torchvision.models")
        elif where.endswith(".py"):
            module = _import_file(Path(where))
        else:
            with _importable(Path.cwd()):
                module = importlib.import_module(where)
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except ModelError:
        raise
    except AttributeError as e:
        raise ModelError(f"{arch}: {where} has no {name!r}") from e
    except (Exception, SystemExit) as e:  # importing runs the user's code, which may raise anything
        raise ModelError(f"{arch}: {where} cannot be imported: {type(e).__name__}: {_line(e)}") from e
    if not callable(found):
        raise ModelError(f"{arch}: {name!r} is not callable")
    return found


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look modules up by name
    with _importable(path.absolute().parent):  # as where it is run as a script
        spec.loader.exec_module(module)
    return module


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path, arch: str) -> None:
    expected = model.state_dict()
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in expected and not k.endswith("num_batches_tracked")]
    shapes = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if missing or extra or shapes:
        parts = [
            f"{len(names)} {what}, first {names[0]!r}"
            for names, what in ((missing, "missing"), (extra, "unexpected"), (shapes, "of another shape"))
            if names
        ]
        raise ModelError(f"the weights in {path} do not fit {arch}: {'; '.join(parts)}")
    if odd := [k for k, v in expected.items() if k in state and state[k].is_complex() and not v.is_complex()]:
        raise ModelError(f"the weights in {path} are complex numbers, first {odd[0]!r}; real ones are needed")
    if odd := [k for k, v in state.items() if v.layout != torch.strided]:
        raise ModelError(f"the weights in {path} are sparse tensors, first {odd[0]!r}; dense ones are needed")
    model.load_state_dict({k: v for k, v in state.items() if k in expected}, strict=False)
