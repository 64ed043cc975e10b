"""Generates text with gpt-oss:  python generate.py --prompt "Why is the sky blue?"

The answer goes to stdout as it is made; reasoning, progress and statistics go to stderr. Without a
prompt it reads stdin or, on a terminal, chats. --help lists the flags.

Exit codes: 0 done, 1 cannot be done (one line says why), 2 wrong flags, 130 interrupted.
"""

import sys

if sys.version_info < (3, 12):  # noqa: UP036 - this file must parse on older ones to say so
    _version = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        f"generate.py needs Python 3.12 or newer, this is {_version}; run it with another one, "
        "for example: python3.12 generate.py"
    )

import importlib.util
import os
import time
from collections.abc import Sequence

_STARTED = time.perf_counter()
_FOLDER = os.path.dirname(os.path.abspath(__file__))

if __name__ == "__main__":
    # As a script its folder is on the path, where its modules would pass for top-level ones.
    sys.path[:] = [os.path.dirname(_FOLDER)] + [p for p in sys.path if p != _FOLDER]
    if importlib.util.find_spec("moe_jax") is None:
        sys.path.append(os.path.dirname(os.path.dirname(_FOLDER)))


def main(argv: Sequence[str] | None = None, started: float | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        argv: the flags; None for those of the process.
        started: when it began, by `time.perf_counter`; None for now.
    """
    try:
        from gpt_oss.flags import parse

        arguments = parse(argv)
        _write_utf8()
        from gpt_oss.command import run

        run(arguments, time.perf_counter() if started is None else started)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        _flush_output()
        print(f"generate.py: {message}", file=sys.stderr)
        return 1
    return 0


def _write_utf8() -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")


def _flush_output() -> None:
    """What cannot be written, to a full disk for one, is not tried again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """What is still buffered goes nowhere, without a complaint at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _message(error: Exception) -> str | None:
    """One line for an error that the user can do something about, else None."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("gpt_oss"):
        return (
            f"the package {error.name} is missing: run  .uv/bin/uv run --extra gpt-oss "
            "examples/gpt_oss/generate.py ...  or first  pip install -e '.[gpt-oss]'  in the root "
            "of the repository"
        )
    if isinstance(error, ImportError):
        return str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory: choose a smaller --context or model, or --dtype bfloat16"
    if isinstance(error, OSError):
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        return f"{error.filename or 'input or output'}: {reason}"
    from gpt_oss.errors import UserError
    from moe_jax.checkpoint import CheckpointError, ConfigError

    if isinstance(error, UserError | CheckpointError | ConfigError):
        return _one_line(str(error))
    return None


def _one_line(message: str) -> str:
    """The first of several faults, and how many more there are."""
    first, *faults = [line.strip() for line in message.splitlines()]
    if not faults:
        return first
    more = "" if len(faults) == 1 else f" (and {len(faults) - 1} more)"
    return f"{first} {faults[0]}{more}"


if __name__ == "__main__":
    sys.exit(main(started=_STARTED))
