"""Text in, text out: chats that remember, and plain continuation, on top of the engine.

    session = ChatSession(engine, tokenizer)
    reply = session.reply("Why is the sky blue?", Options(max_tokens=500))
    for piece in reply: ...                 # or: answer = reply.read()
    reply.finish_reason, reply.statistics

A `Reply` is read once. The chat remembers it when it has been read to its end. What a tool gave
back follows the call as a message:

    session.reply(tool_result("get_time", "12:30")).read()
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal, Protocol

from gpt_oss.errors import UserError
from gpt_oss.generation import Generation, Statistics
from gpt_oss.harmony import (
    Conversation,
    Damage,
    DeveloperConfig,
    Message,
    Parser,
    SystemConfig,
    render_conversation,
)
from gpt_oss.reader import ChatReader, Piece, PlainReader, Reader, is_answer
from gpt_oss.sampling import Greedy, Sampler
from gpt_oss.stop_strings import StopStrings
from gpt_oss.tokenizer import Tokenizer

type Ending = Literal["stop", "length", "stop_string", "tool_call"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a reply is generated.

    Attributes:
        sampler: how tokens are chosen.
        max_tokens: most tokens to generate, reasoning included; the context may end it earlier.
            None for as many as the context holds.
        stop: texts before which the answer ends.
        seed: the same seed gives the same reply.
        ignore_eos: go on after ids that end a text; a chat ends there anyway.

    Raises:
        TypeError: a field is of another type; `stop` must be a tuple.
        ValueError: `max_tokens` is below 1, `seed` is below 0, or a stop string is empty.
    """

    sampler: Greedy | Sampler = Sampler()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Greedy | Sampler):
            raise TypeError(f"sampler must be a Greedy or a Sampler, got {self.sampler!r}")
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, least=1, otherwise=" or None")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) for s in self.stop):
            raise TypeError(f"stop must be a tuple of strings, got {self.stop!r}")
        if not all(self.stop):
            raise ValueError(f"stop strings must have at least one character, got {self.stop!r}")
        _check_integer("seed", self.seed, least=0)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")


def _check_integer(name: str, value: object, *, least: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer{otherwise}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{otherwise}, got {value}")


class TokenGenerator(Protocol):
    """The part of `gpt_oss.engine.Engine` that sessions need."""

    context: int

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampler: Greedy | Sampler,
        *,
        max_tokens: int | None,
        stop_ids: Sequence[int] | None,
        seed: int,
    ) -> Generation:
        """Continues a prompt."""
        ...


class Reply:
    """A reply while it is made. Iterating gives a `Piece` for each token, once.

    Attributes:
        prompt_tokens: tokens of the prompt.
        finish_reason: `stop` (the model ended it), `length` (`max_tokens` or the context did),
            `stop_string`, `tool_call`; None until it is known.
        answer: the answer's text so far.
        tool_call: the call of a function that the reply ended in, or None.
    """

    def __init__(
        self,
        generation: Generation,
        reader: Reader,
        *,
        limit: int,
        stop_ids: frozenset[int],
        stop: Sequence[str],
        on_end: Callable[["Reply"], None] = lambda reply: None,
    ) -> None:
        self.finish_reason: Ending | None = None
        self.answer = ""
        self.tool_call: Message | None = None
        self._generation, self._reader = generation, reader
        self._limit, self._stop_ids, self._on_end = limit, stop_ids, on_end
        self._stops = StopStrings(stop)
        self._pieces = self._read()

    @property
    def damage(self) -> frozenset[Damage]:
        """How the reply so far departs from the format of chats; empty for plain text.

        Text that stands in no message counts as reasoning, so a reply of such text alone has an
        empty `answer`, its text is in the pieces, and `Damage.TEXT_OUTSIDE_MESSAGE` is here.
        """
        return self._reader.damage

    @property
    def statistics(self) -> Statistics:
        """Counts and times of the engine, up to the tokens taken."""
        return self._generation.statistics

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def read(self) -> str:
        """Generates all that is left; returns the whole answer."""
        for _ in self:
            pass
        return self.answer

    def break_off(self) -> Piece | None:
        """Ends the reply early; returns text that was held back, if any."""
        self._pieces.close()
        text = self._stops.flush() if self.finish_reason is None else ""
        self.answer += text
        return Piece(None, text, None, True) if text else None

    def _read(self) -> Generator[Piece]:
        for count, token_id in enumerate(self._generation, start=1):
            stopped = token_id in self._stop_ids
            is_last = stopped or count == self._limit
            piece = self._cut(self._reader.push(token_id, is_last), is_last)
            self.answer += piece.text if piece.is_answer else ""
            if self._stops.found is not None:
                self._end("stop_string")
            elif is_last:
                self._end("stop" if stopped else "length")
            yield piece
            if self.finish_reason is not None:
                return

    def _cut(self, piece: Piece, is_last: bool) -> Piece:
        """The piece as far as it can be shown by now."""
        text = self._stops.push(piece.text) if piece.is_answer else piece.text
        if is_last and (rest := self._stops.flush()):
            if not piece.is_answer:  # an end token: it has no text of its own
                return dataclasses.replace(piece, text=rest, channel="final", is_answer=True)
            text += rest
        return dataclasses.replace(piece, text=text)

    def _end(self, reason: Ending) -> None:
        self._reader.finish()
        self.finish_reason = reason
        self._on_end(self)


class ChatSession:
    """A conversation in the harmony format.

    Attributes:
        conversation: what was said.
    """

    def __init__(
        self,
        engine: TokenGenerator,
        tokenizer: Tokenizer,
        *,
        system: SystemConfig | None = None,
        developer: str | DeveloperConfig | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Begins a conversation.

        Args:
            engine: generates.
            tokenizer: of the model.
            system: content of the system message; None for `SystemConfig()`.
            developer: instructions that precede the first user message, or None.
            stop_ids: ids that end a reply beside those of the format: the model's own.
        """
        self._stop_ids = tokenizer.control.stop_ids | frozenset(stop_ids)
        self._engine, self._tokenizer = engine, tokenizer
        first = [Message("system", system or SystemConfig())]
        if developer is not None:
            config = DeveloperConfig(developer) if isinstance(developer, str) else developer
            first.append(Message("developer", config))
        self._beginning = self.conversation = Conversation(tuple(first))

    def clear(self) -> None:
        """Forgets all but the system and developer messages."""
        self.conversation = self._beginning

    def reply(self, prompt: str | Message, options: Options = Options()) -> Reply:  # noqa: B008
        """Answers what the user says, or a message such as the result of a tool.

        Raises:
            UserError: the text is empty or has no UTF-8 form, or the conversation fills the
                context.
            TypeError: it is neither text nor a message.
            ValueError: the message is one of the assistant or the system.
        """
        conversation = self.conversation.with_messages(_message(prompt))
        try:
            ids = render_conversation(conversation, self._tokenizer)
        except ValueError as error:
            raise UserError(f"the prompt cannot be encoded: {error}") from None
        reader = ChatReader(self._tokenizer, self._stop_ids)

        def remember(reply: Reply) -> None:
            written = _written(reader.parser, reply)
            reply.tool_call = _tool_call(written, reply)
            if reply.tool_call is not None:
                reply.finish_reason = "tool_call"
            self.conversation = conversation.with_messages(*written)

        return _start(self._engine, ids, reader, options, self._stop_ids, remember)


def _message(prompt: str | Message) -> Message:
    """What is said to the assistant, as a message."""
    if isinstance(prompt, Message):
        if prompt.role in ("assistant", "system"):
            raise ValueError(
                f"expected a message for the assistant to answer, of the role user, tool or "
                f"developer, got one of {prompt.role}"
            )
        return prompt
    _check_text(prompt)
    if not prompt.strip():
        raise UserError("the prompt is empty: expected some text")
    return Message("user", prompt)


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected the prompt as a str, got {type(text).__name__}")


def _written(parser: Parser, reply: Reply) -> list[Message]:
    """The assistant's messages, without what a stop string cut off."""
    messages = [m.message for m in parser.messages if m.message.role == "assistant"]
    if reply.finish_reason != "stop_string":
        return messages
    others = [m for m in messages if not is_answer(m.channel, m.recipient)]
    return [*others, Message("assistant", reply.answer, "final")]


def _tool_call(messages: Sequence[Message], reply: Reply) -> Message | None:
    if reply.finish_reason != "stop" or not messages or messages[-1].recipient is None:
        return None
    return messages[-1]


class TextSession:
    """Plain continuation of texts, without a chat format; it remembers nothing."""

    def __init__(
        self, engine: TokenGenerator, tokenizer: Tokenizer, stop_ids: Sequence[int]
    ) -> None:
        """Takes an engine, the model's tokenizer and the ids that end a text."""
        self._engine, self._tokenizer, self._stop_ids = engine, tokenizer, frozenset(stop_ids)

    def reply(self, text: str, options: Options = Options()) -> Reply:  # noqa: B008 - frozen
        """Continues the text.

        Raises:
            UserError: the text is empty or has no UTF-8 form, or fills the context.
            TypeError: it is not a str.
        """
        _check_text(text)
        if not text:
            raise UserError("the prompt is empty: expected some text")
        try:
            ids = self._tokenizer.encode(text)
        except ValueError as error:
            raise UserError(f"the prompt cannot be encoded: {error}") from None
        stop_ids = frozenset() if options.ignore_eos else self._stop_ids
        return _start(self._engine, ids, PlainReader(self._tokenizer), options, stop_ids)


def _start(
    engine: TokenGenerator,
    ids: Sequence[int],
    reader: Reader,
    options: Options,
    stop_ids: frozenset[int],
    on_end: Callable[[Reply], None] = lambda reply: None,
) -> Reply:
    room = engine.context - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens and the context holds {engine.context}, answer "
            f"included: shorten the prompt or enlarge the context (--context)"
        )
    limit = room if options.max_tokens is None else min(options.max_tokens, room)
    generation = engine.generate(
        ids,
        options.sampler,
        max_tokens=limit,
        stop_ids=sorted(stop_ids),
        seed=options.seed,
    )
    return Reply(
        generation, reader, limit=limit, stop_ids=stop_ids, stop=options.stop, on_end=on_end
    )
