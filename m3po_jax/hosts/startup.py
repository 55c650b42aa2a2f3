"""Joining the other hosts."""

from __future__ import annotations

import os

import jax

from m3po_jax.errors import UserError
from m3po_jax.hosts.supervisor import HEARTBEAT_SECONDS


def initialize_distributed() -> None:
    """Joins the other hosts, when a launcher started several.

    TPU pods and Slurm are detected by jax. Elsewhere a launcher sets ``M3PO_COORDINATOR`` (host:port),
    ``M3PO_NUM_PROCESSES`` and ``M3PO_PROCESS_ID``.
    """
    coordinator = os.environ.get("M3PO_COORDINATOR")
    if coordinator:
        try:
            count, index = int(os.environ["M3PO_NUM_PROCESSES"]), int(os.environ["M3PO_PROCESS_ID"])
        except (KeyError, ValueError):
            raise UserError(
                "M3PO_COORDINATOR is set without M3PO_NUM_PROCESSES and M3PO_PROCESS_ID",
                where="environment",
                remedy="set all three, or none",
            ) from None
        jax.distributed.initialize(
            coordinator, num_processes=count, process_id=index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    elif os.environ.get("M3PO_MULTI_HOST") == "1":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
