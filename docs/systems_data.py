"""What docs/systems.md must name: the rows of the systems' layers, the traps, and bad inputs.

`make_systems.py` joins this with what tests recorded. Words that tests record are data here, too.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """A thing that at least one of the systems can do."""

    key: str
    what: str
    """In a few words, what it is."""
    systems: str
    """Which systems have it; in parentheses, those that have it in part."""
    status: str | None = None
    """`reference only` or `GPU` where no test on a CPU with the system's own software can be."""
    tests: tuple[str, ...] = ()
    """Tests that record nothing, for they are skipped without a GPU."""
    benchmark: str | None = None
    """A result of `benchmarks/` whose greatest error is shown."""


ROWS = (
    Row("R1", "linear router; softmax over the chosen experts' logits",
        "ONNX Runtime, ZML, (dropless Swin), gpt-oss"),
    Row("R2", "softmax over all experts, the chosen ones keep their share", "ONNX Runtime"),
    Row("R3", "softmax over all experts, the chosen ones divided by their sum",
        "ONNX Runtime, (ZML), dropless Swin"),
    Row("R4", "nearest centroid, its sigmoid mixes the expert with the token; norm of the scores",
        "InfMoE"),
    Row("R5", "balanced assignment: each expert gets as many tokens as the others",
        "(InfMoE: the model it was made for)"),
    Row("R6", "ids and scores come from outside and are used as they are",
        "TensorRT, (ONNX Runtime), OpenVINO, gpt-oss"),
    Row("R7", "one tensor selects and another weighs; sigmoid scores with a bias that selects",
        "ONNX Runtime, OpenVINO"),
    Row("E1", "two matrices with relu, silu, identity or the tanh form of gelu, and biases",
        "ONNX Runtime"),
    Row("E2", "two matrices with gelu by erf, and biases", "dropless Swin"),
    Row("E3", "three matrices, silu of the gate times up, and biases",
        "TensorRT, (ONNX Runtime), OpenVINO"),
    Row("E4", "clamped swiglu with slope, offset and limit; either lane first, or one after the "
        "other", "(TensorRT), ONNX Runtime, OpenVINO, ZML, gpt-oss"),
    Row("E5", "gated gelu, by erf and by tanh", "(InfMoE), OpenVINO"),
    Row("E6", "T5's feed-forward: norm, gated gelu and the remaining path, from an npz file",
        "InfMoE"),
    Row("E7", "an expert that the user brings, and one that returns its row", "InfMoE, ZML"),
    Row("Q1", "MXFP4 weights: FP4 elements, a power of two for each 32",
        "(ONNX Runtime: CUDA), ZML, gpt-oss"),
    Row("Q2", "NVFP4: FP4 elements, an FP8 scale for each 16 and one for all; of the mul output",
        "TensorRT, (ONNX Runtime: CUDA), (ZML)"),
    Row("Q3", "FP8 with a known scale, of the rows and of the mul output, one or one an expert",
        "TensorRT, (ONNX Runtime: CUDA)"),
    Row("Q4", "integers of 2, 4 and 8 bits in groups, with zero points", "ONNX Runtime, OpenVINO"),
    Row("A1", "rows sorted by expert, no token dropped",
        "(InfMoE), ONNX Runtime, dropless Swin, gpt-oss"),
    Row("A2", "every expert computes every row", "OpenVINO, ZML, dropless Swin"),
    Row("A3", "the chosen experts' weights are gathered for each token",
        "(OpenVINO), ZML, (gpt-oss)"),
    Row("A4", "a fixed number of tokens an expert: dropped or sent elsewhere, and counted", "ZML"),
    Row("A5", "experts spread over devices: packed weights, scales and biases together",
        "(TensorRT), ONNX Runtime, ZML"),
    Row("A6", "the layer as kernels of an NVIDIA GPU", "(ZML), dropless Swin, gpt-oss", "GPU",
        ("tests/kernels/test_expert_mlp_gpu.py::test_values",
         "tests/kernels/test_expert_mlp_gpu.py::test_grouped_matmul",
         "tests/kernels/test_expert_mlp_gpu.py::test_gradients_are_those_of_the_definition",
         "tests/kernels/test_expert_mlp.py"),
        "benchmarks/results/moe_layer_h200.json"),
    Row("L1", "load-balance and z losses, and their gradients", "dropless Swin, (gpt-oss)"),
    Row("X1", "ONNX: a custom node for a TensorRT plugin, with a function that can run",
        "dropless Swin"),
    Row("X2", "ONNX: all experts as standard operators", "dropless Swin"),
    Row("X3", "ONNX: `com.microsoft.MoE` and `QMoE`", "ONNX Runtime"),
    Row("X4", "OpenVINO: a graph that its compiler fuses", "OpenVINO"),
    Row("X5", "TensorRT: the calls that make the layer", "TensorRT", "reference only"),
    Row("N1", "axes have names: exchanged axes are errors where sizes agree, too", "ZML"),
)  # fmt: skip

TRAPS = {
    "1": "`alpha` and `beta` are slope and offset in one system, limit and slope in another",
    "2": "which of two interleaved lanes is the gate",
    "3": "weights are [expert, in, out] or [expert, out, in], and no size tells where both agree",
    "4": "gelu is exact, or its approximation by tanh",
    "5": "which of equal scores is chosen: the lowest expert here, the highest in ONNX Runtime",
    "6": "rows of the router with NaN or infinity: zeros in ONNX Runtime, here NaN, and no expert "
    "where all are minus infinity",
    "7": "MXFP4's scale byte 255 is NaN by the specification and 2^128 in transformers; byte 0 "
    "is 2^-127",
    "8": "OpenVINO computes in bfloat16 on some CPUs unless float32 is asked for",
    "9": "old versions of ONNX Runtime abort, or compute int4 wrongly: 1.31 is the least",
}


@dataclasses.dataclass(frozen=True)
class BadInput:
    """Input that no layer can take as it is, and what happens to it."""

    what: str
    answer: str
    recorded: tuple[str, ...]
    """How the names begin under which tests record it."""


BAD_INPUTS = (
    BadInput("fewer than 1 or more than all experts a token", "ValueError",
             ("K<1, K>E", "experts_per_token")),
    BadInput("no experts", "ValueError", ("no experts",)),
    BadInput("an activation that is not known", "ValueError", ("unknown activation",)),
    BadInput("gate and up in one matrix of odd width", "ValueError", ("fused width odd",)),
    BadInput("some biases without the others", "ValueError", ("biases partly given",)),
    BadInput("sizes that do not fit: rows, experts, widths, ids and weights",
             "ValueError that names the axis",
             ("sizes", "E or sizes differ", "x last", "routing shape", "attributes and shapes")),
    BadInput("weights given transposed where both sizes are equal",
             "axes have names, and a format states its orientation",
             ("D==I weights given transposed",)),
    BadInput("ids that are floats, weights that are integers", "TypeError",
             ("float ids / int weights",)),
    BadInput("ids below 0 or beyond the experts",
             "no expert: nothing is added; there is no option that checks values. "
             "`formats.openvino` refuses them, for its graph would not survive them", ("id < 0",)),
    BadInput("an id twice in a row", "added twice; refused in OpenVINO's graph, which cannot",
             ("duplicate ids",)),
    BadInput("NaN in a logit or in a token", "NaN in that row, and in no other", ("NaN ",)),
    BadInput("a row of minus infinity", "zero weights, zeros, gradients without NaN",
             ("all -inf row",)),
    BadInput("no tokens", "no rows", ("T=0", "no tokens")),
    BadInput("a budget that is not positive; none", "ValueError; no token is dropped",
             ("budget ratio",)),
    BadInput("MXFP4 of a width that 32 does not divide", "ValueError",
             ("MXFP4 in not divisible by 32",)),
    BadInput("MXFP4 blocks and scales of different sizes", "ValueError",
             ("MXFP4 blocks/scales mismatch",)),
    BadInput("MXFP4 that is not bytes", "TypeError", ("MXFP4 dtype",)),
    BadInput("the scale byte 255",
             "NaN in arrays; checkpoints and ONNX refuse it, without an option that permits it",
             ("scale byte 255",)),
    BadInput("npz files: keys, shapes and dtypes that are missing, wrong or too many",
             "FormatError that names the key; the norm's bias is used where it is given",
             ("InfMoE npz", "InfMoE attribute")),
    BadInput("a layer that the target cannot say", "FormatError that names the attribute",
             ("export ", "InfMoE cannot say")),
    BadInput("OpenVINO's two attributes that look exchanged", "a warning, when it is read",
             ("OV alpha/beta looking swapped",)),
)  # fmt: skip
