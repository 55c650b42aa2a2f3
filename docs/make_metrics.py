"""Writes the table of metrics in docs/evaluation.md from m3po_jax/evaluation/registry.py.

python docs/make_metrics.py
"""

from __future__ import annotations

from pathlib import Path

from m3po_jax.evaluation.registry import METRICS

OUTPUT = Path(__file__).with_name("evaluation.md")
BEGIN, END = "<!-- metrics, made by docs/make_metrics.py -->\n", "<!-- /metrics -->\n"


def render() -> str:
    """The table: what a row needs, the rules (the first is the default), and the numbers that tables show."""
    lines = ["| metric | a row needs | rules | numbers |", "|---|---|---|---|"]
    for name, metric in METRICS.items():
        rules = "<br>".join(f"`{rule}`: {whose}" for rule, whose in metric.rules.items())
        numbers = "<br>".join(f"{column.label}: {column.meaning}" for column in metric.columns)
        lines.append(f"| `{name}` | {metric.needs} | {rules} | {numbers} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page with the table in its place."""
    text = OUTPUT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + render() + END + rest.partition(END)[2]


if __name__ == "__main__":
    OUTPUT.write_text(page(), encoding="utf-8")
