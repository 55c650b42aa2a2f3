"""Tiny random Qwen2.5-VL and Qwen3-VL models of `transformers`, with all files of a published directory."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hf_models import load_float32, randomise, torch_and_transformers
from PIL import Image as PILImage
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from m3po_jax.data.schema import Image, Prompt
from m3po_jax.models.registry import Loaded

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
CORPUS = ("system user assistant What is in the image? You are a helpful assistant. Describe both, and then", "a red bus")
# The published one, without its videos and tools.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LIMITS = {"shortest_edge": 2 * 64, "longest_edge": 24 * 64}  # of units of 8 x 8 pixels
# Wide, tall, tiny, square, larger than the limit, no multiple of the patch, at both limits' edges.
SIZES = ((60, 12), (9, 70), (3, 2), (32, 32), (120, 90), (37, 29), (8, 16), (200, 1), (48, 32))


@cache
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, IMAGE, VIDEO)])
    return made


def token(name: str) -> int:
    return tokenizer().token_to_id(name)


def sizes_of(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of text and tower, each switch off its default."""
    text = {
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5},
        **{"bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>")},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1]},
    }
    tower = {
        **{"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32},
    }
    if kind == "qwen2_5_vl":
        return text, {**tower, "window_size": 16, "fullatt_block_indexes": [1]}
    text |= {"head_dim": 16}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return text, {**tower, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}


def qwen(kind: str, *, seed: int = 0, text: Any = None, vision: Any = None, **top: Any) -> Any:
    """A model of `transformers`: ``qwen2_5_vl`` or ``qwen3_vl``."""
    _, transformers = torch_and_transformers()
    of_text, of_tower = sizes_of(kind)
    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    config = getattr(transformers, f"{name}Config")(
        text_config={**of_text, **(text or {})},
        vision_config={**of_tower, **(vision or {})},
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        **top,
    )
    return randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config), seed)


def image_processor(kind: str) -> Any:
    """Of `transformers`, on PIL."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if kind == "qwen3_vl" else {}
    return Qwen2VLImageProcessorPil(patch_size=4, size=LIMITS, **colours)


def processor(kind: str) -> Any:
    """Of `transformers`: tokenizer, images and template."""
    _, transformers = torch_and_transformers()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    name = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[kind]
    return _without_videos(getattr(transformers, name))(image_processor(kind), fast, None, chat_template=TEMPLATE)


@cache
def _without_videos(of: type) -> type:
    """The processor's class where it has no reader of videos, which needs torchvision."""
    return type(of.__name__, (of,), {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])})


def write_files(kind: str, folder: Path) -> None:
    """Tokenizer, template and image processor beside a saved model, in the published files."""
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    images = image_processor(kind).to_dict() | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    if kind == "qwen2_5_vl":  # the published files have limits of their own names
        del images["size"]
        images |= {"min_pixels": LIMITS["shortest_edge"], "max_pixels": LIMITS["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images, default=str))


def saved(kind: str, folder: Path, **fields: Any) -> tuple[Any, Loaded]:
    """A model of transformers, and ours from its directory."""
    model = qwen(kind, **fields)
    model.save_pretrained(folder)
    write_files(kind, folder)
    return model, load_float32(folder)


def picture(width: int, height: int, seed: int = 0) -> PILImage.Image:
    pixels = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), np.uint8)
    return PILImage.fromarray(pixels)


def image(width: int, height: int) -> Image:
    file = io.BytesIO()
    picture(width, height).save(file, "PNG")
    return Image(bytes=file.getvalue())


def prompt(name: str, instruction: str, *sizes: tuple[int, int], **metadata: Any) -> Prompt:
    return Prompt(name, tuple(image(*size) for size in sizes), instruction, metadata=metadata)
