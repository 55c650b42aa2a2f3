"""Options of the engine, replayed token by token with `transformers`' processors in torch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_llava import EOS, PAD, images_of, make_generator, next_logits, prompts, take, teacher_forced, tiny_model
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from m3po_jax.errors import UserError
from m3po_jax.inference.lanes import capacities
from m3po_jax.inference.memory import CacheShape, advice, cache_bytes
from m3po_jax.inference.sampling import candidate_keys, sample, step_keys
from m3po_jax.inference.settings import SamplingConfig

POOL = {
    "temperature": (0.0, 0.8, 2.0),
    "top_k": (0, 50, 0),
    "top_p": (1.0, 0.95, 1.0),
    "min_p": (0.0, 0.01, 0.05),
    "repetition_penalty": (1.4, 1.0, 2.0),
    "min_new_tokens": (2, 9, 0),
}
BANNED = (11, 12, 13)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def generator(model):
    return make_generator(model)


@pytest.fixture(scope="module")
def generated(generator):
    return generator(prompts())


def huggingface(setting, prompt_length, with_prompt):
    """`transformers`' own list in the order of its generate()."""
    ignored = None if with_prompt else prompt_length
    return LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"], prompt_ignore_length=ignored),
            MinNewTokensLengthLogitsProcessor(prompt_length, setting["min_new_tokens"], EOS),
            SuppressTokensLogitsProcessor(list(BANNED)),
        ]
    ), LogitsProcessorList(
        [
            TemperatureLogitsWarper(setting["temperature"] or 1.0),
            *([TopKLogitsWarper(setting["top_k"])] if setting["top_k"] else []),
            TopPLogitsWarper(setting["top_p"]),
            MinPLogitsWarper(setting["min_p"]),
        ]
    )


@pytest.mark.parametrize("with_prompt", [False, True])
def test_a_pool_equals_transformers_token_by_token(model, with_prompt):
    """Every token is what our draw makes of the scores that `transformers` computes; the record stays raw."""
    batch = prompts()
    options = {"repetition_penalty_prompt": with_prompt, "suppress_token_ids": BANNED, "stop_bias": 2.0}
    out = make_generator(model, **POOL, **options)(batch)
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, batch, out), atol=1e-4)
    keys, changed = candidate_keys(0, batch.ids, 3), 0
    for row in range(3):
        prompt = batch.token_ids[row][batch.mask[row]].tolist()
        for k in range(3):
            setting = {name: values[k] for name, values in POOL.items()}
            processors, warpers = huggingface(setting, len(prompt), with_prompt)
            tokens = list(prompt)
            for step in range(out.lengths[row, k]):
                raw = next_logits(model, tokens, images_of(batch, row)).astype(np.float32)
                raw[EOS] += 2.0
                scores = processors(torch.tensor([tokens]), torch.tensor(raw[None]))
                if setting["temperature"] == 0.0:
                    expected = int(scores.argmax())
                else:
                    warped = jnp.asarray(warpers(None, scores).numpy())
                    expected = int(sample(step_keys(jnp.asarray(keys[row, k : k + 1]), jnp.int32([step])), warped)[0])
                assert expected == out.token_ids[row, k, step], (row, k, step)
                changed += setting["temperature"] == 0.0 and expected != raw.argmax()
                tokens.append(expected)
    assert changed, "the penalty never mattered"


def test_a_candidate_of_a_pool_is_that_of_a_uniform_run(model):
    pooled = make_generator(model, **POOL)(prompts())
    alone = make_generator(model, **{name: values[2] for name, values in POOL.items()})(prompts())
    np.testing.assert_array_equal(alone.token_ids[:, 2], pooled.token_ids[:, 2])


def test_a_greedy_member_joins_and_changes_no_other(model, generated):
    out = make_generator(model, greedy_member=True)(prompts())
    greedy = make_generator(model, num_candidates=1, temperature=0.0)(prompts())
    np.testing.assert_array_equal(out.token_ids[:, :1], greedy.token_ids)
    np.testing.assert_array_equal(out.token_ids[:, 1:], generated.token_ids[:, 1:])
    assert (out.token_ids[:, 0] != generated.token_ids[:, 0]).any()


def test_no_end_before_the_least_length(model):
    out = make_generator(model, stop_bias=100.0, min_new_tokens=(5, 0, 12))(prompts())
    assert (out.lengths == [6, 1, 12]).all() and (out.finished == [True, True, False]).all()


def test_ids_beyond_the_tokenizer_are_never_drawn(model, generated):
    assert generated.token_ids[generated.token_ids != PAD].max() >= 90
    out = make_generator(model, tokenizer_size=90, temperature=3.0)(prompts())
    assert out.token_ids[out.token_ids != PAD].max() < 90
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, prompts(), out), atol=1e-4)


def test_single_candidates_can_be_drawn_again(generator, generated):
    """The first attempt repeats itself, the second does not, and neither depends on its batch."""
    wanted = np.array([[False, True, False], [False, False, False], [True, False, True]])
    before = generator.compilations
    same = generator(prompts(), wanted)
    np.testing.assert_array_equal(same.token_ids[wanted], generated.token_ids[wanted])
    assert (same.lengths[~wanted] == 0).all() and (same.token_ids[~wanted] == PAD).all()
    again = generator(prompts(), wanted, 1)
    assert (again.token_ids[wanted] != generated.token_ids[wanted]).any(axis=-1).all()
    apart = generator(take(prompts(), [2]), wanted[2:], 1)
    np.testing.assert_array_equal(apart.token_ids, again.token_ids[2:])
    assert generator.compilations == before


def test_slot_steps_are_steps_times_slots(model):
    generator = make_generator(model, stop_bias=100.0, min_new_tokens=3, num_candidates=2)
    out = generator(take(prompts(), [0, 2]))
    assert out.lengths.sum() == 4 * 2 * 2 and out.slot_steps == 4 * 2 * 3  # the third row is padding


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_p": 1.5}, r"generate\.min_p: must be in \[0, 1\], not 1\.5"),
        ({"repetition_penalty": 0.0}, r"generate\.repetition_penalty: must be in \(0, 1e\+09\], not 0"),
        ({"min_new_tokens": 257}, r"min_new_tokens: 257 is more than max_new_tokens \(256\)"),
        ({"num_candidates": 2, "top_p": (0.5, 0.0)}, r"generate\.top_p: must be in \(0, 1\], not 0"),
        ({"num_candidates": 3, "top_k": (1, 2)}, r"generate\.top_k: 2 values for 3 candidates"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**wrong)


def test_an_answer_that_could_hold_nothing_is_refused(model):
    with pytest.raises(UserError, match="every token but the end token is suppressed"):
        make_generator(model, min_new_tokens=1, suppress_token_ids=tuple(range(128)))


def test_out_of_memory_says_which_number_to_lower(model, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    for program in ("prefill", "decode"):
        generator = make_generator(model, max_new_tokens=65)
        monkeypatch.setattr(generator, program, exhausted)
        with pytest.raises(UserError, match=r"3 prompts of 32 tokens with 3 × 3 candidates of 65 tokens do not") as e:
            generator(prompts())
        assert "lower generate.batch_size from 3 to 1" in str(e.value) and "GiB" in str(e.value)


def test_other_errors_of_the_runtime_pass(model, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    generator = make_generator(model)
    monkeypatch.setattr(generator, "decode", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        generator(prompts())


def test_the_estimate_is_the_caches_size(model):
    """Of a stream of many prompts, with two views of each."""
    generator = make_generator(model, num_candidates=5, max_new_tokens=200, contrast_alpha=1.0)
    sizes, text = generator.sizes(None, 64), model.config.text
    kv = jax.eval_shape(lambda: generator.layout.empty(sizes, 64))[0].kv
    kv += jax.eval_shape(lambda: generator.layout.empty_cache(sizes, capacities(200)[-1])).kv
    shape = {"rows": 3, "held": sizes.slots, "views": 2, "prefix": 64, "candidates": 5, "new_tokens": 200}
    assert sizes.slots > 2 * 3
    size = sum(x.size * x.dtype.itemsize for pair in kv for x in pair)
    assert cache_bytes(text, CacheShape(**shape), 4) == size
    split = CacheShape.on_mesh({"data": 3, "fsdp": 1, "tensor": 2}, 2, **shape)
    assert cache_bytes(text, split, 4) == size // 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"lower generate\.batch_size from 8 to 4 \("),
        (
            {"rows": 2, "held": 2},
            r"lower generate\.num_candidates from 6 to 3 \(.* or generate\.max_new_tokens from 90 to 45",
        ),
        ({"rows": 2, "held": 2, "candidates": 1}, r"lower generate\.max_new_tokens from 90 to 45"),
        ({"rows": 2, "held": 2, "prefix": 9000}, r"split the model over more devices"),
    ],
)
def test_advice_is_the_number_that_helps(model, changes, message):
    sizes = {
        "rows": 8,
        "held": 17,
        "views": 1,
        "prefix": 32,
        "candidates": 6,
        "new_tokens": 90,
        "row_parts": 2,
        **changes,
    }
    assert re.match(message, advice(model.config.text, CacheShape(**sizes), 2))
