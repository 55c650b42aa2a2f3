"""Every backend that a recipe can name, from model directories."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_judges import dual_encoder_directory, one_device, prompt, tiny_policy

from m3po_jax.config import EndpointConfig, ModelConfig, ScoreConfig
from m3po_jax.errors import UserError
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.export import export_model
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.backends import make_backend
from m3po_jax.scoring.alignment import Reference, Similarity
from m3po_jax.scoring.ensemble import Ensemble
from m3po_jax.scoring.judge import Claims

sys.path.append(str(Path(__file__).parents[1] / "models"))
import hf_gemma3
from hf_models import load_float32

OBJECTS = ["dog", "cat", "person"]
ROWS, POOLS = [prompt(1), prompt(2)], [["a dog and a cat.", "a person."], ["a cat."]]
MODEL = ModelConfig(dtype="float32", param_dtype="float32", template="plain", image_fit="stretch")


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    dual_encoder_directory(folder, "clip")
    return str(folder)


@pytest.fixture(scope="module")
def judge_directory(tmp_path_factory):
    """Another LLaVA, as a directory with weights."""
    other = tiny_policy(seed=1)
    return str(export_model(other.model, other.loaded, tmp_path_factory.mktemp("judge") / "model", dtype="float32"))


def backend(policy=None, **settings):
    score = ScoreConfig(**{"vocabulary": OBJECTS, "batch_size": 4, **settings})
    return make_backend(score, one_device(), policy=policy, model_config=MODEL)


def test_similarity(policy, clip, capsys):
    made = backend(policy, backend="similarity", model=clip, aggregate="soft_f1", claim_template="a {claim}")
    assert isinstance(made, Similarity) and made.name == "similarity"
    found = made(ROWS, POOLS)
    assert [len(scores) for scores in found] == [2, 1] and np.isfinite(np.concatenate(found)).all()
    assert "a dog" in made.texts and made.aggregate == "soft_f1"
    assert capsys.readouterr().err == ""


def test_warnings_are_handed_out(policy):
    warnings: list[str] = []
    score = ScoreConfig(backend="claims", vocabulary=OBJECTS)
    make_backend(score, one_device(), policy=policy, model_config=MODEL, warnings=warnings)
    assert len(warnings) == 1 and "the policy itself" in warnings[0]


def test_the_policy_judges_itself_with_a_warning(policy, capsys):
    made = backend(policy, backend="claims", model="")
    assert isinstance(made, Claims) and made.name == "claims"
    assert "the judge is the policy itself" in " ".join(capsys.readouterr().err.split())
    expected = Claims(Scorer(policy.model, one_device(), batch_size=4), policy.processor, vocabulary=OBJECTS)
    for found, scores in zip(made(ROWS, POOLS), expected(ROWS, POOLS), strict=True):
        np.testing.assert_allclose(found, scores, atol=1e-6)


def test_a_judge_of_its_own(policy, judge_directory, capsys):
    made = backend(policy, backend="claims", model=judge_directory)
    # The exported copy has its own random tower; the policy's is not stored, so only the shape can be compared.
    assert "same one" in " ".join(capsys.readouterr().err.split())
    other = tiny_policy(seed=1)
    expected = Claims(Scorer(other.model, one_device(), batch_size=4), other.processor, vocabulary=OBJECTS)
    own = backend(policy, backend="claims", model="")
    for found, scores, mine in zip(made(ROWS, POOLS), expected(ROWS, POOLS), own(ROWS, POOLS), strict=True):
        np.testing.assert_allclose(found, scores, atol=1e-5)
        assert np.abs(found - mine).max() > 1e-4


def test_a_judge_of_another_family_reads_images_its_own_way(policy, judge_directory, tmp_path):
    """Limits and crops are of families that have them, whoever is the policy; questions in the judge's own template,
    whatever the policy's is."""
    hf_gemma3.saved(tmp_path)
    score = ScoreConfig(backend="claims", model=str(tmp_path), vocabulary=OBJECTS, batch_size=4)
    assert MODEL.template == "plain"
    model = dataclasses.replace(MODEL, max_pixels=1000, pan_and_scan=True)
    made = make_backend(score, one_device(), policy=policy, model_config=model)
    assert made.processor.image_reader.pan_and_scan
    loaded, processor = load_float32(tmp_path), Processor.from_pretrained(tmp_path, "chat", "pad", pan_and_scan=True)
    expected = Claims(Scorer(loaded.model, one_device(), batch_size=4), processor, vocabulary=OBJECTS)
    for found, scores in zip(made(ROWS, POOLS), expected(ROWS, POOLS), strict=True):
        np.testing.assert_allclose(found, scores, atol=1e-6)
    llava = dataclasses.replace(MODEL, max_pixels=1000, pan_and_scan=True)
    score = dataclasses.replace(score, model=judge_directory)
    assert make_backend(score, one_device(), policy=policy, model_config=llava).processor.image_buckets is None


def test_image_paths_are_relative_to_the_data(policy, tmp_path):
    from m3po_jax.data.schema import Image, Prompt

    (tmp_path / "picture.png").write_bytes(ROWS[0].images[0].bytes)
    score = ScoreConfig(backend="claims", vocabulary=OBJECTS, batch_size=4)
    made = make_backend(score, one_device(), policy=policy, image_root=tmp_path, model_config=MODEL)
    by_path = made([Prompt("p", (Image(path="picture.png"),), "Describe the image.")], POOLS[:1])
    np.testing.assert_allclose(by_path[0], made(ROWS[:1], POOLS[:1])[0], atol=1e-6)


def test_a_server_as_member_has_a_model_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    server = EndpointConfig(base_url="https://judge.example/v1", model="small", api_key_env="JUDGE_KEY")
    score = ScoreConfig(backend="ensemble", members=["endpoint=large", "endpoint", "reference"], endpoint=server)
    with pytest.raises(UserError, match=r"score\.endpoint\.cache_dir: no place for paid answers"):
        make_backend(score, one_device())
    made = make_backend(score, one_device(), folder=tmp_path / "runs" / "x")
    assert [member.config.model for member in made.members[:2]] == ["large", "small"]
    assert made.columns == ("mas_endpoint", "mas_endpoint_2", "mas_reference")
    assert [usage["judge"] for usage in made.usages()] == ["large", "small"]
    assert made.members[0].cache.path.parent == tmp_path / "runs" / "endpoint-cache"


def test_a_judge_needs_grades_of_one_token(policy):
    with pytest.raises(UserError, match=r"score\.grades: grade 1 is not one token"):
        backend(policy, backend="judge")


def test_reference_needs_no_model():
    made = backend(backend="reference")
    assert isinstance(made, Reference)
    row = prompt(3, metadata={"kind": "caption", "objects": ["dog"]})
    np.testing.assert_allclose(made([row], [["a dog.", "a cat."]])[0], [1, 0])


def test_ensemble_joins_its_members(policy, clip, capsys):
    made = backend(policy, backend="ensemble", members=[f"similarity={clip}", "claims"], model="")
    assert isinstance(made, Ensemble) and made.name == "ensemble"
    assert [member.name for member in made.members] == ["similarity", "claims"]
    alone = [
        backend(policy, backend="similarity", model=clip)(ROWS, POOLS),
        backend(policy, backend="claims", model="")(ROWS, POOLS),
    ]
    np.testing.assert_allclose(made(ROWS, POOLS)[1], (alone[0][1] + alone[1][1]) / 2, atol=1e-6)
    inherited = backend(policy, backend="ensemble", members=["similarity", "reference"], model=clip)
    assert isinstance(inherited.members[0], Similarity)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "clams"}, r"score\.backend: .*did you mean 'claims'"),
        ({"backend": "similarity"}, r"score\.model: similarity needs"),
        ({"backend": "judge"}, r"score\.model: the judge backend needs a judge"),
        ({"backend": "endpoint"}, r"score\.endpoint\.base_url: not the address"),
        ({"backend": "claims"}, r"score\.model: the claims backend needs a judge"),
        ({"backend": "ensemble", "members": ["refrence", "claims"]}, r"score\.members: .*did you mean 'reference'"),
        (
            {"backend": "ensemble", "members": ["ensemble", "reference"]},
            r"score\.members: unknown backend 'ensemble'",
        ),
        ({"backend": "ensemble", "members": ["reference"]}, r"score\.members: .*at least two"),
        ({"backend": "ensemble"}, r"score\.members: .*at least two"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        backend(**settings)


def test_models_of_the_wrong_kind(clip, judge_directory):
    with pytest.raises(UserError, match=r"score\.model .*not a dual encoder"):
        backend(backend="similarity", model=judge_directory)
    with pytest.raises(UserError, match=r"score\.model .*not a vision-language model"):
        backend(backend="claims", model=clip)
    with pytest.raises(UserError, match="no such directory"):
        backend(backend="claims", model="/no/such/model")
