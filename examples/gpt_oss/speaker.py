"""A loaded model that answers on the standard streams, once or in a chat."""

import argparse
import dataclasses
import datetime
import functools
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from gpt_oss.agreement import agreed, check_same, common
from gpt_oss.config import GptOssConfig
from gpt_oss.errors import UserError
from gpt_oss.flags import SEEDS
from gpt_oss.harmony import SystemConfig
from gpt_oss.interrupts import Interrupts
from gpt_oss.mesh import describe, needed_devices, sharding_for
from gpt_oss.output import JsonOutput, Output, TextOutput, printable, report
from gpt_oss.pretrained import Pretrained, load
from gpt_oss.sampling import Sampler
from gpt_oss.session import ChatSession, Options, Reply, TextSession
from gpt_oss.source import Source
from moe_jax.checkpoint import Checkpoint
from moe_jax.sharding import Sharding

_COMMAND = re.compile(r"/[A-Za-z]+(?!\S)")
_COMMANDS = "/clear forgets what was said, /help lists the commands, /exit ends"


class Speaker:
    """Answers prompts on an output.

    Attributes:
        session: turns prompts into replies.
    """

    def __init__(
        self,
        session: ChatSession | TextSession,
        options: Options,
        output: Output,
        about: Mapping[str, Any],
        *,
        load_seconds: float,
        context: int,
        seed: int | None,
    ) -> None:
        """Takes what answers, and what its reports say.

        Args:
            session: turns prompts into replies.
            options: how they are generated; their seed is not used.
            output: shows them.
            about: what every report says of the model, see `output.Report`.
            load_seconds: said by the first report only.
            context: most tokens of prompt and answer.
            seed: of the first answer, the next ones counting up; None draws one for each.
        """
        self.session = session
        self._options, self._output, self._about = options, output, about
        self._load_seconds: float | None = load_seconds
        self._context, self._seed = context, seed

    def answer(self, prompt: str) -> None:
        """Answers one prompt.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the answer was ended properly nevertheless.
            UserError: the prompt cannot be answered.
        """
        seed = agreed(secrets.randbelow(2**31)) if self._seed is None else self._seed
        try:
            reply = self.session.reply(prompt, dataclasses.replace(self._options, seed=seed))
        except KeyboardInterrupt:
            _note("interrupted before the answer began")
            raise
        if self._seed is not None:
            self._seed = (seed + 1) % SEEDS
        self._warn(reply)
        with Interrupts() as interrupts:
            try:
                for piece in reply:
                    interrupts.whole(functools.partial(self._output.show, piece))
            except KeyboardInterrupt:
                interrupts.pressed = False
                interrupts.whole(functools.partial(self._break_off, reply, seed))
                raise
            except Exception:
                self._output.abandon()
                raise
            interrupts.whole(functools.partial(self._end, reply, seed))

    def _break_off(self, reply: Reply, seed: int) -> None:
        rest = reply.break_off()
        if rest is not None:
            self._output.show(rest)
        self._end(reply, seed)

    def _end(self, reply: Reply, seed: int) -> None:
        load_seconds, self._load_seconds = self._load_seconds, None
        self._output.end(report(reply, seed=seed, load_seconds=load_seconds, **self._about))
        call = reply.tool_call
        if call is not None:
            text = f"the model calls {call.recipient} with {call.content}; there are no tools here"
            _note(printable(text, sys.stderr))
        elif not reply.answer.strip():
            cut = reply.finish_reason == "length"
            more = ": allow more tokens with --max-tokens or --context" if cut else ""
            _note(f"the model gave no answer{more}")

    def _warn(self, reply: Reply) -> None:
        wanted, room = self._options.max_tokens, self._context - reply.statistics.prompt_tokens
        if wanted is not None and wanted > room:
            _note(f"--max-tokens {wanted}: the context has room for {room}, see --context")


def load_speaker(arguments: argparse.Namespace, source: Source, started: float) -> Speaker:
    """Loads the model as the flags say; `started` is when that began, by `time.perf_counter`.

    Raises:
        UserError: other processes were started with something else, or it cannot be done.
        ConfigError, CheckpointError: the model's files are missing or damaged.
    """
    device = _device()
    if arguments.compile_cache is not None:
        _keep_compiled(arguments.compile_cache)
    if jax.process_count() > 1:
        check_same(common(arguments, source))
    sharding = _sharding(arguments, source)
    model = load(
        source,
        dtype=arguments.dtype,
        context=arguments.context,
        progress=sys.stderr.isatty() and not arguments.no_progress,
        algorithm=arguments.algorithm,
        tokens_per_expert_ratio=arguments.tokens_per_expert_ratio,
        sharding=sharding,
    )
    about = {"model": source.name, "device": device, "dtype": model.model.dtype.name}
    spread = (
        "" if sharding is None else f" x {sharding.mesh.size} ({describe(sharding.mesh.shape)})"
    )
    _note(f"{source.name} in {about['dtype']} on {device}{spread}")
    return Speaker(
        model.text() if arguments.raw else _new_chat(model, arguments),
        _options(arguments),
        _output(arguments),
        about,
        load_seconds=time.perf_counter() - started,
        context=model.engine.context,
        seed=arguments.seed,
    )


def _device() -> str:
    """The kind of the device that JAX takes."""
    try:
        return jax.devices()[0].device_kind
    except (RuntimeError, AssertionError) as error:  # JAX asserts for a platform it lacks
        wanted = os.environ.get("JAX_PLATFORMS")
        asked = f"; JAX_PLATFORMS is {wanted!r}: leave it out, or install JAX for that"
        reason = " ".join(str(error).split()) or "JAX finds none"
        raise UserError(f"no device to run on: {reason}{asked if wanted else ''}") from None


def _sharding(arguments: argparse.Namespace, source: Source) -> Sharding | None:
    """The devices that the flags name."""
    mesh, count = arguments.mesh, arguments.devices
    if mesh is None and count is None:
        if jax.process_count() == 1:
            return None
        count = jax.device_count()
    config, parts = GptOssConfig.from_folder(source.folder), None
    if mesh is None:
        # 0 for None: processes agree on numbers
        parts = agreed(needed_devices(Checkpoint.open(source.folder).nbytes) or 0) or None
    return sharding_for(config, mesh, count, parts)


def chat(speaker: Speaker) -> None:
    """Answers line after line of the terminal; an empty line is passed over.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed where nothing was typed; during an answer it ends
            the answer only.
    """
    _note(f"chat: {_COMMANDS}; Ctrl-C stops an answer, Ctrl-D ends the chat")
    while (line := _ask()) is not None:
        command = _COMMAND.match(line.strip())
        if command is None:
            _answer(speaker, line)
        elif line.strip() == "/exit":
            return
        elif line.strip() == "/clear" and isinstance(speaker.session, ChatSession):
            speaker.session.clear()
        else:
            _note(f"commands: {_COMMANDS}")


def _answer(speaker: Speaker, line: str) -> None:
    if not line.strip():
        return
    try:
        speaker.answer(line)
    except UserError as error:
        _note(f"{error}, or forget what was said with /clear")
    except KeyboardInterrupt:
        pass  # the report says that the answer was interrupted


def _ask() -> str | None:
    """The next line of the terminal, None at its end."""
    try:
        import readline  # gives input() editing and history
    except ImportError:
        readline = None
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ")
            print("> ", end="", file=sys.stderr, flush=True)  # input() would write it to stdout
            return input()
        except (EOFError, KeyboardInterrupt) as ending:
            _note("")  # the shell's next prompt begins on a line of its own
            if isinstance(ending, EOFError):
                return None
            if readline is None or not readline.get_line_buffer():
                raise


def _new_chat(model: Pretrained, arguments: argparse.Namespace) -> ChatSession:
    today = datetime.date.fromordinal(agreed(datetime.date.today().toordinal()))
    system = SystemConfig(
        current_date=today.isoformat(),
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
