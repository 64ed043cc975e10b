"""onnxruntime on one thread: the models are tiny, and threads that wait for work take time."""

import numpy as np
import onnxruntime
from onnx import ModelProto

VERSION = f"onnxruntime {onnxruntime.__version__}"


def session(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and need not be printed too
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of a model."""
    return np.asarray(session(model).run(None, inputs)[0])
