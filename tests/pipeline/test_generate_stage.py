"""Candidates of a small trained model: stop strings, duplicates drawn again, pools, and what the manifest says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from m3po_jax.config import GenerateConfig, MeshConfig
from m3po_jax.data import tables
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import sampling_config, sampling_record
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import load_model, resolve_directory
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.generate import Tally, candidate_pools, generate
from m3po_jax.pipeline.models import make_generator
from m3po_jax.quickstart.builder import encode_png
from m3po_jax.quickstart.language import CAPTION_INSTRUCTION
from m3po_jax.quickstart.scenes import scene
from m3po_jax.recipes import load_recipe
from m3po_jax.workspace.shards import ShardFolder

# A greedy candidate and three that often repeat it: every pool has duplicates.
CONFIG = GenerateConfig(num_candidates=4, temperature=0.8, greedy_member=True, max_new_tokens=16, batch_size=4)
PROMPTS = [Prompt(f"p{i}", (Image(bytes=encode_png(scene("test", i).image)),), CAPTION_INSTRUCTION) for i in range(6)]


@pytest.fixture(scope="module")
def setting() -> tuple[Generator, Processor]:
    directory = resolve_directory("builtin:quickstart-base")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = load_model(directory, dtype="float32", param_dtype="float32", mesh=mesh).model
    processor = Processor.from_pretrained(directory, "plain", "stretch")
    generator = make_generator(
        processor, model, mesh, sampling=sampling_config(CONFIG, 7), batch_size=CONFIG.batch_size
    )
    return generator, processor


def make_candidates(prompts, generator, processor, config, tally) -> list[dict]:
    """Rows of all prompts in their order."""
    made = dict(candidate_pools(prompts, generator, processor, config, tally))
    assert sorted(made) == list(range(len(prompts)))
    return [row for index in sorted(made) for row in made[index]]


@pytest.fixture(scope="module")
def plain(setting) -> list[dict]:
    return make_candidates(PROMPTS, *setting, CONFIG, Tally())


def pools(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        assert row["candidate"] == len(found.setdefault(row["id"], []))
        found[row["id"]].append(row)
    return found


def distinct(rows: list[dict]) -> int:
    return sum(len({row["text"] for row in pool}) for pool in pools(rows).values())


def test_duplicates_are_drawn_again_up_to_the_bound(setting, plain):
    generator, processor = setting
    compiled = generator.compilations
    counts, last = [distinct(plain)], plain
    for rounds in (1, 4):
        config, tally = dataclasses.replace(CONFIG, resample_duplicates=rounds), Tally()
        rows = make_candidates(PROMPTS, generator, processor, config, tally)
        counts.append(distinct(rows))
        attempts = [json.loads(row["sampling"]).get("attempt", 0) for row in rows]
        assert max(attempts) == rounds and tally.resampled >= sum(a > 0 for a in attempts) > 0
        for pool in pools(rows).values():
            first = {row["text"]: row["candidate"] for row in reversed(pool)}
            for row in pool:
                # Either its text is its own, or every attempt was spent on it; the greedy one is never redrawn.
                spent = json.loads(row["sampling"]).get("attempt", 0)
                assert first[row["text"]] == row["candidate"] or spent == rounds
                assert row["candidate"] > 0 or spent == 0
        kept = [(a, b) for a, b, n in zip(plain, rows, attempts, strict=True) if n == 0]
        assert all(a["token_ids"] == b["token_ids"] and a["token_logprobs"] == b["token_logprobs"] for a, b in kept)
        last = rows
    assert counts[0] < counts[1] < counts[2] and last is not plain
    assert generator.compilations == compiled


def test_what_is_drawn_again_does_not_depend_on_its_batch(setting):
    generator, processor = setting
    config = dataclasses.replace(CONFIG, resample_duplicates=3)
    whole = pools(make_candidates(PROMPTS, generator, processor, config, Tally()))
    for part in (PROMPTS[5:], PROMPTS[3:5], PROMPTS[:3]):
        for name, pool in pools(make_candidates(part, generator, processor, config, Tally())).items():
            for a, b in zip(pool, whole[name], strict=True):
                assert (a["token_ids"], a["text"], a["sampling"]) == (b["token_ids"], b["text"], b["sampling"])
                np.testing.assert_allclose(a["token_logprobs"], b["token_logprobs"], atol=1e-5)


def test_stop_strings_cut_text_and_tokens_alike(setting, plain):
    generator, processor = setting
    config = dataclasses.replace(CONFIG, stop=[" and", ","])
    rows = make_candidates(PROMPTS, generator, processor, config, Tally())
    assert {row["finish_reason"] for row in rows} >= {"stop_string"}
    for row, whole in zip(rows, plain, strict=True):
        n = len(row["token_ids"])
        assert row["token_ids"] == whole["token_ids"][:n] and row["token_logprobs"] == whole["token_logprobs"][:n]
        assert " and" not in row["text"] and "," not in row["text"]
        assert processor.decode(row["token_ids"]) == row["text"] and whole["text"].startswith(row["text"])
        assert (row["finish_reason"] == "stop_string") == (row["text"] != whole["text"])


def test_the_stage_reports_occupancy(setting, plain, tmp_path: Path):
    generator, processor = setting
    details = generate(PROMPTS, generator, processor, CONFIG, ShardFolder(tmp_path, "m3po generate"), inputs="x")
    rows = list(tables.read_rows(tmp_path))
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in plain]
    # 16 lanes for 24 candidates; at most they work one after the other, at least as long as the longest of them.
    lengths = [len(row["token_ids"]) for row in plain]
    steps = sum(lengths) / details["occupancy"] / 16
    assert steps == pytest.approx(round(steps), abs=0.01)
    assert max(*lengths, sum(lengths) / 16) <= round(steps) <= 2 * max(lengths)
    assert details["distinct"] == distinct(plain) and details["resampled"] is None
    again = generate(PROMPTS, generator, processor, CONFIG, ShardFolder(tmp_path, "m3po generate"), inputs="x")
    assert again["shards_done_before"] == 1 and again["occupancy"] is None


def test_usual_settings_are_recorded_as_ever():
    """Names of finished shards depend on this text."""
    record = sampling_record(GenerateConfig(), sampling_config(GenerateConfig(), 3), 5)
    assert json.dumps(record) == '{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 256, "seed": 3}'


@pytest.mark.parametrize(
    "change",
    [
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"repetition_penalty_prompt": True},
        {"min_new_tokens": 3},
        {"suppress_tokens": [5]},
        {"stop": ["\n"]},
        {"resample_duplicates": 1},
        {"greedy_member": True},
    ],
)
def test_every_setting_is_recorded(change):
    config = GenerateConfig(**change)
    assert sampling_record(config, sampling_config(config, 0), 0) != sampling_record(
        GenerateConfig(), sampling_config(GenerateConfig(), 0), 0
    )


def test_a_pool_of_a_recipe_becomes_settings_of_candidates():
    pool = "generate.pool=[{count: 2, temperature: 0.6}, {count: 1, temperature: 1.4, min_p: 0.05}]"
    recipe = load_recipe(None, [pool, "generate.num_candidates=3", "generate.top_k=40"])
    sampling = sampling_config(recipe.generate, 0)
    assert sampling.temperature == (0.6, 0.6, 1.4) and sampling.min_p == (0.0, 0.0, 0.05)
    assert sampling.by_name()["top_k"] == 40
    assert sampling_record(recipe.generate, sampling, 2)["min_p"] == 0.05
    assert "min_p" not in sampling_record(recipe.generate, sampling, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["generate.pool=[{count: 3}]"],
            r"generate\.pool: the counts add up to 3 .*num_candidates=3",
        ),
        (["generate.pool=[{count: 0}]"], r"generate\.pool\[0\]\.count: must be in \[1, 4096\], not 0"),
        (["generate.pool=[{count: 8, temprature: 1}]"], r"unknown key"),
        (["generate.stop=['']"], r"generate\.stop"),
        (["generate.resample_duplicates=-1"], r"generate\.resample_duplicates: must be in \[0, 1000\], not -1"),
        (["generate.min_p=2"], r"generate\.min_p: must be in \[0, 1\], not 2"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused_before_anything_runs(overrides, message):
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe(None, overrides))
