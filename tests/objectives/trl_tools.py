"""TRL's DPO trainer as an oracle: its own loss code, called on stand-in models that return given log-probs."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m3po_jax.objectives import preference_loss

torch = pytest.importorskip("torch")

PAIRS, TOKENS = 6, 9
ORDER = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def token_log_probs(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Per-token log-probs [pairs, tokens] of the four roles, zero beyond each answer's end; lengths."""
    rng = np.random.default_rng(seed)
    lengths = {role: rng.integers(1, TOKENS + 1, PAIRS) for role in ("chosen", "rejected")}
    arrays = {}
    for name in ORDER:
        values = -rng.gamma(1.0, 1.5, (PAIRS, TOKENS))
        arrays[name] = values * (np.arange(TOKENS) < lengths[name.split("_")[1]][:, None])
    return arrays, lengths["chosen"], lengths["rejected"]


def ours(arrays, chosen_lengths, rejected_lengths, **settings):
    """(losses, chosen rewards, rejected rewards), gradient of the mean loss by the four sums."""
    sums = [jnp.asarray(arrays[name].sum(1)) for name in ORDER]
    lengths = {
        "chosen_lengths": jnp.asarray(chosen_lengths),
        "rejected_lengths": jnp.asarray(rejected_lengths),
    }

    def mean_loss(*sums):
        return preference_loss(*sums, **lengths, **settings)[0].mean()

    return preference_loss(*sums, **lengths, **settings), jax.grad(mean_loss, argnums=(0, 1, 2, 3))(*sums)


def trl_dpo(
    arrays,
    chosen_lengths,
    rejected_lengths,
    *,
    loss_type,
    beta,
    label_smoothing=0.0,
    loss_weights=None,
    ld_alpha=None,
    f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5,
    discopop_tau=0.05,
    precomputed_reference=False,
):
    """`DPOTrainer._compute_loss` itself, on stand-in models: (loss, gradients by token, metrics).

    With `precomputed_reference` it is given plain sums of the reference's log-probs, as its data sets may.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    tensors = {name: torch.tensor(arrays[name], requires_grad=True) for name in ORDER}
    lengths = np.concatenate([chosen_lengths, rejected_lengths])
    # One prompt token first: log-probs belong to the positions after it.
    mask = torch.tensor((np.arange(TOKENS + 1) >= 1) & (np.arange(TOKENS + 1) <= lengths[:, None])).long()

    class Model(torch.nn.Module):
        def __init__(self, role):
            super().__init__()
            self.role = role

        def forward(self, **_):
            role = self.role
            blank = torch.zeros(2 * PAIRS, TOKENS)
            return SimpleNamespace(
                log_probs=torch.cat([tensors[f"{role}_chosen"], tensors[f"{role}_rejected"]]),
                entropy=blank,
                mean_logits=blank,
                is_top1=blank.bool(),
            )

    policy = Model("policy")
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    trainer = SimpleNamespace(
        model=policy,
        ref_model=Model("reference"),
        accelerator=SimpleNamespace(
            device="cpu",
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            unwrap_model=lambda m: m,
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=discopop_tau),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=precomputed_reference,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        loss_types=types,
        loss_weights=loss_weights or [1.0] * len(types),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    if precomputed_reference:
        for role in ("chosen", "rejected"):
            inputs[f"ref_{role}_logps"] = tensors[f"reference_{role}"].sum(1)
    import trl.trainer.dpo_trainer as module

    # The stand-in reference has no gradient checkpointing to disable, and gradients by it are wanted here.
    original, no_grad = module.disable_gradient_checkpointing, torch.no_grad
    module.disable_gradient_checkpointing = lambda *_: contextlib.nullcontext()
    torch.no_grad = contextlib.nullcontext
    try:
        loss = DPOTrainer._compute_loss(trainer, policy, inputs, False)
    finally:
        module.disable_gradient_checkpointing, torch.no_grad = original, no_grad
    loss.backward()
    gradients = [torch.zeros(PAIRS, TOKENS) if t.grad is None else t.grad for t in tensors.values()]
    return loss.item(), [g.numpy() for g in gradients], trainer._metrics["train"]
