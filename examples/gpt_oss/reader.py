"""Generated token ids -> pieces of text, as a chat or as plain text."""

import dataclasses
from collections.abc import Iterable
from typing import Protocol

from gpt_oss.harmony import Damage, Parser
from gpt_oss.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one generated token brought.

    Attributes:
        token_id: the token; None for text that was held back when generation was broken off.
        text: what it added, perhaps nothing: it may be a part of a character or of a header, or
            be held back because a stop string may have begun.
        channel: `analysis`, `commentary` or `final`; None for plain text and for headers.
        is_answer: whether the text belongs to the answer.
    """

    token_id: int | None
    text: str
    channel: str | None
    is_answer: bool


class Reader(Protocol):
    """Turns token ids into pieces of text."""

    @property
    def damage(self) -> frozenset[Damage]:
        """How what was read departs from the format."""
        ...

    def push(self, token_id: int, is_last: bool) -> Piece:
        """What an id adds; with the last one, all that was not complete."""
        ...

    def finish(self) -> str:
        """Ends the text before its last token; returns what was not complete."""
        ...


class PlainReader:
    """Reads all tokens as one text; control tokens are not shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()

    @property
    def damage(self) -> frozenset[Damage]:
        """None: there is no format."""
        return frozenset()

    def push(self, token_id: int, is_last: bool) -> Piece:
        """See `Reader`."""
        text = self._stream.step(token_id) if self._tokenizer.is_text(token_id) else ""
        return Piece(token_id, text + (self.finish() if is_last else ""), None, True)

    def finish(self) -> str:
        """See `Reader`."""
        return self._stream.flush()


class ChatReader:
    """Reads tokens as messages; what stands in the channel `final` is the answer.

    Attributes:
        parser: has the messages.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int] = ()) -> None:
        """Takes the tokenizer and ids that end a reply beside those of the format."""
        self.parser = Parser(tokenizer, stop_ids=stop_ids)
        self._answers: set[int] = set()

    @property
    def damage(self) -> frozenset[Damage]:
        """See `Reader`."""
        return frozenset(self.parser.damage)

    def push(self, token_id: int, is_last: bool) -> Piece:
        """See `Reader`."""
        delta = self.parser.push(token_id)
        last = self.parser.finish() if is_last else None
        shown = delta or last
        if shown is None:
            return Piece(token_id, "", None, False)
        text = "".join(d.text for d in (delta, last) if d is not None)
        answers = is_answer(shown.header.channel, shown.header.recipient)
        if answers and shown.index not in self._answers:
            text = ("\n" if self._answers else "") + text  # a second answer on a line of its own
            self._answers.add(shown.index)
        return Piece(token_id, text, shown.header.channel, answers)

    def finish(self) -> str:
        """See `Reader`."""
        last = self.parser.finish()
        return "" if last is None else last.text


def is_answer(channel: str | None, recipient: str | None) -> bool:
    """Whether a message with this header is for the user."""
    return channel == "final" and recipient is None
