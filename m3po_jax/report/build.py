"""The verb `report`: one self-contained `report.html` from whatever exists of a run directory."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from m3po_jax.data.tables import atomic_write
from m3po_jax.report import overview
from m3po_jax.report.browser import LEVELS, Item, TokenText, browse_round, finish
from m3po_jax.report.calibration import calibration_views
from m3po_jax.report.comparison import ComparisonView, comparison_view
from m3po_jax.report.figures import CURVES, MORE_CURVES, distributions, training_curves
from m3po_jax.report.formatting import (
    embed_json,
    encode_page,
    format_compact,
    format_number,
    format_percent,
    slug,
)
from m3po_jax.report.tables import benchmark_views, evaluation_tables, meanings
from m3po_jax.version import __version__
from m3po_jax.workspace.contents import Reader, RunContents, read_run
from m3po_jax.workspace.layout import REPORT, RESULTS

MAX_PAIRS = 60
MAX_DROPS = 24


def _asset(name: str) -> str:
    return resources.files("m3po_jax.report").joinpath(name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=format_number, percent=format_percent, compact=format_compact, slug=slug)
    return environment


def _browse(reader: Reader, run: RunContents, pairs: int, drops: int, token_text: TokenText | None) -> list[Item]:
    """Items of all rounds, latest first; the number of pairs is shared out equally."""
    rounds = [r for r in reversed(run.rounds) if (r.pairs is not None and len(r.pairs)) or r.drops]
    items, images = [], []
    for position, contents in enumerate(rounds):
        share = len(rounds)
        # The first rounds in the list take what the division leaves over.
        pair_count = pairs // share + (position < pairs % share)
        drop_count = drops // share + (position < drops % share)
        more, encoded = browse_round(reader, contents, pairs=pair_count, drops=drop_count, token_text=token_text)
        items += more
        images += encoded
    finish(items, images)
    return items


def render(
    run: RunContents, reader: Reader, token_text: TokenText | None, max_pairs: int, max_drops: int = MAX_DROPS
) -> bytes:
    """The page of a run as UTF-8."""
    tables = evaluation_tables(run.evaluation)
    items = _browse(reader, run, max_pairs, max_drops, token_text)
    rounds = [
        {
            "number": contents.number,
            "funnel": overview.funnel(contents),
            "figures": distributions(contents),
            "correlation": overview.correlation(contents),
        }
        for contents in reversed(run.rounds)
        if contents.candidates is not None or contents.pairs is not None or contents.summary
    ]
    calibrations = calibration_views(run.rounds)
    comparison = _comparison(run, reader)  # before the warnings, which name a file that it cannot read
    curves, more_curves = training_curves(run, CURVES), training_curves(run, MORE_CURVES)
    script, style = _asset("report.js"), _asset("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    context: dict[str, Any] = {
        "version": __version__,
        "style": Markup(style),  # a file of this package
        "script": Markup(script),  # a file of this package
        "script_hash": digest,
        "header": overview.header(run),
        "config_text": run.config_text,
        "headlines": overview.headlines(run, tables),
        "gate": overview.gate(run),
        "warnings": overview.warnings(run),
        "missing": overview.missing(run, tables),
        "stage_bars": overview.stage_bars(run),
        "rounds": rounds,
        "calibrations": calibrations,
        "curves": curves,
        "more_curves": more_curves,
        "arm_rows": overview.arm_rows(run),
        "tables": tables,
        "comparison": comparison,
        "benchmarks": benchmark_views(run),
        "items": items,
        "reasons": sorted({item.reason for item in items if item.reason}),
        "item_rounds": sorted({item.round for item in items}),
        "token_levels": _token_legend() if any(a.tokens for item in items for a in item.answers) else [],
        "chart_data": embed_json({figure.id: figure.crosshair() for figure in [*curves, *more_curves]}),
        "plain": overview.plain,
        "meanings": meanings,
    }
    page = _environment().from_string(_asset("template.html")).render(context)
    # The hash in the policy is of the script as the page carries it; control characters are not in our files.
    return encode_page(page)


def _comparison(run: RunContents, reader: Reader) -> ComparisonView | None:
    """The comparison's section, or None without one; a malformed file is noted and left out."""
    if not run.comparison:
        return None
    try:
        return comparison_view(run.comparison)
    except (KeyError, TypeError, ValueError, AttributeError):
        reader.note(run.path / RESULTS, "not what `m3po compare` writes, left out")
        return None


def _token_legend() -> list[str]:
    edges = [format_percent(level) for level in LEVELS]
    return [f"≥ {edges[0]}", *(f"≥ {edge}" for edge in edges[1:]), f"< {edges[-1]}"]


def build_report(run_dir: Path | str, token_text: TokenText | None = None, *, max_pairs: int = MAX_PAIRS) -> Path:
    """Writes ``report.html`` into a run directory and returns its path.

    The page needs no network and no other file. It shows what is there: a half-finished run
    gives a report of that half, with what is missing named.

    Args:
        run_dir: A run directory.
        token_text: The text that a token id stands for, spaces included; with it, answers are coloured by the
            log-probability of their tokens (`browser.tokenizer_text` makes one of a tokenizer).
        max_pairs: Pairs in the browser, evenly spread over the ranking by value.

    Raises:
        UserError: no such directory, or nothing of a run in it.
    """
    run_dir = Path(run_dir)
    run, reader = read_run(run_dir)
    page = render(run, reader, token_text, max_pairs)
    target = run_dir / REPORT
    with atomic_write(target) as file:
        file.write(page)
    return target
