"""Rows of `sharded.py` against those of one device, and as text."""

import math
from typing import Any

from gpt_oss.mesh import describe


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Tokens per second against the row of one device that does the same."""
    keys = ("phase", "batch", "tokens", "rows", "context")
    alone = {
        tuple(row.get(k) for k in keys): row["tokens_per_second"]
        for row in rows
        if "tokens_per_second" in row and row["devices"] == 1
    }
    for row in rows:
        one = alone.get(tuple(row.get(k) for k in keys))
        if one and "tokens_per_second" in row:
            row["speedup"] = row["tokens_per_second"] / one


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    mesh = describe(row["mesh"]) if isinstance(row["mesh"], dict) else row["mesh"]
    names = ("phase", "collective", "communication", "batch", "rows", "tokens")
    parts = [mesh, *(f"{row[name]}" for name in names if name in row)]
    if "tokens_per_second" in row:
        low, high = row["spread"]
        parts.append(f"{row['tokens_per_second']:.1f} tokens/s ({low:.1f} to {high:.1f})")
        parts.append(f"floor {row['floor_tokens_per_second']:.0f}")
        parts.append(f"x{row.get('speedup', math.nan):.2f}")
    elif "us" in row:
        parts.append(f"{row['us']:.1f} us")
    parts += [f"same: {row['same']}"] if "same" in row else []
    parts += [f"error {row['error']:.1e}"] if "error" in row else []
    parts += [f"absent: {row['absent']}"] if "absent" in row else []
    parts += [f"per device {row['bytes_per_device']}"] if "bytes_per_device" in row else []
    return ", ".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """The best mesh of each number of devices, for each phase and size."""
    best: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in rows:
        if "tokens_per_second" in row:
            key = row["phase"], row.get("batch") or row["tokens"], row["devices"]
            if key not in best or row["tokens_per_second"] > best[key]["tokens_per_second"]:
                best[key] = row
    lines = [f"{'':16s} {'devices':>7s} {'tokens/s':>10s} {'speedup':>7s} {'floor':>10s}  mesh"]
    for (phase, size, devices), row in sorted(best.items()):
        lines.append(
            f"{phase:8s}{size:8d} {devices:7d} {row['tokens_per_second']:10.1f} "
            f"{row.get('speedup', math.nan):7.2f} {row['floor_tokens_per_second']:10.1f}  "
            f"{describe(row['mesh'])}"
        )
    return "\n".join(lines)
