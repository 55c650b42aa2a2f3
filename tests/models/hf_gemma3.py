"""Tiny random Gemma 3 models of `transformers` with a tower, and all files of a published directory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hf_models import load_float32, randomise, torch_and_transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from m3po_jax.models.registry import Loaded

PAD, EOS, BOS, TURN, TURN_END = "<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"
START, END, IMAGE = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
CORPUS = (
    "user\nmodel\n What is in the image? You are a bus. Describe both, and then\n\n\n",
    "Here is the original image \n\n and here are some crops to help you see better \n\n \n\n",
    *("a red bus\n\n", "user\n\n\n", "\n\nuser\n\n\nWhat", *("yes", "Yes", "no", "No") * 3),
)
# The published one.
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
SIDE, TOKENS = 28, 9  # 7 x 7 patches, of which 6 x 6 are pooled to 3 x 3 image tokens
NAMED = {"image_token": IMAGE, "boi_token": START, "eoi_token": END}


@cache
def tokenizer() -> Tokenizer:
    """Spaces and line feeds merge with what stands beside them, as in the published one."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [PAD, EOS, BOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        CORPUS * 9, trainers.BpeTrainer(vocab_size=340, special_tokens=control, show_progress=False)
    )
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 4]
    made = Tokenizer.from_str(json.dumps(content))
    marks = (TURN, TURN_END, START, END, IMAGE)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in marks])
    return made


def token(name: str) -> int:
    return tokenizer().token_to_id(name)


def gemma3(*, seed: int = 0, text: Any = None, vision: Any = None, **top: Any) -> Any:
    """A model of `transformers`; each switch is off its default, and an image is longer than the windows."""
    _, transformers = torch_and_transformers()
    of_text = {
        **{"vocab_size": 352, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
        **{"sliding_window": 6, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24},
        **{"bos_token_id": token(BOS), "eos_token_id": token(EOS), "pad_token_id": token(PAD)},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    }
    tower = {
        **{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3},
        **{"image_size": SIDE, "patch_size": 4, "vision_use_head": False, "model_type": "siglip_vision_model"},
    }
    config = transformers.Gemma3Config(
        text_config={**of_text, **(text or {})},
        vision_config={**tower, **(vision or {})},
        **{
            **{"mm_tokens_per_image": TOKENS, "image_token_index": token(IMAGE)},
            **{"boi_token_index": token(START), "eoi_token_index": token(END)},
            "eos_token_id": [token(EOS), token(TURN_END)],
            **top,
        },
    )
    return randomise(transformers.Gemma3ForConditionalGeneration(config), seed)


def image_processor() -> Any:
    """Of `transformers`, on PIL."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})


def processor() -> Any:
    """Of `transformers`: tokenizer, images and template."""
    _, transformers = torch_and_transformers()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=NAMED
    )
    return transformers.Gemma3Processor(image_processor(), fast, chat_template=TEMPLATE, image_seq_length=TOKENS)


def saved(folder: Path, **fields: Any) -> tuple[Any, Loaded]:
    """A model of transformers, and ours from its directory with the published files beside it."""
    model = gemma3(**fields)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": "<unk>", "add_bos_token": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **NAMED, "extra_special_tokens": NAMED}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    images = image_processor().to_dict() | {"image_processor_type": "Gemma3ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images, default=str))
    return model, load_float32(folder)
