"""A trained model answers as `transformers` does, from the same files: greedy tokens and raw log-probabilities."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from m3po_jax.config import MeshConfig
from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.model_images import joined, stacked
from m3po_jax.data.padding import pad_prompts
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import load_model, resolve_directory
from m3po_jax.quickstart.builder import encode_png
from m3po_jax.quickstart.language import CAPTION_INSTRUCTION
from m3po_jax.quickstart.scenes import scene

torch = pytest.importorskip("torch")
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def setting():
    from transformers import LlavaForConditionalGeneration

    directory = resolve_directory("builtin:quickstart-base")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    loaded = load_model(directory, dtype="float32", param_dtype="float32", mesh=mesh)
    processor = Processor.from_pretrained(directory, "plain", "stretch")
    questions = [CAPTION_INSTRUCTION, "Is there a dog in the image?", "Is there a traffic light in the image?"]
    prompts = [
        Prompt(f"p{i}", (Image(bytes=encode_png(scene("test", i).image)),), questions[i % 3]) for i in range(9)
    ]
    theirs = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return loaded.model, processor, prompts, mesh, theirs


def batch_of(processor, prompts) -> PromptBatch:
    ids, mask = pad_prompts([processor.encode_prompt(p) for p in prompts], processor.pad_token_id)
    return PromptBatch([p.id for p in prompts], ids, mask, stacked([joined(processor.images(p)) for p in prompts]))


def generator(model, processor, mesh, **sampling) -> Generator:
    config = SamplingConfig(max_new_tokens=NEW_TOKENS, **sampling)
    special = {"eos_token_id": processor.eos_token_id, "pad_token_id": processor.pad_token_id}
    return Generator(model, mesh=mesh, sampling=config, batch_size=9, **special)


def test_greedy_answers_are_transformers_own(setting):
    model, processor, prompts, mesh, theirs = setting
    ours = generator(model, processor, mesh, temperature=0.0)(batch_of(processor, prompts))
    for row, prompt in enumerate(prompts):
        ids = torch.from_numpy(processor.encode_prompt(prompt)[None]).long()
        pixels = torch.tensor(joined(processor.images(prompt))["pixels"]).permute(0, 3, 1, 2)
        with torch.no_grad():
            made = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=processor.eos_token_id,
                pad_token_id=processor.pad_token_id,
            )[0, ids.shape[1] :].tolist()
        assert ours.token_ids[row, 0, : ours.lengths[row, 0]].tolist() == made


def test_sampled_log_probs_are_transformers_own(setting):
    model, processor, prompts, mesh, theirs = setting
    made = generator(model, processor, mesh, num_candidates=3, temperature=1.3, top_k=20, seed=5)(
        batch_of(processor, prompts)
    )
    worst = 0.0
    for row, prompt in enumerate(prompts):
        prefix = processor.encode_prompt(prompt)
        pixels = torch.tensor(joined(processor.images(prompt))["pixels"]).permute(0, 3, 1, 2)
        for k in range(3):
            answer = made.token_ids[row, k, : made.lengths[row, k]]
            ids = torch.from_numpy(np.concatenate([prefix, answer])[None]).long()
            with torch.no_grad():
                logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
            log_probs = torch.log_softmax(logits[len(prefix) - 1 : -1], dim=-1).numpy()
            expected = log_probs[np.arange(len(answer)), answer]
            worst = max(worst, float(np.abs(expected - made.log_probs[row, k, : len(answer)]).max()))
    assert worst < 1e-4
