"""The names that users rely on."""

import inspect
import typing

import torch
from torch import nn

import ptq
from ptq import errors
from ptq.artifact import QuantizedModel

PUBLIC = [
    "ArtifactError", "BitConfig", "BitSensitivity", "CalibrationError", "Distilled", "ExportError", "ModelError",
    "PluginError", "PtqError", "QuantizedModel", "ReconstructionError", "Similarity", "SpecError", "Synthesis",
    "bit_sensitivity", "data_similarity", "distill", "distill_quantized", "export", "load", "quantize", "synthesize",
    "write_vectors",
]  # fmt: skip


def test_exact_list_of_names():
    assert ptq.__all__ == PUBLIC


def test_every_name_resolves_and_is_documented():
    for name in PUBLIC:
        assert inspect.getdoc(getattr(ptq, name)), name


def test_every_error_is_public_and_one_family():
    defined = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert defined == {name for name in PUBLIC if name.endswith("Error")}
    assert all(issubclass(getattr(ptq, name), ptq.PtqError) for name in defined)


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {line.split()[1] for line in (errors.__doc__ or "").splitlines() if line.strip().startswith(("├", "└"))}
    assert drawn == {kind.__name__ for kind in errors.PtqError.__subclasses__()}


def test_quantize_is_typed():
    signature, hints = inspect.signature(ptq.quantize), typing.get_type_hints(ptq.quantize)
    assert set(hints) == {*signature.parameters, "return"}
    assert hints["model"] is nn.Module and hints["return"] is QuantizedModel
    assert hints["input_shape"] == tuple[int, int, int] and hints["seed"] is int
    assert hints["device"] == str | torch.device
    required = [n for n, p in signature.parameters.items() if p.default is p.empty]
    assert required == ["model", "input_shape"]
    kinds = {n: p.kind for n, p in signature.parameters.items()}
    positional = [n for n, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "bits", "data"]
    assert not any(kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for kind in kinds.values())


def test_every_argument_of_quantize_is_documented():
    text = inspect.getdoc(ptq.quantize) or ""
    assert [name for name in inspect.signature(ptq.quantize).parameters if name not in text] == []


def test_export_and_load_are_typed():
    for function in (ptq.export, ptq.load):
        parameters = inspect.signature(function).parameters.values()
        assert all(p.annotation is not p.empty for p in parameters), function
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty
