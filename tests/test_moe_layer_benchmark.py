"""The benchmark of the MoE layer: its arithmetic by hand, its report, and a toy run as a whole."""

import importlib.util
import json
import math
import os
import sys

import ml_dtypes
import moe_layer
import moe_layer_problem as problem
import moe_layer_reference
import moe_layer_report as reporting
import numpy as np
import pytest
from moe_layer_problem import Shape
from mxfp4_oracle import decode_mxfp4
from peer_process import PeerError, PeerProcess
from timing import in_turns, sampler, summary

pytestmark = pytest.mark.usefixtures("little_compiling")

TOY = Shape(hidden_size=96, intermediate_size=64, num_experts=5, experts_per_token=2)


def test_bytes_and_operations_of_the_two_models_layers():
    # 5760 x 2880 and 2880 x 2880 elements at 4.25 bits
    assert Shape().expert_bytes == (5760 * 2880 + 2880 * 2880) * 17 // 32 == 13_219_200
    assert Shape().flops_per_token == 2 * 4 * 24_883_200
    assert Shape(num_experts=128).expert_bytes == Shape().expert_bytes


def test_floor_is_bytes_for_one_token_and_operations_for_many():
    # 4 experts, a row in and out (2 x 5760 B), 4 rows between written and read (8 x 5760 B)
    assert problem.layer_bytes(Shape(), 1, 4) == 4 * 13_219_200 + 10 * 5760
    one = problem.floor_us(Shape(), 1, 4, terabytes=4.0, teraflops=700.0)
    assert one == pytest.approx((52_876_800 + 57_600) / 4e12 * 1e6)
    many = problem.floor_us(Shape(), 8192, 32, terabytes=4.0, teraflops=700.0)
    assert many == pytest.approx(8192 * 199_065_600 / 700e12 * 1e6)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 100},
        {"intermediate_size": 0},
        {"num_experts": 3, "experts_per_token": 4},
        {"experts_per_token": 0},
    ],
)
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ValueError, match="must be"):
        Shape(**sizes)


@pytest.mark.parametrize("routing", problem.ROUTINGS)
def test_logits_choose_the_same_experts_however_ties_are_broken(routing):
    found = problem.logits(Shape(num_experts=128), 512, 3, routing)
    ids, weights = problem.route(found, 4)
    backwards = 127 - problem.route(found[:, ::-1], 4)[0]
    np.testing.assert_array_equal(ids, backwards)
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    np.testing.assert_array_equal(found, found.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_routings_are_even_and_skewed():
    share = {}
    for routing in problem.ROUTINGS:
        ids, _ = problem.route(problem.logits(Shape(), 4096, 0, routing), 4)
        counts = np.sort(np.bincount(ids.reshape(-1), minlength=32))[::-1]
        share[routing] = counts / len(ids)
    assert np.all(np.abs(share["uniform"] - 4 / 32) < 0.03)
    assert share["zipf"][0] > 0.5 and share["zipf"][-1] < 0.07
    with pytest.raises(ValueError, match="routing must be one of"):
        problem.logits(Shape(), 1, 0, "even")


def test_numbers_are_random_and_differ_from_set_to_set():
    one, other = problem.weights(TOY, 0), problem.weights(TOY, 1)
    assert one.gate_up.blocks.shape == (5, 128, 3, 16) and one.down.scales.shape == (5, 96, 2)
    assert len(np.unique(one.gate_up.blocks)) == 256 and len(np.unique(one.down.scales)) == 3
    assert np.mean(one.gate_up.blocks == other.gate_up.blocks) < 0.02
    again = problem.weights(TOY, 0)
    np.testing.assert_array_equal(one.gate_up.blocks, again.gate_up.blocks)
    for exact in (one.gate_up_bias, one.down_bias, problem.rows(TOY, 7)):
        assert exact.dtype == np.float32
        np.testing.assert_array_equal(exact, exact.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_reference_is_the_layer_in_numpy(tokens):
    layer, x = problem.weights(TOY, 0), problem.rows(TOY, tokens)
    logits = problem.logits(TOY, tokens, 0, "uniform")
    expected = _numpy_layer(layer, x.astype(np.float64), logits.astype(np.float64))
    found = moe_layer_reference.reference(TOY, layer, x, logits)
    assert moe_layer_reference.relative_error(found, expected) < 1e-13


def _numpy_layer(layer, x, logits):
    y = np.zeros_like(x)
    for t, row in enumerate(logits):
        best = sorted(range(len(row)), key=lambda e: -row[e])[: TOY.experts_per_token]
        weights = np.exp(row[best]) / np.exp(row[best]).sum()
        for e, weight in zip(best, weights, strict=True):
            both = _decode(layer.gate_up, e) @ x[t] + layer.gate_up_bias[e]
            gate, up = np.minimum(both[::2], 7), np.clip(both[1::2], -7, 7)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            y[t] += weight * (_decode(layer.down, e) @ hidden + layer.down_bias[e])
    return y


def _decode(packed, expert):
    return decode_mxfp4(packed.blocks[expert], packed.scales[expert])


def test_error_of_nan_is_no_small_error():
    expected = np.ones((2, 3))
    assert moe_layer_reference.relative_error(expected * 1.01, expected) == pytest.approx(0.01)
    assert math.isnan(moe_layer_reference.relative_error(expected * np.nan, expected))


def test_samples_are_times_of_one_unit_and_failures_are_told():
    calls = []

    def run(count):
        calls.append(count)
        return count * 4e-3

    assert sampler(run, per_call=8, warm_up=0.04, sample=0.02)(3) == pytest.approx([500.0] * 3)
    assert calls == [3, 3, 10, 5, 5, 5, 5, 5]
    order = []

    def take(name):
        def samples(count):
            order.append(name)
            if name == "c":
                raise RuntimeError("lost\nand more")
            return [1.0] * count

        return samples

    taken, failed = in_turns({n: take(n) for n in "abc"}, rounds=2, samples=3)
    assert order == ["a", "b", "c", "a", "b"]
    assert taken == {"a": [1.0] * 6, "b": [1.0] * 6} and failed == {"c": "RuntimeError: lost"}
    assert summary([float(n) for n in range(11)]) == {"us": 5.0, "p10": 1.0, "p90": 9.0}


REPORT = {
    "device": "a device",
    "versions": {},
    "ceilings": {},
    "rows": [
        {"tokens": 1, "ours_us": 20.0, "peers_us": {"a": 60.0, "b": 40.0}, "floor_us": 10.0},
        {"tokens": 8, "ours_us": 50.0, "peers_us": {"a": 400.0}, "floor_us": 40.0},
        {"tokens": 64, "ours_us": None, "peers_us": {"a": 500.0}, "floor_us": 90.0},
        {"tokens": 512, "ours_us": 90.0, "peers_us": {}, "floor_us": 90.0},
    ],
}
for _row in REPORT["rows"]:
    _row["error"] = 1e-3


def test_table_says_who_is_best_and_by_how_much():
    # sqrt(40/20 x 400/50)
    assert reporting.geometric_mean(REPORT["rows"]) == pytest.approx(4.0)
    lines = reporting.table(REPORT).splitlines()
    assert lines[-1] == "geometric mean of best peer / ours: 4.00"
    assert lines[1].split() == "1 nan 10.0 20.0 20.0-20.0 0.50 40.0 2.00 1.0e-03 b".split()
    assert lines[3].split() == "64 nan 90.0 - - - 500.0 - 1.0e-03 a".split()
    assert lines[4].split() == "512 nan 90.0 90.0 90.0-90.0 1.00 - - 1.0e-03 -".split()
    assert reporting.geometric_mean(REPORT["rows"][2:]) is None


def test_file_is_json_even_where_an_error_is_nan(tmp_path):
    reporting.write({"rows": [{"error": math.nan, "ours_us": 1.5}]}, tmp_path / "new" / "r.json")
    found = json.loads((tmp_path / "new" / "r.json").read_text(), parse_constant=pytest.fail)
    assert found == {"rows": [{"error": None, "ours_us": 1.5}]}


def test_plot_is_drawn_or_says_what_is_missing(tmp_path):
    path = tmp_path / "folder" / "plot.svg"
    why = reporting.plot(REPORT, path)
    if importlib.util.find_spec("matplotlib"):
        assert why is None and path.read_text().count("<path") > 10
    else:
        assert "matplotlib is not installed" in why and not path.exists()


def test_a_toy_layer_is_measured_without_its_peers_in_torch(tmp_path, capfd):
    output = tmp_path / "results.json"
    # an interpreter that has nothing installed
    arguments = "--tokens 1 5 --hidden 96 --intermediate 64 --experts 5 --experts-per-token 2"
    arguments += " --sets 3 --rounds 1 --samples 2 --sample-ms 0.1 --tolerance 2e-2"
    arguments += " --ceiling-bytes 4096 --ceiling-matmul 32 --peer-python"
    code = moe_layer.main([*arguments.split(), _bare_python(tmp_path), "--output", str(output)])
    assert code == 0
    report = json.loads(output.read_text())
    assert list(report) == ["device", "versions", "ceilings", "rows"]
    assert [row["tokens"] for row in report["rows"]] == [1, 5]
    for row in report["rows"]:
        assert row["ours_us"] > 0 and row["floor_us"] > 0 and 0 < row["error"] < 2e-2
        assert set(row["peers_us"]) == {"ragged_dot", "naive"}
        assert row["same_bits"] and row["host_us"] > 0
        assert set(row["absent"]) == {"triton_kernels", "grouped_mm"}
        assert 0 < row["peer_errors"]["naive"] < 2e-2
    assert report["rows"][0]["distinct_experts"] == 2.0
    printed = capfd.readouterr().out
    assert "absent: triton_kernels" in printed and "geometric mean" in printed


def test_what_is_wrong_is_not_timed(tmp_path):
    arguments = "--tokens 1 --hidden 96 --intermediate 64 --experts 5 --experts-per-token 2"
    arguments += " --sets 2 --rounds 1 --samples 1 --tolerance 1e-9 --peers --ceiling-bytes 4096"
    arguments += f" --ceiling-matmul 32 --output {tmp_path / 'results.json'}"
    assert moe_layer.main(arguments.split()) == 1
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["ours_us"] is None and row["peers_us"] == {}
    assert "relative error" in row["absent"]["ours"]


def _bare_python(folder):
    """This interpreter without the packages that are installed in it, but for NumPy."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_peer_that_cannot_start_fails_or_dies_is_reported(tmp_path):
    with pytest.raises(PeerError, match="could not be started"):
        PeerProcess(tmp_path / "script.py", str(tmp_path / "no such python"))
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom peer_process import serve\n"
        "def fail():\n    raise ValueError('no')\n"
        "serve({'double': lambda x: print('noise') or 2 * x, 'fail': fail,"
        " 'die': lambda: os._exit(7)})\n"
    )
    peer = PeerProcess(script, path=os.path.dirname(moe_layer.__file__))
    assert peer.ask("double", x=21) == 42
    with pytest.raises(PeerError, match="ValueError: no"):
        peer.ask("fail")
    assert peer.ask("double", x=2) == 4
    for _ in range(2):
        with pytest.raises(PeerError, match="ended with code 7"):
            peer.ask("die")
    peer.close()
