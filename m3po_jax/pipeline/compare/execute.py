"""The comparison's runs: every seed's shared candidates, then arm after arm, each skipped where it is finished."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3po_jax.config import Recipe, SelectConfig, TrainConfig
from m3po_jax.errors import GateFailed, UserError
from m3po_jax.evaluation.gate import FAILED
from m3po_jax.hosts.agreement import agreed, barrier, is_writer
from m3po_jax.pipeline.arms import needs_pairs
from m3po_jax.pipeline.compare import plan
from m3po_jax.pipeline.compare.tables import write_results
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.run import Run
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.directory import ComparisonDirectory


class SeedRun(Run):
    """One seed: the stages of `Run` without a system of its own, and arms that may be added later."""

    one_recipe = True

    def __init__(self, recipe: Recipe, original: Recipe):
        super().__init__(recipe)
        self.original = original
        self._cap: int | None = None

    def recorded_recipe(self) -> Recipe:
        return plan.recorded(self.recipe, self.original)

    def arm_recipe(self, arm: str | None) -> Recipe:
        recipe = super().arm_recipe(arm)
        if self._cap is None or arm not in self.capped_arms:
            return recipe
        return dataclasses.replace(
            recipe, select=dataclasses.replace(recipe.select, max_pairs=self._cap, budget_by="random")
        )

    @property
    def capped_arms(self) -> list[str]:
        """Arms whose number of pairs is made equal: those that learn from pairs and set no limit of their own."""
        if not self.original.compare.equal_pairs:
            return []
        recipes = {arm: super(SeedRun, self).arm_recipe(arm) for arm in plan.trained_arms(self.original.compare)}
        return [arm for arm, recipe in recipes.items() if self._may_cap(recipe.train, recipe.select)]

    @staticmethod
    def _may_cap(train: TrainConfig, select: SelectConfig) -> bool:
        return needs_pairs(train) and select.budget == 1 and select.max_pairs is None

    def check_arm(self, arm: str) -> None:
        """Notes what an arm is, or refuses another one under a name that is taken."""
        overrides = json.loads(json.dumps(self.recipe.arms[arm]))
        stored = self.directory.arm_settings(arm)
        if stored is not None and stored != overrides:
            raise UserError(
                f"holds another arm {arm!r}",
                where=str(self.directory.arm_folder(arm)),
                remedy="give the arm another name, or delete that folder",
            )
        if stored is None and is_writer():
            self.directory.save_arm_settings(arm, overrides)

    def equalise_pairs(self) -> None:
        """Finds how many pairs the arm with the fewest has, once; arms that join later keep to that number."""
        arms = self.capped_arms
        if len(arms) < 2:
            return
        cap = self.directory.pairs_cap()
        if not agreed([cap is not None])[0]:
            counts = {}
            for arm in arms:
                cell = self.directory.cell(1).of(arm)
                self.prepare_scores(cell)
                counts[arm] = self.select_stage(cell)["pairs"]
            if is_writer():
                self.directory.save_pairs_cap({"pairs": counts, "cap": min(counts.values())})
            barrier("counted")
            fewest = min(counts, key=counts.__getitem__)
            say(f"every arm trains on {counts[fewest]} pairs, as many as {fewest} has")
            cap = self.directory.pairs_cap()
        assert cap is not None, "written before the barrier"
        if cap["cap"] < 1:
            raise UserError(
                f"{min(cap['pairs'], key=cap['pairs'].__getitem__)} has no pair",
                where=str(self.directory.root),
                remedy="loosen select.*, or leave that arm out",
            )
        self._cap = cap["cap"]

    def arm_finished(self, arm: str) -> bool:
        """Whether the last thing that an arm leaves behind is there."""
        finished = all(
            cell.training.is_marked and all(cell.evaluation(b.name).is_finished for b in self.benchmarks)
            for cell in self._cells(arm)
        )
        return agreed([finished])[0]

    def _cells(self, arm: str) -> list[Cell]:
        return [self.directory.cell(number).of(arm) for number in range(1, self.recipe.rounds + 1)]

    def work_on(self, arm: str) -> None:
        """All rounds of an arm, each evaluated; nothing of it stays in memory."""
        cells = self._cells(arm)
        for cell in cells:
            self.prepare_arm(cell)
            self.train_stage(cell)
            self.evaluate_stage(cell)
            self.forget(cell.before)
        self.forget(cells[-1])


class ComparisonProgress:
    """Which part of how many this is, and a guess at the time left from the parts of its kind before it."""

    def __init__(self, total: dict[str, int]):
        self.left = dict(total)
        self.total, self.number = sum(total.values()), 0
        self.seconds: dict[str, list[float]] = {}

    def skip(self, kind: str) -> None:
        self.number += 1
        self.left[kind] -= 1

    @contextmanager
    def part(self, kind: str, title: str) -> Iterator[None]:
        self.number += 1
        guess = self.guess()
        say(f"[{self.number}/{self.total}] {title}" + (f", about {guess} left" if guess else ""), style="bold")
        started = time.monotonic()
        yield
        self.left[kind] -= 1
        self.seconds.setdefault(kind, []).append(time.monotonic() - started)

    def guess(self) -> str:
        """Words for the time left; empty before the first part is done."""
        every = [second for seconds in self.seconds.values() for second in seconds]
        if not every:
            return ""
        total = 0.0
        for kind, count in self.left.items():
            taken = self.seconds.get(kind) or every
            total += count * sum(taken) / len(taken)
        return f"{total:.0f} s" if total < 90 else f"{total / 60:.0f} min"


def compare(recipe: Recipe) -> Path:
    """Runs what is missing of every seed and arm, writes the tables and the report; returns the report.

    Everything lies under ``NAME/compare/``: ``seed-S/`` are run directories (round 1's candidates and scores, which
    arms share, and ``arms/ARM/``); ``results.json``, ``results.md``, ``times.json`` and ``report.html`` beside them.
    The tables are written after every seed, so that a stopped comparison shows what it has.

    Raises:
        UserError: settings that contradict each other, or directories of another recipe.
        Interrupted: a signal arrived; the same call continues.
        GateFailed: all is done, and `evaluate.gate` does not let the main system pass.
    """
    from m3po_jax.report import build_report
    from m3po_jax.report.browser import tokenizer_text

    plan.check_compare(recipe)
    if not recipe.evaluate.benchmarks:
        raise UserError("no benchmark", where="evaluate.benchmarks", remedy="name at least one in the recipe")
    recipes = {seed: plan.seed_recipe(recipe, seed) for seed in recipe.compare.seeds}
    directory = ComparisonDirectory.of(recipe.output_dir, recipe.name)
    arms = [*plan.trained_arms(recipe.compare), *(point.arm for point in plan.efficiency_points(recipe.compare))]
    progress = ComparisonProgress({"base": len(recipes), "arm": len(recipes) * len(arms)})
    with directory.lock():
        if is_writer():
            directory.save_recipe(recipe)
        done: dict[int, Run] = {}
        for seed, seed_recipe in recipes.items():
            run = SeedRun(seed_recipe, recipe)
            with run.directory.lock():
                text = _one_seed(run, seed, arms, progress, tokenizer_text)
            done[seed] = run
            run.release()
            results = write_results(recipe, directory, done)
            if is_writer():
                build_report(directory.root, text)
            barrier("compared")
    if is_writer():
        print(directory.text(), flush=True)
    for line in results["verdict"]:
        say(line)
    if failed := [entry["text"] for entry in results["gate"] if entry["outcome"] == FAILED]:
        raise GateFailed(failed)
    return directory.report


def _one_seed(
    run: SeedRun, seed: int, arms: list[str], progress: ComparisonProgress, token_text: Callable[[Any], Any]
) -> Callable[[int], str]:
    run.open()
    for arm in arms:
        run.check_arm(arm)
    with progress.part("base", f"seed {seed}: candidates, scores, the base"):
        run.generate_stage(run.directory.cell(1))
        run.score_stage(run.directory.cell(1))
        run.evaluate_base()
        run.equalise_pairs()
    for arm in arms:
        if run.arm_finished(arm):
            progress.skip("arm")
            continue
        with progress.part("arm", f"seed {seed}: {arm}"):
            run.work_on(arm)
    return token_text(run.policy.processor.text)
