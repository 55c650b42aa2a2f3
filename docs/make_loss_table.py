"""Measures every preference loss against TRL and writes the numbers into the table of docs/training.md.

    pip install -e '.[test]' && python docs/make_loss_table.py

Both sides get the same random log-probs: ours through `preference_loss`, TRL's through the loss code of its own
trainers on stand-in models (tests/objectives/trl_tools.py). An error is the largest |ours − TRL's| / max(1, |TRL's|)
over `SEEDS` batches of six pairs and `BETAS`: of the batch's loss, and of its gradient by the sum of each answer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/objectives")]

from trl_tools import ORDER, ours, token_log_probs, trl_dpo  # noqa: E402

from m3po_jax.objectives import LOSSES  # noqa: E402

PAGE = Path(__file__).with_name("training.md")
SEEDS, BETAS = range(5), (0.1, 0.5)
SIMPO_GAMMA = 0.7
# The smoothings to measure at, where it is not 0 alone.
SMOOTHINGS = {"robust": (0.0, 0.1), "exo_pair": (1e-3, 0.1), "aot": (0.0, 0.1), "aot_unpaired": (0.0, 0.1)}
SMOOTHINGS |= {"sigmoid_trl": (0.0, 0.1), "simpo": (0.0, 0.1), "cpo": (0.0, 0.1)}

Arrays = dict[str, np.ndarray]
Result = tuple[float, list[np.ndarray]]  # the batch's loss; its gradient by the sums of the roles in `ORDER`


def of_dpo_trainer(name: str, arrays: Arrays, lengths: Sequence[np.ndarray], **options: Any) -> Result:
    """TRL's `DPOTrainer`; its gradient by a sum is that by any one of the sum's tokens."""
    loss, gradients, _ = trl_dpo(arrays, *lengths, loss_type=name, **options)
    return loss, [gradient[:, 0] for gradient in gradients]


def of_odds_trainers(name: str, arrays: Arrays, lengths: Sequence[np.ndarray], **options: Any) -> Result:
    """TRL's `CPOTrainer` (for SimPO, too) and `ORPOTrainer`, as their `get_batch_loss_metrics` call them."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    class Exact(torch.Tensor):
        """ORPO's trainer rounds to float32; the formula is compared in the precision of its inputs."""

        def float(self) -> torch.Tensor:
            return self

    sums = [torch.tensor(arrays[role].sum(1), requires_grad=True) for role in ORDER[:2]]
    means = [x / torch.tensor(n).to(x) for x, n in zip(sums, lengths, strict=True)]
    trainer = SimpleNamespace(
        alpha=0.0,
        simpo_gamma=SIMPO_GAMMA,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
        **options,
    )
    if name == "orpo":
        loss = -ORPOTrainer.odds_ratio_loss(trainer, *(x.as_subclass(Exact) for x in means))[0].mean()
    else:
        loss = CPOTrainer.cpo_loss(trainer, *(means if name == "simpo" else sums))[0].mean()
    loss.backward()
    # No reference: its gradient is 0.
    return loss.item(), [x.grad.numpy() for x in sums] + [np.zeros(len(sums[0]))] * 2


def measure(name: str, dtype: str, seeds: Iterable[int] = SEEDS) -> tuple[float, float]:
    """(error of the value, error of the gradient) of one loss in ``float64`` or ``float32``."""
    worst = [0.0, 0.0]
    for seed in seeds:
        exact, *lengths = token_log_probs(seed)
        if name == "ipo_sum":  # TRL's `ipo` divides by lengths: answers of one token leave the sums as they are
            more = ((0, 0), (0, exact[ORDER[0]].shape[1] - 1))
            exact = {role: np.pad(x.sum(1, keepdims=True), more) for role, x in exact.items()}
            lengths = [np.ones_like(n) for n in lengths]
        arrays = {role: x.astype(dtype) for role, x in exact.items()}
        for beta in BETAS:
            for smoothing in SMOOTHINGS.get(name, (0.0,)):
                options = {"beta": beta, "label_smoothing": smoothing}
                of = of_odds_trainers if name in {"simpo", "cpo", "orpo"} else of_dpo_trainer
                theirs = of({"ipo_sum": "ipo", "sigmoid_trl": "sigmoid"}.get(name, name), arrays, lengths, **options)
                with jax.enable_x64(dtype == "float64"):
                    (losses, _, _), gradients = ours(
                        arrays, *lengths, loss_type=name, simpo_gamma=SIMPO_GAMMA, **options
                    )
                    assert losses.dtype == dtype, losses.dtype
                    mine = float(losses.mean()), [np.asarray(x) for x in gradients]
                worst[0] = max(worst[0], _error(mine[0], theirs[0]))
                worst[1] = max(worst[1], *(_error(a, b) for a, b in zip(mine[1], theirs[1], strict=True)))
    return worst[0], worst[1]


def _error(mine: Any, theirs: Any) -> float:
    return float(np.max(np.abs(np.subtract(mine, theirs)) / np.maximum(1, np.abs(theirs))))


def cells(name: str) -> str:
    """The measured columns of one loss: value and gradient in float64, then in float32."""
    errors = [measure(name, dtype) for dtype in ("float64", "float32")]
    return " | ".join(f"{value:.0e}, {slope:.0e}".replace("0e+00", "0") for value, slope in errors)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in LOSSES:
        row = re.compile(rf"^(\| `{name}` \|.*\| )[^|]* \| [^|]*( \|)$", re.M)
        text, found = row.subn(lambda match, name=name: f"{match[1]}{cells(name)}{match[2]}", text)
        assert found == 1, f"no row of {name}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
