"""The benchmark of the grouped matmul: its expected products, and a toy run without torch."""

import json
import sys

import grouped_matmul
import jax.numpy as jnp
import numpy as np
import pytest

SIZES = np.array([3, 0, 5], np.int32)


@pytest.mark.parametrize("name", grouped_matmul.PASSES)
def test_error_is_that_of_the_products_in_numpy(name):
    problem = grouped_matmul.Problem(SIZES, inputs=4, outputs=6)
    x, weight, _, gradient = (np.asarray(array, np.float64) for array in problem.arrays)
    owner = np.repeat(np.arange(3), SIZES)
    expected = {
        "forward": lambda: np.stack([weight[e] @ row for e, row in zip(owner, x, strict=True)]),
        "rows_gradient": lambda: np.stack(
            [row @ weight[e] for e, row in zip(owner, gradient, strict=True)]
        ),
        "weight_gradient": lambda: np.stack(
            [gradient[owner == e].T @ x[owner == e] for e in range(3)]
        ),
    }[name]()
    assert problem.error(name, jnp.asarray(expected, jnp.float32)) < 1e-6
    assert problem.error(name, jnp.asarray(1.5 * expected, jnp.float32)) == pytest.approx(0.5)
    assert np.isnan(problem.error(name, jnp.full(expected.shape, np.nan, jnp.float32)))


def test_a_toy_shape_is_measured_without_torch(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    output = tmp_path / "results.json"
    arguments = "--rows 40 --experts 3 --in 32 --out 64 --rounds 1 --samples 1 --peer-python"
    assert grouped_matmul.main([*arguments.split(), str(python), "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert [row["pass"] for row in report["rows"]] == list(grouped_matmul.PASSES)
    for row in report["rows"]:
        assert set(row["tflops"]) == {"ours", "ragged_dot"} and min(row["tflops"].values()) > 0
        assert "torch" in row["absent"]["grouped_mm"] and row["errors"]["ours"] < 3e-3
    first = report["rows"][0]
    seconds = first["times"]["ours"]["us"] / 1e6
    assert first["tflops"]["ours"] == pytest.approx(2 * 40 * 32 * 64 / seconds / 1e12)
