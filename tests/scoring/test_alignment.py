"""Similarity against transformers' CLIP and SigLIP, aggregation by hand, and the reference backend."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_judges import TEXT_LENGTH, dual_encoder_directory, one_device, prompt, torch_and_transformers

from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.pipeline.models import load_dual_encoder
from m3po_jax.scoring import alignment
from m3po_jax.scoring.alignment import Backend, Reference, Similarity, aggregate_claims, judge_pools

OBJECTS = ["dog", "cat", "person", "car", "traffic light"]
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def encoder(request, tmp_path_factory):
    """(kind, transformers model, ours, processor)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = dual_encoder_directory(folder, request.param, seed=0)
    loaded, processor = load_dual_encoder(str(folder), one_device(), image_fit="")
    return request.param, theirs, loaded.model, processor


def similarity(encoder, **settings):
    return Similarity(encoder[2], encoder[3], one_device(), **{"batch_size": 4, **settings})


def oracle(encoder, row, texts):
    """[texts] scores of a prompt's best image from transformers: CLIPScore, or SigLIP's probability."""
    torch, _ = torch_and_transformers()
    kind, theirs, _, processor = encoder
    ids, mask = processor.encode_texts(texts)
    assert ids.shape[1] == TEXT_LENGTH
    inputs = {
        "input_ids": torch.tensor(ids.astype(np.int64)),
        "pixel_values": torch.tensor(processor.images(row).transpose(0, 3, 1, 2)),
    }
    if kind == "clip":
        inputs["attention_mask"] = torch.tensor(mask.astype(np.int64))
    with torch.no_grad():
        logits = theirs(**inputs).logits_per_image.numpy().astype(np.float64)
    best = logits.max(axis=0)
    if kind == "siglip":
        return 1 / (1 + np.exp(-best))
    return np.minimum(2.5 * np.maximum(best / np.exp(theirs.logit_scale.item()), 0), 1)


def test_whole_answers_equal_transformers(encoder):
    rows = [prompt(1), prompt(2), prompt(3, images=2)]
    pools = [["a dog and a cat.", "a person"], ["a car."], ["Yes", "a red traffic light and a dog", ""]]
    found = similarity(encoder, unit="whole")(rows, pools)
    everything = []
    for row, pool, scores in zip(rows, pools, found, strict=True):
        expected = [oracle(encoder, row, [text])[0] if text else 0.0 for text in pool]
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        everything += scores.tolist()
    assert np.ptp(everything) > 0.01 and all(0 <= score <= 1 for score in everything)


def test_embeddings_that_are_no_numbers_are_no_abstention(encoder, monkeypatch):
    embed = alignment._image_embeddings
    monkeypatch.setattr(alignment, "_image_embeddings", lambda *arguments: embed(*arguments) * np.nan)
    with pytest.raises(UserError, match="the dual encoder's embeddings are not finite"):
        similarity(encoder, unit="whole")([prompt(1)], [["a dog and a cat."]])


def test_claims_are_scored_by_the_rule(encoder):
    rows, pool = [prompt(5), prompt(6)], ["a dog, a person and a cat.", "a car.", "nothing."]
    template = "a picture of a {claim}"
    for row in rows:
        p = dict(zip(OBJECTS, oracle(encoder, row, [f"a picture of a {name}" for name in OBJECTS]), strict=True))
        made = [p["dog"], p["person"], p["cat"]]
        mass = sum(p.values())
        for rule, expected in (
            ("mean", [np.mean(made), p["car"], 0.0]),
            ("min", [min(made), p["car"], 0.0]),
            (
                "soft_f1",
                [
                    2 * np.mean(made) * (sum(made) / mass) / (np.mean(made) + sum(made) / mass),
                    2 * p["car"] * (p["car"] / mass) / (p["car"] + p["car"] / mass),
                    0.0,
                ],
            ),
        ):
            backend = similarity(encoder, aggregate=rule, vocabulary=OBJECTS, template=template)
            (found,) = backend([row], [pool])
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=rule)


def test_sentences_are_the_claims_without_a_vocabulary(encoder):
    row = prompt(7)
    (found,) = similarity(encoder)([row], [["a dog. a cat."]])
    np.testing.assert_allclose(found, [oracle(encoder, row, ["a dog.", "a cat."]).mean()], atol=1e-4)


def test_answers_beyond_the_text_window_are_read_to_their_end(encoder):
    """A text longer than the window is cut; claim by claim nothing of an answer is lost."""
    row = prompt(17)
    start = "a dog and a cat and a person and a car."
    good, bad = f"{start} a red bus. a bird.", f"{start} a banana. a bird."
    assert len(encoder[3].tokenizer(good)["input_ids"]) > TEXT_LENGTH
    whole = similarity(encoder, unit="whole")([row], [[good, bad]])[0]
    assert whole[0] == whole[1], "the window ends before they differ"
    (claims,) = similarity(encoder)([row], [[good, bad]])
    parts = oracle(encoder, row, [start, "a red bus.", "a bird.", "a banana."])
    np.testing.assert_allclose(claims, [parts[[0, 1, 2]].mean(), parts[[0, 3, 2]].mean()], atol=1e-4)
    assert abs(claims[0] - claims[1]) > 1e-5


def test_no_turns_a_claim_round(encoder):
    row = prompt(8, "Is there a dog in the image?")
    backend = similarity(encoder, aggregate="soft_f1", vocabulary=OBJECTS)
    (found,) = backend([row], [["Yes", "No", "Maybe"]])
    p = oracle(encoder, row, ["dog"])[0]
    np.testing.assert_allclose(found, [p, 1 - p, 0], atol=1e-4)


def test_text_alone_abstains(encoder):
    backend = similarity(encoder, vocabulary=OBJECTS)
    text, seen = prompt(9, images=0), prompt(9)
    found = backend([text, seen, text], [["a dog"], ["a dog"], ["a dog", "a cat"]])
    assert np.isnan(found[0]).all() and np.isnan(found[2]).all() and found[2].shape == (2,)
    assert np.isfinite(found[1]).all()
    assert np.isnan(backend([text], [["a dog"]])[0]).all()


def test_scores_do_not_depend_on_the_batch(encoder):
    rows = [prompt(seed, images=1 + seed % 2) for seed in range(10, 15)]
    pools = [["a dog and a person", "a cat."], ["a car"], ["a cat", "a dog", "a person, a car and a dog"]] * 2
    pools = pools[: len(rows)]
    settings = {"vocabulary": OBJECTS, "aggregate": "soft_f1"}
    together = similarity(encoder, batch_size=8, **settings)(rows, pools)
    alone = similarity(encoder, batch_size=2, **settings)
    for row, pool, scores in zip(rows, pools, together, strict=True):
        np.testing.assert_allclose(alone([row], [pool])[0], scores, atol=1e-5)
        for answer, score in zip(pool, scores, strict=True):
            np.testing.assert_allclose(alone([row], [[answer]])[0], [score], atol=1e-5)


def test_texts_are_forgotten_between_calls_when_they_are_many(encoder, monkeypatch):
    monkeypatch.setattr(alignment, "KEPT_TEXTS", 2)
    backend = similarity(encoder)
    first = backend([prompt(1)], [["a dog. a cat. a car."]])
    assert len(backend.texts) == 3
    backend([prompt(1)], [["a person."]])
    assert list(backend.texts) == ["a person."]
    np.testing.assert_allclose(backend([prompt(1)], [["a dog. a cat. a car."]])[0], first[0], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "clam"}, r"score\.unit.*did you mean 'claim'"),
        ({"aggregate": "maen"}, r"score\.aggregate.*did you mean 'mean'"),
        ({"aggregate": "soft_f1"}, r"score\.vocabulary"),
        ({"template": "a dog"}, r"score\.claim_template"),
    ],
)
def test_wrong_settings(encoder, settings, message):
    with pytest.raises(UserError, match=message):
        similarity(encoder, **settings)


def test_soft_f1_by_hand():
    # Claims 0.9 and 0.6 of a picture that holds 2.5 claims: precision 0.75, recall 1.5 / 2.5 = 0.6.
    assert aggregate_claims([0.9, 0.6], "soft_f1", 2.5) == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert aggregate_claims([0.9], "soft_f1", 2.5) < aggregate_claims([0.9, 0.6], "soft_f1", 2.5)
    assert aggregate_claims([0.9], "mean") > aggregate_claims([0.9, 0.6], "mean")
    assert aggregate_claims([0.9, 0.6], "min") == 0.6
    assert [aggregate_claims([], rule, 1.0) for rule in alignment.AGGREGATES] == [0, 0, 0]
    assert aggregate_claims([0.0], "soft_f1", 0.0) == 0
    with pytest.raises(UserError, match="unknown rule"):
        aggregate_claims([0.5], "mim")


@given(probabilities, st.floats(0, 5))
def test_aggregates_stay_in_range(values, extra):
    mass = sum(values) + extra
    low, mean = aggregate_claims(values, "min"), aggregate_claims(values, "mean")
    assert 0 <= low <= mean + 1e-12 <= 1 + 1e-9
    assert 0 <= aggregate_claims(values, "soft_f1", mass) <= 1 + 1e-9


def test_reference_counts_objects_of_captions():
    backend = Reference(OBJECTS)
    row = Prompt("r", (), "Describe the image.", "a dog and a cat.", {"kind": "caption", "objects": ["dog", "cat"]})
    (found,) = backend([row], [["a dog and a cat.", "a dog.", "a dog, a car and a dog.", "a car.", ""]])
    np.testing.assert_allclose(found, [1, 2 / 3, 1 / 2, 0, 0])
    assert np.isfinite(found).all()


def test_reference_reads_short_answers():
    backend = Reference(OBJECTS)
    asked = Prompt("q", (), "Is there a dog in the image?", "Yes", {"kind": "yesno", "objects": ["dog"]})
    (found,) = backend([asked], [["Yes", "yes.", "Yes, there is a dog.", "No", "No dog is here", "", "a dog"]])
    assert found.tolist() == [1, 1, 1, 0, 0, 0, 0]
    shape = Prompt("s", (), "What shape is in the image?", "rectangle")
    assert Reference([])([shape], [["A rectangle.", "circle"]])[0].tolist() == [1, 0]
    assert np.isnan(backend([Prompt("u", (), "Describe the image.")], [["a dog", "a cat"]])[0]).all()


@pytest.mark.parametrize("reference", ["", "  \n", ".", "?!"])
def test_a_reference_that_says_nothing_is_none(reference):
    row = Prompt("e", (), "What is it?", reference)
    judged = judge_pools(Reference([]), [row], [["", "a dog", "."]])
    assert np.isnan(judged.scores[0]).all() and judged.reasons == [["no_reference"] * 3]


def test_the_letter_of_an_option_is_no_article():
    row = Prompt("o", (), "Which option is right? A, B or C", "A")
    assert Reference([])([row], [["A", "a.", "(A)", "B", "", "the"]])[0].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_backend_gives_a_score_for_every_candidate():
    class Short(Backend):
        name = "short"

        def __call__(self, prompts, pools):
            return [np.zeros(len(pool) - 1) for pool in pools]

    row = Prompt("a", (), "What?", "dog")
    with pytest.raises(UserError, match=r"backend short: scores of \[1\] candidates, not \[2\]"):
        judge_pools(Short(), [row], [["a dog", "a cat"]])
    assert Short().columns == () and Short().usages() == []
