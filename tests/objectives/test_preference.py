"""Preference losses against TRL's own code: values, gradients, rewards and metrics in float64."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl_tools import ORDER, PAIRS, ours, token_log_probs, trl_dpo

from m3po_jax.errors import UserError
from m3po_jax.objectives import LOSSES, preference_loss, preference_metrics

torch = pytest.importorskip("torch")

# What TRL 1.16's DPO trainer implements under the same name and, with this smoothing, the same convention.
DPO_CASES = [
    ("sigmoid", 0.0),  # TRL 1.16 ignores the smoothing
    ("robust", 0.0),
    ("robust", 0.1),
    ("hinge", 0.0),
    ("ipo", 0.0),
    ("exo_pair", 1e-3),
    ("exo_pair", 0.1),
    ("nca_pair", 0.0),
    ("bco_pair", 0.0),
    ("sppo_hard", 0.0),
    ("aot", 0.0),
    ("aot", 0.1),
    ("aot_unpaired", 0.1),
    ("apo_zero", 0.0),
    ("apo_down", 0.0),
    ("discopop", 0.0),
    ("sft", 0.0),
    ("sigmoid_norm", 0.0),
]
# What TRL 1.16 has under another name: (ours, TRL's, smoothing).
RENAMED_CASES = [
    ("sigmoid_trl", "sigmoid", 0.1),
]
CPO_CASES = [
    ("simpo", "simpo", 0.0),
    ("simpo", "simpo", 0.1),
    ("cpo", "sigmoid", 0.0),
    ("cpo", "sigmoid", 0.1),
]


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("loss_type", "label_smoothing"), DPO_CASES)
def test_equals_trl_dpo_trainer(loss_type, label_smoothing, beta):
    arrays, chosen_lengths, rejected_lengths = token_log_probs(len(loss_type))
    settings = {"loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing}
    (losses, chosen_rewards, rejected_rewards), gradients = ours(arrays, chosen_lengths, rejected_lengths, **settings)
    loss, trl_gradients, metrics = trl_dpo(arrays, chosen_lengths, rejected_lengths, **settings)

    assert losses.dtype == jnp.float64 and losses.shape == (PAIRS,)
    np.testing.assert_allclose(losses.mean(), loss, rtol=1e-6 if loss_type == "exo_pair" else 1e-12)
    for role, gradient, trl_gradient in zip(ORDER, gradients, trl_gradients, strict=True):
        lengths = chosen_lengths if role.endswith("chosen") else rejected_lengths
        for pair, length in enumerate(lengths):
            # The gradient by a sum is the gradient by any one of its tokens.
            np.testing.assert_allclose(gradient[pair], trl_gradient[pair, :length].mean(), rtol=1e-6, atol=1e-12)

    sums = {name: jnp.asarray(arrays[name].sum(1)) for name in ORDER}
    found = preference_metrics(
        *sums.values(),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_lengths=jnp.asarray(chosen_lengths),
        rejected_lengths=jnp.asarray(rejected_lengths),
    )
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    for name in [*names, "logps/chosen", "logps/rejected"]:
        np.testing.assert_allclose(found[name], metrics[name][0], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"),
    [case for case in DPO_CASES if case[0] not in {"aot", "aot_unpaired", "sft"}],
)
def test_each_pair_equals_trl_alone(loss_type, label_smoothing):
    """Per-pair values, not only their mean: TRL is given batches in which every pair is the same."""
    arrays, chosen_lengths, rejected_lengths = token_log_probs(5)
    settings = {"loss_type": loss_type, "beta": 0.2, "label_smoothing": label_smoothing}
    (losses, _, _), _ = ours(arrays, chosen_lengths, rejected_lengths, **settings)
    for pair in range(PAIRS):
        same = [pair] * PAIRS
        loss, _, _ = trl_dpo(
            {name: value[same] for name, value in arrays.items()},
            chosen_lengths[same],
            rejected_lengths[same],
            **settings,
        )
        np.testing.assert_allclose(losses[pair], loss, rtol=1e-6)


@pytest.mark.parametrize(("loss_type", "trl_type", "label_smoothing"), RENAMED_CASES)
def test_equals_trl_under_another_name(loss_type, trl_type, label_smoothing):
    arrays, *lengths = token_log_probs(4)
    settings = {"beta": 0.2, "label_smoothing": label_smoothing}
    (losses, _, _), _ = ours(arrays, *lengths, loss_type=loss_type, **settings)
    loss, _, _ = trl_dpo(arrays, *lengths, loss_type=trl_type, **settings)
    np.testing.assert_allclose(losses.mean(), loss, rtol=1e-12)
    (honoured, _, _), _ = ours(arrays, *lengths, loss_type="sigmoid", **settings)
    assert abs(honoured.mean() - loss) > 1e-3


@pytest.mark.parametrize(("loss_type", "trl_type", "label_smoothing"), CPO_CASES)
def test_equals_trl_cpo_trainer(loss_type, trl_type, label_smoothing):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    arrays, chosen_lengths, rejected_lengths = token_log_probs(11)
    policy = [torch.tensor(arrays[name].sum(1), requires_grad=True) for name in ORDER[:2]]
    # `concatenated_forward` gives averages to ipo and simpo, sums to the others.
    average = loss_type == "simpo"
    scaled = [
        x / torch.tensor(n) if average else x for x, n in zip(policy, (chosen_lengths, rejected_lengths), strict=True)
    ]
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=label_smoothing,
        loss_type=trl_type,
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected = CPOTrainer.cpo_loss(trainer, *scaled)
    expected[0].mean().backward()
    found, gradients = ours(
        arrays,
        chosen_lengths,
        rejected_lengths,
        loss_type=loss_type,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=label_smoothing,
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-6)
    for gradient, tensor in zip(gradients[:2], policy, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-6, atol=1e-15)
    assert not np.any(gradients[2]) and not np.any(gradients[3])


def test_equals_trl_orpo_trainer():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    class Double(torch.Tensor):
        """TRL rounds to float32 here; the formula is compared in the precision of its inputs."""

        def float(self):
            return self

    arrays, chosen_lengths, rejected_lengths = token_log_probs(12)
    policy = [torch.tensor(arrays[name].sum(1), requires_grad=True) for name in ORDER[:2]]
    means = [
        (x / torch.tensor(n)).as_subclass(Double)
        for x, n in zip(policy, (chosen_lengths, rejected_lengths), strict=True)
    ]
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    ratio_losses, chosen_rewards, rejected_rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *means)
    (-ratio_losses).mean().backward()  # get_batch_loss_metrics: nll − losses.mean()
    found, gradients = ours(arrays, chosen_lengths, rejected_lengths, loss_type="orpo", beta=0.3)
    for a, b in zip(found, (-ratio_losses, chosen_rewards, rejected_rewards), strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-6)
    for gradient, tensor in zip(gradients[:2], policy, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_sigmoid_at_step_zero_is_ln_2(dtype):
    x = jnp.asarray([-40.0, -3.0, 0.0], dtype)
    y = jnp.asarray([-1.0, -90.0, -2.5], dtype)
    for smoothing in (0.0, 0.1):
        losses, chosen, rejected = preference_loss(x, y, x, y, beta=0.1, label_smoothing=smoothing)
        np.testing.assert_allclose(losses, np.log(2), rtol=float(jnp.finfo(dtype).eps))
        assert not np.any(chosen) and not np.any(rejected)


def test_sigmoid_smoothing_is_conservative_dpo():
    """TRL 0.26's formula: −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    arrays, *lengths = token_log_probs(2)
    (losses, _, _), _ = ours(arrays, *lengths, loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    sums = [torch.tensor(arrays[name].sum(1)) for name in ORDER]
    logits = 0.3 * ((sums[0] - sums[2]) - (sums[1] - sums[3]))
    logsigmoid = torch.nn.functional.logsigmoid
    np.testing.assert_allclose(losses, -0.8 * logsigmoid(logits) - 0.2 * logsigmoid(-logits), rtol=1e-12)


def test_ipo_sum_is_the_papers_formula():
    losses, _, _ = preference_loss(
        *(jnp.asarray([v]) for v in (-3.0, -5.0, -4.0, -4.5)), loss_type="ipo_sum", beta=0.25
    )
    assert losses[0] == pytest.approx((1.0 - (-0.5) - 2.0) ** 2)


@given(
    st.sampled_from(sorted(LOSSES)),
    st.lists(st.floats(-3000, 0, width=32), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=150)
def test_extreme_inputs_stay_finite(loss_type, values):
    """Long answers and diverged policies give finite losses and gradients in float32."""
    sums = [jnp.asarray([v], jnp.float32) for v in values]
    options = {
        "loss_type": loss_type,
        "beta": 0.1,
        "label_smoothing": 1e-3 if loss_type == "exo_pair" else 0.0,
        "chosen_lengths": jnp.asarray([7]),
        "rejected_lengths": jnp.asarray([4]),
    }
    losses = preference_loss(*sums, **options)[0]
    assert np.all(np.isfinite(losses))
    gradients = jax.grad(lambda *s: preference_loss(*s, **options)[0].mean(), argnums=(0, 1, 2, 3))(*sums)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_works_under_jit_and_rewards_carry_no_gradient():
    def rewards(x):
        _, chosen, rejected = preference_loss(x, -x, x * 0, x * 0, beta=0.1)
        return jnp.sum(chosen - rejected)

    assert not np.any(jax.jit(jax.grad(rewards))(jnp.ones(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, "did you mean 'sigmoid'"),
        ({"loss_type": "ipo"}, "chosen_lengths"),
        ({"loss_type": "exo_pair"}, "1e-3"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
    ],
)
def test_bad_settings_are_user_errors(options, message):
    x = jnp.zeros(2)
    with pytest.raises(UserError, match=message):
        preference_loss(x, x, x, x, **options)


def test_displacement_metric_is_per_token():
    x = jnp.asarray
    found = preference_metrics(
        x([-12.0, -5.0]),
        x([-9.0, -1.0]),
        x([-10.0, -5.0]),
        x([-6.0, -2.0]),
        chosen_rewards=x([0.0, 0.1]),
        rejected_rewards=x([0.0, -0.1]),
        chosen_lengths=x([4, 1]),
        rejected_lengths=x([3, 2]),
    )
    assert found["delta_logps/chosen"] == pytest.approx((-2 / 4 + 0) / 2)
    assert found["delta_logps/rejected"] == pytest.approx((-3 / 3 + 1 / 2) / 2)
    assert found["rewards/accuracies"] == 0.5  # the tie counts as wrong
