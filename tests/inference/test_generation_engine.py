import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llava import EOS, PAD, images_of, make_generator, next_logits, prompts, take, teacher_forced, tiny_model

from m3po_jax.errors import UserError
from m3po_jax.inference.lanes import capacities
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models.kernels.choice import with_attention


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def generator(model):
    return make_generator(model)


@pytest.fixture(scope="module")
def generated(generator):
    return generator(prompts())


@pytest.mark.parametrize(
    ("kv_heads", "adapters", "images", "sampling"),
    [
        (2, False, 0, {}),
        (4, True, 1, {"temperature": 1.7, "top_k": 20, "top_p": 0.8}),
        (1, True, 2, {"temperature": 0.5, "stop_bias": 1.5}),
    ],
)
def test_recorded_log_probs_equal_teacher_forcing(kv_heads, adapters, images, sampling):
    model, batch = tiny_model(kv_heads, adapters), prompts(images=images)
    out = make_generator(model, **sampling)(batch)
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, batch, out), atol=1e-4)
    assert out.log_probs.min() < -1.0


def test_every_size_of_the_cache_equals_teacher_forcing(model):
    """Long enough to grow twice, with the end token kept away."""
    batch = prompts((3, 7))
    out = make_generator(model, max_new_tokens=70, num_candidates=2, stop_bias=-100.0, batch_size=2)(batch)
    assert len(capacities(70)) == 3 and (out.lengths == 70).all() and not out.finished.any()
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, batch, out), atol=1e-4)


def test_greedy_equals_the_plain_forward_pass(model):
    batch = prompts()
    out = make_generator(model, num_candidates=1, temperature=0.0, max_new_tokens=6)(batch)
    for row in range(3):
        tokens = batch.token_ids[row][batch.mask[row]].tolist()
        for step in range(out.lengths[row, 0]):
            tokens.append(int(next_logits(model, tokens, images_of(batch, row)).argmax()))
            assert tokens[-1] == out.token_ids[row, 0, step]


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [2, 1]])
def test_a_prompts_answers_do_not_depend_on_its_batch(generator, generated, rows):
    before = generator.compilations
    out = generator(take(prompts(), rows))
    assert out.ids == [generated.ids[row] for row in rows]
    np.testing.assert_array_equal(out.token_ids, generated.token_ids[rows])
    np.testing.assert_allclose(out.log_probs, generated.log_probs[rows], atol=1e-5)
    assert generator.compilations == before


def test_generators_share_two_programs_whatever_their_weights_and_seed(model, compiled):
    own = {"top_k": 99, "min_p": 0.001}  # as in no other test
    first = make_generator(model, **own, seed=1)(prompts())
    assert compiled.count("_prefill") == compiled.count("_decode") == 1
    before = len(compiled)
    again = make_generator(model, **own, seed=2)(prompts())
    biased = make_generator(model, **own, seed=2, stop_bias=20.0, suppress_token_ids=(5,))(prompts())
    other = make_generator(tiny_model(scale=1.5), **own, seed=2)(prompts())
    assert compiled[before:] == []
    assert (again.token_ids != first.token_ids).any() and (other.token_ids != again.token_ids).any()
    assert (biased.lengths == 1).all() and not (again.lengths == 1).all()
    make_generator(model, **own, temperature=0.9)(prompts())
    assert compiled[before:].count("_decode") == 1


def test_neither_padding_nor_batch_size_changes_an_answer(model, generated):
    batch = take(prompts(), [0])
    batch.token_ids = np.pad(batch.token_ids, ((0, 0), (0, 40)), constant_values=PAD)
    batch.mask = np.pad(batch.mask, ((0, 0), (0, 40)))
    out = make_generator(model, batch_size=1)(batch)
    np.testing.assert_array_equal(out.token_ids, generated.token_ids[:1])


def test_candidates_do_not_depend_on_their_number(model, generated):
    out = make_generator(model, num_candidates=5)(prompts())
    np.testing.assert_array_equal(out.token_ids[:, :3], generated.token_ids)


def test_answers_end_at_the_end_token(model):
    out = make_generator(model, num_candidates=6, stop_bias=3.0)(prompts())
    assert out.finished.any() and not out.finished.all()
    for tokens, log_probs, length, finished in zip(
        out.token_ids.reshape(-1, 12),
        out.log_probs.reshape(-1, 12),
        out.lengths.flat,
        out.finished.flat,
        strict=True,
    ):
        assert (tokens[:length] == EOS).sum() == finished
        assert not finished or tokens[length - 1] == EOS
        assert finished or length == 12
        assert (tokens[length:] == PAD).all() and (log_probs[length:] == 0).all()
        assert (log_probs[:length] < 0).all()


def test_decoding_stops_when_every_answer_has_ended(model):
    generator = make_generator(model, stop_bias=100.0, max_new_tokens=40, num_candidates=2)
    out = generator(take(prompts(), [0, 2]))
    assert out.slot_steps == 3 * 2  # one step of all lanes
    assert (out.lengths == 1).all() and out.finished.all()


def test_stop_bias_shortens_answers_but_not_the_record(model, generated):
    batch = prompts()
    out = make_generator(model, stop_bias=4.0)(batch)
    assert out.lengths.sum() < generated.lengths.sum()
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, batch, out), atol=1e-4)


def test_image_padding_and_suppressed_tokens_are_never_drawn(model):
    keep = {5, 9, EOS}
    banned = tuple(i for i in range(128) if i not in keep)
    out = make_generator(model, suppress_token_ids=banned, temperature=5.0)(prompts())
    drawn = {int(t) for row, n in zip(out.token_ids.reshape(-1, 12), out.lengths.flat, strict=True) for t in row[:n]}
    assert drawn == keep


def test_contrastive_decoding_equals_two_plain_passes(model):
    batch, alpha, beta = prompts(), 4.0, 0.02
    generator = make_generator(
        model, num_candidates=1, temperature=0.0, contrast_alpha=alpha, contrast_beta=beta, max_new_tokens=6
    )
    out = generator(batch)
    np.testing.assert_allclose(out.log_probs, teacher_forced(model, batch, out), atol=1e-4)
    plain_differs = False
    for row in range(3):
        tokens, images = batch.token_ids[row][batch.mask[row]].tolist(), images_of(batch, row)
        mean_colour = {**images, "pixels": np.zeros_like(images["pixels"])}
        for step in range(out.lengths[row, 0]):
            seen, blank = next_logits(model, tokens, images), next_logits(model, tokens, mean_colour)
            p = np.exp(seen - np.logaddexp.reduce(seen))
            with np.errstate(invalid="ignore"):
                combined = np.where(p >= beta * p.max(), (1 + alpha) * seen - alpha * blank, -np.inf)
            plain_differs |= combined.argmax() != seen.argmax()
            tokens.append(int(combined.argmax()))
            assert tokens[-1] == out.token_ids[row, 0, step]
    assert plain_differs


def test_broken_weights_are_reported_with_the_prompt(model):
    graph, state = nnx.split(model)
    broken = nnx.merge(graph, jax.tree.map(jnp.array, state))
    kernel = broken.projector.linear_2.kernel[...]
    broken.projector.linear_2.kernel[...] = kernel.at[0, 0].set(jnp.nan)
    with pytest.raises(UserError, match=r"prompt prompt-9-1: .*not finite"):
        make_generator(broken)(take(prompts(), [1, 2]))


def test_new_weights_need_no_new_program(model, generator, generated):
    before = generator.compilations
    generator.load(tiny_model(scale=2.0))
    assert (generator(prompts()).token_ids != generated.token_ids).any()
    generator.load(model)
    np.testing.assert_array_equal(generator(prompts()).token_ids, generated.token_ids)
    assert generator.compilations == before


@pytest.mark.parametrize("lengths", [(3, 9, 6), (5, 1, 2, 9, 3)], ids=["fits", "streams"])
def test_kernels_give_the_same_answers(model, lengths):
    """Pallas' interpreter runs the kernels of the prefill and of the shared prefix."""
    batch = prompts(lengths)
    plain = make_generator(model, stop_bias=2.0)(batch)
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    other.config = with_attention(model.config, "pallas_interpret")
    kernels = make_generator(other, stop_bias=2.0)(batch)
    np.testing.assert_array_equal(kernels.token_ids, plain.token_ids)
    np.testing.assert_allclose(kernels.log_probs, plain.log_probs, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
