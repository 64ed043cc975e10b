"""Short passages of the training texts, which end where a sentence ends, and their topics."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from gpt_oss.nano.corpus import Document

MIN_TOKENS = 40
MAX_TOKENS = 120
TOPIC_WITHIN_WORDS = 14

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*(?=\s+[\"'(]?[A-Z])")
_NO_END = re.compile(r"\b(?:Mr|Mrs|Dr|St|Gen|Col|Messrs|No|Nos|Hon|Jr|U\.S|[A-Z])\.$")
_STAGE = re.compile(r"^\s*(?:\[|ACT\b|SCENE\b|PERSONS\b|DRAMATIS\b|by William)", re.IGNORECASE)
_DETERMINERS = frozenset("the a an our your his her my their this that no of".split())
_AFTER_NOUN = frozenset(
    "of and is was are were has have had in to for on by with that which".split()
)


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences (or speeches of a play) of one document.

    Attributes:
      source: `sotu`, `moby-dick` or `shakespeare`.
      text: the passage; its last character ends a sentence.
      following: the passage that comes next in the document, or "" where none fits.
    """

    source: str
    text: str
    following: str = ""


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, without the blanks between; "Mr." and the like end none."""
    parts: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if _NO_END.search(text[start : match.start()]):
            continue
        parts.append(text[start : match.end()].strip())
        start = match.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def units(document: Document) -> list[tuple[list[str], str]]:
    """Runs of pieces that may be joined, each with what joins them.

    Prose gives one run of sentences a paragraph, joined by a blank; a play or poem gives runs of
    its speeches or stanzas between stage directions, joined by an empty line.
    """
    blocks = [block.strip("\n") for block in re.split(r"\n\n+", document.text)]
    if document.source != "shakespeare":
        flat = [" ".join(block.split()) for block in blocks]
        return [(sentences(block), " ") for block in flat if block]
    runs: list[tuple[list[str], str]] = [([], "\n\n")]
    for block in blocks:
        if _STAGE.match(block) or len(block.split()) < 4:
            runs.append(([], "\n\n"))
        else:
            runs[-1][0].append(block)
    return [run for run in runs if run[0]]


def make_passages(
    documents: Iterable[Document], tokenizer: Tokenizer, rng: random.Random
) -> list[Passage]:
    """Passages of 40 to 120 tokens from every sentence or speech on, in the documents' order."""
    passages: list[Passage] = []
    for document in documents:
        for pieces, joint in units(document):
            lengths = [
                len(e.ids) + 1 for e in tokenizer.encode_batch(pieces, add_special_tokens=False)
            ]
            spans = [_span(pieces, lengths, start, rng) for start in range(len(pieces))]
            texts = [joint.join(pieces[i:end]) if end else "" for i, end in enumerate(spans)]
            for text, end in zip(texts, spans, strict=True):
                if text:
                    following = texts[end] if end < len(texts) else ""
                    passages.append(Passage(document.source, text, following))
    return passages


def _span(pieces: Sequence[str], lengths: Sequence[int], start: int, rng: random.Random) -> int:
    """End of the passage that starts at `start`, or 0 where none of an allowed length ends well."""
    if not re.match(r"[\"'(]?[A-Z]", pieces[start]):
        return 0
    wanted = rng.randint(MIN_TOKENS, MAX_TOKENS - 20)
    total = 0
    for end in range(start, len(pieces)):
        total += lengths[end]
        if total > MAX_TOKENS:
            return 0
        if total >= wanted and re.search(r"[.!?][\"')]*$", pieces[end]):
            return end + 1
    return 0


def common_nouns(documents: Iterable[Document], minimum: int = 60) -> list[str]:
    """Words used like nouns: often after a determiner and before a preposition, verb or stop."""
    total, noun_like = Counter[str](), Counter[str]()
    for document in documents:
        words = re.findall(r"[A-Za-z]+|[.,;:!?]", document.text)
        for before, word, after in zip(words, words[1:], words[2:], strict=False):
            if len(word) < 3 or not word.islower():
                continue
            total[word] += 1
            if before.lower() in _DETERMINERS and (after in _AFTER_NOUN or after in ".,;:!?"):
                noun_like[word] += 1
    nouns = [w for w, n in total.items() if n >= minimum and noun_like[w] > 0.3 * n]
    return sorted(set(nouns) - _DETERMINERS - _AFTER_NOUN)


def index_topics(
    passages: Sequence[Passage], topics: Iterable[str], minimum: int = 8
) -> dict[str, list[int]]:
    """Topic -> numbers of the passages about it; topics with fewer than `minimum` are left out.

    A passage is about a topic when the word stands among its first 14 words or comes twice.
    """
    wanted = set(topics)
    index = defaultdict[str, list[int]](list)
    for number, passage in enumerate(passages):
        words = re.findall(r"[A-Za-z]+", passage.text)
        early = set(words[:TOPIC_WITHIN_WORDS])
        for word, count in Counter(words).items():
            if word in wanted and (count > 1 or word in early):
                index[word].append(number)
    return {topic: index[topic] for topic in sorted(index) if len(index[topic]) >= minimum}
