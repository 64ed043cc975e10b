"""Which folder a model's name stands for."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny_chat
from huggingface_hub import constants

from gpt_oss import source
from gpt_oss.errors import UserError
from gpt_oss.source import resolve

REPOSITORY = "openai/gpt-oss-20b"
REVISION = source.REVISIONS[REPOSITORY]
SHARDS = ("model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors")


@dataclasses.dataclass
class DiskUsage:
    """What `shutil.disk_usage` returns, as far as it is looked at."""

    free: int


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and no network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture(autouse=True)
def nano(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "CHECKPOINTS", tmp_path / "checkpoints")
    return checkpoint(tmp_path / "checkpoints" / "gpt-oss-nano")


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def checkpoint(folder, shards=()):
    """A folder with the files of a checkpoint, all but empty."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", *(shards or ["model.safetensors"])):
        (folder / name).write_text("{}")
    if shards:
        index = {"weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cached(cache, revision=REVISION, shards=SHARDS):
    """A repository in the cache, as huggingface_hub lays it out."""
    root = cache / "models--openai--gpt-oss-20b"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    return checkpoint(root / "snapshots" / revision, shards)


def test_the_default_is_the_20b_where_it_is_in_the_cache(cache):
    folder = cached(cache)
    found = resolve()
    assert (found.name, found.folder) == (REPOSITORY, folder)
    assert REPOSITORY in found.note and REVISION[:12] in found.note


def test_the_default_takes_another_revision_that_is_in_the_cache(cache):
    folder = cached(cache, revision="f" * 40)
    found = resolve()
    assert (found.folder, "f" * 12 in found.note) == (folder, True)


def test_the_default_is_nano_where_the_cache_is_empty(nano):
    found = resolve()
    assert (found.name, found.folder) == ("gpt-oss-nano", nano)
    assert "not on this machine" in found.note


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS]
)
def test_the_default_is_nano_where_a_file_of_the_20b_is_missing(cache, nano, missing):
    (cached(cache) / missing).unlink()
    assert resolve().folder == nano


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_the_default_is_nano_where_the_index_of_the_20b_is_damaged(cache, nano, index):
    (cached(cache) / "model.safetensors.index.json").write_text(index)
    assert resolve().folder == nano


def test_nano_is_the_shipped_folder(nano):
    assert resolve("gpt-oss-nano").folder == nano
    (nano / "model.safetensors").unlink()
    with pytest.raises(UserError, match="gpt-oss-nano is missing or incomplete"):
        resolve("gpt-oss-nano")


def test_a_folder_is_itself(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "mine")
    monkeypatch.chdir(folder)
    assert resolve(str(folder)).folder.samefile(folder)
    assert (resolve(".").name, resolve(".").note) == ("mine", "")


def test_a_folder_goes_before_a_repository_of_the_same_name(tmp_path, monkeypatch):
    checkpoint(tmp_path / "openai" / "gpt-oss-20b")
    monkeypatch.chdir(tmp_path)
    assert resolve(REPOSITORY).folder == Path(REPOSITORY)


@pytest.mark.parametrize("model", ["gpt-oss-20b", REPOSITORY])
def test_what_is_in_the_cache_needs_no_network(cache, model):
    folder = cached(cache)
    assert resolve(model, offline=True).folder == folder


def test_a_name_that_means_nothing_is_refused_with_the_path_that_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no folder {tmp_path / 'gpt-oss-21b'}.*gpt-oss-nano"):
        resolve("gpt-oss-21b")


@pytest.mark.parametrize("model", ["../x/y", "a/../b", "a b/c", "-a/b", "a/b/c", "", "/nowhere"])
def test_what_is_no_repository_is_not_looked_for(model):
    with pytest.raises(UserError, match="no model"):
        resolve(model)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file: give the folder"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("model", ["gpt-oss", "gpt-oss-nano", "."])
def test_a_revision_of_what_has_none_is_refused(model):
    with pytest.raises(UserError, match="no revisions"):
        resolve(model, revision="main")


def test_offline_is_refused_with_the_cache_and_the_reason(cache, online):
    with pytest.raises(UserError, match=rf"{REPOSITORY}.*{cache}.*\(--offline\)"):
        resolve("gpt-oss-20b", offline=True)


def test_offline_by_environment_is_refused_with_its_variable(cache):
    with pytest.raises(UserError, match=rf"{REPOSITORY}.*{cache}.*HF_HUB_OFFLINE is set"):
        resolve("gpt-oss-20b")


def repository_files(config=None, total_size=6, shards=SHARDS):
    """The files of a repository, with shards of three bytes."""
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)},
    }
    return {
        "config.json": json.dumps(config or tiny_chat.CONFIG.to_dict()),
        "tokenizer.json": "{}",
        "model.safetensors.index.json": json.dumps(index),
        **dict.fromkeys(shards, "..."),
    }


def fake_download(monkeypatch, tmp_path, files=None):
    """Replaces the download; returns the calls that were made."""
    calls, files = [], files or repository_files()

    def download(repository, **options):
        calls.append((repository, options))
        folder = tmp_path / "hub" / "snapshots" / "downloaded"
        folder.mkdir(parents=True, exist_ok=True)
        filters = {k: v for k, v in options.items() if k.endswith("_patterns")}
        for name in huggingface_hub.utils.filter_repo_objects(files, **filters):
            (folder / name).write_text(files[name])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize(
    ("model", "given", "repository", "revision"),
    [
        ("gpt-oss-20b", None, "openai/gpt-oss-20b", source.REVISIONS["openai/gpt-oss-20b"]),
        ("gpt-oss-120b", None, "openai/gpt-oss-120b", source.REVISIONS["openai/gpt-oss-120b"]),
        ("gpt-oss-20b", "main", "openai/gpt-oss-20b", "main"),
        ("someone/fine-tuned", None, "someone/fine-tuned", "main"),
        ("someone/fine-tuned", "v1", "someone/fine-tuned", "v1"),
    ],
)
def test_what_is_not_in_the_cache_is_downloaded_at_its_revision(
    monkeypatch, tmp_path, online, model, given, repository, revision
):
    calls = fake_download(monkeypatch, tmp_path)
    folder = resolve(model, revision=given).folder
    assert source.is_complete(folder)
    assert [(name, options["revision"]) for name, options in calls] == [(repository, revision)] * 2


def test_of_a_repository_only_the_checkpoint_in_its_root_is_downloaded(
    monkeypatch, tmp_path, online
):
    options = fake_download(monkeypatch, tmp_path)
    resolve("gpt-oss-20b")
    filters = {k: v for k, v in options[1][1].items() if k.endswith("_patterns")}
    files = [
        ".gitattributes",
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "metal/model.bin",
        "model-00000-of-00002.safetensors",
        "model.safetensors.index.json",
        "original/config.json",
        "original/dtypes.json",
        "original/model.safetensors",
        "tokenizer.json",
    ]
    taken = list(huggingface_hub.utils.filter_repo_objects(files, **filters))
    assert taken == [
        "config.json",
        "generation_config.json",
        "model-00000-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def downloaded(tmp_path):
    """Names of the files that were downloaded."""
    return {path.name for path in tmp_path.rglob("hub/snapshots/*/*")}


def test_weights_of_another_model_are_not_downloaded(monkeypatch, tmp_path, online):
    files = repository_files(config={**tiny_chat.CONFIG.to_dict(), "model_type": "llama"})
    fake_download(monkeypatch, tmp_path, files)
    with pytest.raises(UserError, match="a/b is not a gpt-oss model: .*model_type.*llama"):
        resolve("a/b")
    assert downloaded(tmp_path) == set(files) - set(SHARDS)


def test_a_repository_without_a_configuration_is_refused(monkeypatch, tmp_path, online):
    files = repository_files()
    del files["config.json"]
    fake_download(monkeypatch, tmp_path, files)
    with pytest.raises(UserError, match="a/b is not a gpt-oss model: .*config.json"):
        resolve("a/b")
    assert downloaded(tmp_path) == set(files) - set(SHARDS)


def test_weights_that_the_disk_has_no_room_for_are_not_downloaded(monkeypatch, tmp_path, online):
    monkeypatch.setattr(source.shutil, "disk_usage", lambda path: DiskUsage(free=2**31))
    files = repository_files(total_size=13 * 2**30)
    fake_download(monkeypatch, tmp_path, files)
    with pytest.raises(UserError, match="needs 13.0 GiB .*, where 2.0 GiB are free"):
        resolve("gpt-oss-20b")
    assert downloaded(tmp_path) == set(files) - set(SHARDS)


@pytest.mark.parametrize("name", ["snapshots/downloaded/" + SHARDS[0], "blobs/ab12.incomplete"])
@pytest.mark.parametrize(("free", "enough"), [(95, True), (94, False)])
def test_what_was_downloaded_before_needs_no_room(
    monkeypatch, tmp_path, online, name, free, enough
):
    monkeypatch.setattr(source.shutil, "disk_usage", lambda path: DiskUsage(free))
    before = tmp_path / "hub" / name
    before.parent.mkdir(parents=True)
    before.write_bytes(bytes(5))
    fake_download(monkeypatch, tmp_path, repository_files(total_size=100))
    if enough:
        assert source.is_complete(resolve("gpt-oss-20b").folder)
    else:
        with pytest.raises(UserError, match="GiB are free"):
            resolve("gpt-oss-20b")


def test_weights_without_an_index_are_downloaded(monkeypatch, tmp_path, online):
    files = repository_files(shards=["model.safetensors"])
    del files["model.safetensors.index.json"]
    fake_download(monkeypatch, tmp_path, files)
    assert source.is_complete(resolve("a/b").folder)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("cannot reach\n\n  the host", "cannot reach the host"),
        ("No host a.b.c found.  Check the network. Or not.", "No host a.b.c found"),
        (
            "404 Client Error. (Request ID: Root=1-2)\n\nRepository Not Found for url: https://h/x.\n"
            "Please make sure you specified the correct repo_id.",
            "Repository Not Found for url: https://h/x",
        ),
        ("Got: no such host\nAn error happened. Or not.", "Got: no such host"),
        ("", "ConnectionError"),
    ],
)
def test_a_failed_download_is_one_line_with_its_reason(
    monkeypatch, tmp_path, online, message, reason
):
    def fail(*args, **options):
        raise ConnectionError(message)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    expected = (
        f"there is no folder {tmp_path / 'a' / 'b'}, and cannot download a/b (revision main): "
        f"{reason}; check the name"
    )
    with pytest.raises(UserError) as refused:
        resolve("a/b")
    assert str(refused.value).startswith(expected)


def test_offline_too_the_folder_is_named_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no folder {tmp_path / 'a' / 'b'}, and a/b .*cache"):
        resolve("a/b")


def test_a_mistyped_folder_is_not_downloaded(tmp_path, monkeypatch, online):
    calls = fake_download(monkeypatch, tmp_path)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no folder {tmp_path / 'checkpoints' / 'nnao'}; as"):
        resolve("checkpoints/nnao")
    assert calls == []


def test_a_folder_does_not_hide_a_released_model(cache, tmp_path, monkeypatch):
    folder = cached(cache)
    (tmp_path / "openai").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(REPOSITORY).folder == folder


def test_a_repository_without_a_checkpoint_is_refused(monkeypatch, tmp_path, online):
    fake_download(monkeypatch, tmp_path)
    monkeypatch.setattr(source, "is_complete", lambda folder: False)
    with pytest.raises(UserError, match="a/b is not a gpt-oss checkpoint"):
        resolve("a/b")


def test_without_huggingface_hub_nano_is_found_and_the_20b_says_what_is_missing(monkeypatch, nano):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve().folder == nano
    with pytest.raises(UserError, match="pip install huggingface-hub"):
        resolve("gpt-oss-20b")


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, gpt_oss, gpt_oss.generate, gpt_oss.flags, gpt_oss.command; "
        "print([m for m in ('jax', 'tokenizers', 'tqdm', 'huggingface_hub') if m in sys.modules])"
    )
    examples = Path(source.__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=examples, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
