"""The helpers that build, check and search ONNX models."""

import importlib.util
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest

from moe_jax.formats import FormatError
from moe_jax.formats import onnx as formats_onnx
from moe_jax.formats.onnx import graph

TYPES = ["float32", "float16", "uint8", "int64", "bool"]


@pytest.mark.parametrize("dtype", [*TYPES, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_initialisers_keep_their_bits(rng, dtype):
    array = rng.integers(0, 2, (3, 2, 5)).astype(dtype)
    for given in (array, array.transpose(2, 0, 1)):
        tensor = graph.initialiser("w", given)
        found = onnx.numpy_helper.to_array(tensor)
        assert (tensor.name, found.dtype) == ("w", given.dtype)
        np.testing.assert_array_equal(found.view(np.uint8), np.ascontiguousarray(given).view("u1"))


def test_types_that_onnx_lacks():
    for array in (np.array(["a"]), np.ones(2, ml_dtypes.float8_e3m4)):
        with pytest.raises(TypeError, match="'w'"):
            graph.initialiser("w", array)
    with pytest.raises(TypeError, match="no tensors of"):
        graph.data_type("M8[s]")


def linear(weight):
    x, y = graph.value("x", np.float32, ["rows", 4]), graph.value("y", np.float32, ["rows", 3])
    node = graph.node("MatMul", ["x", "w"], ["y"], name="linear", unknown=None)
    return graph.model_of([node], [x], [y], [graph.initialiser("w", weight)])


def test_a_model_states_its_versions():
    model = linear(np.ones((4, 3), np.float32))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", graph.STANDARD_OPSET)]
    assert model.ir_version == graph.IR_VERSION


def test_models_that_the_checker_refuses():
    with pytest.raises(FormatError, match="Incompatible dimensions"):
        linear(np.ones((5, 3), np.float32))
    x = graph.value("x", np.float32, [1])
    with pytest.raises(FormatError, match="not a valid ONNX model"):
        graph.model_of([graph.node("Relu", ["nowhere"], ["x"])], [], [x], [])


def test_models_too_large_for_one_message(monkeypatch):
    monkeypatch.setattr(graph, "_LARGEST_FILE", 40)
    with pytest.raises(FormatError, match="48 bytes"):
        linear(np.ones((4, 3), np.float32))


def test_external_data_can_be_written_again(tmp_path):
    model = linear(np.arange(12, dtype=np.float32).reshape(4, 3))
    for _ in range(2):
        graph.save(model, tmp_path / "m.onnx", external_data="m.data")
    assert (tmp_path / "m.data").stat().st_size < 5000
    loaded = graph.load(tmp_path / "m.onnx")
    assert loaded.graph.initializer[0].raw_data == model.graph.initializer[0].raw_data
    assert model.graph.initializer[0].HasField("raw_data")
    graph.save(model, tmp_path / "n.onnx")
    assert graph.load(str(tmp_path / "n.onnx")) == model == graph.load(model)


def test_constants_through_casts_that_lose_nothing():
    weight = np.ones((4, 3), ml_dtypes.bfloat16)
    lossy = np.full(2, 1 + 2**-12, np.float32)
    nodes = [
        graph.node("Cast", ["w"], ["wide"], to=graph.data_type(np.float32)),
        graph.node("Cast", ["v"], ["narrow"], to=graph.data_type(np.float16)),
        graph.node("Relu", ["wide"], ["y"]),
    ]
    y = graph.value("y", np.float32, [4, 3])
    constants = [graph.initialiser("w", weight), graph.initialiser("v", lossy)]
    model = graph.model_of(nodes, [], [y], constants)
    (found,) = graph.find(model, "", "Relu")
    assert found.constant(0, "weight").dtype == ml_dtypes.bfloat16
    assert found.constant_named("narrow").dtype == np.float16
    assert found.constant_named("y") is None and found.constant(1, "bias") is None


def test_integers_through_a_cast_are_its_floats():
    tensor = graph.initialiser("w", np.arange(6, dtype=np.int8).reshape(2, 3))
    cast = graph.node("Cast", ["w"], ["floats"], to=graph.data_type(np.float32))
    found = graph.Found(cast, {"w": tensor}, {"floats": cast}).constant_named("floats")
    assert found is not None and found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0, 1, 2], [3, 4, 5]])


def test_external_data_is_replaced_and_lies_beside_the_model(tmp_path):
    y = graph.value("y", np.float32, [4, 300])
    weight = graph.initialiser("w", np.ones((4, 300), np.float32))
    model = graph.model_of([graph.node("Relu", ["w"], ["y"])], [], [y], [weight])
    for _ in range(3):
        graph.save(model, tmp_path / "m.onnx", external_data="m.bin")
        assert (tmp_path / "m.bin").stat().st_size == 4800
    for name in ("../m.bin", str(tmp_path / "m.bin"), "m.onnx", "sub/m.bin", "", ".."):
        with pytest.raises(FormatError, match="name of a file beside m.onnx"):
            graph.save(model, tmp_path / "m.onnx", external_data=name)


def test_without_onnx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    spec = importlib.util.spec_from_file_location("without_onnx", formats_onnx.__file__)
    with pytest.raises(ImportError, match=r"moe-jax\[onnx\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
