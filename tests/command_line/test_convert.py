"""Every pair of formats that can be said is converted; every other is refused in one line."""

import json
import os
import sys

import layer_files
import layer_oracle
import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import save_file

from moe_jax.command_line import main
from moe_jax.command_line.options import FORMATS
from moe_jax.formats import torch
from moe_jax.formats.onnx import custom, dense

STATES = {
    "dropless": {"torch:dropless"},
    "mixtral": {"torch:mixtral", "torch:mixtral-checkpoint"},
    "gpt_oss": {"torch:gpt-oss"},
    "gpt_oss_mxfp4": {"torch:gpt-oss-mxfp4"},
}
DROPLESS = {"onnx-custom", "onnx-dense"} | STATES["dropless"]
MIXTRAL = {"onnx-dense", "onnx-microsoft", "openvino"} | STATES["mixtral"]
GPT_OSS = {"onnx-dense", "onnx-microsoft", "openvino"} | STATES["gpt_oss"]
MXFP4 = {"onnx-microsoft"} | STATES["gpt_oss_mxfp4"]
SAYABLE = {
    "custom": DROPLESS,
    "dense": {"onnx-dense"},  # of two layers of different kinds
    "microsoft": MIXTRAL,
    "qmoe": MXFP4,
    "openvino": GPT_OSS,
    "openvino_experts": {"openvino"},
    "infmoe": {"infmoe", "onnx-dense"},
    "dropless": DROPLESS,
    "gpt_oss": GPT_OSS,
    "gpt_oss_mxfp4": MXFP4,
    "mixtral": MIXTRAL,
    "mixtral_checkpoint": MIXTRAL,
}
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "infmoe": ".npz", "torch": ".safetensors"}
RUNTIME = {"onnx": "onnxruntime 1", "openvino": "openvino 20"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {name: layer_files.write_file(folder, name) for name in layer_files.WRITE}


def kind(format: str) -> str:
    return format.replace("-", ":").partition(":")[0]


def convert(source, target, *options) -> int:
    return main(["convert", str(source), str(target), *layer_files.needed(source), *options])


def failure(capsys) -> str:
    """The one line on stderr."""
    out, err = capsys.readouterr()
    assert not out and err.startswith("moe-jax: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name", layer_files.WRITE)
def test_all_formats_of(name, files, tmp_path, capsys):
    for format in FORMATS:
        target = tmp_path / f"out-{format.replace(':', '-')}{SUFFIX[kind(format)]}"
        status = convert(files[name], target, "--to", format)
        if format in SAYABLE[name]:
            out, err = capsys.readouterr()
            assert status == 0 and not err, err
            assert f"checked by {RUNTIME.get(kind(format), 'moe_jax, read back')}" in out
            assert target.stat().st_size
            assert main(["inspect", str(target)]) == 0
            capsys.readouterr()
        else:
            assert status == 2 and not target.exists()
            failure(capsys)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_written_is_the_layer(files, tmp_path):
    back = tmp_path / "back.safetensors"
    assert convert(files["dropless"], tmp_path / "a.onnx", "--to", "onnx-custom", "--quiet") == 0
    assert convert(tmp_path / "a.onnx", back, "--to", "torch:dropless", "--quiet") == 0
    (layer,) = torch.read(back, torch.DROPLESS, experts_per_token=2).values()
    layer_oracle.assert_same_layer(layer, layer_files.DROPLESS)


def test_a_file_with_the_definition_runs_in_onnxruntime(files, tmp_path):
    target = tmp_path / "a.onnx"
    short = ["export-onnx", str(files["dropless"]), str(target), "--mode", "custom"]
    assert main([*short, "--experts-per-token", "2", "--definition", "--quiet"]) == 0
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(target)
    (y,) = session.run(None, {f"{layer_files.NAME}.x": x})
    expected = layer_oracle.evaluate(layer_files.DROPLESS, x)
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["custom", "dense"])
def test_half_precision_and_external_data(mode, files, tmp_path, capsys):
    target = tmp_path / "a.onnx"
    options = ["--mode", mode, "--dtype", "float16", "--external-data", "--experts-per-token", "2"]
    assert main(["export-onnx", str(files["dropless"]), str(target), *options]) == 0
    assert "tolerance 1.0e-02" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.onnx.data"]
    read = {"custom": custom.read, "dense": dense.read}[mode]
    assert list(read(target)) == [layer_files.NAME]
    assert onnx.load_model(target).graph.input[0].type.tensor_type.elem_type == 10


def test_one_layer_of_several(files, tmp_path, capsys):
    target = tmp_path / "b.safetensors"
    assert convert(files["dense"], target, "--to", "torch:mixtral", "--layer", "b") == 0
    assert "1.0e-04" in capsys.readouterr().out
    assert list(torch.read(target, torch.MIXTRAL, experts_per_token=2)) == ["b"]
    assert convert(files["dense"], tmp_path / "c.onnx", "--to", "onnx-dense", "--layer", "c") == 2
    assert "'c'" in failure(capsys)


def test_packed_weights_are_decoded_when_asked(files, tmp_path, capsys):
    source, target = files["gpt_oss_mxfp4"], tmp_path / "a.xml"
    assert convert(source, target) == 2
    assert "--dequantize" in failure(capsys)
    assert convert(source, target, "--dequantize", "float32") == 0
    assert convert(target, tmp_path / "a.safetensors", "--to", "torch:gpt-oss") == 0


def test_weights_too_large_for_the_floats_are_found_out(files, tmp_path, capsys):
    """6 * 2**14 is no float16: what is compared is the source, not what became of it."""
    source, target = tmp_path / "large.safetensors", tmp_path / "a.onnx"
    state = torch.load_tensors(files["gpt_oss_mxfp4"])
    for name in state:
        if name.endswith("down_proj_scales"):
            state[name] = np.full_like(state[name], 127 + 14)
    save_file(state, source)
    assert convert(source, target, "--to", "onnx-dense", "--dequantize", "float16") == 1
    assert "error of inf" in failure(capsys) and not target.exists()
    assert convert(source, target, "--to", "onnx-dense", "--dequantize", "float32") == 0


def test_the_kernels_of_cuda_are_reference_only(files, tmp_path, capsys):
    target = tmp_path / "a.onnx"
    assert convert(files["mixtral"], target, "--to", "onnx-microsoft", "--target", "cuda") == 0
    assert "reference only" in capsys.readouterr().out


def test_without_onnxruntime_it_is_said(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert convert(files["mixtral"], tmp_path / "a.onnx", "--to", "onnx-dense") == 0
    assert "onnxruntime is not installed" in capsys.readouterr().out


def test_above_the_tolerance_nothing_is_left(files, tmp_path, capsys):
    before = sorted(os.listdir(tmp_path))
    options = ["--to", "onnx-dense", "--tolerance", "0"]
    assert convert(files["mixtral"], tmp_path / "a.onnx", *options) == 1
    message = failure(capsys)
    assert "tolerance" in message and layer_files.NAME in message
    assert sorted(os.listdir(tmp_path)) == before


def test_a_wrong_target_is_found_out(files, tmp_path, capsys, monkeypatch):
    """The check is of what is in the file: here the writer negates a matrix."""
    export = torch.export_state

    def damaged(*arguments, **options):
        state = export(*arguments, **options)
        return {n: -a if n.endswith("w2") else a for n, a in state.items()}

    monkeypatch.setattr(torch, "export_state", damaged)
    assert convert(files["dropless"], tmp_path / "a.safetensors", "--to", "torch:dropless") == 1
    assert "error of" in failure(capsys) and not os.listdir(tmp_path)


def test_what_cannot_be_run_is_not_left(files, tmp_path, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    assert convert(files["mixtral"], tmp_path / "a.onnx", "--to", "onnx-dense") == 1
    assert "cannot be run: no such kernel" in failure(capsys) and not os.listdir(tmp_path)


def test_nothing_is_replaced_without_force(files, tmp_path, capsys):
    target = tmp_path / "a.xml"
    (tmp_path / "a.bin").write_bytes(b"mine")
    assert convert(files["mixtral"], target) == 2
    assert "a.bin is there already: --force" in failure(capsys)
    assert (tmp_path / "a.bin").read_bytes() == b"mine" and not target.exists()
    assert convert(files["mixtral"], target, "--force") == 0
    capsys.readouterr()
    assert convert(files["mixtral"], target) == 2
    assert "a.xml is there already: --force" in failure(capsys)


def test_a_file_may_replace_its_source(files, tmp_path):
    source = tmp_path / "a.safetensors"
    source.write_bytes(files["mixtral"].read_bytes())
    assert convert(source, source, "--to", "torch:mixtral-checkpoint", "--force", "--quiet") == 0
    layers = torch.read(source, torch.MIXTRAL_CHECKPOINT, experts_per_token=2)
    layer_oracle.assert_same_layer(layers[layer_files.NAME], layer_files.MIXTRAL)


def test_experts_per_token_and_limit_come_from_the_configuration(files, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(files["gpt_oss_mxfp4"].read_bytes())
    config = {"num_experts_per_tok": 3, "swiglu_limit": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(tmp_path), str(tmp_path / "a.onnx"), "--to", "onnx-microsoft"]) == 0
    (node,) = (n for n in onnx.load_model(tmp_path / "a.onnx").graph.node if n.op_type == "QMoE")
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values["k"] == 3 and values["swiglu_limit"] == 0.5
    # safetensors alone do not hold the limit
    capsys.readouterr()
    target = tmp_path / "b.safetensors"
    assert main(["convert", str(tmp_path), str(target), "--to", "torch:gpt-oss-mxfp4"]) == 2
    assert "activation" in failure(capsys)


@pytest.mark.parametrize(
    ("name", "target", "options", "expected"),
    [
        ("mixtral", "a.onnx", [], "say which with --to"),
        ("mixtral", "a.txt", [], "must end in one of"),
        ("mixtral", "a.onnx", ["--to", "openvino"], "not openvino"),
        ("mixtral", "no/a.xml", [], "is no folder"),
        ("mixtral", "a.xml", ["--dtype", "float16"], "--dtype is for onnx-"),
        ("mixtral", "a.xml", ["--norm", "rms"], "--norm is for infmoe"),
        ("mixtral", "a.xml", ["--from", "torch:dropless"], "torch:dropless"),
        ("mixtral", "a.xml", ["--from", "openvino"], "not openvino"),
        ("mixtral", "a.xml", ["--target", "cpu"], "--target is for onnx-microsoft"),
        ("mixtral", "a.xml", ["--experts-per-token", "9"], "experts_per_token"),
        ("openvino", "a.onnx", ["--to", "onnx-dense", "--experts-per-token", "2"], "torch:"),
        ("dense", "a.npz", [], "--layer"),
    ],
)
def test_what_is_asked_for_must_make_sense(
    name, target, options, expected, files, tmp_path, capsys
):
    assert convert(files[name], tmp_path / target, *options) == 2
    assert expected in failure(capsys)
    assert not os.listdir(tmp_path)


def test_what_a_file_does_not_say_is_asked_for(files, tmp_path, capsys):
    def without(name, *options):
        status = main(["convert", str(files[name]), str(tmp_path / "a.onnx"), *options])
        assert status == 2
        return failure(capsys)

    to = ["--to", "onnx-dense"]
    assert "--experts-per-token" in without("mixtral", *to)
    assert "--norm rms" in without("infmoe", *to)
    lost = ["--norm", "rms", "--attributes", str(tmp_path / "none")]
    assert "--attributes" in without("infmoe", *to, *lost)
