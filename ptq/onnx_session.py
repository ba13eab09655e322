"""An onnxruntime session on the CPU, as a user runs a file or as the file is written."""

from pathlib import Path

import onnxruntime


def onnx_session(
    model: Path | bytes, *, literal: bool = False, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session with all optimizations, or `literal`, each node as it is written; `optimized`: where its graph is written.

    Raises:
        Exception: of onnxruntime's own classes, which have no common base: it refuses the model.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if literal else levels.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
