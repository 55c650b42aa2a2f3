"""`m3po compare` on a handful of scenes: what it shares, that it resumes bit-equal, and that it grows."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from compile_log import noted_compilations
from mini_run import m3po, rows, write_data, write_recipe

from m3po_jax.cli import main
from m3po_jax.config import Recipe
from m3po_jax.errors import Interrupted, UserError
from m3po_jax.pipeline.arms import SYSTEMS, VCD, arm_recipe, overrides_of
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.compare import execute, plan
from m3po_jax.recipes import load_recipe

COMPARE = {"arms": ["mas_dpo", "m3po_prior"], "main": "m3po_prior", "seeds": [0, 1], "resamples": 40}
CHANGES = {
    "arms": {},
    "score": {"confidence": ["mean"]},
    "train": {"max_steps": 3, "save_steps": 10},
    "evaluate": {"stop_bias": [-4.0, 4.0], "contrast_alpha": []},
}


def recipe_in(folder: Path, data: Path, **compare: object) -> Path:
    return write_recipe(folder, data, compare={**COMPARE, **compare}, **CHANGES)


@pytest.fixture(scope="module")
def compiled_by_seed() -> dict[int, list[str]]:
    """What was compiled for each seed of `finished`."""
    return {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, compiled_by_seed: dict[int, list[str]]) -> Path:
    """The comparison's folder, undisturbed."""
    folder = tmp_path_factory.mktemp("compare")
    one_seed = execute._one_seed

    def noted(run: Any, seed: int, *rest: Any) -> Any:
        with noted_compilations() as names:
            result = one_seed(run, seed, *rest)
        compiled_by_seed[seed] = names
        return result

    jax.clear_caches()  # of other tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "_one_seed", noted)
        assert main(["compare", "--config", str(recipe_in(folder, write_data(folder / "data")))]) == 0
    return folder / "runs" / "mini" / "compare"


def test_a_second_seed_runs_the_programs_of_the_first(finished: Path, compiled_by_seed: dict[int, list[str]]):
    programs = {"_prefill", "_decode", "fuse_layers", "log_probs_program", "_text_embeddings"}
    assert programs <= set(compiled_by_seed[0])
    assert not programs & set(compiled_by_seed[1])
    # Pairs of other lengths may need another shape of the step, of which `train.max_shapes` are two.
    assert compiled_by_seed[1].count("step") <= 1


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_tables_have_every_system_seed_and_difference(finished: Path):
    results = results_of(finished)
    assert results["seeds"] == [0, 1] and results["order"] == ["mas_dpo", "m3po_prior"]
    scenes = results["benchmarks"]["scenes"]
    assert scenes["order"] == ["base", "base, stop bias -4", "base, stop bias +4", "mas_dpo", "m3po_prior"]
    for system in scenes["order"]:
        metrics = scenes["systems"][system]["metrics"]
        assert len(metrics["chair_i"]["seeds"]) == 2
        low, high = metrics["chair_i"]["low"], metrics["chair_i"]["high"]
        assert low <= metrics["chair_i"]["mean"] <= high
    assert scenes["systems"]["base"]["metrics"]["delta_chair_i"]["mean"] <= 0
    own, reference = (scenes["systems"][s]["metrics"]["f1"]["seeds"] for s in ("m3po_prior", "mas_dpo"))
    difference = scenes["differences"]["mas_dpo"]["m3po_prior"]["f1"]
    assert difference["seeds"] == pytest.approx([a - b for a, b in zip(own, reference, strict=True)])
    assert difference["outcome"] == "few_seeds"
    assert any("nothing is claimed" in line for line in results["verdict"])
    assert set(results["compute"]["m3po_prior"]) >= {
        "generated_tokens",
        "judge_calls",
        "optimizer_steps",
    }
    assert results["compute"]["m3po_prior"]["judge_calls"] == 4 * 16
    log = (finished / "seed-0" / "arms" / "m3po_prior" / "round-1" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(log[-1])["num_tokens"] < 2 * results["compute"]["m3po_prior"]["trained_tokens"]
    markdown = (finished / "results.md").read_text(encoding="utf-8")
    assert "difference to mas_dpo" in markdown and "| m3po_prior" in markdown
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert 'id="comparison"' in page and "nothing is claimed" in page and "<script src" not in page


def test_arms_share_candidates_and_scores_and_have_equally_many_pairs(finished: Path):
    for seed in (0, 1):
        run = finished / f"seed-{seed}"
        assert len(rows(run / "round-1" / "candidates")) == len(rows(run / "round-1" / "scores")) == 64
        # The variant that an arm needs is computed for all of them.
        assert "confidence_prior" in rows(run / "round-1" / "scores")[0]
        assert not list(run.glob("arms/*/round-1/candidates")) and not list(run.glob("round-1/pairs"))
        counts = {arm: len(rows(run / "arms" / arm / "round-1" / "pairs")) for arm in ("mas_dpo", "m3po_prior")}
        assert len(set(counts.values())) == 1 and min(counts.values()) > 0
        cap = json.loads((run / "pairs-cap.json").read_text())
        assert cap["cap"] == min(cap["pairs"].values()) == counts["mas_dpo"]
    first, second = (rows(finished / f"seed-{seed}" / "round-1" / "candidates") for seed in (0, 1))
    assert [row["text"] for row in first] != [row["text"] for row in second]


def test_a_seed_of_the_comparison_is_the_run_of_that_seed(finished: Path, tmp_path: Path):
    """The same arm trained by `m3po run`, with the pairs that the comparison left it."""
    data = finished.parents[2] / "data" / "prompts.jsonl"
    cap = json.loads((finished / "seed-1" / "pairs-cap.json").read_text())["cap"]
    recipe = write_recipe(tmp_path, data, **CHANGES)
    overrides = ["seed=1", "select.seed=1", "select.rule=mas_only", "evaluate.benchmarks={}"]
    overrides += [f"select.max_pairs={cap}", "select.budget_by=random"]
    assert main(["run", "--config", str(recipe), *overrides]) == 0
    alone = (tmp_path / "runs" / "mini" / "round-1" / "metrics.jsonl").read_text()
    assert alone == (finished / "seed-1" / "arms" / "mas_dpo" / "round-1" / "metrics.jsonl").read_text()


def test_an_interrupted_comparison_ends_bit_equal(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    recipe = recipe_in(tmp_path, finished.parents[2] / "data" / "prompts.jsonl")
    whole = execute.SeedRun.evaluate_stage

    def stops(self, cell):
        if self.recipe.seed == 1 and cell.arm == "m3po_prior":
            raise Interrupted("stopped by SIGTERM while testing")
        whole(self, cell)

    monkeypatch.setattr(execute.SeedRun, "evaluate_stage", stops)
    assert main(["compare", "--config", str(recipe)]) == 75
    assert "the same command continues" in capsys.readouterr().err
    folder = tmp_path / "runs" / "mini" / "compare"
    assert results_of(folder)["seeds"] == [0], "the seed that is done has its table"
    assert "1 of 2 seeds are done" in (folder / "results.md").read_text()
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name in ("done.json", "items.jsonl")}
    assert len(made) > 10
    monkeypatch.undo()
    assert main(["compare", "--config", str(recipe)]) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in made.items()), "something finished was made again"
    assert (folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()


@pytest.mark.slow
def test_a_terminated_comparison_ends_bit_equal(finished: Path, tmp_path: Path):
    """By a real signal in the midst of an arm; one seed, whose files are those of the undisturbed two."""
    recipe = recipe_in(tmp_path, finished.parents[2] / "data" / "prompts.jsonl", seeds=[0])
    folder = tmp_path / "runs" / "mini" / "compare"
    process = m3po("compare", "--config", str(recipe))
    deadline = time.monotonic() + 300
    while not list(folder.glob("seed-0/arms/mas_dpo/round-1/pairs/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75 and "the same command continues" in errors, errors
    assert main(["compare", "--config", str(recipe)]) == 0
    told = {"metrics.jsonl", "items.jsonl", "drops.jsonl", "pairs-cap.json", "calibration.json"}
    made = sorted(path.relative_to(finished) for path in (finished / "seed-0").rglob("*") if path.name in told)
    assert len(made) >= 14
    for path in made:
        assert (folder / path).read_bytes() == (finished / path).read_bytes(), path


def test_arms_and_seeds_may_join_later_but_not_change(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = finished.parents[2] / "data" / "prompts.jsonl"
    first = recipe_in(tmp_path, data, seeds=[0], arms=["mas_dpo"], main="mas_dpo")
    assert main(["compare", "--config", str(first)]) == 0
    folder = tmp_path / "runs" / "mini" / "compare"
    marks = {path: path.stat().st_mtime_ns for path in folder.rglob("done.json")}
    more = ["compare.arms=[vcd,mas_dpo,sft,half]", "arms={half: {select.rule: m3p, select.max_pairs: 4}}"]
    more += ["compare.efficiency=[0.5,1.0]", "compare.efficiency_of=[mas_dpo,half]"]
    more += ["compare.against=[mas_dpo,mas_dpo-random-0.5]"]
    assert main(["compare", "--config", str(first), *more]) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in marks.items())
    results = results_of(folder)
    assert set(results["benchmarks"]["scenes"]["systems"]) >= {"vcd α=1", "sft", "half", "mas_dpo-best-0.5"}
    assert results["compute"]["half"]["pairs"] == 4 and results["compute"]["sft"]["generated_tokens"] == 0
    assert results["compute"]["sft"]["batch_size"] == 2 * results["compute"]["half"]["batch_size"]
    curve = {(row["system"], row["order"], row["budget"]): row["pairs"] for row in results["efficiency"]}
    assert len(curve) == 6 and curve["half", "all", 1.0] == 4
    half = -(-curve["mas_dpo", "all", 1.0] // 2)
    assert curve["mas_dpo", "value", 0.5] == curve["mas_dpo", "random", 0.5] == half
    # Against a point of the curve all points are listed, which the other tables leave out.
    listed = results["benchmarks"]["scenes"]["differences"]["mas_dpo-random-0.5"]
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "mas_dpo-best-0.5" in listed and "| mas_dpo-best-0.5" in text.split("difference to mas_dpo-random-0.5")[1]
    assert "| mas_dpo-best-0.5" not in text.split("difference to mas_dpo\n")[1].split("###")[0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "half, random pairs" in page and "mas_dpo, highest value first" in page
    more[1] = "arms={half: {select.rule: m3p, select.max_pairs: 5}}"
    assert main(["compare", "--config", str(first), *more]) == 2
    assert "holds another arm 'half'" in capsys.readouterr().err
    assert main(["compare", "--config", str(first), "train.beta=0.7"]) == 2
    assert (
        "holds a run of another recipe (it has 'beta: 0.1', this one 'beta: 0.7': train.beta)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("compare.arms=[mas_dop]", "arms: unknown system 'mas_dop' (did you mean 'mas_dpo'?)"),
        ("compare.arms=[base,vcd]", "compare.arms: no arm is trained"),
        ("compare.main=csr", "compare.main: 'csr' is not compared; one of mas_dpo, m3po_prior"),
        ("compare.seeds=[1,1]", "compare.seeds: [1, 1]"),
        ("compare.against=[bsae]", "compare.against: unknown system 'bsae' (did you mean 'base'?)"),
        ("compare.efficiency=[0]", "compare.efficiency"),
        ("compare.efficiency_of=[m3po]", "compare.efficiency_of: 'm3po' is not compared"),
        ("compare.per_seed={model.path: 'x{sed}'}", "compare.per_seed.model.path: cannot fill 'x{sed}'"),
        ("train.objective=sft", "train.objective"),
        (
            "evaluate.benchmarks.questions.metric=mmhal",
            "evaluate.benchmarks.questions: mmhal scores a judge's reviews",
        ),
        ("evaluate.benchmarks={}", "evaluate.benchmarks: no benchmark"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, line: str):
    recipe = recipe_in(tmp_path, tmp_path / "none.jsonl")
    if change.startswith("evaluate.benchmarks={"):
        text = recipe.read_text().split("  benchmarks:")[0] + "  benchmarks: {}\n"
        recipe.write_text(text + "compare: " + json.dumps(COMPARE))
        change = "seed=0"
    assert main(["compare", "--config", str(recipe), change]) == 2
    assert line in capsys.readouterr().err


def test_a_decoding_is_no_arm_of_a_run():
    with pytest.raises(UserError, match=r"arms\.vcd: a decoding, not a trained arm; set evaluate\.contrast_alpha"):
        check_recipe(Recipe(arms={"vcd": {}}))


@pytest.mark.parametrize("arm", [name for name in SYSTEMS if name != VCD])
@pytest.mark.parametrize("config", ["quickstart", "llava15_7b_m3po"])
def test_every_system_is_a_recipe_by_its_name_alone(arm: str, config: str):
    recipe = load_recipe(f"configs/{config}.yaml")
    recipe = replace(recipe, compare=replace(recipe.compare, arms=[arm], main=arm))
    plan.check_compare(recipe)
    own = plan.seed_recipe(recipe, 3)
    check_recipe(own)
    made = arm_recipe(own, arm)
    used = {made.select.confidence, made.select.confidence_dispreferred} - {""}
    assert used <= set(own.score.confidence) and own.seed == made.seed == made.select.seed == 3
    # Filling in an arm twice changes nothing.
    assert overrides_of(own, arm) == own.arms[arm]


def test_a_seed_names_its_own_model_and_data():
    recipe = Recipe(arms={"sft": {"train.data": [{"path": "rows-{seed}.jsonl"}]}})
    compared = replace(
        recipe.compare, arms=["sft", "m3po"], per_seed={"model.path": "bases/{seed}", "train.beta": "0.{seed}"}
    )
    own = plan.seed_recipe(replace(recipe, compare=compared), 7)
    assert own.model.path == "bases/7" and own.train.beta == 0.7
    assert arm_recipe(own, "sft").train.data[0].path == "rows-7.jsonl"
    with pytest.raises(UserError, match=r"unknown key 'model\.paht'"):
        plan.seed_recipe(replace(recipe, compare=replace(compared, per_seed={"model.paht": "x"})), 7)


@pytest.mark.parametrize("config", ["scenes", "ablations", "easy_vqa"])
def test_recipes_of_the_results_can_be_meant(config: str):
    recipe = load_recipe(f"configs/results/{config}.yaml")
    plan.check_compare(recipe)
    for seed in recipe.compare.seeds:
        own = plan.seed_recipe(recipe, seed)
        check_recipe(own)
        assert own.model.path.endswith(f"-{seed}/model") and "{seed}" not in str(own.arms)
    assert load_recipe("configs/results/base.yaml").train.objective == "sft"
