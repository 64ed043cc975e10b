"""Where a model comes from: the folder that a name, a path or a Hugging Face id stands for.

Of a repository on Hugging Face only the JSON files and the safetensors shards in its root are
taken. The two released models are pinned to a commit, so that a name means the same weights always.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from gpt_oss.errors import UserError

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
"""Where the shipped checkpoint lies."""

DEFAULT = "gpt-oss"
NANO = "gpt-oss-nano"
REPOSITORIES = {"gpt-oss-20b": "openai/gpt-oss-20b", "gpt-oss-120b": "openai/gpt-oss-120b"}
REVISIONS = {
    "openai/gpt-oss-20b": "6cee5e81ee83917806bbde320786a8fb61efebee",
    "openai/gpt-oss-120b": "b5c939de8f754692c1647ca79fbf85e8c1e70f8a",
}
"""Commits of the repositories that are pinned; of others the branch main is taken."""

DESCRIPTIONS = ("*.json",)
"""Files that are downloaded first: they say whether to go on with the weights."""

PATTERNS = (*DESCRIPTIONS, "model-*.safetensors", "model.safetensors")
SUBFOLDERS = ("*/*",)
"""Files that are downloaded, and those among them that are not."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_STATUS = re.compile(r"\d+ (Client|Server) Error\.\s+(\(Request ID: [^)]*\)\s+)?")
_SENTENCE_END = re.compile(r"((?<=[.!?])\s+|\s*\n\s*)(?=[A-Z(])")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model found.

    Attributes:
        name: what to call it.
        folder: holds its files.
        note: how it came to be chosen, where that was not the caller's own choice; or "".
    """

    name: str
    folder: Path
    note: str = ""


def resolve(
    model: str = DEFAULT,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Source:
    """The folder of a model, downloaded if need be.

    Args:
        model: a folder; a Hugging Face id; `gpt-oss-20b` or `gpt-oss-120b`; `gpt-oss-nano`, which
            is shipped; or `gpt-oss`: the 20b where it is on this machine, else the nano.
        revision: commit, branch or tag of a Hugging Face repository; None for the pinned one.
        offline: download nothing.
        progress: show downloads on stderr.

    Raises:
        UserError: there is no such model, or it is elsewhere and cannot be fetched.
    """
    if revision is not None and (model in (DEFAULT, NANO) or Path(model).is_dir()):
        raise UserError(f"{model} has no revisions: leave --revision out, or name a repository")
    if model == DEFAULT:
        return _best_present()
    if model == NANO:
        return _nano()
    if model in REPOSITORIES:
        return _repository(REPOSITORIES[model], revision, offline, progress)
    if model and Path(model).is_dir():  # Path("") would be the current folder
        return Source(Path(model).resolve().name, Path(model))
    if model and Path(model).exists():
        raise UserError(f"{model} is a file: give the folder that holds config.json")
    missing = f"there is no folder {Path(model).absolute()}"
    if not _REPOSITORY.fullmatch(model):
        names = ", ".join((DEFAULT, *REPOSITORIES, NANO))
        raise UserError(
            f"no model {model!r}: {missing}, and it is neither one of {names} nor a Hugging Face "
            f"id such as openai/gpt-oss-20b"
        )
    parent = Path(model).parts[0]
    if Path(parent).is_dir() and model not in REPOSITORIES.values():
        raise UserError(
            f"no model {model!r}: {missing}; as there is a folder {parent}, it is not taken for a "
            f"Hugging Face id: correct it, or run from another folder"
        )
    try:
        return _repository(model, revision, offline, progress)
    except UserError as error:
        raise UserError(f"{missing}, and {error}") from error


def _best_present() -> Source:
    repository = REPOSITORIES["gpt-oss-20b"]
    for revision in (REVISIONS[repository], "main"):
        folder = _cached(repository, revision)
        if folder is not None:
            note = f"gpt-oss is {repository} here, revision {folder.name[:12]}"
            return Source(repository, folder, note)
    note = f"gpt-oss is {NANO} here: {repository} is not on this machine (--model gpt-oss-20b)"
    return dataclasses.replace(_nano(), note=note)


def _nano() -> Source:
    folder = CHECKPOINTS / NANO
    if not is_complete(folder):
        raise UserError(f"{folder} is missing or incomplete: fetch the repository anew")
    return Source(NANO, folder)


def _repository(repository: str, revision: str | None, offline: bool, progress: bool) -> Source:
    revision = revision or REVISIONS.get(repository, "main")
    folder = _cached(repository, revision)
    if folder is None:
        _check_online(repository, revision, offline)
        folder = _download(repository, revision, progress)
    return Source(repository, folder)


def is_complete(folder: Path) -> bool:
    """Whether a folder has configuration, tokenizer and all files of the weights."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    if (folder / "model.safetensors").is_file():
        return True
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        shards = set(index["weight_map"].values())
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _cached(repository: str, revision: str) -> Path | None:
    """The folder of a repository in the Hugging Face cache, if all of it is there."""
    cache = _cache()
    if cache is None or not (cache / f"models--{repository.replace('/', '--')}").is_dir():
        return None
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(SUBFOLDERS),
        )
    except (OSError, ValueError):
        return None
    return Path(path) if is_complete(Path(path)) else None


def _cache() -> Path | None:
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return Path(constants.HF_HUB_CACHE)


def _check_online(repository: str, revision: str, offline: bool) -> None:
    try:
        from huggingface_hub import constants
    except ImportError:
        raise UserError(
            f"{repository} must be downloaded, which needs the package huggingface-hub: "
            f"pip install huggingface-hub, or give --model a folder"
        ) from None
    if offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if offline else "HF_HUB_OFFLINE is set"
        raise UserError(
            f"{repository} (revision {revision}) is not complete in the cache {_cache()} and "
            f"downloads are off ({why}): allow them, or give --model a folder"
        )


def _download(repository: str, revision: str, progress: bool) -> Path:
    """Fetches the JSON files, and the weights if they are a gpt-oss model's and the disk has room.

    Raises:
        UserError: it cannot be fetched, is no gpt-oss model, or needs more space than is free.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    folder = _fetch(repository, revision, DESCRIPTIONS)
    _check_config(repository, folder)
    _check_space(repository, folder)
    folder = _fetch(repository, revision, PATTERNS)
    if not is_complete(folder):
        raise UserError(
            f"{repository} is not a gpt-oss checkpoint: expected config.json, tokenizer.json and "
            f"safetensors in its root, see {folder}"
        )
    return folder


def _fetch(repository: str, revision: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(SUBFOLDERS),
        )
    except Exception as error:  # the network, the disk or the repository: of many types
        raise UserError(
            f"cannot download {repository} (revision {revision}): {_reason(error)}; check the "
            f"name and the connection, or give --model a folder"
        ) from error
    return Path(path)


def _reason(error: Exception) -> str:
    """The first sentence of an error's message that says more than the status of HTTP."""
    text = _STATUS.sub("", str(error).strip())
    sentence = " ".join(_SENTENCE_END.split(text, maxsplit=1)[0].split())
    return sentence.rstrip(".")[:300] or type(error).__name__


def _check_config(repository: str, folder: Path) -> None:
    from gpt_oss.config import GptOssConfig  # imports JAX
    from moe_jax.checkpoint import ConfigError

    try:
        GptOssConfig.from_folder(folder)
    except ConfigError as error:
        raise UserError(f"{repository} is not a gpt-oss model: {error}") from error


def _check_space(repository: str, folder: Path) -> None:
    """Checks that the weights fit the disk, where their index tells how large they are."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        total, shards = int(index["metadata"]["total_size"]), set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    present = [folder / shard for shard in shards if (folder / shard).is_file()]
    # A download that was broken off goes on from the part it left.
    present += (folder.parent.parent / "blobs").glob("*.incomplete")
    needed = total - sum(file.stat().st_size for file in present)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{repository} needs {needed / 2**30:.1f} GiB more in {folder}, where "
            f"{free / 2**30:.1f} GiB are free: free some, or set HF_HOME to a folder with more room"
        )
