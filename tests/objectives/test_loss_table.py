"""The table of docs/training.md: every loss against TRL 1.16 in float64 and float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

from m3po_jax.objectives import LOSSES

pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[2] / "docs/make_loss_table.py"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_loss_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-6), ("float32", 1e-5)])
@pytest.mark.parametrize("name", list(LOSSES))
def test_value_and_gradient_equal_trl(table: ModuleType, name: str, dtype: str, limit: float) -> None:
    assert max(table.measure(name, dtype, seeds=(7,))) < limit


def test_a_wrong_gradient_shows(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure sees a gradient that is off by a part in ten thousand, and a value as well."""
    true = table.ours

    def wrong(*args: object, **settings: object) -> object:
        (losses, *rewards), gradients = true(*args, **settings)
        return (losses, *rewards), [x * jnp.asarray(1 + 1e-4, x.dtype) for x in gradients]

    monkeypatch.setattr(table, "ours", wrong)
    value, gradient = table.measure("sppo_hard", "float64", seeds=(7,))
    assert value < 1e-12 and gradient > 1e-5
    monkeypatch.setattr(table, "ours", lambda *a, **s: true(*a, **s | {"beta": s["beta"] * 1.001}))
    value, _ = table.measure("sigmoid", "float64", seeds=(7,))
    assert value > 1e-5 and np.isfinite(value)
