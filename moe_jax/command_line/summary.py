"""What is told of a layer, as a table and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclasses.dataclass(frozen=True)
class Summary:
    """A layer in a file; None for what the file does not say.

    Attributes:
        name: the layer's name.
        format: the format that it is in.
        experts: the class of the experts.
        num_experts: how many there are.
        hidden_size: of the tokens.
        intermediate_size: of an expert.
        experts_per_token: how many experts a token is sent to.
        activation: the kind.
        weights: the number format of the experts' matrices.
        nbytes: of all the layer's tensors.
        tensors: dtype and shape of each tensor, as they lie in the file or, where the format has
            no such tensors, in the layer that was read.
    """

    name: str
    format: str
    experts: str
    num_experts: int
    hidden_size: int | None
    intermediate_size: int | None
    experts_per_token: int | None
    activation: str | None
    weights: str
    nbytes: int
    tensors: dict[str, str]


_COLUMNS = {
    "layer": "name",
    "format": "format",
    "experts are": "experts",
    "experts": "num_experts",
    "per token": "experts_per_token",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "activation": "activation",
    "weights": "weights",
    "size": "nbytes",
}


def as_table(summaries: Sequence[Summary]) -> str:
    """A line for each layer, and one for all."""
    rows = [
        [
            bytes_text(summary.nbytes) if field == "nbytes" else _text(getattr(summary, field))
            for field in _COLUMNS.values()
        ]
        for summary in summaries
    ]
    total = sum(summary.nbytes for summary in summaries)
    count = f"{len(summaries)} layer{'s' if len(summaries) != 1 else ''}"
    return f"{table([*_COLUMNS], rows)}\n{count}, {bytes_text(total)}"


def as_json(path: str, summaries: Sequence[Summary]) -> str:
    """The same for programs."""
    layers = [dataclasses.asdict(summary) for summary in summaries]
    return json.dumps({"path": path, "layers": layers}, indent=2)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what they hold, numbers to the right."""
    columns = list(zip(heads, *rows, strict=True))
    lines = []
    for row in [heads, *rows]:
        cells = []
        for cell, column in zip(row, columns, strict=True):
            width = max(map(len, column))
            to_right = all(text[:1].isdigit() or text == "-" for text in column[1:])
            cells.append(cell.rjust(width) if to_right else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def bytes_text(nbytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    size, unit = float(nbytes), 0
    while size >= 999.95 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.{1 if unit else 0}f} {_UNITS[unit]}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
