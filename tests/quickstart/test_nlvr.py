"""NLVR's rows, from a corpus of the same form that is made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3po_jax.config import DataConfig
from m3po_jax.data.sources import read_prompts
from m3po_jax.errors import UserError
from m3po_jax.quickstart import nlvr

BASE = Path(__file__).parents[2] / "configs/quickstart/base"
PIXELS = {"black": (0, 0, 0), "blue": (0, 153, 255), "yellow": (255, 255, 0)}


def item(colour: str, shape: str) -> dict:
    return {"color": colour, "shape": shape, "size": 20, "x": 40, "y": 40}


BOXES = [
    [item("yellow", "square"), item("yellow", "square")],
    [item("blue", "circle")],
    [item("black", "triangle"), item("yellow", "circle")],
]


def example(split: str, number: int, text: str, fold: int, label: bool = True) -> dict:
    name = f"{split}-{number}"
    image = f"images/{split}/{number}.png"
    return {"id": name, "image": image, "sentence": text, "label": label, "boxes": BOXES, "fold": fold}


DEV = [
    example("dev", 0, "One box has 2 yellow squares", 0),
    example("dev", 1, "There is a blue circle.", 1, label=False),
    example("dev", 2, "There is a black item", 4),
    example("dev", 3, "each box has an item", 5),
    example("dev", 4, "There is a PURPLE circle", 2),
]
# The test split is read without boxes and folds, which only the development split needs.
TEST = [
    {
        key: value
        for key, value in example("test", 0, "there is a purple circle.", 0).items()
        if key not in ("boxes", "fold")
    }
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nlvr")
    for split, examples in (("dev", DEV), ("test", TEST)):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n")
        for row in examples:
            picture = np.full((100, 400, 3), 204, np.uint8)
            for box, name in enumerate(PIXELS):
                picture[40:60, 150 * box + 40 : 150 * box + 60] = PIXELS[name]
            path = folder / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).convert("P").save(path)
    return folder


def test_rows_have_three_boxes_and_no_statement_of_the_test_split(corpus: Path, tmp_path: Path) -> None:
    counts = nlvr.write(corpus, tmp_path, BASE)
    assert counts == {"sft": 2 * (6 + nlvr.TEMPLATES), "prompts": 2, "test": 1}
    prompts = {name: read_prompts(DataConfig(path=str(tmp_path / f"{name}.jsonl"))) for name in counts}
    assert [prompt.id for prompt in prompts["prompts"]] == ["dev-2", "dev-3"]
    assert not any("purple" in prompt.instruction for prompt in prompts["sft"])
    assert prompts["test"][0].instruction == "there is a purple circle True or False ?"
    own = [prompt for prompt in prompts["sft"] if prompt.id.startswith("dev-1-o")]
    assert {prompt.reference for prompt in own} == {"False"}
    assert len({tuple(image.path for image in prompt.images) for prompt in own}) == 6, "every order of the boxes"
    for box, colour in enumerate(PIXELS.values()):
        made = np.asarray(Image.open(tmp_path / f"images/dev/1-{box}.png"))
        assert made.shape == (100, 100, 3) and tuple(made[50, 50]) == colour and tuple(made[10, 10]) == (204,) * 3


def test_model_folder_knows_the_words_that_are_learned_and_no_others(corpus: Path, tmp_path: Path) -> None:
    nlvr.write(corpus, tmp_path, BASE)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["text_config"]["vocab_size"] == len(tokenizer) and len(tokenizer) % 64 == 0
    assert tokenizer.unk_token_id not in tokenizer("one box has 2 yellow squares True or False ?").input_ids
    assert tokenizer.unk_token_id in tokenizer("purple").input_ids
    assert (config["text_config"]["eos_token_id"], config["image_token_index"]) == (2, 3)
    assert (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>")) == (2, 3)


def test_made_statements_are_as_true_as_they_say() -> None:
    """Counted again from the words."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        text, truth = nlvr.statement(BOXES, rng)
        words = text.split()
        colour = next((word for word in words if word in PIXELS), "")
        shape = next(word.rstrip("s") for word in words if word.rstrip("s") in ("item", *nlvr.SHAPES))
        per_box = [
            len([o for o in box if colour in ("", o["color"]) and shape in ("item", o["shape"])]) for box in BOXES
        ]
        if "least" in words and "each" not in words:
            seen.add("least")
            assert truth == (sum(per_box) >= int(words[words.index("least") + 1]))
        elif "each" in words:
            seen.add("each")
            assert truth == all(per_box)
        elif "with" in words:
            seen.add("box")
            assert truth == (sum(n == int(words[words.index("with") + 1]) for n in per_box) == 1)
        else:
            seen.add("exact")
            assert truth == (sum(per_box) == int(words[2]))
    assert len(seen) == 4


def test_what_a_user_may_get_wrong(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nlvr.main([str(tmp_path), str(tmp_path / "out"), str(BASE)]) == 2
    assert "dev.jsonl: no such file" in capsys.readouterr().err
    assert nlvr.main([str(tmp_path)]) == 2
    assert "usage: python -m" in capsys.readouterr().err
    (tmp_path / "dev.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(UserError, match="no field 'boxes'"):
        nlvr.read_examples(tmp_path, "dev")
    assert nlvr.main([str(corpus), str(tmp_path / "out"), str(BASE)]) == 0
    assert "20 rows in sft.jsonl, 2 rows in prompts.jsonl, 1 rows in test.jsonl" in capsys.readouterr().out
