"""Later rounds: pairs of earlier ones, and whose log-probs are the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini_run import rows, write_data, write_recipe

from m3po_jax.cli import main
from m3po_jax.data import tables
from m3po_jax.pipeline.rounds import earlier_count, mix


@given(st.integers(1, 500), st.integers(0, 500), st.floats(0, 0.9))
def test_the_share_of_earlier_pairs_is_what_was_asked_for(own, earlier, share):
    count = earlier_count(own, earlier, share)
    assert 0 <= count <= earlier
    if count < earlier:
        assert abs(count - share * (own + count)) <= 1
    assert earlier_count(own, earlier, 0.0) == 0


def test_a_mixture_has_all_own_pairs_and_the_same_earlier_ones_whatever_their_order():
    def mixed(first, seed):
        rounds = [(n, [f"p{k}" for k in order]) for n, order in ((1, first), (2, range(10)), (3, range(12)))]
        return [(rounds[place][0], rounds[place][1][index]) for place, index in mix(rounds, 0.5, seed)]

    found = mixed(range(20), 0)
    assert [key for number, key in found if number == 3] == [f"p{n}" for n in range(12)]
    earlier = {item for item in found if item[0] < 3}
    assert len(earlier) == 12 and {number for number, _ in earlier} == {1, 2}
    assert {item for item in mixed(range(19, -1, -1), 0) if item[0] < 3} == earlier
    assert {item for item in mixed(range(20), 1) if item[0] < 3} != earlier


def test_two_rounds_against_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = write_recipe(
        tmp_path,
        write_data(tmp_path / "data"),
        rounds=2,
        round={"reference": "base", "mix_previous": 0.4},
        train={"max_steps": 3},
        evaluate={"stop_bias": [], "contrast_alpha": []},
    )
    # The training loop computes recorded log-probs of some rows again, with the base, and refuses others.
    assert main(["run", "--config", str(recipe)]) == 0
    run = tmp_path / "runs" / "mini"
    first, second = (rows(run / f"round-{number}" / "pairs") for number in (1, 2))
    trained = list(tables.read_rows(run / "round-2" / "training-pairs"))
    assert len(trained) == len(second) + earlier_count(len(second), len(first), 0.4)
    own, earlier = trained[: len(second)], trained[len(second) :]
    recorded = {row["id"]: row for row in first}
    for row in earlier:
        # What round 1's generator, the base, recorded.
        assert row["reference_chosen_logprobs"] == recorded[row["id"]]["reference_chosen_logprobs"]
    generated = {row["id"]: row for row in second}
    changed = [
        not np.allclose(
            row["reference_chosen_logprobs"], generated[row["id"]]["reference_chosen_logprobs"], atol=1e-5
        )
        for row in own
    ]
    assert earlier and any(changed), "the second round's generator is the trained policy, not the base"
    table = json.loads((run / "evaluation.json").read_text())["tables"][0]
    assert [row["name"] for row in table["rows"]] == ["base", "mas_dpo", "m3po, round 1", "m3po"]
    assert (run / "round-1" / "evaluation" / "scenes" / "results.json").exists()
