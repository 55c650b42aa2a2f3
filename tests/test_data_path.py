"""One row from a line of JSON to a LoRA weight, compared at every form that docs/architecture.md names."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from m3po_jax import selection_rows
from m3po_jax.api import _with  # settings as a recipe reads them
from m3po_jax.config import DataConfig, Recipe
from m3po_jax.data import tables
from m3po_jax.data.batches import pair_batches
from m3po_jax.data.pair_rows import pair_prompt
from m3po_jax.data.schema import CANDIDATE, PAIR, Prompt
from m3po_jax.data.sources import read_prompts
from m3po_jax.data.stored_pairs import StoredPairs
from m3po_jax.hosts.rows import Shares
from m3po_jax.hosts.sharding import make_mesh, use_mesh
from m3po_jax.inference.settings import sampling_config
from m3po_jax.models.layers import LoRAParam
from m3po_jax.pipeline.generate import Tally, candidate_pools, prompt_rows
from m3po_jax.pipeline.models import InputLimits, attach_adapter, load_policy, make_generator
from m3po_jax.pipeline.score import judge_candidates, pools, rows_of_pools, score_schema
from m3po_jax.pipeline.select import pair_with_prompt
from m3po_jax.pipeline.train import train_on_pairs
from m3po_jax.quickstart.scenes import scene
from m3po_jax.scoring.alignment import Backend, Scores
from m3po_jax.selection import Pool, SelectedPools, select_pools
from m3po_jax.selection_rows import select_rows

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    model = {
        "path": "builtin:quickstart-base",
        "dtype": "float32",
        "param_dtype": "float32",
        "template": "plain",
        "image_fit": "stretch",
    }
    made = _with(Recipe(), "model", model)
    made = _with(made, "generate", {"num_candidates": 4, "max_new_tokens": 24, "temperature": 1.5})
    made = _with(made, "select", {"margin": 0.0, "chosen_floor": 0.0, "min_rejected_z": -9.0, "rule": "mas_only"})
    made = _with(made, "cache", {"vision_features": "off"})
    return _with(made, "train", {"batch_size": 1, "max_steps": 1, "warmup_ratio": 0.0, "lora": {"lora_rank": 2}})


class ByLength(Backend):
    """The longer an answer, the better."""

    name = "length"

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        return [np.array([len(text) / 1000 for text in pool]) for pool in pools]


def test_one_row(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = scene("prompts", 3).image
    Image.fromarray(picture).save(tmp_path / "a.png")
    line = {"id": "a", "image": "a.png", "instruction": "Describe the image."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")

    source = read_prompts(DataConfig(path=str(tmp_path / "rows.jsonl")))
    (prompt,) = list(source)
    assert (prompt.id, prompt.instruction, prompt.images[0].path) == ("a", line["instruction"], "a.png")

    mesh = make_mesh(recipe.mesh)
    with use_mesh(mesh):
        policy = load_policy(recipe.model, recipe.seed, mesh, InputLimits(), image_root=tmp_path)
        processor = policy.processor
        (asked,) = prompt_rows([prompt], processor, Shares(mesh))
        ids = processor.encode_prompt(prompt)
        np.testing.assert_array_equal(asked.token_ids, ids)
        (image,) = processor.images(prompt)
        assert image.tokens == np.sum(ids == processor.image_token_id)
        np.testing.assert_array_equal(asked.images["pixels"], image.arrays["pixels"])

        generator = make_generator(
            processor, policy.model, mesh, sampling=sampling_config(recipe.generate, 0), batch_size=1
        )
        prefilled: list[dict[str, Any]] = []
        prefill = generator.prefill
        generator.prefill = lambda *given: prefilled.append(jax.tree.map(np.asarray, given[-1])) or prefill(*given)
        (made,) = generator.stream(iter([asked]), 1)
        (arrays,) = prefilled
        np.testing.assert_array_equal(arrays["token_ids"][0, : arrays["length"][0]], ids)
        np.testing.assert_array_equal(arrays["images"]["pixels"][0], image.arrays["pixels"])
        assert (made.id, made.images) == (asked.id, asked.images)
        ((_, rows),) = candidate_pools([prompt], generator, processor, recipe.generate, Tally())
    for k, row in enumerate(rows):
        assert row["token_ids"] == made.answers[k].tolist()
        assert row["token_logprobs"] == made.log_probs[k].tolist()
        assert row["text"] == processor.decode(row["token_ids"])
    tables.write_table(tmp_path / "candidates" / "shard.parquet", rows, CANDIDATE)
    stored = list(tables.read_rows(tmp_path / "candidates" / "shard.parquet"))
    assert [row["token_ids"] for row in stored] == [row["token_ids"] for row in rows]
    first, *others = np.flatnonzero(ids == processor.image_token_id)
    assert all(row["prompt_tokens"]["ids"] == np.delete(ids, others).tolist() for row in stored) and first > 0

    distinct = {row["text"]: row["candidate"] for row in stored}
    assert len(distinct) > 1
    groups = pools(stored)
    judged = judge_candidates(groups, {prompt.id: prompt}, ByLength(), "candidates")
    assert judged.scores[0].tolist() == [len(row["text"]) / 1000 for row in stored]
    scores = rows_of_pools(
        groups, {prompt.id: prompt}, judged, "length", recipe.score, recipe.select, processor, scorer=None
    )
    tables.write_table(tmp_path / "scores" / "shard.parquet", scores, score_schema(recipe.score, ByLength()))
    scores = list(tables.read_rows(tmp_path / "scores" / "shard.parquet"))
    for row, score in zip(stored, scores, strict=True):
        assert (row["id"], row["candidate"]) == (score["id"], score["candidate"])
        assert score["mas"] == len(row["text"]) / 1000
        assert score["confidence"] == pytest.approx(np.mean(row["token_logprobs"]))

    texts = {"instruction": prompt.instruction, "metadata": {}}
    scored = [row | score | texts for row, score in zip(stored, scores, strict=True)]
    selected: list[Any] = []

    def watched(given: Sequence[Pool], *settings: Any) -> SelectedPools:
        selected.extend([given, select_pools(given, *settings)])
        return selected[1]

    monkeypatch.setattr(selection_rows, "select_pools", watched)
    (pair,), drops, _ = select_rows(scored, recipe.select)
    assert drops == []
    ((pool,), selection) = selected
    assert (pool.texts, pool.lengths) == ([row["text"] for row in stored], [len(row["token_ids"]) for row in stored])
    assert pool.mas.tolist() == [score["mas"] for score in scores]
    best, worst = stored[pair["chosen_candidate"]], stored[pair["rejected_candidate"]]
    ((chosen, rejected, mas),) = [(one.chosen, one.rejected, one.chosen_mas) for one in selection.pairs]
    assert (chosen, rejected, mas) == (best["candidate"], worst["candidate"], len(best["text"]) / 1000)
    assert len(best["text"]) == max(len(text) for text in distinct) > len(worst["text"])
    assert (pair["chosen_token_ids"], pair["prompt_tokens"]) == (best["token_ids"], stored[0]["prompt_tokens"])

    shard = tmp_path / "pairs" / "shard.parquet"
    tables.write_table(shard, [pair_with_prompt(pair, prompt, source.image_root)], PAIR)
    pairs = StoredPairs.open([shard])
    assert pairs[0]["images"][0]["bytes"] == (tmp_path / "a.png").read_bytes()
    again = pair_prompt(pairs[0])
    assert (again.id, again.instruction) == (prompt.id, prompt.instruction)
    np.testing.assert_array_equal(processor.encode_prompt(again), ids)

    batch = next(iter(pair_batches(pairs, processor, batch_size=1, seed=0)))
    np.testing.assert_array_equal(batch.prefix_ids[0][batch.prefix_mask[0]], ids)
    np.testing.assert_array_equal(batch.images["pixels"][0], asked.images["pixels"])
    for side, row in enumerate((best, worst)):
        assert batch.branch_ids[0, side][batch.branch_mask[0, side]].tolist() == row["token_ids"]
        np.testing.assert_allclose(
            batch.reference[0, side], np.sum(row["token_logprobs"], dtype=np.float64), rtol=1e-6
        )

    with use_mesh(mesh):
        start = attach_adapter(policy, recipe.train.lora, recipe.seed)
        trained = train_on_pairs(recipe, policy, pairs, tmp_path / "out", mesh, start=start, seed=0)
    factors = [nnx.to_flat_state(nnx.state(model, LoRAParam)) for model in (start, trained.model)]
    moved = [not np.array_equal(a[...], b[...]) for (_, a), (_, b) in zip(*factors, strict=True)]
    # After one step from B = 0, the gradient of A is 0: B alone has moved, in every layer.
    assert sum(moved) == len(moved) // 2


def test_the_page_draws_every_form() -> None:
    page = PAGE.read_text(encoding="utf-8")
    forms = re.findall(r"^\| (\d+) \|", page, re.M)
    assert forms == [str(number) for number in range(1, 13)]
    _, picture = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    assert sorted(set(re.findall(r"\d+", picture)), key=int) == forms
