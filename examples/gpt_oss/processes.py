"""Several processes that run one model together, each with devices of its own.

All processes run the same command and must take the same decisions, since each starts its part of
every program, see `gpt_oss.agreement`. The first one is the only one that prints.
"""

import argparse
import atexit
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from gpt_oss.errors import UserError

AUTO = "auto"
"""The coordinator to name where a launcher, such as Slurm's, says which process this is."""

_HEARTBEAT_SECONDS = 20
_SHUTDOWN_SECONDS = 10
_JOIN_SECONDS = 120

_LOST = re.compile(
    r"^\s*(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b|gloo|nccl|coordination service"
    r"|heartbeat|connection (closed|reset|refused)|socket closed",
    re.IGNORECASE,
)
"""How errors of the distributed runtime and of collectives read when a process has gone."""


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if the flags name any; all but the first are silent inside.

    A process that fails says so and ends at once: the others notice within half a minute.

    Raises:
        UserError: the processes did not meet, or one of them was lost.
    """
    if arguments.coordinator is None:
        yield
        return
    _join(arguments)
    _keep_stdout()
    import jax

    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as silence:
            if jax.process_index():
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    except BaseException as error:
        # at exit JAX would wait for the others, who may be waiting for this one
        atexit.register(_leave, _exit_code(error))
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
            reason = " ".join(str(error).split())
            raise UserError(f"this or another process was lost: {reason:.300}") from None
        raise


def _exit_code(error: BaseException) -> int:
    """What generate.py, or Python, ends with after an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 0 if isinstance(error, BrokenPipeError) else 1


def _leave(code: int) -> None:
    """Ends the process without waiting for others; what was printed is written first."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _join(arguments: argparse.Namespace) -> None:
    import jax

    named: dict[str, Any] = {}
    if arguments.coordinator != AUTO:
        named = {
            "coordinator_address": arguments.coordinator,
            "num_processes": arguments.num_processes,
            "process_id": arguments.process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--coordinator {arguments.coordinator}: the processes did not meet: {reason}"
        ) from None


def _keep_stdout() -> None:
    """Sends to stderr what libraries of other languages print: the answer only is on stdout."""
    stdout = sys.stdout
    stdout.flush()
    answer = os.dup(stdout.fileno())
    os.dup2(sys.stderr.fileno(), stdout.fileno())
    sys.stdout = open(answer, "w", encoding=stdout.encoding, errors=stdout.errors)
