"""Fixtures of the training tests."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import Mesh

from m3po_jax.config import MeshConfig
from m3po_jax.hosts.sharding import make_mesh


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])
