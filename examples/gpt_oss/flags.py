"""The flags of generate.py."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from gpt_oss.source import DEFAULT

VERSION = "0.1.0"
SEEDS = 2**63
"""Seeds are below it."""

MESH_AXES = ("data", "expert", "model")
"""What --mesh takes."""

_ALGORITHMS = ("auto", "per_token", "dense", "grouped", "fixed_budget")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags; exits with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Generates text with gpt-oss.",
        epilog="Without --prompt it reads stdin or, on a terminal, chats.",
    )
    _add_model_flags(parser.add_argument_group("model"))
    _add_process_flags(parser.add_argument_group("several processes"))
    _add_prompt_flags(parser.add_argument_group("prompt"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    _add_output_flags(parser.add_argument_group("output"))
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    arguments = parser.parse_args(argv)
    if arguments.raw and arguments.developer is not None:
        parser.error("--developer belongs to the chat format: leave it or --raw out")
    if arguments.raw and arguments.reasoning is not None:
        parser.error("--reasoning belongs to the chat format: leave it or --raw out")
    if arguments.ignore_eos and not arguments.raw:
        parser.error("--ignore-eos needs --raw: a chat ends where the model ends it")
    ratio = arguments.tokens_per_expert_ratio
    if ratio is not None and arguments.algorithm not in ("auto", "fixed_budget"):
        parser.error("--tokens-per-expert-ratio needs --algorithm auto or fixed_budget")
    if arguments.algorithm == "fixed_budget" and ratio is None:
        parser.error("--algorithm fixed_budget needs --tokens-per-expert-ratio")
    _check_processes(parser, arguments)
    return arguments


def _check_processes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    coordinator = arguments.coordinator
    numbers = arguments.num_processes, arguments.process_id
    if coordinator is not None and arguments.prompt in (None, "-"):
        parser.error("--coordinator needs --prompt: every process must have the same text")
    if coordinator in (None, "auto"):
        if numbers != (None, None):
            parser.error("--num-processes and --process-id need --coordinator HOST:PORT")
    elif None in numbers:
        parser.error("--coordinator HOST:PORT needs --num-processes and --process-id")
    elif arguments.process_id >= arguments.num_processes:
        parser.error("--process-id must be below --num-processes")


def _add_model_flags(group: Any) -> None:
    group.add_argument(
        "--model",
        default=DEFAULT,
        metavar="NAME",
        help="gpt-oss (the 20b where it is on this machine, else the shipped nano; default), "
        "gpt-oss-20b, gpt-oss-120b, gpt-oss-nano, a folder, or a Hugging Face id",
    )
    group.add_argument("--revision", help="commit, branch or tag on Hugging Face (default: pinned)")
    group.add_argument("--offline", action="store_true", help="download nothing")
    group.add_argument(
        "--context",
        type=_number(int, "at least 2", lambda n: n >= 2),
        metavar="N",
        help="most tokens of prompt and answer (default: the model's, at most 8192)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of float weights and computation; auto: bfloat16, float32 for small models on a CPU",
    )
    group.add_argument(
        "--algorithm", choices=_ALGORITHMS, default="auto", help="how tokens reach their experts"
    )
    group.add_argument(
        "--tokens-per-expert-ratio",
        type=_number(float, "above 0", lambda r: 0 < r < float("inf")),
        metavar="R",
        help="give each expert room for R times its mean share; the answer then depends on it",
    )
    spread = group.add_mutually_exclusive_group()
    spread.add_argument(
        "--devices",
        type=_number(int, "at least 1", lambda n: n >= 1),
        metavar="N",
        help="take N devices (default: 1): copies of the model if they have room, else parts of it",
    )
    spread.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXIS=N,...",
        help="spread it so: data=N holds it N times, expert=N splits experts and vocabulary, "
        "model=N splits attention heads as well; for example expert=2,model=4",
    )
    group.add_argument("--compile-cache", metavar="DIR", help="keep compiled programs here")


def _add_process_flags(group: Any) -> None:
    group.add_argument(
        "--coordinator",
        type=_coordinator,
        metavar="HOST:PORT",
        help="where the first of several processes listens, each of which runs this command; "
        "auto: as the launcher says (Slurm, Open MPI, Kubernetes)",
    )
    group.add_argument(
        "--num-processes",
        type=_number(int, "at least 1", lambda n: n >= 1),
        metavar="N",
        help="how many there are",
    )
    group.add_argument(
        "--process-id",
        type=_number(int, "at least 0", lambda n: n >= 0),
        metavar="I",
        help="which one this is, counted from 0",
    )


def _add_prompt_flags(group: Any) -> None:
    group.add_argument("-p", "--prompt", metavar="TEXT", help="what to answer; - reads stdin")
    group.add_argument(
        "--reasoning",
        choices=("low", "medium", "high"),
        help="how long to think (default: medium)",
    )
    group.add_argument("--developer", metavar="TEXT", help="instructions for the whole chat")
    group.add_argument("--raw", action="store_true", help="continue the text; no chat format")


def _add_sampling_flags(group: Any) -> None:
    group.add_argument(
        "--max-tokens",
        type=_number(int, "at least 1", lambda n: n >= 1),
        metavar="N",
        help="most tokens to generate, reasoning included (default: what the context holds)",
    )
    group.add_argument(
        "--temperature",
        type=_number(float, "0 or more", lambda t: 0 <= t < float("inf")),
        default=1.0,
        metavar="T",
        help="0 takes the likeliest token always (default: 1)",
    )
    group.add_argument(
        "--top-p",
        type=_number(float, "above 0 and at most 1", lambda p: 0 < p <= 1),
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens with this share (default: 1)",
    )
    group.add_argument(
        "--top-k",
        type=_number(int, "at least 1", lambda k: k >= 1),
        metavar="K",
        help="draw from the K likeliest tokens (default: all)",
    )
    group.add_argument(
        "--min-p",
        type=_number(float, "at least 0 and below 1", lambda p: 0 <= p < 1),
        default=0.0,
        metavar="P",
        help="draw tokens at least P times as likely as the likeliest (default: 0)",
    )
    group.add_argument(
        "--seed",
        type=_number(int, "at least 0 and below 2**63", lambda s: 0 <= s < SEEDS),
        help="the same seed gives the same answer; in a chat it counts up with each answer "
        "(default: another each time)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        type=_text,
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="with --raw: go on where the model would end"
    )


def _add_output_flags(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="a JSON object a line for each token")
    reasoning = group.add_mutually_exclusive_group()
    reasoning.add_argument(
        "--show-reasoning",
        action="store_true",
        default=True,
        help="show reasoning on stderr (default)",
    )
    reasoning.add_argument("--hide-reasoning", dest="show_reasoning", action="store_false")
    group.add_argument("--no-progress", action="store_true", help="no progress bars")


def _number(kind: Callable[[str], Any], expected: str, good: Callable[[Any], bool]) -> Any:
    """Reads a number that must satisfy `good`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what}, {expected}, got {text!r}")
        return value

    return read


def _mesh(text: str) -> dict[str, int]:
    """Sizes of mesh axes by name."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or axis in sizes or not re.fullmatch("[1-9][0-9]{0,8}", size):
            raise argparse.ArgumentTypeError(
                f"expected sizes of at least 1 for some of {', '.join(MESH_AXES)}, such as "
                f"expert=4 or data=2,model=4, got {text!r}"
            )
        sizes[axis] = int(size)
    return sizes


def _coordinator(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"\S+:[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"expected HOST:PORT or auto, got {text!r}")
    return text


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected at least one character, got none")
    return text
