"""The parser, and how every ending becomes an exit status.

0: done. 1: what was written did not compute what it was made of, and was removed. 2: what was asked
for cannot be done, with one line on stderr that says why.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from moe_jax.command_line.options import FORMATS, MODES, ReadOptions, WriteOptions

_DESCRIPTION = "Mixture-of-experts layers in files: what they hold, and one format from another."
_INSPECT = "Shows the MoE layers of a file: experts, sizes, number formats and bytes."
_CONVERT = """Writes the MoE layers of a file in another format. Both are run on the same random
tokens: the source by moe_jax; the target by onnxruntime or OpenVINO where they can run it, else by
moe_jax. The target is left only if they agree."""
_FLOATS = ("float32", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    if jax.config.jax_platforms is None:
        # the check needs float32 throughout, and no accelerator's memory
        jax.config.update("jax_platforms", "cpu")
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, 2)
    except Exception as error:
        from moe_jax.command_line.convert import CheckError

        if isinstance(error, CheckError):
            return _fail(error, 1)
        raise


def _fail(error: Exception, status: int) -> int:
    print(f"moe-jax: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _inspect(arguments: argparse.Namespace) -> int:
    from moe_jax.command_line.sources import open_source
    from moe_jax.command_line.summary import as_json, as_table

    source = open_source(arguments.file, _read_options(arguments))
    summaries = [source.describe(name) for name in source.names]
    print(as_json(str(arguments.file), summaries) if arguments.json else as_table(summaries))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from moe_jax.command_line.convert import Request, convert
    from moe_jax.command_line.summary import bytes_text, table

    report = convert(
        Request(
            arguments.source,
            arguments.target_file,
            _read_options(arguments),
            WriteOptions(
                arguments.dtype,
                arguments.target if _writes_microsoft(arguments) else None,
                arguments.definition or None,
                arguments.external_data or None,
            ),
            arguments.to,
            arguments.layer or (),
            arguments.dequantize,
            arguments.tolerance,
            arguments.seed,
            arguments.force,
            False if arguments.quiet else None,
        )
    )
    if not arguments.quiet:
        rows = [[name, f"{error:.1e}"] for name, error in report.errors.items()]
        print(table(["layer", "error"], rows))
        print(f"checked by {report.runtime}, tolerance {report.tolerance:.1e}")
        for path, size in report.files.items():
            print(f"wrote {path} ({report.format}, {bytes_text(size)})")
    return 0


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    target = None if _writes_microsoft(arguments) else arguments.target
    return ReadOptions(
        arguments.source_format,
        arguments.experts_per_token,
        arguments.norm,
        arguments.attributes,
        target,
    )


def _writes_microsoft(arguments: argparse.Namespace) -> bool:
    """Whether `--target` says what a file is for, and not what it is from."""
    return getattr(arguments, "to", None) == "onnx-microsoft"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moe-jax", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    inspect = commands.add_parser("inspect", help="what layers a file holds", description=_INSPECT)
    inspect.add_argument("file", metavar="FILE", type=Path, help="file, or folder of safetensors")
    inspect.add_argument("--json", action="store_true", help="for programs")
    _add_read_options(inspect)
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="a file of another", description=_CONVERT)
    _add_convert(convert)
    convert.add_argument("--to", choices=FORMATS, help="where the suffix does not say it")
    convert.set_defaults(run=_convert)

    short = "short for convert --to onnx-MODE"
    onnx = commands.add_parser("export-onnx", help=short, description=_CONVERT)
    _add_convert(onnx)
    onnx.add_argument(
        "--mode",
        dest="to",
        type=_mode,
        required=True,
        metavar="{" + ",".join(MODES) + "}",
        help="nodes CustomMoE of a TensorRT plugin, standard operators, or onnxruntime's MoE",
    )
    onnx.set_defaults(run=_convert)
    return parser


def _mode(text: str) -> str:
    if text not in MODES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(MODES)}, got {text!r}")
    return f"onnx-{text}"


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="file or folder to read")
    parser.add_argument("target_file", metavar="TARGET", type=Path, help="file to write")
    _add_read_options(parser)
    add = parser.add_argument
    add("--layer", action="append", metavar="NAME", help="only this layer; may be repeated")
    add("--dtype", choices=_FLOATS, help="what ONNX computes in")
    add("--dequantize", choices=(*_FLOATS, "bfloat16"), help="packed weights become floats")
    add("--definition", action="store_true", help="onnx-custom: for runtimes without the plugin")
    add("--external-data", action="store_true", help="ONNX: constants go to TARGET.data")
    add("--tolerance", type=_tolerance, help="largest error, relative to the largest output")
    add("--seed", type=int, default=0, help="of the random tokens")
    add("--force", action="store_true", help="replaces what is there")
    add("--quiet", action="store_true", help="only errors")


def _add_read_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="source_format", choices=FORMATS, help="where the file does not say it")
    add("--experts-per-token", type=_positive, metavar="K", help="of safetensors")
    add("--norm", choices=("rms", "layer"), help="of InfMoE: as described, or as computed")
    add("--attributes", type=Path, metavar="FILE", help="of InfMoE: the plugin's attributes")
    add("--target", choices=("cpu", "cuda"), help="of onnx-microsoft: which kernels")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return number
