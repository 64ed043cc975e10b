"""The file of the plugin's attributes: they come back, and what is none is refused."""

import dataclasses

import infmoe_files
import numpy as np
import pytest

from moe_jax.formats import FormatError, infmoe


@pytest.mark.parametrize("variant", infmoe.VARIANTS)
def test_attributes_come_back(variant, tmp_path, rng):
    (tmp_path / "weights").mkdir()
    layer = infmoe_files.layer_of(rng, variant)
    plugin = infmoe.write_layer(layer, tmp_path / "weights" / "a.npz", max_concurrency=3)
    infmoe.write_attributes(plugin, tmp_path / "a.plugin.npz")
    found = infmoe.read_attributes(tmp_path / "a.plugin.npz")
    for field in dataclasses.fields(plugin):
        expected, value = getattr(plugin, field.name), getattr(found, field.name)
        assert type(value) is type(expected)
        np.testing.assert_array_equal(value, expected)


def test_the_path_of_the_weights_is_relative(tmp_path, rng):
    plugin = infmoe.write_layer(infmoe_files.layer_of(rng), tmp_path / "a.npz")
    infmoe.write_attributes(plugin, tmp_path / "a.plugin.npz")
    with np.load(tmp_path / "a.plugin.npz", allow_pickle=False) as file:
        assert file["expert_weight_file"] == "a.npz"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"expert_count": None}, "missing are .'expert_count'"),
        ({"colour": np.zeros(2)}, "not known are .'colour'"),
        ({"expert_weight_file": np.asarray(3)}, "expert_weight_file must be text"),
        ({"hidden_size": np.asarray(0)}, "hidden_size"),
        ({"moe_variant": np.asarray("other")}, "moe_variant"),
        ({"expert_centroids": np.zeros((9, 9), np.float32)}, "expert_centroids"),
        ({"expert_count": np.zeros(2, np.int64)}, "expert_count"),
    ],
)
def test_other_attributes_are_refused(change, expected, tmp_path, rng):
    path = tmp_path / "a.plugin.npz"
    plugin = infmoe.write_layer(infmoe_files.layer_of(rng), tmp_path / "a.npz")
    infmoe.write_attributes(plugin, path)
    with np.load(path, allow_pickle=False) as file:
        arrays = {**file, **change}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(FormatError, match=expected):
        infmoe.read_attributes(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK no archive")
    with pytest.raises(FormatError, match="not an npz file"):
        infmoe.read_attributes(path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(FormatError, match="single array"):
        infmoe.read_attributes(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError):
        infmoe.read_attributes(tmp_path / "none")
