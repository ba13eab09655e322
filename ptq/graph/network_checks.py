"""What a network must be before it is traced, so that it is refused for what it is and not for what goes wrong later."""

import copy
import keyword
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from ptq.errors import ModelError
from ptq.graph.aten import is_exported, plain
from ptq.graph.ops import BATCH_NORMS
from ptq.graph.source_line import first_line

_FX_OWN = ("graph", "meta", "code")  # attributes of a GraphModule, which modules of the network become too


def own_copy(model: Any) -> nn.Module:
    """A copy of a network in eval mode and float32, frozen; what wraps it for training is taken off.

    Raises:
        ModelError: it is none, or cannot be copied or held by a graph, or its weights are not there or no numbers.
    """
    model = _unwrapped(model)
    _refuse_kind(model)
    try:
        original = copy.deepcopy(model).float().eval().requires_grad_(False)
    except Exception as e:  # whatever a module holds may refuse to be copied, or the old weight_norm
        raise ModelError(
            f"the network cannot be copied: {first_line(e)}; remove what it holds beside weights (weight_norm with "
            "remove_weight_norm; locks, open files, generators)"
        ) from e
    _bake(original)
    _refuse_hooks(original)
    _refuse_broken_weights(original)
    return original


def _unwrapped(model: Any) -> Any:
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module(check_guards=False)
    if is_exported(model):
        model = plain(model)
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = inner
        else:
            return model


def _refuse_kind(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a {type(model).__name__} given as the network; a torch.nn.Module is needed, built and with its weights"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the network is TorchScript, which has no Python to trace; give the module that it was made from"
        )
    for path, module in model.named_modules():
        if path in _FX_OWN:
            raise ModelError(f"module {path} has a name that a graph of torch.fx has for itself; rename it")
        if any(map(keyword.iskeyword, path.split("."))):
            raise ModelError(f"module {path} is named by a word of Python's own, which a graph cannot hold; rename it")
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = f"{path}.{name}".lstrip(".")
            if nn.parameter.is_lazy(tensor):
                raise ModelError(f"{full} has no shape yet; run the network once on an image")
            if tensor.is_meta:
                raise ModelError(f"{full} is on the meta device and has no values; load the weights first")


def _bake(model: nn.Module) -> None:
    """Puts the tensor that a parametrization yields, as weight_norm's and spectral_norm's, in the place of what it yields it from.

    Raises:
        ModelError: it does not yield one.
    """
    for path, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        try:
            with torch.no_grad():
                found = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
        except Exception as e:  # whatever a user's parametrization raises
            raise ModelError(
                f"the parametrization of {path or 'the network itself'} cannot be baked in: {first_line(e)}"
            ) from e
        # torch's remove_parametrizations would take them from the class, which the user's own network shares.
        kind = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        module.__class__ = kind
        for name, tensor in found.items():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _refuse_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"module {path or 'the network itself'} has a forward hook, which a graph cannot hold; remove it "
                "(spectral_norm is one: use torch.nn.utils.parametrizations.spectral_norm and remove_parametrizations)"
            )


def _refuse_broken_weights(model: nn.Module) -> None:
    """Parameters and statistics of BatchNorm; what is no layer of torch's own may well hold an infinite mask."""
    for path, module in model.named_modules():
        norm = isinstance(module, BATCH_NORMS)
        buffers = module.named_buffers(recurse=False) if norm else ()
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            broken = (
                ~tensor.isfinite()
                if norm or type(module).__module__.startswith("torch.nn.modules.")
                else tensor.isnan()
            )
            if name == "running_var":
                broken |= tensor < 0
            if bool(broken.any()):
                raise ModelError(
                    f"{f'{path}.{name}'.lstrip('.')}: {int(broken.sum())} of {tensor.numel()} values are NaN, infinite or, of a "
                    "variance, negative; did the training diverge, or is the file damaged?"
                )
