"""How a reply is shown: as text on two streams, or as lines of JSON; and what it took."""

import dataclasses
import json
import os
import re
import sys
from typing import Any, Protocol, TextIO

from gpt_oss.reader import Piece
from gpt_oss.session import Reply

_DIM, _PLAIN = "\033[2m", "\033[22m"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str, stream: TextIO) -> str:
    """A model's text for a stream: a terminal gets U+FFFD for the characters that control it."""
    return _CONTROLS.sub("\ufffd", text) if stream.isatty() else text


@dataclasses.dataclass(frozen=True)
class Report:
    """What a reply took. Rates leave compilation out and are None where nothing is left.

    Attributes:
        model: the model's name.
        device: what it ran on.
        dtype: what it computed in.
        seed: with it the reply can be had again.
        finish_reason: why it ended: `stop`, `length`, `stop_string`, `tool_call`, `interrupted`.
        prompt_tokens: tokens of the prompt.
        generated_tokens: tokens generated, reasoning included.
        load_seconds: from the start of the program until the model was ready, less the wait for
            the prompt and for downloads; None in all but the first report.
        compile_seconds: first runs of the programs that had to be compiled.
        first_token_seconds: from the prompt to the first token, compilation included.
        prompt_tokens_per_second: rate of taking the prompt.
        decode_tokens_per_second: rate of generating.
        peak_memory_bytes: most memory used, of the device or, on a CPU, of the process.
    """

    model: str
    device: str
    dtype: str
    seed: int
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    load_seconds: float | None
    compile_seconds: float
    first_token_seconds: float | None
    prompt_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_memory_bytes: int | None

    def line(self) -> str:
        """All of it in one line for people."""
        parts = [
            _optional("load {:.1f} s", self.load_seconds),
            f"compile {self.compile_seconds:.1f} s",
            _optional("first token {:.2f} s", self.first_token_seconds),
            f"prompt {self.prompt_tokens} tokens"
            + _optional(" at {:.1f} tokens/s", self.prompt_tokens_per_second),
            f"decode {self.generated_tokens} tokens"
            + _optional(" at {:.1f} tokens/s", self.decode_tokens_per_second),
            _optional("peak memory {:.2f} GiB", self.peak_memory_bytes, 2**30),
            f"seed {self.seed}",
            f"ended by {self.finish_reason}",
        ]
        return ", ".join(part for part in parts if part)


def _optional(text: str, value: float | None, unit: int = 1) -> str:
    return "" if value is None else text.format(value / unit)


def report(reply: Reply, *, load_seconds: float | None, **about: Any) -> Report:
    """The report of a reply, whole or broken off."""
    statistics = reply.statistics
    return Report(
        finish_reason=reply.finish_reason or "interrupted",
        prompt_tokens=statistics.prompt_tokens,
        generated_tokens=statistics.generated_tokens,
        load_seconds=load_seconds,
        compile_seconds=statistics.compile_seconds,
        first_token_seconds=statistics.first_token_seconds,
        prompt_tokens_per_second=statistics.prefill.per_second,
        decode_tokens_per_second=statistics.decoding.per_second,
        peak_memory_bytes=peak_memory(),
        **about,
    )


def peak_memory() -> int | None:
    """Most bytes used on the first device, or by the process where the device does not say."""
    import jax

    try:
        import resource
    except ImportError:  # Windows
        resource = None
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Output(Protocol):
    """Shows one reply after the other."""

    def show(self, piece: Piece) -> None:
        """Shows what one token brought, at once."""
        ...

    def end(self, summary: Report) -> None:
        """Ends a reply."""
        ...

    def abandon(self) -> None:
        """Leaves a reply that an error ended, so that a message can follow."""
        ...


class TextOutput:
    """The answer on one stream, all else on the other.

    Answer and reasoning each end with a line feed, so that they do not run into each other where
    both streams are one terminal.
    """

    def __init__(self, answer: TextIO, notes: TextIO, *, show_reasoning: bool) -> None:
        """Takes the streams; reasoning is dimmed on a terminal, without NO_COLOR."""
        self._answer = _Lines(answer)
        self._reasoning = _Lines(notes, dim=_takes_color(notes)) if show_reasoning else None
        self._notes = notes

    def show(self, piece: Piece) -> None:
        """See `Output`."""
        if not piece.text:
            return
        if not piece.is_answer:
            if self._reasoning is not None:
                self._answer.end_line()
                self._reasoning.write(piece.text)
            return
        if self._reasoning is not None:
            self._reasoning.end_line()
        self._answer.write(piece.text)

    def end(self, summary: Report) -> None:
        """See `Output`."""
        self.abandon()
        print(summary.line(), file=self._notes, flush=True)

    def abandon(self) -> None:
        """See `Output`."""
        for lines in (self._reasoning, self._answer):
            if lines is not None:
                lines.end_line()


def _takes_color(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


class _Lines:
    """A stream that knows whether its last line is complete, and is dim until then."""

    def __init__(self, stream: TextIO, *, dim: bool = False) -> None:
        self._stream, self._dim = stream, dim
        self._open = self._dimmed = False

    def write(self, text: str) -> None:
        if self._dim and not self._dimmed:
            self._stream.write(_DIM)
            self._dimmed = True
        self._stream.write(printable(text, self._stream))
        self._stream.flush()
        self._open = not text.endswith("\n")

    def end_line(self) -> None:
        if not self._open and not self._dimmed:
            return
        self._stream.write((_PLAIN if self._dimmed else "") + ("\n" if self._open else ""))
        self._stream.flush()
        self._open = self._dimmed = False


class JsonOutput:
    """One JSON object a line: one for each token, then one with the statistics.

    {"token_id": 17, "text": " sea", "channel": "final"}
    {"statistics": {...}}                                     fields of `Report`
    """

    def __init__(self, stream: TextIO) -> None:
        """Takes the stream for the lines."""
        self._stream = stream

    def show(self, piece: Piece) -> None:
        """See `Output`."""
        self._write({"token_id": piece.token_id, "text": piece.text, "channel": piece.channel})

    def end(self, summary: Report) -> None:
        """See `Output`."""
        self._write({"statistics": dataclasses.asdict(summary)})

    def abandon(self) -> None:
        """See `Output`."""

    def _write(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False)
        # JSON leaves some of the characters that control a terminal as they are
        line = _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
        print(line, file=self._stream, flush=True)
