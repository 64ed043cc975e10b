"""A loaded model that answers on the standard streams, once or in a chat."""

import argparse
import dataclasses
import datetime
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

import jax

from gpt_oss.errors import UserError
from gpt_oss.harmony import SystemConfig
from gpt_oss.output import JsonOutput, Output, TextOutput, report
from gpt_oss.pretrained import Pretrained, load
from gpt_oss.sampling import Sampler
from gpt_oss.session import ChatSession, Options, Reply, TextSession
from gpt_oss.source import Source


class Interruptible:
    """Ctrl-C takes effect at `check`, not while a piece is shown; a second one at once."""

    def __init__(self) -> None:
        self._pressed = False
        # only the main thread may handle signals, and only it gets them
        self._main = threading.current_thread() is threading.main_thread()
        self._previous: Any = signal.SIG_DFL

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._pressed:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._previous)

    def _press(self, *_: object) -> None:
        self.check()
        self._pressed = True


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Answers prompts on an output.

    Attributes:
        session: turns prompts into replies.
        options: how they are generated.
        output: shows them.
        about: what every report says of the model and the run, see `output.Report`.
    """

    session: ChatSession | TextSession
    options: Options
    output: Output
    about: Mapping[str, Any]

    def answer(self, prompt: str) -> None:
        """Answers one prompt; an interrupted answer is ended properly too."""
        reply = self.session.reply(prompt, self.options)
        try:
            with Interruptible() as interrupt:
                for piece in reply:
                    self.output.show(piece)
                    interrupt.check()
        except KeyboardInterrupt:
            rest = reply.break_off()
            if rest is not None:
                self.output.show(rest)
            self.output.end(report(reply, **self.about))
            raise
        self.output.end(report(reply, **self.about))
        self._explain(reply)

    def _explain(self, reply: Reply) -> None:
        call = reply.tool_call
        if call is not None:
            _note(f"the model calls {call.recipient} with {call.content}; there are no tools here")
        elif reply.finish_reason == "length" and not reply.answer:
            _note("no answer yet where the reply was cut: allow more --max-tokens or --context")


def load_speaker(arguments: argparse.Namespace, source: Source, started: float) -> Speaker:
    """Loads the model as the flags say."""
    if arguments.compile_cache is not None:
        _keep_compiled(arguments.compile_cache)
    model = load(
        source,
        dtype=arguments.dtype,
        context=arguments.context,
        progress=sys.stderr.isatty() and not arguments.no_progress,
        algorithm=arguments.algorithm,
        tokens_per_expert_ratio=arguments.tokens_per_expert_ratio,
    )
    options = _options(arguments)
    about = {
        "model": source.name,
        "device": jax.devices()[0].device_kind,
        "dtype": model.model.dtype.name,
        "seed": options.seed,
        "load_seconds": time.perf_counter() - started,
    }
    _note(f"{source.name} in {about['dtype']} on {about['device']}")
    session = model.text() if arguments.raw else _new_chat(model, arguments)
    return Speaker(session, options, _output(arguments), about)


def chat(speaker: Speaker) -> None:
    """Answers line after line of the terminal; an empty line is passed over."""
    _note("chat: /clear forgets what was said, Ctrl-D ends")
    while (line := _ask()) is not None:
        if line.strip() == "/clear" and isinstance(speaker.session, ChatSession):
            speaker.session.clear()
        elif line.strip():
            try:
                speaker.answer(line)
            except UserError as error:
                _note(f"{error}, or forget what was said with /clear")


def _ask() -> str | None:
    """The next line of the terminal, None at its end."""
    try:
        import readline  # noqa: F401 - gives input() editing and history
    except ImportError:
        pass
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # input() would write it to stdout
        return input()
    except (EOFError, KeyboardInterrupt) as ending:
        _note("")  # the shell's next prompt begins on a line of its own
        if isinstance(ending, KeyboardInterrupt):
            raise
        return None


def _new_chat(model: Pretrained, arguments: argparse.Namespace) -> ChatSession:
    system = SystemConfig(
        current_date=datetime.date.today().isoformat(),
        reasoning_effort=arguments.reasoning or "medium",
    )
    return model.chat(system=system, developer=arguments.developer)


def _options(arguments: argparse.Namespace) -> Options:
    sampler = Sampler(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
    )
    return Options(
        sampler=sampler,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
        seed=secrets.randbelow(2**31) if arguments.seed is None else arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )


def _output(arguments: argparse.Namespace) -> Output:
    if arguments.json:
        return JsonOutput(sys.stdout)
    return TextOutput(sys.stdout, sys.stderr, show_reasoning=arguments.show_reasoning)


def _keep_compiled(folder: str) -> None:
    """Keeps every compiled program in a folder, for later runs."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--compile-cache {folder}: {error.strerror}; name another") from None
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
