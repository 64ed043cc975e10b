"""What is told of files, and of files that are none."""

import json

import layer_files
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax.command_line import main
from moe_jax.formats.onnx import custom, dense, graph
from moe_jax.formats.onnx.microsoft_write import to_model

SIZES = {
    "MLP": (5, 4, 7, "gelu"),
    "GatedMLP": (5, 4, 7, "swiglu"),
    "GptOssMLP": (5, 6, 9, "swiglu"),
    "T5FeedForward": (4, 3, 7, "geglu_tanh"),
}


def inspect(path, *options) -> int:
    return main(["inspect", str(path), *options])


def told(path, capsys, *options):
    assert inspect(path, "--json", *options) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)["layers"]


@pytest.mark.parametrize("name", layer_files.WRITE)
def test_sizes_of_every_format(name, tmp_path, capsys):
    path = layer_files.write_file(tmp_path, name)
    layers = told(path, capsys)
    assert len(layers) == (2 if name == "dense" else 1)
    for layer in layers:
        expected = SIZES[layer["experts"]]
        if name in ("qmoe", "gpt_oss_mxfp4"):
            expected = (3, 64, 32, "swiglu")
        keys = ("num_experts", "hidden_size", "intermediate_size", "activation")
        assert tuple(layer[key] for key in keys) == expected
        assert layer["weights"] == ("mxfp4" if expected[0] == 3 else "float32")
        said = {"infmoe": 1, "openvino_experts": None}.get(name, 2)
        if path.suffix == ".safetensors":
            said = None
        assert layer["experts_per_token"] == said
        assert layer["nbytes"] > 100 and layer["tensors"]


def test_bytes_and_shapes_of_safetensors(tmp_path, capsys):
    path = layer_files.write_file(tmp_path, "gpt_oss_mxfp4")
    (layer,) = told(path, capsys)
    assert layer["tensors"]["experts.gate_up_proj_blocks"] == "uint8[3, 64, 2, 16]"
    packed = 3 * (64 * 2 + 64 * 1) * 17
    floats = 4 * 3 * (64 + 1 + 64 + 64)
    assert layer["nbytes"] == packed + floats


def test_the_table(tmp_path, capsys):
    path = layer_files.write_file(tmp_path, "dense")
    assert inspect(path) == 0
    heads, first, second, total = capsys.readouterr().out.splitlines()
    assert heads.split()[:2] == ["layer", "format"]
    assert first.split() == "a onnx-dense MLP 5 2 4 7 gelu float32 1.4 kB".split()
    assert second.split() == "b onnx-dense GatedMLP 5 2 4 7 swiglu float32 1.8 kB".split()
    assert total == "2 layers, 3.2 kB"


def test_layers_of_a_checkpoint_are_in_the_order_of_their_numbers(tmp_path, capsys):
    path = layer_files.write_file(tmp_path, "mixtral")
    from moe_jax.formats import torch

    names = [f"model.layers.{n}.mlp" for n in (10, 9, 0)]
    torch.write(path, dict.fromkeys(names, layer_files.MIXTRAL), torch.MIXTRAL)
    assert [layer["name"] for layer in told(path, capsys)] == names[::-1]


def test_safetensors_are_not_read(tmp_path, capsys):
    """A file of 2**40 bytes, none of which are there but the header."""
    shapes = {
        "mlp.gate.weight": [4, 2**18],
        "mlp.experts.gate_up_proj": [4, 2**18, 2**18],
        "mlp.experts.down_proj": [4, 2**18, 2**17],
    }
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    (layer,) = told(path, capsys, "--experts-per-token", "2")
    assert layer["nbytes"] == place and layer["intermediate_size"] == 2**17
    assert layer["weights"] == "bfloat16" and layer["experts_per_token"] == 2


def test_experts_are_told_of_where_the_router_cannot_be_read(tmp_path, capsys):
    model = to_model({"moe": layer_files.MIXTRAL})
    for node in model.graph.node:
        if node.op_type == "MoE":
            x = graph.value("logits", np.float32, ["tokens", 5])
            model.graph.input.append(x)
            node.input[1] = "logits"
    path = tmp_path / "a.onnx"
    graph.save(model, path)
    (layer,) = told(path, capsys)
    assert layer["experts_per_token"] == 2 and layer["num_experts"] == 5
    assert layer["hidden_size"] == 4
    assert main(["convert", str(path), str(tmp_path / "b.onnx"), "--to", "onnx-dense"]) == 2


def test_a_file_of_two_formats_asks_which(tmp_path, capsys):
    first = custom.to_model({"a": layer_files.DROPLESS})
    second = dense.to_model({"b": layer_files.DROPLESS})
    for field in ("node", "input", "output", "initializer"):
        getattr(second.graph, field).extend(getattr(first.graph, field))
    second.opset_import.append([o for o in first.opset_import if o.domain][0])
    path = tmp_path / "a.onnx"
    graph.save(second, path)
    assert inspect(path) == 2
    assert "--from" in capsys.readouterr().err
    assert told(path, capsys, "--from", "onnx-custom")[0]["name"] == "a"


def test_files_without_layers(tmp_path, capsys):
    save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", w=np.zeros(3))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("a.safetensors", "a.npz", "a.txt", "empty", "none.onnx"):
        assert inspect(tmp_path / name) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and name in err


@pytest.mark.parametrize("name", layer_files.WRITE)
def test_damaged_files_are_refused_or_read(name, tmp_path, capsys, rng):
    """Cut at several places, with bytes changed, and empty: never a traceback."""
    path = layer_files.write_file(tmp_path, name)
    data = path.read_bytes()
    damaged = [b"", data[:7], data[: len(data) // 2], data[:-1]]
    for _ in range(12):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            changed[place] = rng.integers(0, 256)
        damaged.append(bytes(changed))
    seen = set()
    for content in damaged:
        path.write_bytes(content)
        seen.add(status := inspect(path))
        out, err = capsys.readouterr()
        assert status in (0, 2), err
        assert err.count("\n") == (status == 2) and bool(out) == (status == 0)
    assert 2 in seen
