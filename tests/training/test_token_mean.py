"""What an NLL's sum is divided by: the same for every token, or each batch's own tokens as in TRL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from losses_tools import one_step, plain_sums, recorded
from training_tools import TinyProcessor, base_config, tiny_model

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.batches import pair_batches, sft_batches
from m3po_jax.data.schema import Prompt, message
from m3po_jax.errors import UserError
from m3po_jax.objectives.objective import LossContext
from m3po_jax.objectives.registry import check_objective
from m3po_jax.training.loop import train
from m3po_jax.training.step import split_model

BATCHES, SIZE, LONGEST = 4, 3, 9
MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


def rows(lengths: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Text-only pairs of (chosen, rejected) letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        {
            "id": f"row-{i}",
            "images": [],
            "prompt": message("user", "what?", images=0),
            "chosen": message("assistant", letters[i : i + chosen]),
            "rejected": message("assistant", letters[i + 5 : i + 5 + rejected]),
        }
        for i, (chosen, rejected) in enumerate(lengths)
    ]


def source(config: TrainConfig, lengths: list[tuple[int, int]], seed: int = 0, window: int = 1) -> BatchSource:
    # One shape, that of the longest answer: one program serves all examples.
    widths: dict[str, Any] = {"batch_size": SIZE, "seed": seed, "length_window": window, "max_shapes": 1}
    if config.objective == "sft":
        prompts = [
            Prompt(row["id"], (), "what?", reference=row["chosen"][0]["content"][0]["text"]) for row in rows(lengths)
        ]
        return sft_batches(prompts, TinyProcessor(), **widths)
    return pair_batches(rows(lengths), TinyProcessor(), **widths)


@pytest.fixture(scope="module", params=["preference", "mixture", "sft"])
def gradient(request: pytest.FixtureRequest) -> tuple[TrainConfig, Callable[..., Any]]:
    """A configuration, and the gradient of one of its batches under a number to divide by."""
    kinds: dict[str, dict[str, Any]] = {
        "preference": {"chosen_nll_weight": 1.0},
        "mixture": {"loss_type": "mixture", "loss_weights": MPO},
        "sft": {"objective": "sft"},
    }
    config = base_config(reference="recorded", **kinds[request.param])
    partition, trainable, frozen = split_model(tiny_model(config), config)
    trainable = {name: value + 0.1 for name, value in trainable.items()}
    objective = check_objective(config)

    @jax.jit
    def of(batch: Any, tokens: Any) -> Any:
        loss = lambda weights: objective.loss(partition.merge(weights, frozen), batch, LossContext(tokens)).loss  # noqa: E731
        return jax.grad(loss)(trainable)

    return config, of


lengths_of_rows = st.lists(
    st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST)),
    min_size=BATCHES * SIZE - 1,
    max_size=BATCHES * SIZE - 1,
)


def epoch(
    gradient: Any, lengths: list[tuple[int, int]], seed: int, window: int, *, own: bool
) -> dict[str, np.ndarray]:
    """The sum of an epoch's gradients; `own`: each batch divides by its own tokens."""
    config, gradient_of = gradient
    batches = source(config, lengths, seed, window)
    assert batches.answer_tokens is not None
    total: dict[str, Any] = {}
    for _, drawn in zip(range(BATCHES), batches, strict=False):
        # References that depend on the row, not on its place in a batch.
        batch = drawn._replace(
            reference=np.float32(-5.0 - np.stack([drawn.row_index % 7] * drawn.reference.shape[1], 1))
        )
        tokens = batch.branch_mask[:, 0].sum() if own else batches.answer_tokens * SIZE
        found = gradient_of(batch, np.float32(tokens))
        total = jax.tree.map(jnp.add, total, found) if total else found
    return {name: np.asarray(value) for name, value in total.items()}


@settings(max_examples=8, deadline=None)
@given(lengths_of_rows, st.integers(0, 99), st.integers(2, BATCHES))
def test_an_epochs_gradient_is_the_same_however_rows_are_grouped(
    gradient: Any, lengths: list[tuple[int, int]], seed: int, window: int
) -> None:
    lengths = [*lengths, (LONGEST, LONGEST)]
    shuffled = epoch(gradient, lengths, seed, 1, own=False)
    grouped = epoch(gradient, lengths, seed, window, own=False)
    for name, value in shuffled.items():
        np.testing.assert_allclose(grouped[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_a_batchs_own_tokens_do_depend_on_the_grouping(gradient: Any) -> None:
    """The harm that `token_mean: data` mends."""
    lengths = [(1, 1)] * 6 + [(LONGEST, LONGEST)] * 6
    shuffled, grouped = (epoch(gradient, lengths, 0, window, own=True) for window in (1, BATCHES))
    gap = max(np.abs(grouped[name] - value).max() / np.abs(value).max() for name, value in shuffled.items())
    assert gap > 0.05


def test_sources_know_their_mean_answer() -> None:
    lengths = [(1, 9), (2, 1), (6, 3)]  # and one end token each
    for objective in ("preference", "sft"):
        assert source(base_config(objective=objective), lengths).answer_tokens == pytest.approx(4)


@pytest.mark.parametrize("token_mean", ["data", "batch"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_loop_divides_by_it(token_mean: str, groups: int, tmp_path: Path, one_device: Mesh) -> None:
    config = base_config(
        token_mean=token_mean,
        chosen_nll_weight=0.5,
        batch_size=SIZE,
        max_steps=1,
        gradient_accumulation_steps=groups,
    )
    lengths = [(1, 4)] * 5 + [(8, 8)] * 4
    batches = source(config, lengths, seed=1, window=3)
    batch = next(iter(batches))
    model = tiny_model(config)
    tokens = batch.branch_mask[:, 0].sum() if token_mean == "batch" else SIZE * np.mean([1 + n for n, _ in lengths])
    expected = -float(plain_sums(model, batch)[:, 0].sum()) / tokens
    result = train(model, batches, config, output_dir=tmp_path, mesh=one_device)
    assert result.metrics["nll/chosen"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["loss"] == pytest.approx(np.log(2) + 0.5 * expected, rel=1e-4)


def test_mixtures_with_sft_accumulate(one_device: Mesh) -> None:
    config = base_config(reference="recorded", loss_type="mixture", loss_weights=MPO, batch_size=SIZE)
    batch = recorded(next(iter(source(config, [(1, 4), (9, 2), (4, 9)]))))
    whole = one_step(tiny_model(config), batch, config, one_device)
    split = one_step(tiny_model(config), batch, replace(config, gradient_accumulation_steps=SIZE), one_device)
    for name, value in whole[0].items():
        np.testing.assert_allclose(split[0][name], value, rtol=1e-4, atol=5e-6, err_msg=name)
    for name, value in whole[1].items():
        np.testing.assert_allclose(split[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_unknown_means_are_refused() -> None:
    with pytest.raises(UserError, match=r"token_mean.*batch, data"):
        check_objective(base_config(token_mean="rows"))
