"""Tiny random Hugging Face models, the oracles of these tests, and their checkpoints in every layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from m3po_jax.models.quantization import BLOCK, NF4
from m3po_jax.models.registry import Loaded, load_model

IMAGE = 60  # the image token's id
PATCHES = 4


def torch_and_transformers() -> tuple[Any, Any]:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def shared_data() -> Path:
    """The folder of published facts; tests that need it are skipped where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "../shared/data"
    folder = Path(os.environ["M3PO_SHARED"]) / "data" if "M3PO_SHARED" in os.environ else beside
    if not folder.is_dir():
        pytest.skip("the shared data folder is absent (set M3PO_SHARED)")
    return folder


def randomise(model: Any, seed: int, std: float = 0.15) -> Any:
    """Every parameter random: published initialisers leave biases zero and norms one, which would hide mistakes."""
    torch, _ = torch_and_transformers()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(noise + 1.0 if is_norm else noise)
    return model.eval()


def quantise(model: Any, kind: str) -> int:
    """Rounds a language model's projections to the values of ``int8`` or ``nf4`` codes; how many there are.

    By NumPy in torch's own orientation: rows of `weight` are output channels, blocks lie along them.
    """
    torch, _ = torch_and_transformers()
    changed = 0
    for name, parameter in model.named_parameters():
        if "language_model" not in name or not name.endswith("proj.weight"):
            continue
        w = parameter.detach().numpy().astype(np.float64)
        if kind == "int8":
            scale = np.abs(w).max(1, keepdims=True) / 127
            w = np.round(w / scale) * scale
        else:
            blocks = w.reshape(-1, BLOCK)
            scale = np.abs(blocks).max(1, keepdims=True)
            nearest = np.abs(blocks[..., None] / scale[..., None] - np.asarray(NF4)).argmin(-1)
            w = (np.asarray(NF4)[nearest] * scale).reshape(w.shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(w))
        changed += 1
    return changed


def llava(
    *,
    seed: int = 0,
    decoder: str = "Llama",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **top: Any,
) -> Any:
    _, transformers = torch_and_transformers()
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **(text or {}),
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 14,
        **(vision or {}),
    }
    config = transformers.LlavaConfig(
        text_config=getattr(transformers, f"{decoder}Config")(**text),
        vision_config=transformers.CLIPVisionConfig(**vision),
        **{"image_token_index": IMAGE, **top},
    )
    return randomise(transformers.LlavaForConditionalGeneration(config), seed)


def causal_lm(decoder: str, *, seed: int = 0, **text: Any) -> Any:
    """A text decoder of `transformers` by the first part of its classes' names."""
    _, transformers = torch_and_transformers()
    sizes = {
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    config = getattr(transformers, f"{decoder}Config")(**{**sizes, **text})
    # Eager: other implementations of transformers' attention leave out soft caps.
    config._attn_implementation = "eager"
    return randomise(transformers.AutoModelForCausalLM.from_config(config), seed)


def dual_encoder(kind: str, *, seed: int = 0, text: dict[str, Any] | None = None, **top: Any) -> Any:
    _, transformers = torch_and_transformers()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {
        **sizes,
        "vocab_size": 64,
        "max_position_embeddings": 12,
        "bos_token_id": 1,
        "eos_token_id": 63,
        **(text or {}),
    }
    vision = {**sizes, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
    classes = {"clip": ("CLIPConfig", "CLIPModel"), "siglip": ("SiglipConfig", "SiglipModel")}[kind]
    if kind == "clip":
        top = {"projection_dim": 20, **top}
    config = getattr(transformers, classes[0])(text_config=text, vision_config=vision, **top)
    return randomise(getattr(transformers, classes[1])(config), seed)


def canonical_state(model: Any) -> dict[str, np.ndarray]:
    """A LLaVA's tensors by their 4.x names, from its modules' names (independently of our rules)."""
    state = {}
    for name, value in model.state_dict().items():
        part = name.removeprefix("model.")
        if part.startswith("language_model."):
            part = part.replace("language_model.", "language_model.model.", 1)
        elif part == "lm_head.weight":
            part = "language_model.lm_head.weight"
        elif part.startswith("vision_tower.") and not part.startswith("vision_tower.vision_model."):
            part = part.replace("vision_tower.", "vision_tower.vision_model.", 1)
        state[part] = np.ascontiguousarray(value.detach().numpy())
    if model.config.tie_word_embeddings or model.config.text_config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    return state


def write(directory: Path, state: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load_float32(directory: Path, **kwargs: Any) -> Loaded:
    return load_model(directory, dtype=jnp.float32, param_dtype=jnp.float32, **kwargs)


def saved(model: Any, directory: Path) -> Loaded:
    """`model` through its own `save_pretrained` into ours."""
    model.save_pretrained(directory)
    return load_float32(directory)


def images(count: int, size: int = 28, seed: int = 0) -> np.ndarray:
    """Channels first, as Hugging Face takes them."""
    return np.random.default_rng(seed).normal(size=(count, 3, size, size)).astype(np.float32)
