"""Meshes for gpt-oss: which fit, what each device reads, and the flags of the command."""

import collections
import dataclasses
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
import tiny_chat
from hypothesis import given
from hypothesis import strategies as st
from sharding_tools import bytes_by_device
from tiny_mesh import sharding

import gpt_oss
from gpt_oss import loader, mesh
from gpt_oss.config import GptOssConfig
from gpt_oss.errors import UserError
from gpt_oss.flags import parse
from gpt_oss.generate import main
from moe_jax.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("little_compiling")

NAME = "divisible_by_8"


def config(kv: int = 8, experts: int = 32, vocab: int = 201088) -> GptOssConfig:
    changes = {
        "num_key_value_heads": kv,
        "num_attention_heads": 8 * kv,
        "num_local_experts": experts,
        "vocab_size": vocab,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return GptOssConfig.from_dict({**tiny.config(NAME), **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(NAME, tmp_path_factory.mktemp("mesh"))


@pytest.fixture
def reads(monkeypatch):
    """Every read of a checkpoint: name, the bounds of each axis, bytes."""
    found = []
    real = Checkpoint.read

    def read(self, name, index=()):
        array = real(self, name, index)
        shape = self.tensors[name].shape
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        found.append((name, bounds, array.nbytes))
        return array

    monkeypatch.setattr(Checkpoint, "read", read)
    return found


class TestChoice:
    @pytest.mark.parametrize(
        ("changes", "count", "expected"),
        [
            ({}, 4, (1, 1, 4)),
            ({}, 8, (1, 1, 8)),
            ({}, 16, (1, 2, 8)),
            ({}, 32, (1, 4, 8)),
            ({"experts": 128}, 64, (1, 8, 8)),
            ({"kv": 2, "experts": 16}, 8, (1, 4, 2)),
            ({"kv": 3, "experts": 6, "vocab": 150}, 6, (1, 2, 3)),
            ({}, 1, (1, 1, 1)),
        ],
    )
    def test_examples(self, changes, count, expected):
        assert tuple(mesh.choose_sizes(config(**changes), count).values()) == expected

    @pytest.mark.parametrize(
        ("changes", "count", "parts", "expected"),
        [
            ({}, 4, 1, (4, 1, 1)),
            ({}, 3, 1, (3, 1, 1)),
            ({}, 8, 2, (4, 1, 2)),
            ({}, 8, 3, (2, 1, 4)),
            ({}, 4, 9, (1, 1, 4)),
            ({"kv": 2}, 8, 4, (2, 2, 2)),
        ],
    )
    def test_as_many_copies_as_have_room(self, changes, count, parts, expected):
        assert tuple(mesh.choose_sizes(config(**changes), count, parts).values()) == expected

    def test_too_few_devices_for_a_copy(self):
        with pytest.raises(UserError, match="over 6 devices: .* or --mesh data=3,expert=1,model=2"):
            mesh.choose_sizes(config(), 6, 4)

    @pytest.mark.parametrize(
        ("limits", "num_bytes", "expected"),
        [
            ([100, 80], 40, 1),
            ([100, 80], 41, 2),
            ([100, 100], 0, 1),
            ([100, 100], 401, 9),
            ([100, None], 40, None),
        ],
    )
    def test_weights_take_half_of_the_memory(self, limits, num_bytes, expected, monkeypatch):
        def device(limit):
            stats = None if limit is None else {"bytes_limit": limit}
            return SimpleNamespace(memory_stats=lambda: stats)

        monkeypatch.setattr(mesh.jax, "local_devices", lambda: [device(n) for n in limits])
        assert mesh.needed_devices(num_bytes) == expected

    @given(st.integers(1, 16), st.integers(5, 96), st.integers(50, 400), st.integers(1, 64))
    def test_weights_are_split_over_all_devices_or_it_refuses(self, kv, experts, vocab, count):
        shape = config(kv, experts, vocab)
        if math.gcd(experts, vocab) % count:
            with pytest.raises(UserError, match=f"cannot be split over {count} devices"):
                mesh.choose_sizes(shape, count)
            return
        sizes = mesh.choose_sizes(shape, count)
        assert math.prod(sizes.values()) == count and mesh.fault(shape, sizes) is None
        assert sizes["data"] == 1

    @pytest.mark.parametrize(
        ("count", "message"),
        [
            (3, "over 3 devices: 1, 2, 4, 8, 16 or 32 would do, or --mesh data=3,expert=1,model=1"),
            (64, "over 64 devices: .* data=2,expert=4,model=8, which holds the model 2 times"),
        ],
    )
    def test_numbers_of_devices_that_do_not_fit(self, count, message):
        with pytest.raises(UserError, match=message):
            mesh.choose_sizes(config(), count)

    def test_copies_of_the_model_are_made_where_they_are_asked_for(self):
        here = mesh.sharding_for(config(), {"data": 3})
        assert here is not None and here.mesh.shape["data"] == 3

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            (
                {"model": 3},
                r"'model' of size 3 does not divide 8 key/value heads: 1, 2, 4 or 8 would",
            ),
            (
                {"expert": 5},
                r"of sizes 5 and 1 do not divide the experts of 24: a product of 1, 2,",
            ),
            (
                {"expert": 3},
                r"the vocabulary of 320: a product of 1, 2, 4 or 8 would",
            ),
            ({"data": 3, "expert": 4}, r"data=3,expert=4,model=1 needs 12 devices, there are 8"),
        ],
    )
    def test_meshes_that_do_not_fit(self, sizes, message):
        with pytest.raises(UserError, match=message):
            mesh.sharding_for(GptOssConfig.from_dict(tiny.config(NAME)), sizes)

    def test_nothing_asked_for(self):
        assert mesh.sharding_for(config()) is None


class TestLoading:
    @pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 4)], ids=str)
    def test_each_byte_is_read_once(self, folder, reads, sizes):
        loader.load_model(folder, sharding=sharding(sizes))
        assert sum(nbytes for *_, nbytes in reads) == Checkpoint.open(folder).nbytes

    @pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
    def test_a_device_reads_no_other_experts(self, folder, reads, sizes, monkeypatch):
        """What is read on behalf of each device, one tensor and device at a time."""
        here, real = sharding(sizes), jax.make_array_from_callback
        shape = GptOssConfig.from_folder(folder)
        per_device = shape.num_experts // (sizes[1] * sizes[2])
        asked = collections.defaultdict(list)

        def make(whole, where, read, dtype):
            for device, index in where.addressable_devices_indices_map(whole).items():
                before = len(reads)
                array = read(index)
                asked[device] += reads[before:]
                assert array.shape == where.shard_shape(whole)
            return real(whole, where, read, dtype=dtype)

        monkeypatch.setattr(jax, "make_array_from_callback", make)
        monkeypatch.setattr(loader, "_READERS", 1)
        loader.load_model(folder, sharding=here)
        place = {device: at for at, device in np.ndenumerate(here.mesh.devices)}
        seen = 0
        for device, found in asked.items():
            _, expert, model = place[device]
            first = (expert * sizes[2] + model) * per_device
            for name, bounds, _ in found:
                if ".experts." in name:
                    assert bounds[0] == (first, first + per_device), (device, name)
                    seen += 1
        assert seen

    @pytest.mark.parametrize("prepare", [False, True])
    def test_a_device_holds_its_share(self, folder, prepare):
        here = sharding((2, 2, 2))
        model = loader.load_model(folder, sharding=here, prepare=prepare)
        for block in model.layers:
            experts = block.mlp.experts.tree()
            total = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
            assert set(bytes_by_device(experts).values()) == {total // 4}
            expected = jax.tree.leaves(here.of(experts))
            for leaf, where in zip(jax.tree.leaves(experts), expected, strict=True):
                assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
            router = block.mlp.router_weight.get_value()
            assert router.sharding.is_fully_replicated
        table = model.lm_head.weight.get_value()
        assert table.addressable_shards[0].data.nbytes * 4 == table.nbytes
        heads = model.layers[0].self_attn.q_proj.weight.get_value()
        assert heads.addressable_shards[0].data.nbytes * 2 == heads.nbytes


class TestFlags:
    def test_values(self):
        assert parse(["--mesh", "expert=4"]).mesh == {"expert": 4}
        assert parse(["--mesh", "model=2,data=3"]).mesh == {"model": 2, "data": 3}
        assert parse(["--devices", "4"]).devices == 4
        assert parse([]).mesh is None and parse([]).devices is None

    @pytest.mark.parametrize(
        "flags",
        [
            *(
                ["--mesh", text]
                for text in ("", "4", "expert", "expert=", "expert=0", "expert=-1", "experts=2")
            ),
            *(
                ["--mesh", text]
                for text in ("expert=2,expert=2", "expert=2,", "model=x", "data=1e3")
            ),
            ["--devices", "0"],
            ["--devices", "2", "--mesh", "expert=2"],
        ],
        ids=" ".join,
    )
    def test_wrong(self, flags, capsys):
        with pytest.raises(SystemExit) as caught:
            parse(flags)
        assert caught.value.code == 2
        assert flags[-2] in capsys.readouterr().err

    def test_the_same_answer_as_on_one_device(self, tmp_path, capsys):
        changed = dataclasses.replace(tiny_chat.CONFIG, vocab_size=272, num_experts=8)
        folder = tiny_chat.write(tmp_path, changed)
        prompt = f"--model {folder} --temperature 0 --max-tokens 16 --raw -p Sea".split()
        assert main(prompt) == 0
        one = capsys.readouterr()
        for flag, size, note in (
            ("--mesh", "expert=4", "4,model=1"),
            ("--devices", "4", "2,model=2"),
        ):
            assert main([flag, size, *prompt]) == 0
            several = capsys.readouterr()
            assert several.out == one.out and len(one.out) > 10
            assert f"x 4 (data=1,expert={note})" in several.err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--devices", "16"], "needs 16 devices, there are 8"),
            (["--devices", "3"], "cannot be split over 3 devices: 1, 2, 4"),
            (["--mesh", "model=4"], "'model' of size 4 does not divide 2 key/value heads"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_one_line(self, flags, message, capsys):
        assert main([*flags, "--model", "gpt-oss-nano", "--offline", "-p", "Hi"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_python_interface():
    here = sharding((1, 4, 2))
    model = gpt_oss.load("gpt-oss-nano", sharding=sharding((1, 4, 2)), context=64)
    one = gpt_oss.load("gpt-oss-nano", context=64)
    ids = one.tokenizer.encode("It was a")
    np.testing.assert_allclose(model.logits(ids), one.logits(ids), rtol=0, atol=5e-5)
    assert model.model.sharding == here
