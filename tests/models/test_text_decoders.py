"""Every text decoder against its class in transformers, float32: logits, log-probs, greedy answers, adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import IMAGE, PATCHES, causal_lm, images, llava, saved, torch_and_transformers
from model_inputs import encoded

from m3po_jax.config import LoRAConfig, MeshConfig
from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.padding import pad_prompts
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.decoder_config import LayerKind
from m3po_jax.models.export.adapter import export_adapter
from m3po_jax.models.export.model import export_model
from m3po_jax.models.forward import branch_log_probs, reference_forward
from m3po_jax.models.kernels.choice import with_attention
from m3po_jax.models.registry import Loaded

# The decoder, and its fields beside the usual sizes. Windows are shorter than the prompts below, answers cross them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral_two": ("Mistral", {"sliding_window": 2}),
    "mistral_full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_later": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_later": (
        "Qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "llama3_scaling": (
        "Llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 12},
            }
        },
    ),
    "qwen2_yarn": (
        "Qwen2",
        {
            "head_dim": 16,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0},
                **{"original_max_position_embeddings": 12, "beta_fast": 2.0},
            },
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            **{"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4},
            **{"attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.5},
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **{"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, "num_hidden_layers": 4},
            **{"final_logit_softcapping": 2.0, "layer_types": [*["sliding_attention", "full_attention"] * 2]},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "qwen2_between": (
        "Qwen2",
        {
            **{"use_sliding_window": True, "sliding_window": 3, "num_hidden_layers": 4},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
EOS, PAD, NEW_TOKENS = 2, 0, 14
PROMPTS = [[1, 9, 8, 7, 11, 30, 31, 5, 6, 12, 13], [1, 5, 6, 7], [1, 9, 3, 11, 12, 40, 41]]
ANSWERS = np.random.default_rng(3).integers(3, 60, (3, 2, 9))
ANSWER_MASK = np.arange(9) < np.array([[9, 4], [7, 9], [2, 9]])[..., None]
RANK = LoRAConfig(lora_rank=2, lora_alpha=4.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])


class Pair(NamedTuple):
    """A model of transformers, and ours from its files."""

    theirs: Any
    loaded: Loaded

    @property
    def windowed(self) -> bool:
        return any(kind.window is not None for kind in self.loaded.config.text.kinds)


@pytest.fixture(scope="module", params=CASES)
def pair(request: Any, tmp_path_factory: Any) -> Pair:
    decoder, fields = CASES[request.param]
    theirs = causal_lm(decoder, seed=len(request.param), **fields)
    return Pair(theirs, saved(theirs, tmp_path_factory.mktemp("decoder")))


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """The prompts and their mask, one place wider than the longest."""
    width = max(map(len, PROMPTS)) + 1
    ids, mask = np.full((len(PROMPTS), width), PAD), np.zeros((len(PROMPTS), width), bool)
    for row, prompt in enumerate(PROMPTS):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = prompt, True
    return ids, mask


def their_logits(model: Any, ids: Any, mask: np.ndarray | None = None) -> Any:
    torch, _ = torch_and_transformers()
    ids = np.asarray(ids)
    mask = np.ones_like(ids) if mask is None else mask.astype(int)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return model(**{name: torch.tensor(value) for name, value in tensors.items()}).logits


def their_log_probs(model: Any, prompt: list[int], answer: np.ndarray) -> Any:
    """Of one answer behind its unpadded prompt."""
    torch, _ = torch_and_transformers()
    logits = their_logits(model, [[*prompt, *answer]])[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_log_probs_equal_transformers(pair: Pair, side: str) -> None:
    torch, _ = torch_and_transformers()
    ids, mask = padded(side)

    @nnx.jit
    def ours(model: Any) -> tuple[jax.Array, jax.Array]:
        branches = (jnp.asarray(ANSWERS), jnp.asarray(ANSWER_MASK))
        return reference_forward(model, ids, mask, None), branch_log_probs(model, ids, mask, None, *branches)

    logits, log_probs = map(np.asarray, ours(pair.loaded.model))
    with torch.no_grad():
        expected = their_logits(pair.theirs, ids, mask).numpy()
        assert np.abs(expected).max() > 0.3
        np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=1e-4)
        for row, branch in np.ndindex(*ANSWERS.shape[:2]):
            valid = ANSWER_MASK[row, branch]
            wanted = their_log_probs(pair.theirs, PROMPTS[row], ANSWERS[row, branch][valid]).numpy()
            np.testing.assert_allclose(log_probs[row, branch][valid], wanted, rtol=0, atol=1e-4)


def test_windows_show_in_the_logits(pair: Pair) -> None:
    """Guards the comparisons: without its windows the same model says something else."""
    if not pair.windowed:
        pytest.skip("every token sees all before it")
    ids, mask = padded("right")
    graph, state = nnx.split(pair.loaded.model)
    other = nnx.merge(graph, state)
    other.decoder.config = dataclasses.replace(other.decoder.config, layer_pattern=(LayerKind(),))
    models = (nnx.merge(graph, state), other)
    with_windows, without = (nnx.jit(reference_forward)(model, ids, mask, None) for model in models)
    assert np.abs(np.asarray(with_windows - without))[mask].max() > 1e-2


def generator(model: Any, **sampling: Any) -> Generator:
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    config = SamplingConfig(max_new_tokens=NEW_TOKENS, **sampling)
    return Generator(model, eos_token_id=EOS, pad_token_id=PAD, mesh=mesh, sampling=config, batch_size=2)


def prompt_batch() -> PromptBatch:
    return PromptBatch(["a", "b", "c"], *pad_prompts(PROMPTS, PAD), None)


def test_greedy_answers_are_transformers_own(pair: Pair) -> None:
    torch, _ = torch_and_transformers()
    ours = generator(pair.loaded.model, temperature=0.0)(prompt_batch())
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": EOS, "pad_token_id": PAD}
        with torch.no_grad():
            # Ours never draws the padding token.
            answer = pair.theirs.generate(ids, attention_mask=torch.ones_like(ids), suppress_tokens=[PAD], **options)
        wanted = answer[0, len(prompt) :].tolist()
        assert ours.token_ids[row, 0, : ours.lengths[row, 0]].tolist() == wanted


@pytest.mark.parametrize("attention", ["xla", "pallas_interpret"])
def test_sampled_log_probs_are_transformers_own(pair: Pair, attention: str) -> None:
    """Three candidates of a prompt share its prefix; lanes go from one prompt to another."""
    torch, _ = torch_and_transformers()
    graph, state = nnx.split(pair.loaded.model)
    model = nnx.merge(graph, state)
    model.config = with_attention(model.config, attention)
    drawn = generator(model, num_candidates=3, temperature=1.2, seed=5)(prompt_batch())
    assert drawn.lengths.max() > 8
    for row, prompt in enumerate(PROMPTS):
        for k in range(3):
            answer = drawn.token_ids[row, k, : drawn.lengths[row, k]]
            with torch.no_grad():
                wanted = their_log_probs(pair.theirs, prompt, answer).numpy()
            np.testing.assert_allclose(drawn.log_probs[row, k, : len(answer)], wanted, rtol=0, atol=1e-4)


def adapted(model: Any) -> Any:
    """The model with an adapter that changes the logits: B is zero after `attach`."""
    model = nnx.merge(*nnx.split(model))
    lora.attach(model, RANK, scope="decoder", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for linear in lora.adapters(model).values():
        linear.lora_b[...] = jnp.asarray(rng.normal(size=linear.lora_b.shape) * 0.1, jnp.float32)
    return model


def test_adapters_are_pefts_own(pair: Pair, tmp_path: Path) -> None:
    """Logits of the adapter and of the merged export, and the adapter's gradients through two answers."""
    torch, _ = torch_and_transformers()
    peft = pytest.importorskip("peft")
    model = adapted(pair.loaded.model)
    out = export_model(model, pair.loaded, tmp_path / "merged", dtype="float32")
    export_adapter(model, str(pair.loaded.directory), tmp_path / "adapter", RANK)
    again = type(pair.theirs).from_pretrained(pair.loaded.directory, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(again, tmp_path / "adapter", is_trainable=True).eval()
    merged = type(pair.theirs).from_pretrained(out, dtype=torch.float32).eval()
    ids = np.asarray(PROMPTS[:1])
    ours = nnx.jit(reference_forward)(model, jnp.asarray(ids), jnp.ones(ids.shape), None)
    with torch.no_grad():
        for peer in (merged, wrapped):
            np.testing.assert_allclose(ours, their_logits(peer, ids).numpy(), rtol=0, atol=1e-4)

    loss = their_log_probs(wrapped, PROMPTS[0], ANSWERS[0, 0]).sum()
    loss = loss - 0.5 * their_log_probs(wrapped, PROMPTS[0], ANSWERS[0, 1][ANSWER_MASK[0, 1]]).sum()
    loss.backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in wrapped.named_parameters() if "lora_" in name}
    graph, trained, rest = nnx.split(model, lora.LoRAParam, ...)
    prompt_ids, mask = (x[:1] for x in padded("right"))
    branches = (jnp.asarray(ANSWERS[:1]), jnp.asarray(ANSWER_MASK[:1]))

    @jax.jit
    @jax.grad
    def gradients(trained: Any) -> Any:
        scored = branch_log_probs(nnx.merge(graph, trained, rest), prompt_ids, mask, None, *branches, remat="dots")
        return jnp.sum(scored.sum(-1) * jnp.asarray([1.0, -0.5]))

    layers = gradients(trained)["decoder"]["layers"]
    for name, wanted in theirs.items():
        *_, number, part, projection, factor, _, _ = name.split(".")
        found = layers[{"self_attn": "attention"}.get(part, part)][projection][factor.lower()][...][int(number)].T
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(wanted).max()))
    assert max(np.abs(wanted).max() for wanted in theirs.values()) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_llava_takes_the_decoder(case: str, tmp_path: Path) -> None:
    torch, _ = torch_and_transformers()
    decoder, fields = CASES[case]
    theirs = llava(seed=7, decoder=decoder, text={"num_key_value_heads": 2, **fields})
    loaded = saved(theirs, tmp_path)
    ids, pixels = np.array([[1, *[IMAGE] * PATCHES, 7, 8, 11, 12, 13]]), images(1)

    def forward(model: Any) -> jax.Array:
        features = encoded(model, jnp.asarray(pixels.transpose(0, 2, 3, 1))[None])
        return reference_forward(model, jnp.asarray(ids), jnp.ones(ids.shape, bool), features)

    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()
    np.testing.assert_allclose(nnx.jit(forward)(loaded.model), expected, rtol=0, atol=1e-4)
