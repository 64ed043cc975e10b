"""The vision example: its windows, and its model in ONNX, run by onnxruntime and OpenVINO."""

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from vision import export
from vision.graph import to_onnx
from vision.model import VisionConfig, VisionMoE, windows

from moe_jax.formats.modules import load_layers, moe_layers
from moe_jax.formats.onnx import custom, dense
from moe_jax.formats.openvino.package import load_openvino

openvino = load_openvino()

CONFIG = VisionConfig(
    patches=4,
    window_size=2,
    hidden_size=12,
    num_heads=3,
    num_experts=5,
    intermediate_size=7,
    num_classes=6,
)
ROWS = {"custom": "X1", "custom_half": "X1", "dense": "X2"}
TOLERANCES = {"custom": 1e-6, "custom_half": 2e-2, "dense": 1e-6}


@pytest.fixture(scope="module")
def model() -> VisionMoE:
    return VisionMoE(CONFIG, nnx.Rngs(0))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def logits(model, images) -> np.ndarray:
    return np.asarray(export.forward(model, images))


@pytest.mark.parametrize("name", export.MODES)
def test_x1_x2_the_whole_model_matches_onnxruntime(
    name, model, images, logits, tmp_path, record_property
):
    add_moe, functions = export.MODES[name]
    exported = to_onnx(model, add_moe, functions)
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, tmp_path / "model.onnx")
    error = float(abs(export.run(tmp_path / "model.onnx", images) - logits).max())
    assert error < TOLERANCES[name]
    record_property("row", ROWS[name])
    record_property("error", error)
    record_property("with", f"onnxruntime {onnxruntime.__version__}, vision model, {name}")


def test_x2_the_dense_model_matches_openvino(model, images, logits, record_property):
    core = openvino.Core()
    read = core.read_model(to_onnx(model, dense.add_dense).SerializeToString())
    compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    error = float(abs(compiled(images)[0] - logits).max())
    assert error < 1e-5
    record_property("row", "X2")
    record_property("error", error)
    record_property("with", f"openvino {openvino.__version__.split('-')[0]}, vision model")


@pytest.mark.parametrize(
    ("add_moe", "read"), [(custom.add_custom, custom.read), (dense.add_dense, dense.read)]
)
def test_the_layers_go_into_another_model(add_moe, read, model):
    other = VisionMoE(CONFIG, nnx.Rngs(1))
    layers = read(to_onnx(model, add_moe))
    assert list(layers) == ["blocks.0.mlp", "blocks.1.mlp"]
    load_layers(other, layers)
    for name, layer in moe_layers(other).items():
        pairs = zip(jax.tree.leaves(layer), jax.tree.leaves(moe_layers(model)[name]), strict=True)
        for found, expected in pairs:
            np.testing.assert_array_equal(found, expected, strict=True)


def test_the_command_prints_an_error_for_each_file(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "VisionConfig", lambda: CONFIG)
    assert export.main(["--out", str(tmp_path / "files"), "--seed", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(export.MODES)
    for line, name in zip(lines[1:], export.MODES, strict=True):
        assert line.startswith(f"{name}.onnx") and "blocks.0.mlp, blocks.1.mlp" in line
        assert float(line.split("error ")[1].split(",")[0]) < TOLERANCES[name]
        assert (tmp_path / "files" / f"{name}.onnx").exists()


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_hold_every_token_once_and_only_neighbours_meet(shift):
    patches, window_size = 6, 3
    order, mask = windows(patches, window_size, shift)
    assert sorted(order.reshape(-1)) == list(range(patches * patches))
    meeting = set()
    for window, blocked in zip(order, mask, strict=True):
        for i, a in enumerate(window):
            for j, b in enumerate(window):
                if not blocked[i, j]:
                    meeting.add((int(a), int(b)))
    place = lambda token: ((np.array(divmod(token, patches)) - shift) // window_size).tolist()  # noqa: E731
    tokens = range(patches * patches)
    assert meeting == {(a, b) for a in tokens for b in tokens if place(a) == place(b)}


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="window_size must divide"):
        VisionConfig(patches=5)
