"""Loading: bit for bit what is on disk, in no more memory than it takes there."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from loader_files import EXPERTS, NAME, bits, fails, read, with_float_experts, write

from benchmarks import sparse_checkpoint
from gpt_oss import loader
from gpt_oss.config import GptOssConfig
from gpt_oss.layout import parameter_specs
from moe_jax.checkpoint import Checkpoint
from moe_jax.quantization import BlockScaled


def assert_is_on_disk(parameters, originals):
    """Parameters have the very bytes of the tensors."""
    seen = set()
    for name, value in parameters.items():
        if isinstance(value, BlockScaled):
            pairs = {name + "_blocks": value.blocks, name + "_scales": value.scales}
        else:
            pairs = {name: value}
        for key, leaf in pairs.items():
            seen.add(key)
            np.testing.assert_array_equal(bits(leaf.array), bits(originals[key]))
    assert seen == originals.keys()


class TestLayout:
    def test_is_that_of_the_released_files(self, config):
        expected = {key: shape for key, (_, shape) in tiny.shapes(tiny.config(NAME)).items()}
        got = {}
        for name, spec in parameter_specs(config).items():
            assert name == spec.name and len(spec.axes) == len(spec.shape)
            *lead, columns = spec.shape
            if spec.is_expert_weight:
                got[name + "_blocks"] = (*lead, columns // 32, 16)
                got[name + "_scales"] = (*lead, columns // 32)
            else:
                got[name] = spec.shape
        assert got == expected

    def test_norms_begin_with_one_and_biases_with_zero(self, config):
        for name, spec in parameter_specs(config).items():
            kind = "ones" if "norm" in name else "zeros" if name.endswith("bias") else "normal"
            assert spec.init == kind


class TestRead:
    @pytest.mark.parametrize("shards", [1, 2, 5])
    @pytest.mark.parametrize("style", ["released", "transformers5"])
    def test_every_byte_is_kept(self, tmp_path, originals, shards, style):
        tiny.write(NAME, tmp_path, shards, style)
        parameters = read(tmp_path, GptOssConfig.from_folder(tmp_path))
        assert_is_on_disk(parameters, originals)
        specs = parameter_specs(GptOssConfig.from_folder(tmp_path))
        assert parameters.keys() == specs.keys()
        for name, spec in specs.items():
            assert parameters[name].axes == spec.axes and parameters[name].shape == spec.shape

    def test_builds_the_model(self, tmp_path):
        tiny.write(NAME, tmp_path)
        model = loader.load_model(tmp_path)
        assert (
            sum(leaf.nbytes for leaf in jax.tree.leaves(model)) == Checkpoint.open(tmp_path).nbytes
        )

    def test_packed_experts_take_no_more_memory_than_disk(self, tmp_path, config, originals):
        parameters = read(write(tmp_path, originals), config)
        experts = [p for p in parameters.values() if isinstance(p, BlockScaled)]
        assert len(experts) == 2 * config.num_hidden_layers
        on_disk = sum(
            a.nbytes for key, a in originals.items() if key.endswith(("blocks", "scales"))
        )
        assert sum(p.nbytes for p in experts) == on_disk
        assert (
            sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
            == Checkpoint.open(tmp_path).nbytes
        )

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_cast(self, tmp_path, config, tensors, dtype):
        wide = originals_in_float32(tensors)
        for folder, source in (("a", tensors), ("b", wide)):
            (tmp_path / folder).mkdir()
            parameters = read(write(tmp_path / folder, source), config, dtype=dtype)
            for name, value in parameters.items():
                if not isinstance(value, BlockScaled):
                    assert value.dtype == dtype
                    np.testing.assert_array_equal(
                        np.asarray(value.array).astype(np.float32), wide[name]
                    )
                else:
                    assert value.blocks.dtype == np.uint8

    def test_dtype_of_the_file_is_kept_without_a_cast(self, tmp_path, config, tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)
        parameters = read(write(tmp_path, tensors), config)
        assert parameters["lm_head.weight"].dtype == jnp.float32
        assert parameters["model.norm.weight"].dtype == jnp.bfloat16

    @pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32, bool])
    def test_dtype_must_be_a_float(self, tmp_path, config, tensors, dtype):
        write(tmp_path, tensors)
        with pytest.raises(TypeError, match="must be a float dtype"):
            read(tmp_path, config, dtype=dtype)

    def test_float_experts_of_transformers_are_transposed(self, tmp_path, config, tensors, rng):
        expected = with_float_experts(tensors, rng)
        value = read(write(tmp_path, tensors), config)[EXPERTS]
        assert value.axes == ("expert", "out", "in")
        np.testing.assert_array_equal(np.asarray(value.array), expected)

    def test_float_experts_in_the_packed_orientation_are_refused(
        self, tmp_path, config, tensors, rng
    ):
        tensors[EXPERTS] = with_float_experts(tensors, rng)
        fails(tmp_path, tensors, config, rf"{EXPERTS}: expected .*\[7, 64, 192\], got .*192, 64\]")

    def test_largest_first_and_each_once(self, tmp_path, config, tensors, monkeypatch):
        sizes = []
        monkeypatch.setattr(loader, "_READERS", 1)  # several may overtake each other
        real = Checkpoint.read
        monkeypatch.setattr(
            Checkpoint,
            "read",
            lambda self, name, index=(): (
                sizes.append(tensors[name].nbytes),
                real(self, name, index),
            )[1],
        )
        read(write(tmp_path, tensors), config)
        assert sizes == sorted((array.nbytes for array in tensors.values()), reverse=True)

    def test_progress_goes_to_stderr_and_counts_all_bytes(self, tmp_path, config, capsys, tensors):
        read(write(tmp_path, tensors), config, progress=True)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "100%" in printed.err and "B/s" in printed.err
        read(tmp_path, config)
        assert capsys.readouterr().err == ""


def originals_in_float32(tensors):
    return {
        key: array if array.dtype == np.uint8 else array.astype(np.float32)
        for key, array in tensors.items()
    }


MEASURE = """
import sys
import jax
from gpt_oss.loader import load_model

def peak():  # of this program alone; getrusage would count what the parent had when it forked
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

jax.device_put(0.0).block_until_ready()
before = peak()
model = load_model(sys.argv[1])
print(before * 1024, peak() * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_little_more_than_the_checkpoint(tmp_path):
    size = sparse_checkpoint.write(tmp_path, num_layers=2, num_experts=6, vocab=12345)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = map(int, result.stdout.split())
    assert size > 250e6
    assert 0.95 * size < peak - before <= 1.15 * size
