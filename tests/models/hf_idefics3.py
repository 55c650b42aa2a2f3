"""Tiny random Idefics3 and SmolVLM models of `transformers`, with all files of a published directory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hf_models import load_float32, randomise, torch_and_transformers
from hf_qwen import CORPUS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from m3po_jax.models.registry import Loaded

START, EOS, END, IMAGE = "<|im_start|>", "<|endoftext|>", "<end_of_utterance>", "<image>"
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
# SmolVLM's published one, without its videos.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TILE, TOKENS = 24, 9  # 6 x 6 patches, in squares of 2 x 2


@cache
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [*CORPUS * 9, "\n\n" * 20],
        trainers.BpeTrainer(
            vocab_size=312, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    special = (EOS, START, END, "<fake_token_around_image>", IMAGE)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<global-img>", *PLACES)])
    return made


def model_of(kind: str, *, seed: int = 0, text: Any = None, vision: Any = None, **top: Any) -> Any:
    """A model of `transformers`: ``idefics3`` or ``smolvlm``."""
    _, transformers = torch_and_transformers()
    of_text = {
        **{"model_type": "llama", "vocab_size": 368, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0},
        **{"max_position_embeddings": 1024, "pad_token_id": tokenizer().token_to_id(EOS)},
        **{"bos_token_id": tokenizer().token_to_id(START), "eos_token_id": tokenizer().token_to_id(END)},
    }
    tower = {
        **{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3},
        **{"image_size": TILE, "patch_size": 4},
    }
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    config = getattr(transformers, f"{name}Config")(
        text_config={**of_text, **(text or {})},
        vision_config={**tower, **(vision or {})},
        image_token_id=tokenizer().token_to_id(IMAGE),
        **top,
    )
    return randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config), seed)


def image_processor(splits: bool = True) -> Any:
    """Of `transformers`, on PIL; SmolVLM's is the same."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    sizes = {"size": {"longest_edge": 4 * TILE}, "max_image_size": {"longest_edge": TILE}}
    return Idefics3ImageProcessorPil(do_image_splitting=splits, **sizes)


def processor() -> Any:
    """Of `transformers`: tokenizer, images and template."""
    _, transformers = torch_and_transformers()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token=END, pad_token=EOS)
    return transformers.Idefics3Processor(image_processor(), fast, image_seq_len=TOKENS, chat_template=TEMPLATE)


def saved(kind: str, folder: Path, **fields: Any) -> tuple[Any, Loaded]:
    """A model of transformers, and ours from its directory with the published files beside it."""
    model = model_of(kind, **fields)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    images = image_processor().to_dict() | {"image_processor_type": "SmolVLMImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images, default=str))
    return model, load_float32(folder)
