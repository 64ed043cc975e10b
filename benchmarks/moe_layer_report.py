"""Table, plot and file of the results of `moe_layer.py`.

    python benchmarks/moe_layer_report.py results.json --plot moe_layer.png

The file is {"device", "versions", "ceilings", "rows"}, and a row is {"tokens", "ours_us",
"peers_us": {name: us}, "floor_us", "error"} and more: percentiles, experts hit, who was absent.
"""

import argparse
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def best_peer(row: dict) -> tuple[str, float] | None:
    """Name and microseconds of the fastest peer of a row; None where there is none."""
    return min(row["peers_us"].items(), key=lambda item: item[1], default=None)


def ratio(row: dict) -> float | None:
    """How many times as long as ours the best peer takes; None where one of them is missing."""
    best = best_peer(row)
    return None if best is None or row["ours_us"] is None else best[1] / row["ours_us"]


def geometric_mean(rows: Sequence[dict]) -> float | None:
    """Of the rows' ratios; None where no row has one."""
    logarithms = [math.log(found) for row in rows if (found := ratio(row)) is not None]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def table(report: dict) -> str:
    """The rows for people to read, and the geometric mean of best peer over ours."""
    lines = [
        f"{'tokens':>6} {'experts':>7} {'floor us':>9} {'ours us':>9} {'p10-p90':>17} "
        f"{'floor/ours':>10} {'best peer us':>12} {'peer/ours':>9} {'error':>8}  best peer"
    ]
    for row in report["rows"]:
        best = best_peer(row)
        ours = row["ours_us"]
        spread = "-" if ours is None else f"{row.get('p10', ours):.1f}-{row.get('p90', ours):.1f}"
        share = None if ours is None else row["floor_us"] / ours
        lines.append(
            f"{row['tokens']:6d} {row.get('distinct_experts', math.nan):7.1f} "
            f"{row['floor_us']:9.1f} {_number(ours, 9, 1)} {spread:>17} {_number(share, 10, 2)} "
            f"{_number(best and best[1], 12, 1)} {_number(ratio(row), 9, 2)} "
            f"{_scientific(row['error']):>8}  {best[0] if best else '-'}"
        )
    mean = geometric_mean(report["rows"])
    if mean is not None:
        lines.append(f"geometric mean of best peer / ours: {mean:.2f}")
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def write(report: dict, path: Path) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_without_nan(report), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def _without_nan(value: Any) -> Any:
    """null in the place of what JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(report: dict, path: Path) -> str | None:
    """Draws time against tokens, both logarithmic; the suffix of `path` says the format.

    Returns:
        None, or why there is no plot.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    rows = report["rows"]
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["floor_us"] for row in rows], "k--", label="floor")
    _line(axes, rows, lambda row: row["ours_us"], label="ours", linewidth=2.5, marker="o")
    for name in _peer_names(rows):
        _line(axes, rows, lambda row, name=name: row["peers_us"].get(name), label=name, marker=".")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="microseconds",
        title=f"one MoE layer, {report['device']}",
    )
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None


def _line(axes: Any, rows: Sequence[dict], value: Any, **style: Any) -> None:
    points = [(row["tokens"], value(row)) for row in rows if value(row) is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


def _peer_names(rows: Sequence[dict]) -> list[str]:
    """Every peer that a row has a time of, in the order of their first row."""
    return list(dict.fromkeys(name for row in rows for name in row["peers_us"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="a file that moe_layer.py wrote")
    parser.add_argument("--plot", type=Path, help="file to draw to: .png, .svg, .pdf")
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    if options.plot and (why := plot(report, options.plot)):
        print(why)
    print(table(report))


if __name__ == "__main__":
    main()
