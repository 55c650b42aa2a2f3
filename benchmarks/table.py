"""The reports of the benchmarks as the Markdown table of docs/performance.md.

python benchmarks/table.py REPORT.json...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEAD = (
    "| workload | peer | ratio | ours, s | peer, s | peak MB, ours / peer | FLOPs / minimum | temp MB "
    "| cache copies |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|\n"
)


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def table(workloads: Iterable[Mapping[str, Any]]) -> str:
    """Markdown of the rows; the program's own figures stand in the first row of each workload."""
    lines, last = [], None
    for entry in workloads:
        first, last = entry["name"] != last, entry["name"]
        own = ["", "", ""]
        if first:
            copies = entry["cache_copies"]
            flops = f"{entry['dot_flops'] / entry['dot_flops_minimum']:.3f}"
            own = [flops, _whole(entry["temp_mb"]), "" if copies is None else str(copies)]
        cells = [
            f"`{entry['name']}`" if first else "",
            f"`{entry['peer']}`",
            f"{entry['ratio']:.2f}" + (" (not clean)" if entry["warnings"] else ""),
            f"{entry['ours_s']:.3f}",
            f"{entry['peer_s']:.3f}",
            f"{_whole(entry['ours_peak_mb'])} / {_whole(entry['peer_peak_mb'])}",
            *own,
        ]
        lines.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(lines)


def rates(report: Mapping[str, Any]) -> str:
    """Markdown of both libraries' rates at the dominating products."""
    lines = [
        f"| {name} {'×'.join(map(str, rate['shape']))} | {rate['jax']} | {rate['torch']} |\n"
        for name, rate in report["gemm_gflops"].items()
    ]
    return "| product, GFLOP/s | XLA | torch |\n|---|--:|--:|\n" + "".join(lines)


def main(paths: list[str]) -> None:
    reports = [json.loads(Path(path).read_text()) for path in paths]
    print(table([entry for report in reports for entry in report["workloads"]]))
    for report in reports:
        print(rates(report))


if __name__ == "__main__":
    main(sys.argv[1:])
