import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "inference"))
from model_inputs import after_tower
from tiny_llava import images_of, make_generator, one_device, prompts, tiny_model

from m3po_jax.data.padding import answer_bucket, pad_answers
from m3po_jax.errors import UserError
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models import lora
from m3po_jax.models.forward import encode_images, reference_forward


@pytest.fixture(scope="module")
def model():
    return tiny_model(adapters=True)


@given(st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3), max_size=3))
def test_padded_answers_are_the_answers(answers):
    ids, mask = pad_answers([[np.array(tokens, np.int32) for tokens in own] for own in answers])
    longest = max((len(tokens) for own in answers for tokens in own), default=0)
    assert ids.shape == mask.shape == (len(answers), max(map(len, answers), default=0), longest)
    found = [[ids[b, k][mask[b, k]].tolist() for k in range(len(own))] for b, own in enumerate(answers)]
    assert found == answers
    assert mask.sum() == sum(len(tokens) for own in answers for tokens in own) and not ids[~mask].any()
    assert (np.sort(~mask, axis=-1) == ~mask).all(), "padding stands on the right"


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, one_device(), batch_size=2)


def answers(batch, count=5, width=6, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 100, (len(batch.ids), count, width)).astype(np.int32)
    mask = np.arange(width) < rng.integers(1, width + 1, ids.shape[:2])[..., None]
    return ids, mask


@partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens, images):
    """Logits at every position of a full causal pass, [32, vocabulary]."""
    model = nnx.merge(graph, state)
    return reference_forward(model, tokens, jnp.ones_like(tokens, bool), encode_images(model, images))[0]


def plain_log_probs(model, batch, ids, mask):
    """Every answer in a pass of its own, without sharing; the padding lies after it, where nothing looks."""
    out = np.zeros(ids.shape, np.float32)
    for b, k in np.ndindex(ids.shape[:2]):
        prompt, answer = batch.token_ids[b][batch.mask[b]], ids[b, k][mask[b, k]]
        if not len(answer):
            continue
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
        logits = np.float64(forward(*nnx.split(model), tokens, images_of(batch, b)))
        rows = logits[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        out[b, k, : len(answer)] = rows[np.arange(len(answer)), answer] - np.logaddexp.reduce(rows, axis=-1)
    return out


def test_scores_equal_one_plain_pass_an_answer(model, scorer):
    batch = prompts((3, 9, 6))
    ids, mask = answers(batch)
    ours = scorer.log_probs(batch, ids, mask)
    assert ours.shape == ids.shape and (ours[~mask] == 0).all() and (ours[mask] < 0).all()
    some = np.zeros_like(mask)
    some[0, 4], some[1, 0], some[2, 2] = mask[0, 4], mask[1, 0], mask[2, 2]
    expected = plain_log_probs(model, batch, ids, some)
    np.testing.assert_allclose(ours[some], expected[some], atol=1e-4)


def test_blank_images_give_the_language_prior(scorer):
    batch = prompts((3, 9, 6))
    ids, mask = answers(batch)
    prior = scorer.log_probs(batch, ids, mask, blank_images=True)
    blank = prompts((3, 9, 6))
    blank.images["pixels"] = np.zeros_like(batch.images["pixels"])
    np.testing.assert_allclose(prior, scorer.log_probs(blank, ids, mask), atol=1e-5)
    assert np.abs(prior - scorer.log_probs(batch, ids, mask))[mask].max() > 1e-2


def test_features_stand_for_the_images(model, scorer):
    """Given features are what the tower would make of the pixels; a blanked pass needs neither."""
    batch = prompts((3, 9, 6), images=2)
    ids, mask = answers(batch)
    given = replace(batch, images=after_tower(model, batch.images))
    expected, tokens = scorer.log_probs(batch, ids, mask), [7, 50]
    np.testing.assert_allclose(scorer.log_probs(given, ids, mask), expected, atol=1e-5)
    np.testing.assert_allclose(
        scorer.choice_probabilities(given, tokens), scorer.choice_probabilities(batch, tokens), atol=1e-5
    )
    other = replace(given, images=jax.tree.map(lambda x: np.roll(x, 1, axis=0), given.images))
    assert np.abs(scorer.log_probs(other, ids, mask) - expected)[mask].max() > 1e-2
    none = replace(batch, images=None)
    for reference in (False, True):
        prior = scorer.log_probs(batch, ids, mask, blank_images=True, reference=reference)
        for seen in (given, none):
            found = scorer.log_probs(seen, ids, mask, blank_images=True, reference=reference)
            np.testing.assert_array_equal(found, prior)


def test_a_blank_image_is_encoded_by_the_weights_of_the_moment(model):
    scorer, batch = Scorer(model, one_device(), batch_size=2), prompts((3, 9, 6))
    ids, mask = answers(batch)
    first = scorer.log_probs(batch, ids, mask, blank_images=True)
    np.testing.assert_array_equal(scorer.log_probs(batch, ids, mask, blank_images=True), first)
    changed = nnx.merge(*nnx.split(model))
    places = changed.vision_tower.position_embedding
    places[...] = jax.random.normal(jax.random.key(1), places[...].shape)
    scorer.load(changed)
    assert np.abs(scorer.log_probs(batch, ids, mask, blank_images=True) - first)[mask].max() > 1e-3


def test_the_reference_is_the_model_without_its_adapters(model, scorer):
    batch = prompts((3, 9))
    ids, mask = answers(batch)
    reference = scorer.log_probs(batch, ids, mask, reference=True)
    bare = nnx.merge(*nnx.split(model))
    lora.set_scale(bare, 0.0)
    expected = Scorer(bare, one_device(), batch_size=2).log_probs(batch, ids, mask)
    np.testing.assert_array_equal(reference, expected)
    assert np.abs(reference - scorer.log_probs(batch, ids, mask))[mask].max() > 1e-2
    assert model.decoder.layers.mlp.up_proj.lora_scale == 2.0


def test_scores_equal_what_generation_recorded(model, scorer):
    batch = prompts((3, 9, 6))
    out = make_generator(model, temperature=0.8, top_p=0.9)(batch)
    mask = np.arange(out.token_ids.shape[-1]) < out.lengths[..., None]
    np.testing.assert_allclose(scorer.log_probs(batch, out.token_ids, mask), out.log_probs, atol=1e-4)


def test_choice_probabilities(scorer):
    """exp of the one-token scores: after the prompt, and after each of several questions."""
    batch, tokens = prompts((3, 9, 6)), [7, 50, 51]
    ours = scorer.choice_probabilities(batch, tokens)
    single = np.broadcast_to(np.int32(tokens)[None, :, None], (3, 3, 1))
    expected = np.exp(scorer.log_probs(batch, single, np.ones(single.shape, bool)))
    np.testing.assert_allclose(ours[:, 0], expected[..., 0], rtol=1e-4)

    ids, mask = answers(batch, count=2)
    ours = scorer.choice_probabilities(batch, tokens, ids, mask)
    assert ours.shape == (3, 2, 3)
    longer, longer_mask = np.pad(ids, ((0, 0), (0, 0), (0, 1))), np.pad(mask, ((0, 0), (0, 0), (0, 1)))
    last = mask.sum(-1)[..., None]
    np.put_along_axis(longer, last, 50, axis=2)
    np.put_along_axis(longer_mask, last, True, axis=2)
    expected = np.take_along_axis(scorer.log_probs(batch, longer, longer_mask), last, axis=2)[..., 0]
    np.testing.assert_allclose(ours[..., 1], np.exp(expected), rtol=1e-4)


def test_buckets_bound_the_number_of_programs(model, compiled):
    scorer = Scorer(model, one_device(), batch_size=2, prefix_bucket=36)  # as no other test has it
    for lengths, count, width in (((3, 9), 5, 6), ((1, 2, 7), 8, 8), ((4,), 6, 3)):
        batch = prompts(lengths)
        assert scorer.log_probs(batch, *answers(batch, count, width)).shape == (len(lengths), count, width)
    assert compiled.count("log_probs_program") == 1


def test_answers_are_padded_little_and_to_few_widths():
    widths = [answer_bucket(tokens) for tokens in range(1, 257)]
    assert len(set(widths)) == 13
    assert all(tokens <= width <= max(8, 1.5 * tokens) for tokens, width in enumerate(widths, start=1))


def test_scorers_share_their_programs_whatever_their_weights(model, compiled):
    """Another seed's model, loaded anew, compiles nothing; another architecture does."""
    batch = prompts((3, 9, 6))
    ids, mask = answers(batch)

    def all_scores(model):
        scorer = Scorer(model, one_device(), batch_size=2, prefix_bucket=40)
        scores = [scorer.log_probs(batch, ids, mask, reference=reference) for reference in (False, True)]
        scores += [scorer.log_probs(batch, ids, mask, blank_images=True), scorer.choice_probabilities(batch, [7])]
        return scores

    other = tiny_model(adapters=True, scale=1.5)
    first, before = all_scores(model), len(compiled)
    assert compiled.count("log_probs_program") == 3 and compiled.count("choices_program") == 1
    second = all_scores(other)
    assert compiled[before:] == []
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(first, second, strict=True))
    all_scores(tiny_model(kv_heads=4, adapters=True))
    assert compiled[before:].count("log_probs_program") == 3


def test_scores_that_are_not_finite_name_the_prompt(scorer):
    batch = prompts((3, 9, 6))
    batch.images["pixels"][2, 0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"prompt prompt-6-2: .*not finite"):
        scorer.log_probs(batch, *answers(batch))
