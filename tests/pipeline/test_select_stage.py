"""The `select` stage on files: what a pair keeps of its prompt."""

from __future__ import annotations

from pathlib import Path

from m3po_jax.config import SelectConfig
from m3po_jax.data import tables
from m3po_jax.data.pair_rows import pair_prompt
from m3po_jax.data.preference_files import read_preferences
from m3po_jax.data.schema import CANDIDATE, SCORE_FIXED, Image, Prompt
from m3po_jax.data.templates import get_template
from m3po_jax.pipeline.select import select
from m3po_jax.workspace.selection import PairFolder
from m3po_jax.workspace.shards import ShardFolder

METADATA = {"history": [["Hello.", "Hi."]], "system": "Be brief."}
PROMPTS = [
    Prompt("talk", (Image(bytes=b"one"),), "What is it?", metadata=METADATA),
    Prompt("llava", (Image(bytes=b"two"),), "<image>\nWhat is it?"),
    Prompt("inside", (Image(bytes=b"three"),), "What is <image> this?"),
    Prompt("later", (Image(bytes=b"four"),), "<image>\nAnd this?", metadata=METADATA),
]


def test_pairs_keep_the_conversation_of_their_prompt(tmp_path: Path) -> None:
    """History, system turn and places of images: training sees the prompt that the candidates were drawn for."""
    rows = [{"id": p.id, "candidate": k} for p in PROMPTS for k in range(2)]
    candidates = [
        row | {"text": f"a {('dog', 'cat')[row['candidate']]}", "token_ids": [5, 6 + row["candidate"], 2]}
        | {"token_logprobs": [-1.0, -1.0, -1.0]}
        for row in rows
    ]  # fmt: skip
    scores = [row | {"mas": 0.9 - 0.7 * row["candidate"], "confidence": -1.0} for row in rows]
    tables.write_table(tmp_path / "candidates/0.parquet", candidates, CANDIDATE)
    tables.write_table(tmp_path / "scores/0.parquet", scores, SCORE_FIXED)
    out = PairFolder(tmp_path / "pairs")
    prompts = {prompt.id: prompt for prompt in PROMPTS}
    folders = (ShardFolder(tmp_path / name, "m3po") for name in ("candidates", "scores"))
    select(*folders, prompts, SelectConfig(min_rejected_z=-9.0), out, image_root=tmp_path)
    pairs = out.pairs()
    assert sorted(pairs.ids()) == sorted(prompts)
    # The same folder, read as anybody's file of pairs.
    for row, again in zip(pairs, read_preferences(str(out.folder)), strict=True):
        for made in (pair_prompt(row), pair_prompt(again)):
            prompt = prompts[made.id]
            for name in ("vicuna_v1", "hf", "plain"):
                written, expected = (
                    get_template(name).render(
                        p.instruction, 1, p.metadata.get("history", ()), system=p.metadata.get("system")
                    )
                    for p in (made, prompt)
                )
                assert written == expected
            assert [image.bytes for image in made.images] == [image.bytes for image in prompt.images]
        assert again["chosen_token_ids"] == [5, 6, 2] and again["reference_rejected_logprobs"] == [-1.0] * 3
