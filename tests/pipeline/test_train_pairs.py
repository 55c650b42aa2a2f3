"""`train.pairs`: preference training on pairs from a file, by the command line, against TRL on the same file."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from mini_run import ROOT, write_data, write_recipe

from m3po_jax.cli import main
from m3po_jax.errors import UserError
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.compare.plan import check_compare
from m3po_jax.recipes import load_recipe

BASE = ROOT / "m3po_jax/quickstart/checkpoints/quickstart-base"
# Template `plain` as a chat template, with the end token that TRL's templates of LLaVA lack.
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ {'user': ' ASSISTANT:', 'assistant': eos_token, 'system': ' '}[m['role']] }}{% endfor %}"
)
ARMS = {"chosen": {"train.objective": "sft"}}
MPO = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}


def said(words: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": words}


def asked(words: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}


def conversations() -> list[dict[str, Any]]:
    """TRL's conversational rows, one image each: a system turn, earlier turns, an image in a later turn."""
    describe, is_there = "Describe the image.", "Is there a dog in the image?"
    prompts = [
        [asked(describe)],
        [said("Describe the dog and the cat.", "system"), asked(is_there)],
        [asked(is_there), said("No"), {"role": "user", "content": [{"type": "text", "text": describe}]}],
        [{"role": "user", "content": [{"type": "text", "text": is_there}]}, said("Yes"), asked("Is there a cat?")],
        [said(describe, "user")],
    ]
    answers = [("A cat and a dog.", "A dog."), ("Yes", "No"), ("A dog.", "A car and a cat."), ("No", "Yes")]
    answers.append(("A bear.", "A cat."))
    return [
        {"prompt": prompt, "chosen": [said(chosen)], "rejected": [said(rejected)], "image": f"{number:03d}.png"}
        for number, (prompt, (chosen, rejected)) in enumerate(zip(prompts, answers, strict=True))
    ]


def write_pairs(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_with(folder: Path, pairs: Path, arms: Any = (), **train: Any) -> str:
    """The mini recipe on pairs alone: it has no prompts, and all rows in a batch."""
    settings = {"pairs": str(pairs), "batch_size": 5, "max_steps": 2, "save_steps": 1, "warmup_ratio": 0.0}
    settings |= {"lr_schedule": "constant", "learning_rate": 1e-2, "token_mean": "batch"}
    settings |= {"loss_type": "mixture", "loss_weights": MPO} | train
    path = write_recipe(folder, folder / "none.jsonl", train=settings, cache={"reference": "auto"})
    content = yaml.safe_load(path.read_text(encoding="utf-8")) | {"data": {}, "arms": dict(arms)}
    benchmarks = content["evaluate"]["benchmarks"]
    benchmarks.pop("questions")
    benchmarks["scenes"]["data"]["path"] = str(pairs.parent / "prompts.jsonl")
    content["evaluate"] |= {"stop_bias": [], "contrast_alpha": []}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_data(folder, 5)
    return write_pairs(folder, conversations())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["run", "--config", recipe_with(folder, pairs, ARMS)]) == 0
    return folder / "runs/mini"


def metrics(run: Path, arm: str = ".") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / arm / "round-1/metrics.jsonl").read_text().splitlines()]


def exported(run: Path, out: Path, *settings: str) -> Path:
    recipe = str(run.parents[1] / "mini.yaml")
    options = ["--dtype", "float32", "--output", str(out)]
    assert main(["export", "--config", recipe, *options, *settings]) == 0
    return out


def test_run_trains_evaluates_and_reports_without_candidates(finished: Path) -> None:
    for made in (
        "round-1/done.json",
        "round-1/evaluation/scenes/results.json",
        "report.html",
        "arms/chosen/round-1/done.json",
    ):
        assert (finished / made).exists(), made
    for absent in ("candidates", "scores", "pairs"):
        assert not (finished / "round-1" / absent).exists()
    names = [row["name"] for row in json.loads((finished / "evaluation.json").read_text())["tables"][0]["rows"]]
    assert names == ["base", "chosen", "pairs"]
    data = json.loads((finished / "manifest.json").read_text())["data"]
    assert data["rows"] == 5 and data["shapes"] == {"TRL": 5}
    first = metrics(finished, "arms/chosen")[0]
    assert first["loss"] == pytest.approx(metrics(finished)[0]["nll/chosen"], rel=1e-5)


def test_the_step_is_that_of_trl(finished: Path, pairs: Path, tmp_path: Path) -> None:
    """MPO's loss, rewards and log-probs at the second step: TRL's collator and loss on the same rows and weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    from PIL import Image
    from trl.trainer.utils import add_fused_lm_head

    torch.set_num_threads(1)
    recipe = recipe_with(tmp_path, pairs, max_steps=1)
    assert main(["train", "--config", recipe]) == 0
    assert metrics(tmp_path / "runs/mini") == metrics(finished)[:1]
    models = [
        transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (exported(tmp_path / "runs/mini", tmp_path / "export"), BASE)
    ]
    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    settings = json.loads((BASE / "preprocessor_config.json").read_text())
    settings.pop("image_processor_type")
    processor = transformers.LlavaProcessor(
        clip.CLIPImageProcessorPil(**settings),
        transformers.AutoTokenizer.from_pretrained(BASE),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    rows = [row | {"image": Image.open(pairs.parent / row["image"])} for row in conversations()]
    inputs = module.DataCollatorForVisionPreference(processor)(rows)
    trainer = SimpleNamespace(
        model=models[0],
        ref_model=models[1],
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        loss_types=list(MPO),
        loss_weights=list(MPO.values()),
        beta=0.1,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = module.DPOTrainer._compute_loss(trainer, models[0], dict(inputs), False).item()
    ours, theirs = metrics(finished)[1], trainer._metrics["eval"]
    assert ours["loss"] == pytest.approx(loss, abs=2e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert ours[name] == pytest.approx(np.mean(theirs[name]), abs=5e-4), name
    assert abs(ours["rewards/margins"]) > 1e-3


def stopped_after_one_step(finished: Path, name: str) -> tuple[Path, list[str]]:
    """A copy of the run whose training was stopped after its first step, and how to go on with it."""
    copy = finished.with_name(name)
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "round-1/checkpoints/2")
    (copy / "round-1/done.json").unlink()
    record = json.loads((copy / "round-1/training.json").read_text())
    (copy / "round-1/training.json").write_text(json.dumps(record | {"finished": None, "outputs": {}}))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("name: mini", f"name: {name}"))
    return copy, ["train", "--config", str(finished.parents[1] / "mini.yaml"), f"name={name}"]


def test_the_same_command_continues_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    copy, command = stopped_after_one_step(finished, "stopped")
    assert main(command) == 0
    assert metrics(copy) == metrics(finished)
    from safetensors.numpy import load_file

    one = load_file(exported(copy, tmp_path / "a", "name=stopped") / "model.safetensors")
    other = load_file(exported(finished, tmp_path / "b") / "model.safetensors")
    base = load_file(BASE / "model.safetensors")
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert any((one[name] != base[name]).any() for name in base)


@pytest.mark.parametrize("change", ["system", "image"])
def test_other_pairs_do_not_continue_a_training(finished: Path, pairs: Path, change: str, capsys) -> None:
    """What the answers' tokens do not tell: the prompt and the image."""
    _, command = stopped_after_one_step(finished, f"other-{change}")
    kept = pairs.read_bytes()
    rows = conversations()
    rows[0] |= {"system": "Describe."} if change == "system" else {"image": "003.png"}
    try:
        write_pairs(pairs.parent, rows)
        assert main(command) == 2
    finally:
        pairs.write_bytes(kept)
    assert "the unfinished training there was made from something else (pairs " in capsys.readouterr().err


def test_nothing_is_generated_scored_or_selected(finished: Path, capsys) -> None:
    for verb in ("generate", "score", "select"):
        assert main([verb, "--config", str(finished.parents[1] / "mini.yaml")]) == 2
        assert "train.pairs: training reads pairs from a file" in capsys.readouterr().err


def test_a_second_run_does_nothing_new(finished: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.jsonl")}
    assert main(["run", "--config", str(finished.parents[1] / "mini.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.jsonl")} == before
    assert "trained" not in capsys.readouterr().err


def test_a_preview_lists_no_stage_that_a_file_of_pairs_leaves_out(finished: Path, capsys) -> None:
    assert main(["run", "--dry-run", "--config", str(finished.parents[1] / "mini.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "round 1: train: done" in lines
    assert not [line for line in lines if line.split(": ")[1] in ("generate", "score", "select")]


def test_recorded_tokens_and_log_probs_are_verified(pairs: Path, tmp_path: Path, capsys) -> None:
    """Recorded log-probs count where they are this model's; tokens of another tokenizer never do."""
    processor = Processor.from_pretrained(BASE, "plain", "stretch")
    rows = conversations()
    for row in rows:
        for side in ("chosen", "rejected"):
            tokens = processor.encode_answer(row[side][0]["content"]).tolist()
            row |= {f"{side}_token_ids": tokens, f"reference_{side}_logprobs": [-0.5] * len(tokens)}
    file = write_pairs(pairs.parent, rows, "recorded.jsonl")
    assert main(["train", "--config", recipe_with(tmp_path, file, loss_type="sigmoid", loss_weights={})]) == 2
    assert "recorded" in capsys.readouterr().err
    rows[3]["chosen_token_ids"] = rows[0]["chosen_token_ids"]
    file = write_pairs(pairs.parent, rows, "foreign.jsonl")
    for verb in ("train", "validate"):
        assert main([verb, "--config", recipe_with(tmp_path, file), "name=foreign"]) == 2
        assert "foreign.jsonl:4 (id 'pair-3'): `chosen_token_ids` are not the text" in capsys.readouterr().err


def test_a_reward_model_learns_from_the_images_of_a_file(pairs: Path, tmp_path: Path) -> None:
    """`reward.pairs` in RLAIF-V's shape, beside no prompts: other images give another model."""
    rows = [
        {
            "idx": row,
            "image": f"{row % 5:03d}.png",
            "question": "Describe the image.",
            "chosen": "A dog.",
            "rejected": "A cat.",
        }
        for row in range(6)
    ]
    identities = set()
    for name, image in (("one", "000.png"), ("other", "001.png")):
        rows[0]["image"] = image
        file = write_pairs(pairs.parent, rows, "rlaif.jsonl")
        reward = ["train.objective=reward", "train.pairs=''", f"reward.pairs={file}", "reward.holdout=0.4"]
        settings = [*reward, "train.loss_type=sigmoid", "train.loss_weights={}", "train.batch_size=2", f"name={name}"]
        assert (
            main(["train", "--config", recipe_with(tmp_path, file, loss_type="sigmoid", loss_weights={}), *settings])
            == 0
        )
        folder = tmp_path / "runs" / name
        results = json.loads((folder / "round-1/reward/results.json").read_text())
        assert results["train_pairs"] + results["held_out_pairs"] == 6
        assert json.loads((folder / "manifest.json").read_text())["data"]["shapes"] == {"RLAIF-V": 6}
        identities.add(results["identity"])
    assert len(identities) == 2


def test_validate_reads_every_row(pairs: Path, tmp_path: Path, capsys) -> None:
    rows = conversations() + conversations()
    rows[1]["image"] = "nowhere.png"
    rows[2]["chosen"] = [said("dog " * 30)]
    rows[3]["prompt"] = [said("dog " * 2000, "user")]
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[6]["prompt"] = [said("Is there a dog?", "user"), said("Yes")]
    file = write_pairs(pairs.parent, rows, "faulty.jsonl")
    recipe = recipe_with(tmp_path, file)
    assert main(["validate", "--config", recipe]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "faulty.jsonl:" in line]
    for row, words in (
        (2, "nowhere.png"),
        (3, "max_answer_tokens"),
        (4, "max_prompt_tokens"),
        (5, "same"),
        (7, "ends"),
    ):
        assert sum(f"faulty.jsonl:{row}" in line and words in line for line in told) == 1, (words, told)
    assert len(told) == 5
    assert main(["validate", "--config", recipe, f"train.pairs={pairs}"]) == 0
    assert "5 pairs from" in capsys.readouterr().err
    reward = ["train.objective=reward", "train.pairs=''", "train.loss_type=sigmoid", f"reward.pairs={file}"]
    assert main(["validate", "--config", recipe, *reward]) == 2
    assert sum("faulty.jsonl:" in line for line in capsys.readouterr().err.splitlines()) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rounds=2"], "2 rounds on pairs from a file"),
        (["train.objective=reward"], "reward.pairs"),
        (["train.objective=rlhf"], "objective 'rlhf' and pairs from a file"),
        (["train.objective=sft", "train.sft_answers=reference"], "reference answers and pairs"),
        (["arms={sft: {}}"], "arms.sft: train.pairs"),
        (["arms={rm_dpo: {}}"], "arms.rm_dpo: train.pairs"),
        (["arms={mas_dpo: {}}"], "arms.mas_dpo: train.pairs"),
        (["arms={own: {train.pairs: ''}}"], "arms.own: train.pairs"),
    ],
)
def test_settings_that_pairs_from_a_file_exclude(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe(None, ["train.pairs=x.jsonl", *settings]))


def test_no_comparison_on_pairs_from_a_file() -> None:
    with pytest.raises(UserError, match=r"train\.pairs"):
        check_compare(load_recipe(None, ["train.pairs=x.jsonl"]))
