"""Post-training quantization of PyTorch vision networks, without data.

import ptq
qm = ptq.quantize(model, bits="w4a4", data="genie", input_shape=(3, 32, 32))
qm.save("out")
ptq.export(qm, "onnx_qdq", "out/model.onnx")
qm = ptq.load("out")
"""

from ptq.artifact import QuantizedModel
from ptq.distillation import Distilled, distill, distill_quantized
from ptq.errors import (
    ArtifactError,
    CalibrationError,
    ExportError,
    ModelError,
    PluginError,
    PtqError,
    ReconstructionError,
    SpecError,
)
from ptq.mixed_precision import BitSensitivity, bit_sensitivity
from ptq.pipeline import quantize
from ptq.proof import export
from ptq.similarity import Similarity
from ptq.sources import Synthesis, data_similarity, synthesize
from ptq.spec import BitConfig
from ptq.vectors import write_vectors

load = QuantizedModel.load

__all__ = [
    "ArtifactError", "BitConfig", "BitSensitivity", "CalibrationError", "Distilled", "ExportError", "ModelError",
    "PluginError", "PtqError", "QuantizedModel", "ReconstructionError", "Similarity", "SpecError", "Synthesis",
    "bit_sensitivity", "data_similarity", "distill", "distill_quantized", "export", "load", "quantize", "synthesize",
    "write_vectors",
]  # fmt: skip
