"""What generate.py does: reads the prompt, finds the model, and lets it answer."""

import argparse
import sys
import time

from gpt_oss.errors import UserError
from gpt_oss.processes import joined
from gpt_oss.source import resolve


def run(arguments: argparse.Namespace, started: float) -> None:
    """Runs the command.

    Args:
        arguments: the flags, see `gpt_oss.flags`.
        started: when the program began, by `time.perf_counter`.

    Raises:
        UserError: what is asked for cannot be done.
        ConfigError, CheckpointError: the model's files are missing or damaged.
    """
    with joined(arguments):
        _run(arguments, started)


def _run(arguments: argparse.Namespace, started: float) -> None:
    waiting = time.perf_counter()
    prompt = _prompt(arguments)
    source = resolve(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        progress=not arguments.no_progress,
    )
    waited = time.perf_counter() - waiting
    if source.note:
        print(source.note, file=sys.stderr, flush=True)
    # Everything heavy is imported only here, after what can be refused without it.
    from gpt_oss.speaker import chat, load_speaker

    speaker = load_speaker(arguments, source, started + waited)
    if prompt is None:
        chat(speaker)
    else:
        speaker.answer(prompt)


def _prompt(arguments: argparse.Namespace) -> str | None:
    """The prompt, or None for a chat on the terminal."""
    prompt = arguments.prompt
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        if arguments.raw:
            raise UserError("--raw needs a text to continue: give --prompt or pipe it in")
        return None
    if prompt is None or prompt == "-":
        prompt = _read_stdin()
    if not (prompt if arguments.raw else prompt.strip()):
        raise UserError("the prompt is empty: give --prompt some text, or pipe it in")
    return prompt


def _read_stdin() -> str:
    """All of stdin, less the line feed that ends its last line."""
    if sys.stdin is None:
        return ""
    stream = getattr(sys.stdin, "buffer", None)
    text = sys.stdin.read() if stream is None else _decode(stream.read())
    return text.removesuffix("\n").removesuffix("\r")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 text: {error}; convert it first") from None
