"""The benchmark of sharded models: its arithmetic by hand, and a run as a whole on a tiny model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import sharded
import sharded_floors
import sharded_measure
import sharded_model
import sharded_parts
import sharded_profile
from sharded_floors import Collective, Rates, Step

pytestmark = pytest.mark.usefixtures("little_compiling")

GPT_OSS_20B = sharded_model.model_config("20b")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A report of one device and a mesh of four, with collectives and layers."""
    path = tmp_path_factory.mktemp("sharded") / "report.json"
    arguments = "--model tiny --devices 1 4 --mesh data=1 expert=2,model=2 --output"
    assert sharded.main([*arguments.split(), str(path)]) == 0
    return path


@pytest.fixture
def rows(output):
    return json.loads(output.read_text())["rows"]


def of(rows, phase):
    return [row for row in rows if row["phase"] == phase]


def test_every_mesh_decodes_and_prefills_as_one_device(rows):
    shapes = [(1, 1, 1), (1, 2, 2)]
    decode, prefill = of(rows, "decode"), of(rows, "prefill")
    for found, sizes in ((decode, {1, 8}), (prefill, {128})):
        keys = [(*row["mesh"].values(), row.get("batch") or row["tokens"]) for row in found]
        assert sorted(keys) == sorted((*shape, size) for shape in shapes for size in sizes)
    for row in decode:
        assert row["same"] and row["tokens_agreed"] == row["tokens_checked"] > 0
    for row in prefill:
        assert row["same"] and row["error"] < 1e-4
        assert (row["error"] == 0) == (row["devices"] == 1)


def test_logits_of_prompts_are_those_of_one_device(rows):
    for row in of(rows, "forward"):
        assert row["same"] and row["rows"] == 4
        assert (row["error"] == 0) == (row["devices"] == 1) and row["error"] < 1e-4


def test_rates_follow_from_times(rows):
    alone = {(r["phase"], r.get("batch"), r.get("tokens")): r for r in rows if r["devices"] == 1}
    for row in of(rows, "decode") + of(rows, "prefill"):
        tokens = row.get("batch") or row["tokens"]
        rate = row["tokens_per_second"]
        assert rate == pytest.approx(tokens / row["us"] * 1e6)
        assert row["spread"][0] <= rate <= row["spread"][1]
        assert row["floor_us"] == max(row["floor_memory_us"], row["floor_compute_us"]) > 0
        assert (row["floor_communication_us"] == 0) == (row["devices"] == 1)
        one = alone[row["phase"], row.get("batch"), row.get("tokens")]
        assert row["speedup"] == pytest.approx(rate / one["tokens_per_second"])


def test_each_device_holds_its_share(rows):
    elements = 3 * 64 * 96
    layer = 16 * (elements * 17 // 32 + 4 * (2 * 96 + 64))
    for row in of(rows, "weights"):
        owners = row["mesh"]["expert"] * row["mesh"]["model"]
        assert row["expert_bytes"] == 2 * layer
        assert row["expert_bytes_per_device"] == [2 * layer // owners] * row["devices"]


def test_parts_are_measured(rows):
    collectives = {(r["collective"], r["devices"], r["tokens"]) for r in of(rows, "collective")}
    assert collectives == {(kind, 4, n) for kind in sharded_parts.KINDS for n in (1, 64)}
    layers = {(r["communication"], r["devices"], r["tokens"]) for r in of(rows, "layer")}
    assert layers == {
        (form, count, tokens)
        for form, count in (("psum", 1), ("psum", 4), ("all_to_all", 4))
        for tokens in (1, 64)
    }
    assert all(row["us"] > 0 for row in of(rows, "collective") + of(rows, "layer"))


def test_a_later_run_goes_on_and_sees_what_differs(output, rows, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(output.read_text())
    with np.load(output.with_suffix(".npz")) as found:
        arrays = dict(found)
    arrays["tokens_1"] = arrays["tokens_1"] + 1
    np.savez(path.with_suffix(".npz"), **arrays)
    arguments = "--model tiny --devices 1 --sizes 1 --mesh data=2,expert=2 --batch 1 --prefill"
    assert sharded.main([*arguments.split(), "--output", str(path)]) == 1
    later = json.loads(path.read_text())["rows"]
    added = [row for row in later if row["mesh"]["data"] == 2]
    assert [row["phase"] for row in added] == ["weights", "forward", "decode"]
    assert len(later) == len(rows) + len(added)  # a layer was measured again
    assert [row["same"] for row in added] == [True, True, False]
    assert added[-1]["tokens_agreed"] == 0


def test_no_row_begins_after_the_budget(tmp_path, capsys):
    path = tmp_path / "report.json"
    sizes = "--ceiling-bytes 64 --ceiling-matmul 2"
    arguments = f"--model tiny --devices 1 --budget-s 0 {sizes} --output {path}"
    assert sharded.main(arguments.split()) == 0
    assert not path.exists()
    assert capsys.readouterr().out.count("the rest is left out") == 1 + 1


def test_results_of_another_model_are_refused(output):
    with pytest.raises(ValueError, match="has results for model 'tiny', this run is for '20b'"):
        sharded.main(["--output", str(output), "--ceiling-bytes", "64", "--ceiling-matmul", "2"])


class TestFloors:
    """Against figures that were worked out by hand: gigabytes of a decoding step of gpt-oss-20b."""

    @pytest.mark.parametrize(("batch", "gigabytes"), [(1, 3.734), (8, 9.327), (32, 13.354)])
    def test_bytes_on_one_device(self, batch, gigabytes):
        found = sharded_floors.floors(GPT_OSS_20B, {}, Step(batch, 1, 1023))
        assert found.bytes / 1e9 == pytest.approx(gigabytes, rel=3e-3)
        assert found.collectives == ()

    def test_operations_of_a_prompt(self):
        found = sharded_floors.floors(GPT_OSS_20B, {}, Step(1, 8192, 0))
        assert found.operations / 1e12 == pytest.approx(39.14 + 10.44 + 6.80, rel=2e-2)

    def test_weights_and_caches_are_split(self):
        one = sharded_floors.floors(GPT_OSS_20B, {}, Step(8, 1, 1023))
        four = sharded_floors.floors(GPT_OSS_20B, {"model": 4}, Step(8, 1, 1023))
        routers = 24 * 32 * 2880 * 2
        assert four.bytes - routers == pytest.approx((one.bytes - routers) / 4)
        assert four.operations == pytest.approx(one.operations / 4)
        attention = Collective("psum", 4, 8 * 2880 * 2, 24)
        experts = Collective("psum", 4, 8 * 2880 * 4, 24)
        assert four.collectives == (attention, experts)

    def test_a_split_batch_is_gathered_for_the_experts(self):
        found = sharded_floors.floors(GPT_OSS_20B, {"expert": 4}, Step(8, 1, 1023))
        row = 8 * 2880 * 2
        expected = Collective("all_gather", 4, row, 24), Collective("psum", 4, 2 * row, 24)
        assert found.collectives == expected

    def test_copies_of_everything_send_nothing(self):
        found = sharded_floors.floors(GPT_OSS_20B, {"data": 4}, Step(8, 1, 1023))
        two = sharded_floors.floors(GPT_OSS_20B, {}, Step(2, 1, 1023))
        assert found == two

    def test_time_of_collectives(self):
        rows = [
            {"phase": "collective", "collective": "psum", "devices": 4, "bytes": n, "us": us}
            for n, us in ((1000, 20.0), (3000, 30.0))
        ]
        rates = Rates(rows)
        for size, us in ((10, 20.0), (2000, 25.0), (6000, 60.0)):
            assert rates.microseconds([Collective("psum", 4, size, 2)]) == pytest.approx(2 * us)
        assert rates.microseconds([Collective("psum", 2, 1000, 1)]) is None


def test_meshes_by_default():
    found = [tuple(sizes.values()) for sizes in sharded.default_meshes(GPT_OSS_20B, [1, 2, 4])]
    two, four = [(1, 1, 2), (1, 2, 1), (2, 1, 1)], [(1, 1, 4), (1, 2, 2), (1, 4, 1), (4, 1, 1)]
    assert found == [(1, 1, 1), *two, *four]


def test_a_call_looks_as_far_as_it_must():
    prompts = sharded_model.Prompts(rows=2, length=32, chunk=8, reaches=(16, 32))
    assert prompts.calls() == [(0, 16), (8, 16), (16, 32), (24, 32)]
    assert prompts.tokens == 64


def test_start_of_an_exchange_in_rows():
    """Capacities of 2048 and 8192 tokens are 1.25 * 0.6836 of them, up to a multiple of 8."""
    times = {512: (9.0, 20.0), 8192: (30.0, 31.0), 32768: (90.0, 50.0)}
    rows = [
        {"phase": "layer", "devices": 4, "tokens": n, "communication": form, "us": us}
        for n, pair in times.items()
        for form, us in zip(("psum", "all_to_all"), pair, strict=True)
    ]
    low, high = sharded_parts.start_rows(rows, 4, 4)
    assert (low, high) == (6 * (2 * 2048 - 1752), 6 * (2 * 8192 - 7008))
    assert sharded_parts.start_rows(rows[:2], 4, 4)[1] == float("inf")


def test_agreement():
    expected, margins = np.array([[1, 2, 3], [4, 5, 6]]), np.full((2, 3), 0.5)
    same = sharded_measure.agreement(expected, expected, margins, 0.0)
    assert same["same"] and same["tokens_agreed"] == 6
    other = np.array([[1, 2, 3], [4, 9, 9]])
    assert sharded_measure.agreement(other, expected, margins, 0.6)["same"]
    found = sharded_measure.agreement(other, expected, margins, 0.4)
    assert not found["same"] and found["tokens_agreed"] == 4
    assert not sharded_measure.agreement(other, expected, margins, float("nan"))["same"]


def test_overlap_in_a_trace():
    def event(name, start, duration):
        return SimpleNamespace(name=name, start_ns=1e3 * start, duration_ns=1e3 * duration)

    lines = [
        SimpleNamespace(name="Stream #7(Compute)", events=[event("fusion", 0, 10)]),
        SimpleNamespace(
            name="Stream #8", events=[event("ncclDevKernel_AllReduce", 6, 8), event("gemm", 20, 5)]
        ),
        SimpleNamespace(name="XLA Ops", events=[event("fusion", 0, 100)]),
    ]
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=lines),
        SimpleNamespace(name="/host:CPU", lines=lines),
    ]
    [found] = sharded_profile.device_times(planes)
    assert (found.span, found.collectives, found.kernels, found.overlap) == (25, 8, 15, 4)
    assert found.idle == 6 and list(found.longest)[0] == "fusion"
    assert "hidden 4" in sharded_profile.table("decode", [found])
