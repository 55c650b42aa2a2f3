"""Nobody outside `objectives/` compares a value with the name of an objective, loss, divergence or algorithm."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import m3po_jax
from m3po_jax.objectives import DIVERGENCES, LOSSES, MIXTURE
from m3po_jax.objectives.registry import OBJECTIVES
from m3po_jax.objectives.rlhf import ALGORITHMS

PACKAGE = Path(m3po_jax.__file__).parent
NAMES = {*OBJECTIVES, *LOSSES, *DIVERGENCES, *ALGORITHMS, MIXTURE}
KEYS = {"objective", "loss_type", "f_divergence_type", "algorithm"}
# Other vocabularies with a word in common: judges (score.backend), and splits of the quickstart's data.
OTHER_WORDS = {"backend", "members", "split"}


def words_of(node: ast.expr) -> set[str]:
    """Plain words that an operand is or lists."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return {word for item in node.elts for word in words_of(item)}
    if isinstance(node, ast.Dict):
        return {word for key in node.keys if key is not None for word in words_of(key)}
    return set()


def key_of(node: ast.expr) -> str:
    """The last name of what an operand reads: `recipe.train.objective`, `setting("train.objective")`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript):
        return key_of(node.slice)
    if isinstance(node, ast.Call) and node.args:
        return key_of(node.args[0])
    return str(node.value).rpartition(".")[2] if isinstance(node, ast.Constant) else ""


def comparisons(source: str) -> list[int]:
    """Lines that compare with a name, or look one up in a dictionary that they write down."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            operands = [node.value, node.slice]
        elif isinstance(node, ast.Match):
            values = [p.value for case in node.cases for p in ast.walk(case) if isinstance(p, ast.MatchValue)]
            operands = [node.subject, *values]
        else:
            continue
        words = {word for operand in operands for word in words_of(operand)}
        keys = {key_of(operand) for operand in operands if not words_of(operand)}
        if (words and keys & KEYS) or (words & NAMES and not keys & OTHER_WORDS):
            lines.append(node.lineno)
    return lines


def test_stages_ask_the_objective() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "objectives"]
    assert len(files) > 100
    assert [(str(path), line) for path in files for line in comparisons(path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        'recipe.train.objective == "anything"',
        'if own.train.objective not in ("preference", "rlhf"): pass',
        'run.setting("train.loss_type") == "hinge"',
        'saved["objective"] != "sft"',
        'kind == "ipo"',
        '{"preference": 2, "sft": 1}[config.objective]',
        'match config.rl.algorithm:\n    case "ppo" | "rloo":\n        pass',
    ],
)
def test_a_comparison_shows(source: str) -> None:
    assert comparisons(source)


@pytest.mark.parametrize("source", ['score.backend == "reward"', '"reward" in score.members', 'name == "base"'])
def test_other_words_are_free(source: str) -> None:
    assert not comparisons(source)
