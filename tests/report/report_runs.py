"""Synthetic run directories for the tests of the report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from m3po_jax.data.schema import CANDIDATE, PAIR, PROMPT, SCORE_FIXED, message

WORDS = [
    "a",
    "cat",
    "dog",
    "on",
    "the",
    "red",
    "chair",
    "beside",
    "kite",
    "and",
    "two",
    "cups",
    "with",
    "bench",
]
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</title></style></script><!--<script>\u2028 {{ 7*7 }} & \u202eltr \x00\x07 naïve 猫 🐈"
)


def picture(seed: int, side: int = 160) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(170, 250, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, size = (int(v) for v in (*rng.integers(0, side - 50, 2), rng.integers(25, 60)))
        draw.ellipse((x, y, x + size, y + size), fill=tuple(int(v) for v in rng.integers(20, 230, 3)))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def word(token: int) -> str:
    return " " + WORDS[token % len(WORDS)]


def write_jsonl(path: Path, rows: list[dict], tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_table(path: Path, rows: list[dict], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def metric_rows(steps: int, slope: float, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        margin = 1.6 * slope * (1 - np.exp(-step / (0.4 * steps))) + 0.06 * rng.normal() * min(step - 1, 5)
        rows.append(
            {
                "step": step,
                "loss": float(np.log1p(np.exp(-margin))),
                "rewards/chosen": 0.4 * margin,
                "rewards/rejected": -0.6 * margin,
                "rewards/margins": float(margin),
                "rewards/accuracies": float(np.clip(0.5 + 0.3 * margin + 0.04 * rng.normal(), 0, 1)),
                "grad_norm": float(1 + 0.2 * rng.random()),
                "learning_rate": 2e-6 * (1 - step / steps),
                "delta_logps/chosen": float(-0.05 * slope * step / steps + 0.004 * rng.normal()),
                "tokens_per_s": 15000 + 400 * float(rng.normal()),
            }
        )
    return rows


def write_round(
    path: Path,
    *,
    prompts: int = 40,
    k: int = 4,
    words: int = 8,
    hostile: bool = False,
    seed: int = 0,
    side: int = 160,
) -> None:
    """Candidates, scores and pairs of one round: half of the prompts give a pair, the rest are dropped."""
    rng = np.random.default_rng(seed)
    prompt_rows, candidate_rows, score_rows, pair_rows, drops = [], [], [], [], []
    for p in range(prompts):
        pid = f"scene-{p:04d}"
        instruction = HOSTILE if hostile and p == 0 else "Which things do you see in this picture? Name all of them."
        prompt_rows.append(
            {"id": pid, "images": [{"bytes": picture(p, side), "path": None}], "instruction": instruction}
        )
        mas = rng.beta(3, 2, k)
        confidence = -0.9 + 0.5 * (mas - 0.6) + 0.22 * rng.normal(size=k)
        texts, tokens, log_probs = [], [], []
        for c in range(k):
            ids = rng.integers(0, len(WORDS), words).tolist()
            tokens.append(ids)
            text = "".join(word(i) for i in ids).strip()
            texts.append(f"{HOSTILE} {c}" if hostile and p < 2 else text)
            log_probs.append(np.minimum(0, -rng.exponential(max(0.05, -confidence[c]), words)).tolist())
            candidate_rows.append(
                {
                    "id": pid, "candidate": c, "text": texts[c], "token_ids": ids,
                    "token_logprobs": log_probs[c],
                    "finish_reason": "length" if c == 3 and p % 9 == 0 else "stop", "sampling": "{}",
                }
            )  # fmt: skip
            score_rows.append(
                {
                    "id": pid, "candidate": c, "mas": None if c == 3 and p % 13 == 0 else mas[c],
                    "confidence": float("nan") if c == 2 and p % 11 == 0 else confidence[c],
                    "m3p_preferred": rng.normal(), "m3p_dispreferred": rng.normal(), "mas_similarity": mas[c],
                }
            )  # fmt: skip
        w, l = int(np.argmax(mas)), int(np.argmin(mas))
        if p % 2:
            drops.append(
                {
                    "id": pid,
                    "reason": "no_contrast" if p % 3 else "<b>below_floor</b>" if hostile else "below_floor",
                }
            )
            continue
        pair_rows.append(
            {
                "id": pid, "images": prompt_rows[-1]["images"], "prompt": message("user", instruction, 1),
                "chosen": message("assistant", texts[w]), "rejected": message("assistant", texts[l]),
                "chosen_candidate": w, "rejected_candidate": l, "chosen_token_ids": tokens[w],
                "rejected_token_ids": tokens[l], "chosen_mas": mas[w], "rejected_mas": mas[l],
                "chosen_confidence": confidence[w], "rejected_confidence": confidence[l],
                "value": float("nan") if p == 4 else mas[w] - mas[l],
            }
        )  # fmt: skip
    write_table(path / "prompts.parquet", prompt_rows, PROMPT)
    half = len(candidate_rows) // 2
    write_table(path / "candidates" / "shard-0.parquet", candidate_rows[:half], CANDIDATE)
    write_table(path / "candidates" / "shard-1.parquet", candidate_rows[half:], CANDIDATE)
    write_table(
        path / "scores" / "shard-0.parquet",
        score_rows,
        SCORE_FIXED.append(pa.field("mas_similarity", pa.float64())),
    )
    write_table(path / "pairs" / "shard-0.parquet", pair_rows, PAIR)
    counts: dict[str, int] = {}
    for row in drops:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    write_json(
        path / "pairs" / "summary.json",
        {
            "prompts": prompts, "kept": len(pair_rows), "drops": counts, "correlation_mas_confidence": 0.47,
            "warnings": ["The judge shares the policy's vision encoder."],
        },
    )  # fmt: skip
    write_jsonl(path / "pairs" / "drops.jsonl", drops)
    write_json(path / "scores" / "calibration.json", calibration(hostile, seed))


def calibration(hostile: bool = False, seed: int = 0) -> dict:
    """What the score stage writes of an ensemble with two members and four confidence variants."""
    rng = np.random.default_rng(seed)

    def signal(auroc: float, scale: str = "probability", **more: object) -> dict:
        edges = np.linspace(-14, -1, 9) if scale == "nats" else np.linspace(0, 1, 11)
        middles = (edges[1:] + edges[:-1]) / 2
        slope = (middles - middles.mean()) / np.ptp(middles) * 2 * (auroc - 0.5)
        true = np.clip(0.6 + slope + 0.04 * rng.normal(size=len(middles)), 0, 1)
        bins = [
            {"low": low, "high": high, "count": int(rng.integers(4, 90)), "score": middle, "true": share}
            for low, high, middle, share in zip(edges, edges[1:], middles.tolist(), true.tolist(), strict=False)
        ]
        within = {"auroc": auroc - 0.02, "low": auroc - 0.08, "high": auroc + 0.04, "pairs": 310, "prompts": 64}
        reliability = {"scale": scale, "bins": bins, "ece": None if scale == "nats" else 0.083}
        return {"auroc": auroc, "n": 412, "within": within, "reliability": reliability, **more}

    name = HOSTILE if hostile else "answers that name objects, and none that the image lacks"
    return {
        "correlation_mas_confidence": {"confidence_mean": 0.47, "confidence_sum": 0.3, "confidence_visual": None},
        "truths": [{"kind": "objects", "meaning": name, "n": 412, "true": 250}],
        "mas": signal(0.86),
        "mas_similarity": signal(0.79),
        "mas_claims": signal(0.83),
        "confidence": signal(0.52, variant=HOSTILE if hostile else "mean"),
        "confidence_sum": signal(0.55, "nats"),
        "confidence_visual": signal(0.66, "nats"),
        "verdict": [
            {"about": "mas", "tone": "good", "text": "MAS tells right from wrong answers of the same prompt."},
            {"about": "confidence", "tone": "warn", "text": f"Its AUROC is about 0.5, so λ is noise. {name}"},
            {"about": "correlation", "tone": "warn", "text": "MAS and confidence (mean) correlate at 0.47."},
        ],
        "judges": [
            {"judge": name, "server": "https://judge.example/v1", "requests": 1234, "prompt_tokens": 910_000,
             "completion_tokens": 2468, "cost": 1.8446, "from_cache": 12}
        ],
    }  # fmt: skip


def evaluation() -> dict:
    columns = [
        {"key": "chair_i", "label": "CHAIR_i", "digits": 1, "better": "lower"},
        {"key": "recall", "label": "Recall", "digits": 1, "better": "higher"},
        {"key": "f1", "label": "F1", "digits": 1, "better": "higher"},
        {"key": "length", "label": "Mean length", "digits": 1, "better": None},
    ]
    values = {
        "base": (12.4, 71.0, 78.4, 9.4, "arm"), "m3po": (8.1, 72.2, 80.9, 9.3, "arm"),
        "mas_dpo": (9.0, 71.4, 79.9, 9.2, "arm"), "dpo": (10.4, 69.0, 78.0, 8.8, "arm"),
        "sft_chosen": (13.9, 72.9, 78.7, 9.9, "arm"), "stop +0.5": (11.0, 67.1, 76.5, 8.5, "frontier"),
        "stop +1.0": (9.7, 61.4, 73.0, 7.3, "frontier"), "stop −0.5": (14.1, 73.6, 79.0, 10.2, "frontier"),
        "vcd α 1.0": (8.8, 70.6, 79.5, 9.2, "decoding"),
    }  # fmt: skip
    rows = []
    for name, (*numbers, kind) in values.items():
        keyed = dict(zip(("chair_i", "recall", "f1", "length"), numbers, strict=True))
        spans = {key: [value - 1.1, value + 1.2] for key, value in keyed.items() if key != "length"}
        rows.append({"name": name, "kind": kind, "values": keyed, "intervals": spans})
    rows[3]["values"]["f1"] = None
    note = "1,000 images; intervals are bootstrap intervals over images (95 %)."
    return {
        "tables": [{"title": "CHAIR on held-out scenes", "note": note, "columns": columns, "rows": rows}],
        "warnings": ["3 generations of 1,000 were cut at 128 tokens."],
    }


def write_run(
    run: Path,
    *,
    rounds: int = 2,
    arms: tuple[str, ...] = ("mas_dpo", "dpo"),
    steps: int = 60,
    **kwargs: object,
) -> Path:
    """A finished run."""
    run.mkdir(parents=True, exist_ok=True)
    hostile = bool(kwargs.get("hostile"))
    (run / "config.yaml").write_text(
        "name: scenes\nseed: 3\nmodel:\n  path: builtin:tiny-llava\n  template: vicuna_v1\n"
        "data:\n  path: data/scenes.jsonl\nselect:\n  rule: m3p\n  lambda_dispreferred: 1.0\n"
        "train:\n  loss_type: sigmoid\n  chosen_nll_weight: 0.0\n  beta: 0.1\n"
        "secret: ${oc.env:HOME}\n"
    )
    stages = []
    for r in range(1, rounds + 1):
        for number, (stage, seconds) in enumerate(
            (("generate", 812.0), ("score", 95.5), ("select", 1.2), ("train", 1432.9))
        ):
            stages.append(
                {
                    "stage": stage, "round": r, "arm": None, "seconds": seconds / r,
                    "rows": 1500 if stage == "generate" else 700,
                    "finished": f"2026-11-23T1{r}:{10 + number}:00+00:00",
                    "details": {"tokens": 81234} if number == 0 else {},
                }
            )  # fmt: skip
        write_round(run / f"round-{r}", seed=r, **kwargs)
        write_jsonl(run / f"round-{r}" / "metrics.jsonl", metric_rows(steps, 1.0, r), tail='{"step": 61, "lo')
    for index, arm in enumerate(arms):
        stages.append({"stage": "train", "round": 1, "arm": arm, "seconds": 700.0, "rows": 700})
        for r in range(1, rounds + 1):
            write_jsonl(
                run / "arms" / arm / f"round-{r}" / "metrics.jsonl",
                metric_rows(steps, 0.8 - 0.3 * index, 9 + r),
            )
    write_json(
        run / "manifest.json",
        {
            "name": HOSTILE if hostile else "scenes-tiny",
            "versions": {"m3po_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.9"},
            "seed": 3, "model": {"path": "builtin:tiny-llava", "hash": "sha256:" + "ab12" * 16},
            "data": {"fingerprint": "sha256:" + "77fe" * 16}, "template": "vicuna_v1",
            "device": "8 × TPU v5e",
            "started": "2026-11-23T08:32:00+00:00", "stages": stages,
        },
    )  # fmt: skip
    write_json(run / "evaluation.json", evaluation())
    folder = run / f"round-{rounds}" / "evaluation" / "pope"
    text = HOSTILE if hostile else "Yes, there is a cat."
    items = [
        {"id": f"q{i}", "prompt": "Is there a cat in the image?", "output": text,
         "parsed": "yes" if i % 5 else None, "label": "yes" if i % 3 else "no",
         "correct": bool(i % 3 and i % 5)}
        for i in range(50)
    ]  # fmt: skip
    write_jsonl(folder / "items.jsonl", items)
    write_json(folder / "results.json", {"accuracy": 0.862, "f1": 0.871, "random": {"f1": 0.88, "yes_rate": 0.512}})
    return run
