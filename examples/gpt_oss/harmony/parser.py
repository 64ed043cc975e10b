"""Ids -> messages, one id at a time, without ever refusing what a model wrote.

Models leave the format now and then: a token too many, a header without an end, an unknown
channel. The parser reads on: text that no message holds becomes reasoning, an unknown channel
becomes commentary, a message left open is closed where the next begins. Every departure is reported
as Damage and the ids are kept, so that the caller can decide what a damaged reply is worth.

What was emitted is never taken back: the output for n ids is a prefix of the output for more.
"""

import codecs
import dataclasses
from collections import Counter
from collections.abc import Iterable

from gpt_oss.harmony.header import OUTSIDE, Damage, Header, HeaderReader
from gpt_oss.harmony.messages import Message
from gpt_oss.tokenizer import Tokenizer

MAX_HEADER_TOKENS = 128
"""A longer header is text whose header got lost."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one id added to one message."""

    index: int
    """Which message, counted from 0."""
    header: Header
    """The message's header."""
    text: str
    """The text added; the texts of a message joined are its content."""
    is_first: bool = False
    """Whether it begins the message."""
    is_last: bool = False
    """Whether it ends the message."""


@dataclasses.dataclass(frozen=True)
class ParsedMessage:
    """A message and how it was written."""

    message: Message
    """The message; it has raw_ids, for replay, if it is an undamaged one of the assistant."""
    ids: tuple[int, ...]
    """Its ids, from `<|start|>` (or what came first) to the last."""
    end: int | None
    """The id that ended it, None if the output stopped or went on without one."""
    damage: frozenset[Damage]
    """How it departs from the format; empty: it does not."""


class Parser:
    """Reads a reply, or a whole conversation, as it comes.

    Args:
      tokenizer: gives the control ids and the text of the others.
      transcript: False: the ids follow `<|start|>assistant`, and the reply ends with the first stop
        id. True: they are whole messages of any role, as render_conversation makes them.
      stop_ids: further ids that end a reply as `<|return|>` does, such as a model's own.

    Attributes:
      messages: the finished messages.
      ids: every id pushed.
      damage: how often each kind of damage occurred.
      stop_id: the id that ended the reply (`<|return|>`, `<|call|>`, `<|endoftext|>` or one of
        `stop_ids`), None before.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, transcript: bool = False, stop_ids: Iterable[int] = ()
    ):
        self._tokenizer = tokenizer
        self._control = tokenizer.control
        self._stop_ids = self._control.stop_ids | frozenset(stop_ids)
        self._ends = self._stop_ids | {self._control.end}
        self._transcript = transcript
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._finished = False
        self._parts: list[str] = []
        self._open: Header | None = None
        self.messages: list[ParsedMessage] = []
        self.ids: list[int] = []
        self.damage: Counter[Damage] = Counter()
        self.stop_id: int | None = None
        self._begin_header([], role_written=not transcript)

    @property
    def current(self) -> Header | None:
        """The header of the message being written, None between messages."""
        return self._open

    def push(self, token_id: int) -> Delta | None:
        """Takes one id; returns what it added, if anything. Never raises on an integer."""
        self.ids.append(token_id)
        if self._finished:
            self._report(Damage.TRAILING)
        elif token_id not in self._stop_ids and self._tokenizer.is_text(token_id):
            self._message_ids.append(token_id)
            return self._push_text(self._tokenizer.token_bytes(token_id))
        elif self._open is None:
            return self._push_header_control(token_id)
        else:
            return self._push_content_control(self._open, token_id)

    def feed(self, ids: Iterable[int]) -> list[Delta]:
        """Pushes several ids; the deltas do not depend on how the ids are divided into calls."""
        return [delta for delta in map(self.push, ids) if delta is not None]

    def finish(self) -> Delta | None:
        """Ends the input; closes the message being written, if any."""
        if self._finished:
            return None
        self._finished = True
        if self._open is not None:
            return self._close(self._open, None)
        if self._header.begun or self._header.has_channel:
            self._report(Damage.UNFINISHED_HEADER)
            return None
        return self._flush_header(None)

    def _push_text(self, piece: bytes) -> Delta | None:
        if self._open is not None:
            text = self._decoder.decode(piece)
            self._parts.append(text)
            return Delta(len(self.messages), self._open, text) if text else None
        self._header.add(piece)
        if self._header.length > MAX_HEADER_TOKENS:
            self._report(Damage.TEXT_OUTSIDE_MESSAGE)
            return self._open_message(OUTSIDE, self._decoder.decode(bytes(self._header.text)))
        return None

    def _push_header_control(self, token_id: int) -> Delta | None:
        control = self._control
        if token_id == control.start:
            delta = self._flush_header(None)
            self._begin_header([token_id], begun=True)
            return delta
        self._message_ids.append(token_id)
        if token_id == control.message:
            return self._open_message(self._read_header(), "")
        if token_id in self._ends:
            return self._end_header(token_id)
        if token_id == control.channel:
            self._header.begin_section("channel")
        elif token_id == control.constrain:
            self._header.begin_section("constrain")
        else:
            self._report_stray(token_id)
        return None

    def _push_content_control(self, header: Header, token_id: int) -> Delta | None:
        control = self._control
        if token_id in (control.start, control.channel):
            self._report(Damage.MISSING_END)
            delta = self._close(header, None)
            # A model that forgot `<|end|><|start|>assistant` goes on with its next channel.
            is_start = token_id == control.start
            self._begin_header([token_id], begun=is_start, role_written=not is_start)
            if not is_start:
                self._header.begin_section("channel")
            return delta
        self._message_ids.append(token_id)
        if token_id in self._ends:
            return self._close(header, token_id)
        self._report_stray(token_id)
        return None

    def _begin_header(
        self, ids: list[int], *, begun: bool = False, role_written: bool = False
    ) -> None:
        """`begun`: `<|start|>` was seen; `role_written`: the role is `assistant`, already known."""
        self._header = HeaderReader(
            transcript=self._transcript, begun=begun, role_written=role_written
        )
        self._start_missing = not (begun or role_written)
        self._message_ids = ids
        self._message_damage: set[Damage] = set()

    def _read_header(self) -> Header:
        header = self._header.read()
        if self._start_missing:
            self._report(Damage.MISSING_START)
        for damage in self._header.damage:
            self._report(damage)
        return header

    def _end_header(self, token_id: int) -> Delta | None:
        """An end where `<|message|>` was due."""
        if self._message_ids == [token_id]:
            self._report(Damage.STRAY_CONTROL)
        elif delta := self._flush_header(token_id):
            return delta
        self._begin_header([])
        self._stop_at(token_id)
        return None

    def _flush_header(self, end: int | None) -> Delta | None:
        """Turns the text of a header that led to no message into reasoning."""
        if not self._header.holds_text:
            if self._message_ids:
                self._report(Damage.UNFINISHED_HEADER)
            return None
        self._report(Damage.TEXT_OUTSIDE_MESSAGE)
        first = self._open_message(OUTSIDE, self._decoder.decode(bytes(self._header.text)))
        last = self._close(OUTSIDE, end)
        return dataclasses.replace(first, is_last=True, text=first.text + last.text)

    def _open_message(self, header: Header, text: str) -> Delta:
        self._open = header
        self._parts = [text]
        return Delta(len(self.messages), header, text, is_first=True)

    def _close(self, header: Header, end: int | None) -> Delta:
        index = len(self.messages)
        tail = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        ids, damage = tuple(self._message_ids), frozenset(self._message_damage)
        message = Message(
            content="".join(self._parts) + tail,
            raw_ids=self._replayable(ids) if header.role == "assistant" and not damage else None,
            **vars(header),
        )
        self.messages.append(ParsedMessage(message, ids, end, damage))
        self._open = None
        self._begin_header([])
        self._stop_at(end)
        return Delta(index, header, tail, is_last=True)

    def _replayable(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Without a stop id that is not of the format: rendering puts an end there."""
        foreign = self._stop_ids - self._control.stop_ids - {self._control.end}
        return ids[:-1] if ids[-1] in foreign else ids

    def _stop_at(self, token_id: int | None) -> None:
        if token_id in self._stop_ids and not self._transcript:
            self._finished = True
            self.stop_id = token_id

    def _report(self, damage: Damage) -> None:
        self.damage[damage] += 1
        self._message_damage.add(damage)

    def _report_stray(self, token_id: int) -> None:
        known = 0 <= token_id < self._tokenizer.vocab_size
        self._report(Damage.STRAY_CONTROL if known else Damage.UNKNOWN_ID)


def parse_completion(ids: Iterable[int], tokenizer: Tokenizer) -> list[ParsedMessage]:
    """The messages of a reply: the ids sampled after `<|start|>assistant`. Never raises."""
    return _parse_all(Parser(tokenizer), ids)


def parse_transcript(ids: Iterable[int], tokenizer: Tokenizer) -> list[ParsedMessage]:
    """The messages of a rendered conversation. Never raises."""
    return _parse_all(Parser(tokenizer, transcript=True), ids)


def _parse_all(parser: Parser, ids: Iterable[int]) -> list[ParsedMessage]:
    parser.feed(ids)
    parser.finish()
    return parser.messages
