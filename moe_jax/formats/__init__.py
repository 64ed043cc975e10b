"""Mixture-of-experts layers of other systems: read, run and written.

One module a system, imported by its name (`import moe_jax.formats.onnx.dense`), for most need a
package that is not among the library's own dependencies. Names and layouts of the other system are
turned into the library's at this border and nowhere else: weights are {expert, out, in}, `alpha`,
`beta` and `limit` are those of `moe_jax.Activation`. What a system cannot say is refused with a
`FormatError` that names it.

Formats that hold whole layers in files have the same two functions. `read` gives layers by name,
`dict[str, MoE]`; those of OpenVINO may be experts without a router. `write` takes an `MoE`, several
by name, or a Flax model, of which it takes the `MoE` inside by their paths; a layer alone is read
back under the name `moe`.

    onnx.microsoft   com.microsoft.MoE and QMoE (moe-jax[onnx])
        read(source, *, target=CPU)
        write(path, layers, *, target=CPU, token_axes=("tokens",), float_type=None,
              external_data=None)
    onnx.custom      trt.plugins::CustomMoE (moe-jax[onnx])
        read(source)
        write(path, layers, *, expert_dtype=None, functions=(), external_data=None)
    onnx.dense       standard operators, of files that moe_jax wrote (moe-jax[onnx])
        read(source)
        write(path, layers, *, dtype="float32", external_data=None)
    openvino         NAME.xml with NAME.bin, of files that moe_jax wrote (moe-jax[openvino])
        read(path)
        write(path, layers)
    torch            PyTorch's state dicts in safetensors; `layout` is one of its Layouts
        read(path, layout, *, experts_per_token)
        write(path, layers, layout)

`source` is a path or an `onnx.ModelProto`, which `to_model` makes of the same arguments as `write`.
The rest are in parts:

    gpt_oss          a layer of gpt-oss's checkpoints, whose matrices are MXFP4
        import_state(state, *, experts_per_token, prefix="", activation=GPT_OSS_ACTIVATION) -> MoE
        export_state(layer, *, prefix="", activation=GPT_OSS_ACTIVATION) -> dict[str, np.ndarray]
    infmoe           one layer is an npz file and a plugin's attributes
        read_layer(plugin, *, norm, algorithm="auto", sharding=None, sublayers=SUBLAYERS) -> MoE
        write_layer(layer, path, *, max_concurrency=2, sublayers=SUBLAYERS) -> InfMoEPlugin
    tensorrt         experts without a router; no file, but what to call in TensorRT
        from_experts(experts) -> MoELayer;  recipe(layer) -> tuple[Call, ...]
"""

from moe_jax.formats.errors import FormatError as FormatError
