"""Judges that share the policy's vision encoder are told apart from those that do not."""

from __future__ import annotations

import numpy as np

from m3po_jax.scoring.blind_spots import shared_blind_spots


def tower(folder, *, seed, hidden=4, noise=0.0, prefix="vision_model.", stored=True):
    """A directory with a patch embedding only, and the config that describes it."""
    from safetensors.numpy import save_file

    folder.mkdir()
    if stored:
        kernel = np.random.default_rng(seed).normal(size=(hidden, 3, 2, 2))
        kernel += noise * np.random.default_rng(99).normal(size=kernel.shape)
        name = f"{prefix}embeddings.patch_embedding.weight"
        save_file({name: kernel.astype(np.float32)}, folder / "model.safetensors")
    return folder, {
        "vision_config": {"hidden_size": hidden, "num_hidden_layers": 2, "image_size": 8, "patch_size": 2}
    }


def test_blind_spots(tmp_path):
    ours, config = tower(tmp_path / "policy", seed=0, prefix="vision_tower.vision_model.")

    def warning(judge_directory, judge_config):
        return shared_blind_spots(ours, judge_directory, config, judge_config)

    assert "itself" in warning(tmp_path / "x" / ".." / "policy", config)
    assert "vision encoder" in warning(*tower(tmp_path / "tuned", seed=0, noise=0.02))
    assert warning(*tower(tmp_path / "other", seed=1)) is None
    assert warning(*tower(tmp_path / "wider", seed=0, hidden=6)) is None
    assert "if it is the same" in warning(*tower(tmp_path / "bare", seed=0, stored=False))
    assert warning(tmp_path / "bare", {"model_type": "llama"}) is None
