"""What preference losses share, against TRL's own code: mixtures, f-divergences, LD-DPO, scalars; mDPO's terms."""

from __future__ import annotations

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl_tools import ORDER, PAIRS, TOKENS, ours, token_log_probs, torch, trl_dpo

from m3po_jax.config import TrainConfig
from m3po_jax.errors import UserError
from m3po_jax.objectives import (
    DIVERGENCES,
    LOSSES,
    PairLoss,
    anchor_loss,
    conditional_logits,
    conditional_loss,
    divergence_score,
    length_desensitised_sums,
    preference_loss,
)

MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
WITH_DIVERGENCES = sorted(name for name, loss in LOSSES.items() if loss.divergences)
OURS_ALONE = {"ipo_sum", "sigmoid_trl"}  # names that TRL lacks


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("mix", "label_smoothing"),
    [
        (MPO, 0.0),
        ({"hinge": 0.5, "ipo": 2.0, "nca_pair": 0.0, "aot": 1.0}, 0.0),
        ({"sigmoid_trl": 1.0, "exo_pair": 0.3}, 1e-2),
    ],
)
def test_mixture_equals_trl(mix, label_smoothing):
    arrays, *lengths = token_log_probs(3)
    shared = {"beta": 0.1, "label_smoothing": label_smoothing}
    (losses, chosen, rejected), gradients = ours(arrays, *lengths, loss_type="mixture", loss_weights=mix, **shared)
    names = [name.removesuffix("_trl") for name in mix]
    expected, trl_gradients, metrics = trl_dpo(
        arrays, *lengths, loss_type=names, loss_weights=list(mix.values()), **shared
    )
    assert losses.shape == (PAIRS,) and losses.dtype == jnp.float64
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-7)
    np.testing.assert_allclose(chosen.mean(), metrics["rewards/chosen"][0], rtol=1e-6)
    np.testing.assert_allclose(rejected.mean(), metrics["rewards/rejected"][0], rtol=1e-6)
    for role, gradient, trl_gradient in zip(ORDER, gradients, trl_gradients, strict=True):
        for pair, length in enumerate(lengths["rejected" in role]):
            np.testing.assert_allclose(gradient[pair], trl_gradient[pair, :length].mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", [name for name in WITH_DIVERGENCES if name not in OURS_ALONE])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
def test_divergence_equals_trl(loss_type, divergence):
    arrays, *lengths = token_log_probs(8)
    arrays = {name: 0.3 * value for name, value in arrays.items()}
    options = {
        "loss_type": loss_type,
        "beta": 0.2,
        "label_smoothing": 1e-3 if loss_type == "exo_pair" else 0.0,
        "f_divergence_type": divergence,
    }
    (losses, chosen, _), gradients = ours(arrays, *lengths, **options)
    expected, trl_gradients, metrics = trl_dpo(arrays, *lengths, **options)
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-6)
    np.testing.assert_allclose(chosen.mean(), metrics["rewards/chosen"][0], rtol=1e-6)
    for role, gradient, trl_gradient in zip(ORDER, gradients, trl_gradients, strict=True):
        for pair, length in enumerate(lengths["rejected" in role]):
            np.testing.assert_allclose(gradient[pair], trl_gradient[pair, :length].mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("coefficient", [0.5, 1.0, 2.0, -0.5])
def test_alpha_divergence_equals_trl(loss_type, coefficient):
    """In float32: TRL's clamp knows no float64."""
    arrays, *lengths = token_log_probs(9)
    arrays = {name: (0.3 * value).astype(np.float32) for name, value in arrays.items()}
    options = {
        "loss_type": loss_type,
        "beta": 0.2,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": coefficient,
    }
    (losses, _, _), _ = ours(arrays, *lengths, **options)
    expected, _, _ = trl_dpo(arrays, *lengths, **options)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-4)


def test_alpha_divergence_clamps_where_trl_does():
    arrays, *lengths = token_log_probs(9)
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    arrays["policy_rejected"] = arrays["policy_rejected"] * 200
    options = {"loss_type": "hinge", "beta": 1e-3, "f_divergence_type": "alpha_divergence"}
    (losses, _, _), _ = ours(arrays, *lengths, **options)
    expected, _, _ = trl_dpo(arrays, *lengths, **options)
    assert np.isfinite(expected)
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-4)


def test_divergences_apply_where_trl_applies_them():
    from trl.trainer.dpo_trainer import DPOTrainer

    listed = re.search(r"f_divergence_loss_types = \{([^}]*)\}", inspect.getsource(DPOTrainer.__init__))
    assert listed is not None
    assert set(re.findall(r'"(\w+)"', listed[1])) == set(WITH_DIVERGENCES) - OURS_ALONE


@given(
    st.sampled_from(sorted(DIVERGENCES)),
    st.floats(-1, 3).filter(lambda alpha: abs(alpha - 1) > 1e-3),
    st.floats(-20, 20),
    st.floats(1e-3, 5),
)
@settings(deadline=None, max_examples=60)
def test_scores_increase_and_vanish_at_the_reference(divergence, alpha, log_ratio, step):
    """f' is increasing (f is convex): a likelier answer never has a smaller implicit reward."""
    score = divergence_score(divergence, alpha)
    low, high, zero = score(jnp.asarray([log_ratio, log_ratio + step, 0.0]))
    assert high >= low
    assert abs(zero) < 1e-12


@given(
    st.sampled_from(["sigmoid", "hinge", "robust", "sigmoid_norm", "sigmoid_trl"]),
    st.sampled_from(sorted(DIVERGENCES)),
    st.lists(st.floats(-3000, 0, width=32), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=60)
def test_divergences_of_extreme_inputs_stay_finite(loss_type, divergence, values):
    sums = [jnp.asarray([v], jnp.float32) for v in values]
    lengths = {"chosen_lengths": jnp.asarray([7]), "rejected_lengths": jnp.asarray([4])}

    def loss(*sums):
        return preference_loss(*sums, loss_type=loss_type, f_divergence_type=divergence, **lengths)[0].mean()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*sums)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize("precomputed", [False, True], ids=["both", "policy_only"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "mixture"])
def test_length_desensitised_equals_trl(loss_type, ld_alpha, precomputed):
    """Values and gradients by every token. TRL given the reference's plain sums desensitises the policy alone."""
    arrays, *lengths = token_log_probs(6)
    mask = np.stack([np.arange(TOKENS) < n[:, None] for n in lengths], axis=1)
    assert (lengths[0] > lengths[1]).any() and (lengths[0] < lengths[1]).any()

    def mean_loss(*tokens):
        policy, reference = jnp.stack(tokens[:2], axis=1), jnp.stack(tokens[2:], axis=1)
        sums = length_desensitised_sums(policy, mask, ld_alpha)
        reference_sums = reference.sum(-1) if precomputed else length_desensitised_sums(reference, mask, ld_alpha)
        losses, chosen, rejected = preference_loss(
            *sums.T,
            *reference_sums.T,
            loss_type=loss_type,
            loss_weights=MPO if loss_type == "mixture" else None,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            chosen_nll=-policy[:, 0].sum(-1),
        )
        return losses.mean(), (chosen - rejected).mean()

    tokens = [jnp.asarray(arrays[name]) for name in ORDER]
    (found, margin), gradients = jax.value_and_grad(mean_loss, argnums=(0, 1, 2, 3), has_aux=True)(*tokens)
    mixed = {"loss_type": list(MPO), "loss_weights": list(MPO.values())}
    expected, trl_gradients, metrics = trl_dpo(
        arrays,
        *lengths,
        beta=0.1,
        ld_alpha=ld_alpha,
        precomputed_reference=precomputed,
        **(mixed if loss_type == "mixture" else {"loss_type": loss_type}),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    np.testing.assert_allclose(margin, metrics["rewards/margins"][0], rtol=1e-6)
    for role, gradient, trl_gradient in zip(ORDER, gradients, trl_gradients, strict=True):
        counted = mask[:, int("rejected" in role)]
        np.testing.assert_allclose(gradient * counted, trl_gradient * counted, rtol=1e-6, atol=1e-9)


def test_length_desensitised_ignores_what_is_masked():
    log_probs = jnp.asarray([[[-1.0, -2.0, -4.0], [-8.0, jnp.nan, jnp.nan]]])
    mask = jnp.asarray([[[True, True, True], [True, False, False]]])
    np.testing.assert_allclose(length_desensitised_sums(log_probs, mask, 0.25), [[-1.0 - 0.25 * 6.0, -8.0]])
    assert np.all(np.isfinite(jax.grad(lambda x: length_desensitised_sums(x, mask, 0.25).sum())(log_probs)))


def test_discopop_tau_equals_trl():
    arrays, *lengths = token_log_probs(1)
    options = {"loss_type": "discopop", "beta": 0.1, "discopop_tau": 0.4}
    (losses, _, _), _ = ours(arrays, *lengths, **options)
    expected, _, _ = trl_dpo(arrays, *lengths, **options)
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-12)


def test_conditional_and_anchor_are_mdpos():
    """The three terms of `mDPOTrainer.dpo_loss` (github.com/luka-group/mDPO), written out in torch."""
    rng = np.random.default_rng(0)
    names = ("chosen", "rejected", "imageless")
    policy = {name: torch.tensor(-rng.gamma(5.0, 4.0, PAIRS), requires_grad=True) for name in names}
    reference = {name: torch.tensor(-rng.gamma(5.0, 4.0, PAIRS)) for name in names}
    beta, log_sigmoid = 0.1, torch.nn.functional.logsigmoid
    preferred = (policy["chosen"] - policy["rejected"]) - (reference["chosen"] - reference["rejected"])
    image = (policy["chosen"] - policy["imageless"]) - (reference["chosen"] - reference["imageless"])
    anchor = policy["chosen"] - reference["chosen"]
    expected = -log_sigmoid(beta * preferred) - log_sigmoid(beta * image) - log_sigmoid(beta * anchor)
    expected.sum().backward()

    given = {name: jnp.asarray(value.numpy()) for name, value in reference.items()}

    def losses(policy):
        logits = conditional_logits(policy["chosen"], policy["imageless"], given["chosen"], given["imageless"])
        main = preference_loss(policy["chosen"], policy["rejected"], given["chosen"], given["rejected"], beta=beta)[0]
        return main + conditional_loss(logits, beta) + anchor_loss(policy["chosen"], given["chosen"], beta)

    start = {name: jnp.asarray(value.detach().numpy()) for name, value in policy.items()}
    found = losses(start)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-12)
    gradients = jax.grad(lambda policy: losses(policy).sum())(start)
    for name in names:
        np.testing.assert_allclose(gradients[name], policy[name].grad.numpy(), rtol=1e-10)


def test_anchor_delta_is_in_units_of_reward():
    reward, delta = 0.1 * 3.0, 0.7
    found = anchor_loss(jnp.asarray([-4.0]), jnp.asarray([-7.0]), 0.1, delta)
    np.testing.assert_allclose(found, np.log1p(np.exp(delta - reward)), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "mixture"}, "positive weight"),
        ({"loss_type": "mixture", "loss_weights": {"sigmoid": 0.0}}, "positive weight"),
        ({"loss_type": "mixture", "loss_weights": {"sigmod": 1.0}}, "did you mean 'sigmoid'"),
        ({"loss_type": "mixture", "loss_weights": {"mixture": 1.0}}, "loss_weights.mixture: unknown value 'mixture'"),
        ({"loss_type": "mixture", "loss_weights": {"sigmoid": -1.0}}, "must be in"),
        ({"loss_type": "mixture", "loss_weights": {"sigmoid": float("inf")}}, "must be a finite number"),
        ({"loss_type": "mixture", "loss_weights": {"sigmoid": 1.0, "exo_pair": 1.0}}, "1e-3"),
        ({"loss_type": "sigmoid", "loss_weights": {"sigmoid": 1.0}}, "train.loss_type=mixture"),
        ({"loss_type": "mixtur"}, "did you mean 'mixture'"),
        ({"loss_type": "bco_pair", "f_divergence_type": "js_divergence"}, "no form under js_divergence"),
        (
            {"loss_type": "mixture", "loss_weights": MPO, "f_divergence_type": "js_divergence"},
            "'bco_pair' has no form",
        ),
        ({"f_divergence_type": "js"}, "f_divergence_type: unknown value 'js'"),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": float("nan")},
            "must be a finite number",
        ),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau"),
        ({"loss_type": "simpo", "simpo_gamma": float("nan")}, "simpo_gamma"),
    ],
)
def test_senseless_options_are_user_errors(options, message):
    x, lengths = jnp.zeros(2), jnp.ones(2)
    with pytest.raises(UserError, match=message):
        preference_loss(x, x, x, x, chosen_lengths=lengths, rejected_lengths=lengths, **options)


def test_weights_of_zero_are_left_out():
    """So that an arm can take a loss out of the recipe's mixture, whatever that loss would demand."""
    loss = PairLoss.of(TrainConfig(loss_type="mixture", loss_weights={"sigmoid": 0.5, "exo_pair": 0.0}))
    loss.check()
    assert loss.mixture == {"sigmoid": 0.5}
