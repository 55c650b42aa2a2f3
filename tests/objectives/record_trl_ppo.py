"""Records what TRL's former PPO trainers compute, for `test_policy_gradient.py`. Run where torch is:

    pip download --no-deps trl==0.11.4 trl==0.19.0   # then unpack both wheels
    python tests/objectives/record_trl_ppo.py TRL_0_11_4_FOLDER TRL_0_19_0_FOLDER

TRL 1.16 has no PPO any more. Of 0.11.4 this executes `PPOTrainer.compute_rewards`, `compute_advantages` and `loss`
and `AdaptiveKLController.update`, of 0.19.0 the statements of `PPOTrainer.train` between the estimators' comment and
"whiten rewards", all from the files as they were published, on the tensors that are recorded with their results.
"""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

OUTPUT = Path(__file__).with_name("trl_ppo.json")
ROWS, TOKENS = 6, 8


def definitions(path: Path, names: set[str]) -> dict[str, Any]:
    """Functions and classes of a module, without importing what the module imports."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if getattr(node, "name", None) in names]
    for node in found:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns = [], None
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
    scope: dict[str, Any] = {"torch": torch, "np": np, "F": torch.nn.functional}
    exec(compile(ast.Module(found, []), str(path), "exec"), scope)
    return scope


def main(old: Path, new: Path) -> None:
    rng = np.random.default_rng(5)
    lengths = np.array([8, 5, 1, 7, 3, 8])
    mask = np.arange(TOKENS) < lengths[:, None]
    draw = lambda scale, shift=0.0: torch.tensor((rng.normal(size=(ROWS, TOKENS)) * scale + shift) * mask)  # noqa: E731
    given = {
        "log_probs": draw(0.5, -2.0),
        "reference": draw(0.5, -2.0),
        "values": draw(1.0),
        "new_log_probs": draw(0.5, -2.0),
        "new_values": draw(1.0),
    }
    scores = torch.tensor(rng.normal(size=ROWS))
    masks = torch.tensor(mask)

    names = {"masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits"}
    core = definitions(old / "trl/core.py", names)
    core["flatten_dict"] = lambda stats: stats
    methods = {"compute_rewards", "_kl_penalty", "compute_advantages", "loss"}
    ppo = definitions(old / "trl/trainer/ppo_trainer.py", methods)
    ppo |= {name: value for name, value in core.items() if name not in ppo}
    for name in methods:
        ppo[name].__globals__.update(core)
    control = definitions(old / "trl/trainer/utils.py", {"AdaptiveKLController"})

    settings = {"kl_coef": 0.15, "gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.3, "vf_coef": 0.1}
    recorded: dict[str, Any] = {"settings": settings, "lengths": lengths.tolist(), "scores": scores.tolist()}
    recorded["given"] = {name: value.tolist() for name, value in given.items()}
    config = SimpleNamespace(kl_penalty="kl", whiten_rewards=False, ratio_threshold=1e9, **settings)
    trainer = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=settings["kl_coef"]))
    trainer._kl_penalty = lambda a, b: ppo["_kl_penalty"](trainer, a, b)
    rewards, _, _ = ppo["compute_rewards"](trainer, scores, given["log_probs"], given["reference"], masks)
    _, advantages, returns = ppo["compute_advantages"](trainer, given["values"], rewards, masks)
    fresh = {name: given[name].clone().requires_grad_() for name in ("new_log_probs", "new_values")}
    policy, value, stats = ppo["loss"](
        trainer,
        given["log_probs"],
        given["values"],
        torch.zeros(ROWS, TOKENS, 2),
        fresh["new_values"],
        fresh["new_log_probs"],
        masks,
        advantages,
        returns,
    )
    (policy + value).backward()
    recorded |= {
        "rewards": (rewards * masks).tolist(),
        "whitened_rewards": (core["masked_whiten"](rewards, masks, shift_mean=False) * masks).tolist(),
        "advantages": (advantages * masks).tolist(),
        "returns": (returns * masks).tolist(),
        "policy_loss": policy.item(),
        "value_loss": value.item() / settings["vf_coef"],
        "policy_clipfrac": stats["policy"]["clipfrac"].item(),
        "value_clipfrac": stats["val"]["clipfrac"].item(),
        "gradient_log_probs": fresh["new_log_probs"].grad.tolist(),
        "gradient_values": fresh["new_values"].grad.tolist(),
    }
    controller = control["AdaptiveKLController"](0.2, 6.0, 10_000)
    path = []
    for kl in (1.0, 7.0, 6.5, 5.5, 30.0):
        controller.update(kl, 256)
        path.append([kl, float(controller.value)])
    recorded["adaptive_kl"] = path

    lines = (new / "trl/trainer/ppo_trainer.py").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "k1 and k3 estimators" in line)
    last = next(i for i, line in enumerate(lines) if "5. whiten rewards" in line)
    code = textwrap.dedent("\n".join(lines[first:last]))
    for estimator in ("k1", "k3"):
        scope = {
            "torch": torch,
            "args": SimpleNamespace(kl_estimator=estimator, kl_coef=settings["kl_coef"]),
            "logprobs": given["log_probs"][:1],
            "ref_logprobs": given["reference"][:1],
            "scores": scores[:1],
            "sequence_lengths": torch.tensor([TOKENS - 1]),
            "sequence_lengths_p1": torch.tensor([TOKENS]),
        }
        exec(code, scope)
        recorded[f"rewards_{estimator}"] = {"kl": scope["kl"].tolist(), "rewards": scope["rewards"].tolist()}
    OUTPUT.write_text(json.dumps(recorded, indent=None) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
