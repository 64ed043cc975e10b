"""The operator `trt.plugins::CustomMoE` defined by standard ones, for runtimes that lack it."""

from onnx import FunctionProto, parser

_FUNCTION = """
<opset_import: ["" : 17], domain: "trt.plugins">
CustomMoE <top_k, num_experts, in_features, hidden_features,
           activation, plugin_version, plugin_namespace>
          (x, router_w, w1, b1, w2, b2) => (y)
{
    zeroth = Constant <value_ints: ints = [0]> ()
    first = Constant <value_ints: ints = [1]> ()
    second = Constant <value_ints: ints = [2]> ()
    remaining = Constant <value_ints: ints = [-1]> ()
    size = Constant <value_int: int = @in_features> ()
    sizes = Unsqueeze (size, zeroth)
    rows_shape = Concat <axis: int = 0> (remaining, sizes)
    rows = Reshape (x, rows_shape)

    rows_float = Cast <to: int = 1> (rows)
    logits = Gemm <transB: int = 1> (rows_float, router_w)
    count = Constant <value_int: int = @top_k> ()
    counts = Unsqueeze (count, zeroth)
    chosen_logits, ids = TopK <axis: int = -1> (logits, counts)
    chosen_weights = Softmax <axis: int = -1> (chosen_logits)
    logits_shape = Shape (logits)
    no_weights = ConstantOfShape (logits_shape)
    weights = ScatterElements <axis: int = -1> (no_weights, ids, chosen_weights)
    weights_by_expert = Transpose <perm: ints = [1, 0]> (weights)
    weight_columns = Unsqueeze (weights_by_expert, second)

    b1_rows = Unsqueeze (b1, first)
    rows_once = Unsqueeze (rows, zeroth)
    experts = Constant <value_int: int = @num_experts> ()
    experts_size = Unsqueeze (experts, zeroth)
    copies = Concat <axis: int = 0> (experts_size, first, first)
    rows_copied = Tile (rows_once, copies)
    products = MatMul (rows_copied, w1)
    hidden = Add (products, b1_rows)
    half_float = Constant <value_float: float = 0.5> ()
    half = CastLike (half_float, x)
    one_float = Constant <value_float: float = 1.0> ()
    one = CastLike (one_float, x)
    slope_float = Constant <value_float: float = 0.7071067811865476> ()
    slope = CastLike (slope_float, x)
    scaled = Mul (hidden, slope)
    error = Erf (scaled)
    gate = Add (error, one)
    hidden_half = Mul (hidden, half)
    activated = Mul (hidden_half, gate)
    b2_rows = Unsqueeze (b2, first)
    outputs = MatMul (activated, w2)
    biased = Add (outputs, b2_rows)

    biased_float = Cast <to: int = 1> (biased)
    none = CastLike (zeroth, weight_columns)
    unused = Equal (weight_columns, none)
    weighted = Mul (biased_float, weight_columns)
    used = Where (unused, none, weighted)
    sum = ReduceSum <keepdims: int = 0> (used, zeroth)
    sum_typed = CastLike (sum, x)
    x_shape = Shape (x)
    y = Reshape <allowzero: int = 1> (sum_typed, x_shape)
}
"""


def custom_moe_function() -> FunctionProto:
    """The operator defined by standard ones: all experts on all tokens, weighed."""
    return parser.parse_function(_FUNCTION)
