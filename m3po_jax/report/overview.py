"""Header, headline numbers, warnings in plain words, stage timings and the funnel from prompts to pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from m3po_jax.evaluation.gate import FAILED
from m3po_jax.report.figures import main_arm, within_prompt_correlation
from m3po_jax.report.formatting import DASH, format_duration, format_number, format_percent, format_time
from m3po_jax.report.tables import EvaluationTable, flatten
from m3po_jax.selection import CORRELATION_LIMIT
from m3po_jax.workspace.contents import Round, RunContents
from m3po_jax.workspace.files import as_dict, as_dicts, as_number

TRUNCATED_LIMIT = 0.1
KEPT_LIMIT = 0.1
DISPLACED_LIMIT = -0.01  # nats per token: clearly more than rounding


@dataclass
class Bar:
    """One bar: label, text at its end, share of the longest in [0, 1], note below, kind for its colour."""

    label: str
    text: str
    share: float  # of the longest bar, 0 to 1
    note: str = ""
    kind: str = ""


@dataclass
class Headline:
    """One number of the summary, with what it is to be compared with."""

    label: str
    value: str
    note: str = ""
    tone: str = ""  # good | bad


def stages(run: RunContents) -> list[dict[str, Any]]:
    recorded = run.manifest.get("stages")
    return [stage for stage in recorded if isinstance(stage, dict)] if isinstance(recorded, list) else []


def header(run: RunContents) -> dict[str, Any]:
    """Name, when, where and the facts that make the run repeatable."""
    manifest = run.manifest
    model, data = as_dict(manifest.get("model")), as_dict(manifest.get("data"))
    name = manifest.get("name") or run.setting("name") or run.path.resolve().name
    finished = max((str(s["finished"]) for s in stages(run) if isinstance(s.get("finished"), str)), default=None)
    facts = [
        ("Model", model.get("path") or run.setting("model.path"), False),
        ("Data", run.setting("data.path"), False),
        ("Template", manifest.get("template") or run.setting("model.template"), False),
        ("Device", manifest.get("device"), False),
        ("Started", format_time(manifest["started"]) if manifest.get("started") else None, False),
        ("Last stage finished", format_time(finished) if finished else None, False),
        ("Time in stages", format_duration(seconds) if (seconds := total_seconds(run)) > 0 else None, False),
        ("Seed", manifest.get("seed", run.setting("seed")), False),
        ("Selection rule", run.setting("select.rule"), False),
        ("Loss", run.setting("train.loss_type"), False),
        ("Model hash", model.get("hash"), True),
        ("Data fingerprint", data.get("fingerprint"), True),
    ]
    versions = [(str(key), str(value)) for key, value in as_dict(manifest.get("versions")).items()]
    return {
        "name": str(name),
        "facts": [(label, str(value), mono) for label, value, mono in facts if value not in (None, "")],
        "versions": versions,
    }


def stage_bars(run: RunContents) -> list[Bar]:
    """One bar per finished stage, in the order in which they ran."""
    rows = [(stage, as_number(stage.get("seconds")) or 0.0) for stage in stages(run)]
    longest = max((seconds for _, seconds in rows), default=0.0)
    bars = []
    for stage, seconds in rows:
        parts = [str(stage.get("stage", "stage"))]
        if stage.get("round") is not None:
            parts.append(f"round {stage['round']}")
        if stage.get("arm"):
            parts.append(str(stage["arm"]))
        count = as_number(stage.get("rows"))
        notes = []
        if count is not None:
            notes.append(f"{format_number(count, 0)} rows")
            if seconds > 0 and count > 0:
                notes.append(f"{format_number(count / seconds, 1)} rows/s")
        notes += [f"{key} {text}" for key, text in flatten(stage.get("details"))[:4]]
        share = seconds / longest if longest > 0 else 0.0
        bars.append(Bar(" · ".join(parts), format_duration(stage.get("seconds")), share, ", ".join(notes)))
    return bars


def total_seconds(run: RunContents) -> float:
    """Seconds of all stages together."""
    return sum(as_number(stage.get("seconds")) or 0.0 for stage in stages(run))


def prompt_total(one_round: Round) -> int | None:
    """Prompts of a round: as selection counted them, or as far as the files tell."""
    stated = as_number(one_round.summary.get("prompts"))
    if stated is not None:
        return int(stated)
    if one_round.prompt_count is not None:
        return one_round.prompt_count
    return len(set(one_round.candidates.ids)) if one_round.candidates is not None else None


def pair_total(one_round: Round) -> int | None:
    """Pairs of a round, as selection stated them or as they lie there."""
    if one_round.pairs is not None:
        return len(one_round.pairs)
    stated = as_number(one_round.summary.get("kept"))
    return None if stated is None else int(stated)


def drop_counts(one_round: Round) -> list[tuple[str, int]]:
    """Dropped prompts by reason, most frequent first."""
    stated = {
        str(k): int(n) for k, v in as_dict(one_round.summary.get("drops")).items() if (n := as_number(v)) is not None
    }
    if not stated:
        for _, reason in one_round.drops:
            stated[reason] = stated.get(reason, 0) + 1
    return sorted(((reason, n) for reason, n in stated.items() if n > 0), key=lambda item: (-item[1], item[0]))


def funnel(one_round: Round) -> dict[str, list[Bar]]:
    """Bars of three groups: candidates, prompts, and reasons for dropping a prompt."""
    groups: dict[str, list[Bar]] = {"candidates": [], "prompts": [], "drops": []}
    pool = one_round.candidates
    if pool is not None and len(pool):
        scored = int(np.isfinite(pool.scores["mas"]).sum()) if "mas" in pool.scores else None
        cut = float(pool.truncated.mean())
        note = f"{format_percent(cut, 1)} reached the length limit" if cut else ""
        counts = [("Sampled candidates", len(pool), note)]
        if pool.distinct:
            counts.append(("Distinct within their prompt", pool.distinct, "case and spaces ignored"))
        if scored is not None:
            counts.append(("With an alignment score", scored, ""))
        groups["candidates"] = [_bar(label, n, len(pool), note) for label, n, note in counts]
    prompts, pairs = prompt_total(one_round), pair_total(one_round)
    if prompts:
        groups["prompts"].append(_bar("Prompts", prompts, prompts))
        if pairs is not None:
            groups["prompts"].append(_bar("Preference pairs", pairs, prompts, kind="kept"))
    drops = drop_counts(one_round)
    total = max((n for _, n in drops), default=0)
    for reason, n in drops:
        share = f"{format_percent(n / prompts, 1)} of prompts" if prompts else ""
        groups["drops"].append(Bar(plain(reason), f"{n:,}", n / total, share, "dropped"))
    return groups


def _bar(label: str, count: int, total: int, note: str = "", kind: str = "") -> Bar:
    share = min(count / total, 1.0) if total else 0.0
    text = f"{count:,}" if count == total else f"{count:,} ({format_percent(share, 1)})"
    return Bar(label, text, share, note, kind)


def plain(reason: str) -> str:
    """A drop reason as words."""
    return reason.replace("_", " ")


def _late(one_round: Round, key: str) -> float | None:
    """Mean of a metric over the last tenth of a round's steps: one step alone is noise."""
    values = [value for row in one_round.metrics if (value := as_number(row.get(key))) is not None]
    return float(np.mean(values[-max(1, len(values) // 10) :])) if values else None


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def arm_rows(run: RunContents) -> list[dict[str, str]]:
    """The run and its comparison arms side by side, each at its latest round with metrics or pairs."""
    if not run.arms:
        return []
    rows = []
    for name, rounds in [(main_arm(run), run.rounds), *run.arms.items()]:
        trained = next((r for r in reversed(rounds) if r.metrics), None)
        paired = next((r for r in reversed(rounds) if r.pairs is not None), None)
        if trained is None and paired is None:
            continue
        numbers = paired.pairs.numbers if paired is not None and paired.pairs is not None else {}
        empty = np.array([])
        rows.append(
            {
                "name": name,
                "pairs": f"{len(paired.pairs):,}" if paired is not None and paired.pairs is not None else "–",
                "chosen_mas": format_number(_mean(numbers.get("chosen_mas", empty))),
                "rejected_mas": format_number(_mean(numbers.get("rejected_mas", empty))),
                "rejected_confidence": format_number(_mean(numbers.get("rejected_confidence", empty)), 2),
                "steps": format_number(trained.metrics[-1].get("step"), 0) if trained else "–",
                "accuracy": format_percent(_late(trained, "rewards/accuracies")) if trained else "–",
                "margin": format_number(_late(trained, "rewards/margins")) if trained else "–",
                "logratio": format_number(_late(trained, "delta_logps/chosen")) if trained else "–",
            }
        )
    return rows


def headlines(run: RunContents, tables: list[EvaluationTable]) -> list[Headline]:
    """Up to six numbers that a reader wants first."""
    cards: list[Headline] = []
    main = main_arm(run)
    for table in tables:
        row = next((r for r in table.rows if r["name"] == main), None)
        base = next((r for r in table.rows if r["is_base"]), None)
        if row is None or base is None:
            continue
        for index in range(min(2, len(table.columns))):
            cell, before = row["cells"][index], base["cells"][index]
            if cell.text == DASH:  # CHAIR at equal recall has no value outside the frontier's recall
                continue
            tone = {"better": "good", "worse": "bad"}.get(cell.verdict, "")
            outside = "outside the base's interval" if cell.verdict else "not outside the base's interval"
            if not before.interval:
                outside = "no interval"
            label = f"{table.columns[index]['label']} ({main})"
            cards.append(Headline(label, cell.text, f"base {before.text}, {outside}", tone))
        break
    paired = next((r for r in reversed(run.rounds) if pair_total(r) is not None), None)
    if paired is not None:
        prompts, pairs = prompt_total(paired), pair_total(paired) or 0
        note = f"from {prompts:,} prompts ({format_percent(pairs / prompts)})" if prompts else ""
        cards.append(Headline(f"Pairs, round {paired.number}", f"{pairs:,}", note))
        if paired.pairs is not None:
            chosen, rejected = (_mean(paired.pairs.numbers[f"{role}_mas"]) for role in ("chosen", "rejected"))
            if chosen is not None and rejected is not None:
                note = f"chosen {format_number(chosen, 2)}, rejected {format_number(rejected, 2)}"
                cards.append(Headline("MAS gap within pairs", format_number(chosen - rejected, 2), note))
    trained = next((r for r in reversed(run.rounds) if r.metrics), None)
    if trained is not None:
        accuracy = _late(trained, "rewards/accuracies")
        if accuracy is not None:
            note = f"on training pairs, end of round {trained.number}"
            cards.append(Headline("Preference accuracy", format_percent(accuracy), note))
        ratio = _late(trained, "delta_logps/chosen")
        if ratio is not None:
            tone = "bad" if ratio < DISPLACED_LIMIT else ""
            note = "nats per token against the reference"
            cards.append(Headline("Chosen log-ratio", format_number(ratio, 3, sign=True), note, tone))
    return cards[:6]


def _stated(value: Any) -> list[str]:
    return [str(item) for item in value if item] if isinstance(value, list) else []


@dataclass
class GateView:
    """The verdicts of `evaluate.gate`: a title, lines with `text` and `outcome`, and whether the run has failed."""

    title: str
    lines: list[dict[str, str]]
    failed: bool


def gate(run: RunContents) -> GateView | None:
    """None where the recipe has no gate."""
    verdicts = as_dicts(run.evaluation.get("gate"))
    lines = [
        {"text": f"{verdict['text']}.", "outcome": str(verdict.get("outcome"))}
        for verdict in verdicts
        if isinstance(verdict.get("text"), str)
    ]
    if not lines:
        return None
    decided = [verdict for verdict in verdicts if verdict.get("decides") is True]
    failed = any(verdict.get("outcome") == FAILED for verdict in decided)
    outcome = "failed" if failed else "passed" if decided else "of the systems compared with"
    return GateView(f"Regression gate: {outcome}", lines, failed)


def warnings(run: RunContents) -> list[str]:
    """What a careful reader should know, in plain words; the stages' own warnings first.

    Our own remarks are about the latest state of the run; the arms' numbers stand in their table.
    """
    lines = _stated(run.evaluation.get("warnings"))
    places: dict[str, list[str]] = {}
    for name, rounds in [("", run.rounds), *run.arms.items()]:
        for r in rounds:
            where = f"{name} round {r.number}".strip()
            for line in _stated(r.summary.get("warnings")):
                places.setdefault(line, []).append(where)
    lines += [f"{line} ({', '.join(where)})" for line, where in places.items()]
    selected = next((r for r in reversed(run.rounds) if r.candidates is not None or r.summary), None)
    if selected is not None:
        stated = " ".join(_stated(selected.summary.get("warnings"))).lower()
        lines += [f"Round {selected.number}: {line}" for line in _round_warnings(selected, stated)]
    trained = next((r for r in reversed(run.rounds) if r.metrics), None)
    if trained is not None:
        lines += [f"Round {trained.number}: {line}" for line in _training_warnings(trained)]
    lines += [f"File {line}." for line in run.problems]
    return list(dict.fromkeys(lines))


def correlation(one_round: Round) -> float | None:
    """As selection stated it, or computed here."""
    stated = as_number(one_round.summary.get("correlation_mas_confidence"))
    return within_prompt_correlation(one_round.candidates) if stated is None else stated


def _round_warnings(one_round: Round, stated: str) -> list[str]:
    lines = []
    r = correlation(one_round)
    if r is not None and r > CORRELATION_LIMIT and "correlat" not in stated:
        lines.append(
            f"MAS and confidence correlate within prompts at {format_number(r, 2)} (above {CORRELATION_LIMIT}"
            "): confidence partly repeats MAS, so compare with mas_dpo before crediting confidence."
        )
    for line in as_dicts(one_round.calibration.get("verdict")):
        # Selection warns of the correlation itself.
        if line.get("tone") == "warn" and not (line.get("about") == "correlation" and (r is not None or stated)):
            lines.append(str(line.get("text")))
    if one_round.candidates is not None and len(one_round.candidates):
        cut = float(one_round.candidates.truncated.mean())
        if cut > TRUNCATED_LIMIT:
            lines.append(f"{format_percent(cut)} of the candidates were cut at the length limit.")
    prompts, pairs = prompt_total(one_round), pair_total(one_round)
    if prompts and pairs is not None and pairs < KEPT_LIMIT * prompts:
        lines.append(f"Only {pairs:,} of {prompts:,} prompts gave a pair: selection may have collapsed.")
    return lines


def _training_warnings(one_round: Round) -> list[str]:
    lines = [
        f"step {row.get('step')}: {row['message']}." for row in one_round.training_warnings if row.get("message")
    ]
    if any(isinstance(v := row.get("loss"), float) and not np.isfinite(v) for row in one_round.metrics):
        lines.append("the loss was not finite at some steps; those are left out of the chart.")
    ratio = _late(one_round, "delta_logps/chosen")
    if ratio is not None and ratio < DISPLACED_LIMIT:
        lines.append(
            f"chosen answers ended {format_number(-ratio, 3)} nats per token less likely than under the "
            "reference (likelihood displacement); a chosen-likelihood anchor prevents this."
        )
    return lines


def missing(run: RunContents, tables: list[EvaluationTable]) -> list[str]:
    """Stages of which nothing is there yet."""
    absent: list[str] = []
    rounds = run.rounds
    if run.comparison and not rounds:
        return absent  # a comparison's own page: its runs have pages of theirs
    if not any(r.candidates is not None for r in rounds):
        absent.append("candidates")
    if not any(r.candidates is not None and r.candidates.scores for r in rounds):
        absent.append("scores")
    if not any(r.pairs is not None for r in rounds):
        absent.append("pairs")
    if not any(r.metrics for r in rounds):
        absent.append("training metrics")
    if not tables and not any(r.benchmarks for r in rounds):
        absent.append("evaluation")
    return absent
