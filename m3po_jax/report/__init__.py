"""Static HTML reports of runs."""

from m3po_jax.report.build import build_report

__all__ = ["build_report"]
