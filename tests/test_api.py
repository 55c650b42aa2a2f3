"""The stages as functions: the document's examples run, and say what the command says of the same rows."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import m3po_jax as m3po
from m3po_jax.quickstart.scenes import scene

PAGE = Path(__file__).parents[1] / "docs" / "library.md"
INSTRUCTION = "Describe the image."


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "photos"
    folder.mkdir()
    for number in range(10):
        Image.fromarray(scene("prompts", number).image).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def names(photos):
    """What the examples of the page leave behind, run in order beside a folder ``photos``."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    left: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(photos.parent)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), left)
    return left


def test_importing_loads_no_heavy_library():
    code = "import m3po_jax, sys; print([name for name in ('jax', 'flax', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_that_is_offered_can_be_imported():
    assert all(getattr(m3po, name) is not None for name in m3po.__all__)
    assert set(m3po.__all__) <= set(dir(m3po))
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        m3po.generat  # noqa: B018


def test_ten_lines_run_the_loop(names, photos):
    assert [len({row["id"] for row in names["candidates"]}), len(names["candidates"])] == [10, 80]
    assert names["selection"].summary["pairs"] == len(names["selection"].pairs) > 0
    assert names["aligned"].training.steps == 5
    assert (photos.parent / "aligned" / "config.json").is_file()
    # The model that was given is as it was.
    again = m3po.generate(names["model"], names["prompts"], num_candidates=8, max_new_tokens=24)
    assert [row["text"] for row in again] == [row["text"] for row in names["candidates"]]


def test_the_trained_model_answers_as_its_export_does(names, photos):
    options = {"num_candidates": 1, "temperature": 0.0, "max_new_tokens": 24}
    keys = {"dtype": "float32", "param_dtype": "float32", "template": "plain", "image_fit": "stretch"}
    exported = m3po.load_model(photos.parent / "aligned", **keys)
    texts = [
        [row["text"] for row in m3po.generate(model, names["prompts"], **options)]
        for model in (names["aligned"], exported)
    ]
    assert texts[0] == texts[1]


def test_rows_say_what_the_commands_files_say(names, photos, tmp_path):
    """One recipe through the command and through the functions: the same candidates, scores and pairs."""
    from m3po_jax.cli import main
    from m3po_jax.data import tables

    recipe = {
        "name": "run",
        "output_dir": str(tmp_path),
        "model.path": "builtin:quickstart-base",
        "model.dtype": "float32",
        "model.param_dtype": "float32",
        "model.template": "plain",
        "model.image_fit": "stretch",
        "data.path": str(photos),
        "data.instruction": INSTRUCTION,
        "generate.max_new_tokens": "24",
        "score.backend": "similarity",
        "score.model": "builtin:quickstart-scorer",
        "select.margin": "0.05",
        "select.chosen_floor": "0.0",
        "cache.vision_features": "off",
    }
    for verb in ("generate", "score", "select"):
        assert main([verb, *(f"{key}={value}" for key, value in recipe.items())]) == 0
    run = tmp_path / "run" / "round-1"
    candidates, scores, pairs = (list(tables.read_rows(run / name)) for name in ("candidates", "scores", "pairs"))
    model, prompts = names["model"], names["prompts"]
    drawn = m3po.generate(model, prompts, seed=1, max_new_tokens=24)  # a run's seed and its round
    assert [(row["id"], row["token_ids"]) for row in candidates] == [(row["id"], row["token_ids"]) for row in drawn]
    scored = m3po.score(model, prompts, drawn, backend="similarity", model="builtin:quickstart-scorer")
    columns = ("mas", "confidence", "m3p_preferred", "m3p_dispreferred")
    np.testing.assert_allclose(
        *([[row[name] for name in columns] for row in rows] for rows in (scores, scored)), atol=1e-6
    )
    chosen = m3po.select(prompts, scored, margin=0.05, chosen_floor=0.0)
    shown = [
        [(row["id"], row["prompt"], row["chosen"], row["rejected"], row["images"][0]["bytes"]) for row in rows]
        for rows in (pairs, chosen.pairs)
    ]
    assert shown[0] == shown[1] != []


def test_pictures_in_memory_are_files_without_one(names, photos):
    path = photos / "3.png"
    array = np.asarray(Image.open(path))
    rows = [
        {"id": "3.png", "instruction": INSTRUCTION, "image": image}
        for image in (path, array, Image.fromarray(array), path.read_bytes())
    ]
    texts = {
        tuple(row["text"] for row in m3po.generate(names["model"], [one], num_candidates=2, max_new_tokens=8))
        for one in rows
    }
    assert len(texts) == 1


def test_a_judge_may_be_a_function_and_may_abstain(names):
    scored = m3po.score(names["model"], names["prompts"], names["candidates"], judge=names["shorter_is_better"])
    assert [row["mas"] for row in scored] == [1 / len(row["text"].split()) for row in scored]
    silent = m3po.score(
        names["model"],
        names["prompts"],
        names["candidates"],
        judge=lambda prompts, pools: [[float("nan")] * len(pool) for pool in pools],
    )
    assert m3po.select(names["prompts"], silent).summary["dropped"] == {"abstained": 10}


def test_questions_are_scored_by_the_metrics_rule(names, photos):
    questions = [
        {"id": str(number), "image": photos / f"{number}.png", "instruction": "Is there a cat?", "reference": "no"}
        for number in range(4)
    ]
    results = m3po.evaluate(names["model"], questions, metric="pope", max_new_tokens=4, bootstrap_samples=10)
    assert results["summary"]["n"] == 4 and set(results["intervals"]) == {"accuracy", "f1", "yes_ratio"}
    assert json.loads(json.dumps(results)) == results


_ASKED = [{"id": "a", "instruction": "b"}]
_DRAWN = {"id": "a", "candidate": 0, "text": "b", "token_ids": [4, 2], "token_logprobs": [-1.0, -1.0]}


def _picture(image):
    return m3po.read_prompts([{"instruction": "b", "image": image}])


def test_candidates_of_a_prompt_are_one_pool_wherever_they_stand(names):
    drawn = [{**_DRAWN, "id": key, "candidate": number} for number in range(3) for key in "ab"]
    prompts = [{"id": key, "instruction": "b"} for key in "ab"]
    pools = []
    rows = m3po.score(
        names["model"],
        prompts,
        drawn,
        judge=lambda prompts, texts: [pools.append(len(text)) or np.arange(len(text)) / 10 for text in texts],
    )
    assert pools == [3, 3]
    assert [(row["id"], row["candidate"], row["mas"]) for row in rows] == [
        (key, number, number / 10) for key in "ab" for number in range(3)
    ]


def test_a_picture_in_memory_keeps_orientation_and_colours(tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for image, size in ((Image.open(tmp_path / "turned.jpg"), 6), (Image.new("CMYK", (8, 8)), None)):
        (picture,) = _picture(image)[0].images
        assert Image.open(io.BytesIO(picture.bytes)).getexif().get(274) == size


def test_a_limit_holds_for_rows_in_memory():
    assert len(m3po.read_prompts([{"instruction": "b"}] * 3, limit=2)) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m3po.load_model("builtin:quickstart-base", dtpye="float32"), "model.dtpye"),
        (lambda m: m3po.generate(m, [{"image": "a.png"}]), "prompts:1"),
        (lambda m: m3po.generate(m, ["a.png"]), "prompts:1: a row is a mapping"),
        (lambda m: m3po.generate(m, []), "no rows"),
        (lambda m: m3po.generate(m, [{"id": "a", "instruction": "b"}, {"id": "a", "instruction": "b"}]), "prompts:2"),
        (lambda m: m3po.generate(m, [{"id": "a", "instruction": "b"}], top_p=2), "generate.top_p"),
        (lambda m: m3po.train(m, []), "no pair"),
        (lambda m: m3po.train(m, [], objective="reward"), "does not learn from pairs"),
        (lambda m: m3po.evaluate(m, [{"id": "a", "instruction": "b"}], metric="pop"), "pop"),
        (lambda m: m3po.export(m, "x", format="onnx"), "unknown format"),
        (lambda m: m3po.read_prompts(3), "a int, not a path"),
        (lambda m: m3po.read_prompts([{"instruction": "b"}], split="x"), "data.split: rows in memory do not take it"),
        (lambda m: _picture(np.zeros((8, 8, 3))), "shape [8, 8, 3] and type float64 is no image"),
        (lambda m: _picture(np.zeros((3, 8, 8), np.uint8)), "prompts:1: an array of shape [3, 8, 8]"),
        (lambda m: _picture(np.zeros((0, 0, 3), np.uint8)), "without a pixel"),
        (lambda m: m3po.score(m, _ASKED, [{"id": "a", "candidate": 0, "text": "b"}]), "no 'token_ids'"),
        (lambda m: m3po.score(m, _ASKED, [_DRAWN, _DRAWN]), "candidate 0 occurs twice"),
        (lambda m: m3po.score(m, _ASKED, [_DRAWN], judge=lambda prompts, pools: [[7]]), "judge: a score of 7"),
        (lambda m: m3po.score(m, _ASKED, [_DRAWN], judge=lambda prompts, pools: None), "judge: gave no arrays"),
        (lambda m: m3po.score(m, _ASKED, [_DRAWN], judge=lambda prompts, pools: [["b"]]), "judge: gave no arrays"),
        (lambda m: m3po.train(m, [{"id": "a"}]), "pairs:1: no 'prompt'"),
        (
            lambda m: m3po.train(m, [{"id": "a", "prompt": 3, "chosen": 1, "rejected": 2}]),
            "not of the form of a pair",
        ),
        (lambda m: m3po.train(m, [], pairs="x.jsonl"), "train.pairs: the pairs are given"),
    ],
)
def test_what_cannot_be_used_is_one_line(names, call, message):
    with pytest.raises(m3po.UserError, match=re.escape(message)):
        call(names["model"])
