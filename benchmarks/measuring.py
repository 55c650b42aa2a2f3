"""What both benchmarks share: one pinned thread, alternating clocks, peak memory and the report.

Import `pin` and call it before jax or torch is imported: both size their thread pools at their first use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

UNCLEAN = 0.10  # a run whose CPU time differs from its wall time by more than this share is not worth quoting
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "trl", "peft", "numpy")


def pin(cpu: int | None = None) -> int:
    """Confines this process to one CPU (default: the last that it may use) and one thread; returns the CPU."""
    # Measured programs fetch nothing, and nobody wants their telemetry.
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    # XLA sizes its pool by the CPUs that the process may use; the flag turns the pool off inside a product too.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    chosen = max(os.sched_getaffinity(0)) if cpu is None else cpu
    os.sched_setaffinity(0, {chosen})
    return chosen


def use_compilation_cache(directory: Path) -> None:
    """Keeps every compiled XLA program, so that neither a second lowering nor a child process compiles again."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def arguments(description: str, workloads: Sequence[str]) -> argparse.ArgumentParser:
    """The command line that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", required=True, type=Path, help="where the report goes")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: checks the benchmark, measures nothing")
    parser.add_argument("--workloads", default=",".join(workloads), help="comma-separated; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side; medians are reported")
    parser.add_argument("--no-peaks", action="store_true", help="leave out peak memory (a process for each side)")
    parser.add_argument("--cpu", type=int, help="the CPU to run on; default: the last one allowed")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # of the checkpoint, in child processes
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # WORKLOAD:SIDE, in child processes
    return parser


def chosen_workloads(text: str, known: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The names of `--workloads`, checked."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"--workloads: {', '.join(unknown) or 'none'} unknown; choose from {', '.join(known)}")
    return names


def clock(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds (of all threads) of one call, which must have finished its work on return."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of every side, after one untimed call of each.

    The sides take turns, and the order turns round from one repeat to the next, so that whatever else happens
    to the machine happens to all of them.
    """
    for run in sides.values():
        run()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    names = list(sides)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            gc.collect()
            samples[name].append(clock(sides[name]))
    middle = lambda name, index: statistics.median(sample[index] for sample in samples[name])  # noqa: E731
    return {name: (middle(name, 0), middle(name, 1)) for name in names}


def _status(field: str) -> float | None:
    """A size in this process's kernel record, MB (10⁶ bytes); None where there is no such record."""
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


def peak_memory(run: Callable[[], Any]) -> float | None:
    """Most resident memory of this process during a warm call, MB, libraries and weights included.

    The record of the highest point is cleared after a first call, so that compilation does not count. None
    where the kernel keeps no such record.
    """
    run()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    run()
    return _status("VmHWM")


def peak_in_child(script: str, workload: str, side: str, directory: Path, *options: str) -> float | None:
    """`peak_memory` of one side of a workload, in a process that runs nothing else."""
    command = [sys.executable, script, "--json", os.devnull, "--directory", str(directory)]
    command += ["--peak-of", f"{workload}:{side}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"peak memory of {side} in {workload}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def gemm_gflops(shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, dict[str, Any]]:
    """Rate of [m, k] × [k, n] in float32 on one thread, 10⁹ FLOP/s, of XLA and of torch (weights as [n, k])."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    table: dict[str, dict[str, Any]] = {}
    product = jax.jit(jnp.matmul)
    for name, (m, k, n) in shapes.items():
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=(k, n)).astype(np.float32)
        ours = (jnp.asarray(x), jnp.asarray(w))
        theirs = (torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(w.T)))
        calls = max(1, int(2e8 / (2 * m * k * n)))

        def with_jax(pair: Any = ours, calls: int = calls) -> None:
            jax.block_until_ready([product(*pair) for _ in range(calls)])

        def with_torch(pair: Any = theirs, calls: int = calls) -> None:
            for _ in range(calls):
                torch.nn.functional.linear(*pair)

        with torch.inference_mode():
            times = alternate({"jax": with_jax, "torch": with_torch}, 5)
        rates = {side: round(2e-9 * m * k * n * calls / wall, 1) for side, (wall, _) in times.items()}
        table[name] = {"shape": [m, k, n], **rates}
    return table


def processor_name() -> str:
    """The CPU's model name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def row(
    name: str,
    peer: str,
    shapes: Mapping[str, Any],
    times: Mapping[str, tuple[float, float]],
    *,
    peaks: Mapping[str, float | None],
    compiled: Mapping[str, Any],
    checks: Mapping[str, Any],
) -> dict[str, Any]:
    """One entry of `workloads`; `times` and `peaks` hold ``ours`` and the peer."""
    (ours, ours_cpu), (theirs, theirs_cpu) = times["ours"], times[peer]
    warnings = [
        f"{side}: {cpu:.4g} s of CPU in {wall:.4g} s: not a clean run"
        for side, (wall, cpu) in (("ours", times["ours"]), (peer, times[peer]))
        if abs(cpu - wall) > UNCLEAN * wall
    ]
    return {
        "name": name,
        "peer": peer,
        "shapes": dict(shapes),
        "ours_s": ours,
        "peer_s": theirs,
        "ratio": theirs / ours,
        "ours_cpu_s": ours_cpu,
        "peer_cpu_s": theirs_cpu,
        "ours_peak_mb": peaks.get("ours"),
        "peer_peak_mb": peaks.get(peer),
        **compiled,
        "checks": dict(checks),
        "warnings": warnings,
    }


def measure_all(
    options: argparse.Namespace,
    names: Sequence[str],
    run: Callable[[str], list[dict[str, Any]]],
    gemm_shapes: Mapping[str, tuple[int, int, int]],
) -> None:
    """Runs the workloads one after another and writes the report after each, so that a failure loses no other's rows.

    Raises:
        SystemExit: a workload failed; the others are in the report.
    """
    gemm, rows, failures = gemm_gflops(gemm_shapes), [], []
    for name in names:
        try:
            found = run(name)
        except (Exception, SystemExit) as error:
            failures.append(f"{name}: {error or type(error).__name__}")
            print(f"{name:32} failed: {error}", flush=True)
            continue
        rows += found
        write_report(options.json, rows, gemm, tiny=options.tiny)
        for entry in found:
            print(line(entry), flush=True)
    if failures:
        raise SystemExit("\n".join(failures))


def line(entry: Mapping[str, Any]) -> str:
    """A row of the report for a terminal."""
    note = "  NOT CLEAN" if entry["warnings"] else ""
    return (
        f"{entry['name']:32} {entry['peer']:32} ours {entry['ours_s']:8.3f} s  "
        f"peer {entry['peer_s']:8.3f} s  ratio {entry['ratio']:5.2f}{note}"
    )


def write_report(path: Path, workloads: list[dict[str, Any]], gemm: Mapping[str, Any], *, tiny: bool) -> None:
    """The report as JSON."""
    report = {
        "device": processor_name(),
        "threads": 1,
        "versions": installed_versions(),
        "gemm_gflops": dict(gemm),
        "tiny": tiny,
        "workloads": workloads,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
