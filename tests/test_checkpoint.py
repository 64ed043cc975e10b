"""Checkpoint folders: what loads, and a clear error for each way in which files can be wrong."""

import json
import os
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax import checkpoint as checkpoint_module
from moe_jax.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError, ConfigError

TENSORS = {
    "a": np.arange(2 * 3 * 5 * 7, dtype=np.float32).reshape(2, 3, 5, 7),
    "b": np.arange(6, dtype=np.uint8),
    "c": np.array(3.5, np.float16),
    "d": np.zeros((4, 0), np.int32),
}


def data_bytes(tensors):
    return b"".join(array.tobytes() for array in tensors.values())


def entries(tensors):
    """A header's entries for tensors that follow each other."""
    names = {"float32": "F32", "uint8": "U8", "float16": "F16", "int32": "I32"}
    header, end = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    return header


def write_raw(folder, header, data=None, length=None):
    """A file with these header bytes, or this object as its header."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    length = len(header) if length is None else length
    data = data_bytes(TENSORS) if data is None else data
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", length) + header + data)


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """Two shards and an index; `write_index` replaces the index's map."""
    save_file({"a": TENSORS["a"], "c": TENSORS["c"]}, tmp_path / "x.safetensors")
    save_file({"b": TENSORS["b"], "d": TENSORS["d"]}, tmp_path / "y.safetensors")
    write_index(tmp_path, WEIGHT_MAP)
    return tmp_path


WEIGHT_MAP = {
    "a": "x.safetensors",
    "b": "y.safetensors",
    "c": "x.safetensors",
    "d": "y.safetensors",
}


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(checkpoint):
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert checkpoint.nbytes == sum(array.nbytes for array in TENSORS.values())
    for name, array in TENSORS.items():
        got = checkpoint.read(name)
        assert got.dtype == array.dtype and got.shape == array.shape
        np.testing.assert_array_equal(got, array)


class TestRead:
    def test_single_file(self, single):
        assert_same(Checkpoint.open(single))
        assert_same(Checkpoint.open(str(single)))

    def test_shards(self, sharded):
        checkpoint = Checkpoint.open(sharded)
        assert_same(checkpoint)
        assert checkpoint.tensors["b"].path.name == "y.safetensors"

    def test_symbolic_links_as_in_a_download_cache(self, tmp_path):
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
        blobs.mkdir()
        snapshot.mkdir()
        save_file(TENSORS, blobs / "0f3c")
        (snapshot / SINGLE_FILE).symlink_to("../blobs/0f3c")
        assert_same(Checkpoint.open(snapshot))

    def test_bfloat16_and_metadata(self, tmp_path):
        array = np.arange(8).astype(ml_dtypes.bfloat16).reshape(2, 4)
        save_file({"w": array}, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.tensors["w"].dtype_name == "BF16"
        np.testing.assert_array_equal(checkpoint.read("w"), array)

    def test_any_box(self, single, rng):
        checkpoint, array = Checkpoint.open(single), TENSORS["a"]
        for _ in range(200):
            index = tuple(
                slice(*sorted(int(n) for n in rng.integers(0, size + 1, 2))) for size in array.shape
            )[: rng.integers(0, 5)]
            got = checkpoint.read("a", index)
            np.testing.assert_array_equal(got, array[index])

    def test_only_the_bytes_of_the_box_are_read(self, single, monkeypatch):
        counted = []
        checkpoint = Checkpoint.open(single)
        read_exactly = checkpoint_module.read_exactly
        monkeypatch.setattr(
            checkpoint_module,
            "read_exactly",
            lambda file, offset, target: (
                counted.append(target.nbytes),
                read_exactly(file, offset, target),
            ),
        )
        checkpoint.read("a", (slice(1, 2), slice(0, 2), slice(1, 4)))
        assert counted == [3 * 7 * 4] * 2
        counted.clear()
        checkpoint.read("a", (slice(None), slice(None), slice(None), slice(6, 7)))
        assert sum(counted) == 2 * 3 * 5 * 4
        counted.clear()
        checkpoint.read("a")
        assert counted == [TENSORS["a"].nbytes]

    def test_refusals(self, single):
        checkpoint = Checkpoint.open(single)
        with pytest.raises(CheckpointError, match="no tensor z"):
            checkpoint.read("z")
        with pytest.raises(ValueError, match="2 slices for tensor b"):
            checkpoint.read("b", (slice(None), slice(None)))
        with pytest.raises(ValueError, match="step 1"):
            checkpoint.read("b", (slice(None, None, 2),))

    def test_errors_are_value_errors(self):
        assert issubclass(CheckpointError, ValueError) and issubclass(ConfigError, ValueError)


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


SIZES = {
    "a byte less": lambda path: cut(path, 1),
    "half": lambda path: cut(path, path.stat().st_size // 2),
    "header only": lambda path: cut(path, sum(array.nbytes for array in TENSORS.values())),
    "seven bytes": lambda path: os.truncate(path, 7),
    "nothing": lambda path: os.truncate(path, 0),
    "a byte more": lambda path: os.truncate(path, path.stat().st_size + 1),
    "a megabyte more": lambda path: os.truncate(path, path.stat().st_size + 2**20),
}


@pytest.mark.parametrize("size", SIZES)
def test_file_of_the_wrong_size(single, size):
    SIZES[size](single / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        Checkpoint.open(single)


@pytest.mark.parametrize("length", [0, 10**4, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_header_length(tmp_path, length):
    write_raw(tmp_path, entries(TENSORS), length=length)
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        Checkpoint.open(tmp_path)


HEADERS = {
    "not JSON": b"{nonsense}",
    "two values": b"{} {}",
    "array": b"[]",
    "string": b'"text"',
    "null": b"null",
    "not UTF-8": b'{"\xff\xfe": {}}',
    "zero bytes": b"\0" * 64,
    "deep nesting": b'{"a":' * 100_000 + b"}" * 100_000,
    "deep arrays": b"[" * 100_000 + b"]" * 100_000,
    "repeated tensor": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    + b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "repeated field": b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}',
    "huge integer": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
    "metadata number": b'{"__metadata__":{"n":1}}',
    "metadata list": b'{"__metadata__":[]}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_header_text(tmp_path, header):
    write_raw(tmp_path, HEADERS[header], data=b"")
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        Checkpoint.open(tmp_path)


FIELDS = {
    "no dtype": {"dtype": ...},
    "no shape": {"shape": ...},
    "no offsets": {"data_offsets": ...},
    "another field": {"strides": [1]},
    "unknown dtype": {"dtype": "F31"},
    "dtype of another width": {"dtype": "U16"},
    "dtype not a string": {"dtype": ["U8"]},
    "other shape": {"shape": [7]},
    "negative size": {"shape": [-6]},
    "two negative sizes": {"shape": [-2, -3]},
    "float size": {"shape": [6.0]},
    "boolean size": {"shape": [6, True]},
    "shape a number": {"shape": 6},
    "size 2^63": {"shape": [2**63, 1]},
    "product beyond 64 bits": {"shape": [2**32, 2**32, 6]},
    "negative offset": {"data_offsets": [-6, 0]},
    "reversed offsets": {"data_offsets": [846, 840]},
    "overlap": {"data_offsets": [838, 844]},
    "hole": {"data_offsets": [844, 850]},
    "past the end": {"data_offsets": [10**6, 10**6 + 6]},
    "three offsets": {"data_offsets": [840, 846, 848]},
    "offsets as text": {"data_offsets": ["840", "846"]},
    "not an object": None,
}


@pytest.mark.parametrize("fields", FIELDS)
def test_tensor_fields(tmp_path, fields):
    header = entries(TENSORS)
    assert header["b"]["data_offsets"] == [840, 846]
    changed = FIELDS[fields]
    if changed is None:
        header["b"] = [1, 2]
    else:
        merged = {**header["b"], **changed}
        header["b"] = {key: value for key, value in merged.items() if value is not ...}
    write_raw(tmp_path, header)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}, tensor [bc]"):
        Checkpoint.open(tmp_path)


def test_many_tensors_take_no_time(tmp_path):
    write_raw(tmp_path, entries({str(n): np.zeros(0, np.uint8) for n in range(100_000)}), data=b"")
    start = time.process_time()
    assert len(Checkpoint.open(tmp_path).tensors) == 100_000
    assert time.process_time() - start < 10


SHARD_NAMES = [
    "../x.safetensors",
    "sub/../x.safetensors",
    "sub/x.safetensors",
    "/etc/x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "x.safetensors\0",
    "x\0.safetensors",
    "",
    ".safetensors",
    "..",
    "x.bin",
    "x.safetensors/",
    None,
    7,
    ["x.safetensors"],
]


@pytest.mark.parametrize("shard", SHARD_NAMES, ids=repr)
def test_shard_must_be_a_plain_file_name(sharded, shard):
    write_index(sharded, {**WEIGHT_MAP, "a": shard})
    with pytest.raises(
        CheckpointError, match=rf"{INDEX_FILE}, tensor a: expected a plain file name"
    ):
        Checkpoint.open(sharded)


INDEXES = {
    "not JSON": "{",
    "list": "[]",
    "no weight_map": '{"metadata": {}}',
    "weight_map a list": '{"weight_map": ["x.safetensors"]}',
    "weight_map empty": '{"weight_map": {}}',
    "repeated tensor": '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    "repeated weight_map": '{"weight_map": {"a": "x.safetensors"}, "weight_map": {}}',
    "empty file": "",
}


@pytest.mark.parametrize("index", INDEXES)
def test_index_text(sharded, index):
    (sharded / INDEX_FILE).write_text(INDEXES[index])
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        Checkpoint.open(sharded)


def test_index_names_a_shard_without_the_tensor(sharded):
    write_index(sharded, {**WEIGHT_MAP, "e": "x.safetensors"})
    with pytest.raises(CheckpointError, match=r"x\.safetensors lacks e, which"):
        Checkpoint.open(sharded)


def test_index_names_the_wrong_shard(sharded):
    write_index(sharded, {**WEIGHT_MAP, "b": "x.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"y\.safetensors holds b, which .* in x\.safetensors"
    ):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards(sharded):
    save_file({"b": TENSORS["b"], "d": TENSORS["d"], "a": TENSORS["a"]}, sharded / "y.safetensors")
    with pytest.raises(
        CheckpointError, match=r"y\.safetensors holds a, which .* in x\.safetensors"
    ):
        Checkpoint.open(sharded)


def test_tensor_that_the_index_does_not_know(sharded):
    write_index(sharded, {key: value for key, value in WEIGHT_MAP.items() if key != "c"})
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds c, which .* nowhere"):
        Checkpoint.open(sharded)


def test_both_single_file_and_index(sharded):
    save_file(TENSORS, sharded / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="holds both"):
        Checkpoint.open(sharded)


def test_empty_and_missing_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="holds neither"):
            Checkpoint.open(folder)


def remove(path):
    path.unlink()


def directory(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [remove, directory, pipe, dangling_link, link_to_itself])
@pytest.mark.parametrize("name", ["y.safetensors", INDEX_FILE])
def test_not_a_file(sharded, name, make):
    make(sharded / name)
    expected = "holds neither" if (make, name) == (remove, INDEX_FILE) else name
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(sharded)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable(single):
    (single / SINGLE_FILE).chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoint.open(single)


def replace(path):
    path.rename(path.with_name("old"))
    save_file(TENSORS, path)


def overwrite(path):
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(0, 0))


CHANGES = {
    "removed": remove,
    "truncated": lambda path: cut(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "replaced": replace,
    "written to": overwrite,
}


@pytest.mark.parametrize("change", CHANGES)
def test_file_that_changes_while_loading(single, change):
    checkpoint = Checkpoint.open(single)
    CHANGES[change](single / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        checkpoint.read("a")
