"""Run by test_generation_mesh.py in a process with eight simulated devices: one device against two meshes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_llava import make_generator, one_device, prompts, take, tiny_model

from m3po_jax.config import MeshConfig
from m3po_jax.data.collation import rows_of
from m3po_jax.hosts import rows
from m3po_jax.hosts.sharding import make_mesh, state_shardings
from m3po_jax.inference import stream
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.decoder_config import LayerKind


def on_mesh(model, mesh):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(state, state_shardings(state, mesh)))


def streamed(generator, batch, processes):
    """Answers by id and the occupancy, with the prompts dealt to `processes` hosts of equally many devices."""
    owners = lambda mesh: [(device.id * processes // mesh.size,) for device in mesh.devices.flat]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "shard_hosts", owners)
        patch.setattr(stream, "shard_hosts", owners)
        shares = rows.Shares(generator.mesh)
        dealt = (
            dataclasses.replace(row, hosts=shares.deal(), wanted=(0,) if place % 2 else None)
            for place, row in enumerate(rows_of(batch))
        )
        before, answers, tokens = generator.slot_steps, {}, 0
        for made in generator.stream(dealt, len(batch.ids)):
            shares.answered(made.hosts)
            answers[made.id] = [answer.tolist() for answer in made.answers]
            tokens += sum(map(len, made.answers))
    return answers, tokens / (generator.slot_steps - before)


def main():
    assert jax.device_count() == 8
    # Grouped queries, a window in the first layer alone, and biases of every axis that is split.
    biases, kinds = ("q_proj", "k_proj", "o_proj", "up_proj"), (LayerKind(window=5), LayerKind())
    model = tiny_model(adapters=True, biases=biases, layer_pattern=kinds)
    batch = take(prompts((3, 9, 6, 1, 4, 2)), [5, 4, 3, 2, 1, 0])
    expected = make_generator(model, batch_size=6)(batch)
    mask = np.arange(12) < expected.lengths[..., None]
    scores = Scorer(model, one_device(), batch_size=6).log_probs(batch, expected.token_ids, mask)
    np.testing.assert_allclose(scores, expected.log_probs, atol=1e-4)
    pool = {
        "temperature": (0.0, 1.0, 1.5),
        "repetition_penalty": 1.3,
        "min_p": 0.02,
        "repetition_penalty_prompt": True,
    }
    pooled = make_generator(model, batch_size=6, **pool)(batch)
    for sizes in ((8, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes))
        placed = on_mesh(model, mesh)
        out = make_generator(placed, mesh, batch_size=6)(batch)
        np.testing.assert_array_equal(out.token_ids, expected.token_ids)
        np.testing.assert_allclose(out.log_probs, expected.log_probs, atol=1e-5)
        out = make_generator(placed, mesh, batch_size=6, **pool)(batch)
        np.testing.assert_array_equal(out.token_ids, pooled.token_ids)
        again = Scorer(placed, mesh, batch_size=6).log_probs(batch, expected.token_ids, mask)
        np.testing.assert_allclose(again, scores, atol=1e-5)
        print("equal on", sizes)
    # Prompts with three and with one candidate alternate: dealt in turn, one of two hosts would do three quarters of
    # the work, and lanes would be two thirds as busy.
    many = take(prompts((3, 9, 6, 1, 4, 2, 8, 7) * 12), range(96))
    many.ids = [f"{name}-{i}" for i, name in enumerate(many.ids)]
    mesh = make_mesh(MeshConfig(8, 1, 1))
    generator = make_generator(on_mesh(model, mesh), mesh, batch_size=8, stop_bias=2.0)
    alone, busy = streamed(generator, many, 1)
    for processes in (2, 4):
        dealt, share = streamed(generator, many, processes)
        assert dealt == alone and share > 0.8 * busy, (processes, share, busy)
        print("equal on", processes, "hosts, occupancy", round(share, 3), "of", round(busy, 3))


main()
