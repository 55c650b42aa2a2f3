"""Models that see with a tower of another directory: original LLaVA releases, and LLaVAs with towers of other grids.

Every verb, and the export, must hold one image token for each feature of the tower.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from mini_run import write_data, write_recipe
from safetensors.numpy import load_file, save_file

from m3po_jax.cli import main
from m3po_jax.data.model_images import joined, stacked
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.errors import UserError
from m3po_jax.models.forward import encode_images, reference_forward
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import describe, describe_policy, load_model, resolve_directory
from m3po_jax.pipeline.models import InputLimits, make_processor
from m3po_jax.recipes import load_recipe

SHIPPED = resolve_directory("builtin:quickstart-base")
ROWS = 192  # of the shipped model's vocabulary, whose <image> is 3
RENAMED = {
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def write_release(folder: Path, *, image_named: bool = True, tower_inside: bool = False, **changes: Any) -> Path:
    """The shipped model as the original release lays it out: a bare LLaMA, a projector, no file of a processor."""
    shutil.copytree(SHIPPED, folder)
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, value in stored.items():
        if name.startswith("vision_tower."):
            if tower_inside:
                tensors[f"model.vision_tower.{name}"] = value
            continue
        old = next(old for old in RENAMED if name.startswith(old))
        tensors[RENAMED[old] + name.removeprefix(old)] = value
    save_file(tensors, folder / "model.safetensors")
    config = {
        **read(folder / "config.json")["text_config"],
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": True,
        "vocab_size": ROWS,
        **changes,
    }
    write(folder / "config.json", config)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    if not image_named:  # as in the releases: a word has that id, and no token stands for images
        tokenizer = read(folder / "tokenizer.json")
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["formerly"] = vocabulary.pop("<image>")
        write(folder / "tokenizer.json", tokenizer)
        settings = read(folder / "tokenizer_config.json")
        del settings["extra_special_tokens"]
        write(folder / "tokenizer_config.json", settings)
    return folder


def write_tower(folder: Path, *, image_size: int = 64, patch_size: int = 16) -> Path:
    """The shipped model's tower as a CLIP directory, cut to another grid."""
    folder.mkdir()
    stored = load_file(SHIPPED / "model.safetensors")
    tensors = {
        name.removeprefix("vision_tower."): x for name, x in stored.items() if name.startswith("vision_tower.")
    }
    positions, kernel = (
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight",
    )
    tensors[positions] = tensors[positions][: (image_size // patch_size) ** 2 + 1].copy()
    repeat = patch_size // 16
    tensors[kernel] = np.ascontiguousarray(tensors[kernel].repeat(repeat, 2).repeat(repeat, 3) / repeat**2)
    save_file(tensors, folder / "model.safetensors")
    vision = read(SHIPPED / "config.json")["vision_config"] | {"image_size": image_size, "patch_size": patch_size}
    write(folder / "config.json", {"model_type": "clip", "vision_config": vision})
    sizes = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    write(folder / "preprocessor_config.json", read(SHIPPED / "preprocessor_config.json") | sizes)
    return folder


def logits(directory: Path, processor: Processor, prompt: Prompt, **settings: Any) -> np.ndarray:
    """Of a prompt with an image, by our model in float32: tokens x vocabulary."""
    model = load_model(directory, dtype="float32", param_dtype="float32", **settings).model
    ids, images = processor.encode_prompt(prompt)[None], stacked([joined(processor.images(prompt))])
    features = encode_images(model, images)
    return np.asarray(reference_forward(model, jnp.asarray(ids), jnp.ones(ids.shape, bool), features))[0]


def transformers_logits(directory: Path, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        given = {"input_ids": torch.tensor(ids[None]).long(), "attention_mask": torch.ones((1, len(ids))).long()}
        return model(**given, pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2))).logits.numpy()[0]


def prompt_in(folder: Path) -> Prompt:
    write_data(folder, 1)
    return Prompt("a", (Image(path="000.png"),), "describe the image")


@pytest.mark.parametrize("image_named", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"image_token_index": -200}, {"model_type": "llava_llama", "mm_use_im_patch_token": False}]
)
def test_a_release_equals_the_same_weights_in_the_hugging_face_layout(
    tmp_path: Path, image_named: bool, changes: dict[str, Any]
) -> None:
    release = write_release(tmp_path / "release", image_named=image_named, **changes)
    tower = write_tower(tmp_path / "clip")
    prompt = prompt_in(tmp_path / "data")
    processor = Processor.from_pretrained(
        release, "plain", "stretch", vision_tower=tower, image_root=tmp_path / "data"
    )
    # The tokenizer's <image>, or its next id: a row that is added and that no text reaches.
    assert processor.image_token_id == (3 if image_named else ROWS)
    assert processor.encode_prompt(prompt).tolist().count(processor.image_token_id) == 16
    ours = logits(release, processor, prompt, vision_tower=tower)
    ids = processor.encode_prompt(prompt)
    ids = np.where(ids == processor.image_token_id, 3, ids)
    theirs = transformers_logits(SHIPPED, ids, joined(processor.images(prompt))["pixels"])
    np.testing.assert_allclose(ours[:, :ROWS], theirs, atol=2e-4)
    assert ours.shape[1] == (ROWS if image_named else 256)


def test_ids_without_a_stored_row_are_refused_unless_nothing_embeds_them(tmp_path: Path) -> None:
    release, tower = write_release(tmp_path / "release", image_named=False), write_tower(tmp_path / "clip")
    tokenizer = read(release / "tokenizer.json")
    off = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)

    def add(*tokens: str) -> Processor:
        added = [{"id": ROWS + i, "content": token, **off, "special": True} for i, token in enumerate(tokens)]
        write(release / "tokenizer.json", tokenizer | {"added_tokens": [*tokenizer["added_tokens"], *added]})
        return Processor.from_pretrained(release, "plain", "stretch", vision_tower=tower)

    assert add("<image>").image_token_id == ROWS
    for tokens in (["<point>"], ["<image>", "<point>"]):
        last = ROWS + len(tokens) - 1
        with pytest.raises(UserError, match=f"the tokenizer has ids up to {last}, the model has {ROWS} rows"):
            add(*tokens)


def test_a_vocabulary_that_is_padded_needs_no_more_rows(tmp_path: Path) -> None:
    release, tower = write_release(tmp_path / "release", image_named=False), write_tower(tmp_path / "clip")
    stored = load_file(release / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored[name] = np.concatenate([stored[name], np.zeros((64, 128), stored[name].dtype)])
    save_file(stored, release / "model.safetensors")
    write(release / "config.json", read(release / "config.json") | {"vocab_size": ROWS + 64})
    loaded = load_model(release, dtype="float32", param_dtype="float32", vision_tower=tower)
    assert loaded.config.image_token_id == ROWS and loaded.config.text.vocab_size == ROWS + 64


def test_a_tower_inside_a_release_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    """A release that trained its tower holds it; what `mm_vision_tower` names is what it began with."""
    named = write_tower(tmp_path / "clip")
    stored = load_file(named / "model.safetensors")
    layer = "vision_model.encoder.layers.0.mlp.fc1.weight"
    save_file({**stored, layer: stored[layer] + 1}, named / "model.safetensors")
    release = write_release(tmp_path / "release", tower_inside=True, mm_vision_tower=str(named))

    def first_layer(**settings: Any) -> np.ndarray:
        model = load_model(release, dtype="float32", param_dtype="float32", **settings).model
        return np.asarray(model.vision_tower.encoder.layers.mlp.fc1.kernel[...])[0].T

    np.testing.assert_array_equal(first_layer(), stored[layer].astype(np.float32))
    np.testing.assert_array_equal(first_layer(vision_tower=named), (stored[layer] + 1).astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', and must be 'mlp2x_gelu'"),
        ({"mm_projector_type": "identity"}, "mm_projector_type is 'identity'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True, and must be false"),
        ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token is True, and must be false"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'"),
        ({"mm_vision_select_layer": 9}, "vision_feature_layer 9, and the tower has 3 layers"),
        ({"image_token_index": "x"}, "image_token_index is 'x', and must be a token's id"),
        ({"image_token_index": 7}, "image_token_index is 7 in config.json, and <image> is 3"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is .* not implemented"),
    ],
)
def test_options_of_releases_that_are_not_implemented_are_named(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    release, tower = write_release(tmp_path / "release", **changes), write_tower(tmp_path / "clip")
    with pytest.raises(UserError, match=complaint):
        Processor.from_pretrained(release, "plain", "stretch", vision_tower=tower)


@pytest.mark.parametrize(("image_size", "patch_size", "features"), [(64, 16, 16), (32, 16, 4), (64, 32, 4)])
@pytest.mark.parametrize("layout", ["original", "original without <image>", "hugging face"])
def test_an_image_is_as_many_tokens_as_its_tower_has_features(
    tmp_path: Path, layout: str, image_size: int, patch_size: int, features: int
) -> None:
    """By what every verb makes its processor and its model of."""
    tower = write_tower(tmp_path / "clip", image_size=image_size, patch_size=patch_size)
    named = {"original": True, "original without <image>": False}
    model = write_release(tmp_path / "model", image_named=named[layout]) if layout in named else SHIPPED
    prompt = prompt_in(tmp_path / "data")
    recipe = load_recipe(
        write_recipe(
            tmp_path, tmp_path / "data/prompts.jsonl", model={"path": str(model), "vision_tower": str(tower)}
        )
    )
    description = describe_policy(recipe.model)
    processor = make_processor(recipe.model, description, InputLimits(), image_root=tmp_path / "data")
    assert description.config.tokens_per_image == features
    assert processor.encode_prompt(prompt).tolist().count(processor.image_token_id) == features
    assert joined(processor.images(prompt))["pixels"].shape == (1, image_size, image_size, 3)
    assert np.isfinite(logits(model, processor, prompt, vision_tower=tower)).all()


@pytest.mark.parametrize("layout", ["original without <image>", "hugging face"])
def test_every_stage_and_an_export_that_stands_alone(tmp_path: Path, layout: str, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers")
    original = layout != "hugging face"
    tower = write_tower(tmp_path / "clip", patch_size=16 if original else 32)
    model = (
        write_release(tmp_path / "model", image_named=False)
        if original
        else shutil.copytree(SHIPPED, tmp_path / "model")
    )
    data = write_data(tmp_path / "data", 4)
    few = {"generate": {"num_candidates": 4, "max_new_tokens": 8}, "arms": {}, "train": {"max_steps": 1}}
    benchmarks = {"questions": {"metric": "pope", "kind": "yesno", "data": {"source": "jsonl", "path": str(data)}}}
    asked = {"benchmarks": benchmarks, "max_new_tokens": 4, "stop_bias": [], "contrast_alpha": []}
    recipe = write_recipe(
        tmp_path,
        data,
        model={"path": str(model), "vision_tower": str(tower)},
        select={"cut": "keep"},
        evaluate=asked,
        **few,
    )
    for verb in ("validate", "run", "export"):
        assert main([verb, "--config", str(recipe)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["run", "--dry-run", "--config", str(recipe)]) == 0
    said = capsys.readouterr()
    assert "out of date" not in said.out + said.err and "to do" not in said.out + said.err
    assert main(["export", "--config", str(recipe), "--format", "peft"]) == 0
    assert ("export the merged model" in " ".join(capsys.readouterr().err.split())) == original
    exported = tmp_path / "runs/mini/export-round-1-huggingface"
    prompt = Prompt("a", (Image(path="000.png"),), "describe the image")
    processor = Processor.from_pretrained(exported, "plain", "stretch", image_root=tmp_path / "data")
    borrowing = Processor.from_pretrained(model, "plain", "stretch", vision_tower=tower, image_root=tmp_path / "data")
    ids, pixels = processor.encode_prompt(prompt), joined(processor.images(prompt))["pixels"]
    np.testing.assert_array_equal(ids, borrowing.encode_prompt(prompt))
    np.testing.assert_array_equal(pixels, joined(borrowing.images(prompt))["pixels"])
    np.testing.assert_allclose(
        logits(exported, processor, prompt), transformers_logits(exported, ids, pixels), atol=2e-4
    )
    theirs = transformers.AutoProcessor.from_pretrained(exported)
    picture = np.zeros((64, 64, 3), np.uint8)
    given = theirs(images=picture, text="<image> describe the image", return_tensors="np")
    count = describe(exported).config.tokens_per_image
    assert count == (16 if original else 4)
    assert (given["input_ids"] == describe(exported).config.image_token_id).sum() == count
    assert given["pixel_values"].shape == (1, 3, 64, 64)
