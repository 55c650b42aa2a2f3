"""Writes the table of metrics in docs/evaluation.md from m3po_jax/evaluation/registry.py.

python docs/make_metrics.py
"""

from __future__ import annotations

from pathlib import Path

from m3po_jax.evaluation.published import PUBLISHED
from m3po_jax.evaluation.registry import METRICS

OUTPUT = Path(__file__).with_name("evaluation.md")
BEGIN, END = "<!-- metrics, made by docs/make_metrics.py -->\n", "<!-- /metrics -->\n"
PUBLISHED_BEGIN, PUBLISHED_END = "<!-- published, made by docs/make_metrics.py -->\n", "<!-- /published -->\n"


def render() -> str:
    """The table: what a row needs, the rules (the first is the default), and the numbers that tables show."""
    lines = ["| metric | a row needs | rules | numbers |", "|---|---|---|---|"]
    for name, metric in METRICS.items():
        rules = "<br>".join(f"`{rule}`: {whose}" for rule, whose in metric.rules.items())
        numbers = "<br>".join(f"{column.label}: {column.meaning}" for column in metric.columns)
        lines.append(f"| `{name}` | {metric.needs} | {rules} | {numbers} |")
    return "\n".join(lines) + "\n"


def render_published() -> str:
    """The table of published benchmarks: the files that are read as they are, and the rules."""
    lines = ["| `--benchmark` | `--references` | `--answers` | from | `--rule` |", "|---|---|---|---|---|"]
    for name, published in PUBLISHED.items():
        rules = ", ".join(f"`{rule}`" for rule in METRICS[published.metric].rules)
        cells = [f"`{name}`", published.references, published.answers, published.source, rules]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page with both tables in their places."""
    text = OUTPUT.read_text(encoding="utf-8")
    for begin, content, end in ((BEGIN, render(), END), (PUBLISHED_BEGIN, render_published(), PUBLISHED_END)):
        before, _, rest = text.partition(begin)
        text = before + begin + content + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    OUTPUT.write_text(page(), encoding="utf-8")
