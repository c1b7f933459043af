"""Times callables in turns, on a GPU with its events, on a CPU with a clock; beside what the device can do at most."""

from __future__ import annotations

import contextlib
import ctypes
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nova_kernels.backend import cuda_runs_on, triton_runs_on

L2_FLUSH_BYTES = 256 << 20
MAX_ROUNDS, MIN_ROUNDS = 50, 3


@dataclass(frozen=True, kw_only=True)
class Provider:
    """forward: returns the outputs. inputs: what gradients are taken of; empty if it cannot run backward.
    comparable: outputs and gradients are those of the first provider, so that they must agree."""

    forward: Callable[[], tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...] = ()
    comparable: bool = True


@dataclass(frozen=True, kw_only=True)
class Case:
    """bytes and flops: the fewest that (forward, backward) can do with; useful ones only."""

    name: str
    providers: dict[str, Provider]
    bytes: tuple[int, int]
    flops: tuple[int, int]
    documents: int = 0
    """Of which one call does so many, where that compares better than FLOPs."""
    phases: tuple[str, ...] = ("forward", "forward_backward")
    """What is timed. A loss that computes its gradients in its forward has no time of its own for that."""


def runnable(backends: Sequence[str], device: torch.device, tiny: bool) -> list[str]:
    """Those of the backends that run here. Triton's interpreter is for tiny shapes; they are too small for CUDA's rules."""
    runs = {
        "reference": True,
        "triton": triton_runs_on(device) and (tiny or device.type == "cuda"),
        "cuda": cuda_runs_on(device) and not tiny,
    }
    return [backend for backend in backends if runs[backend]]


def drawn(*shape: int, device: torch.device, seed: int) -> Tensor:
    """Standard normal fp32 values, drawn on the device: on a CPU a large weight takes many seconds."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, device=device, generator=generator)


def leaf(device: torch.device, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Drawn, bf16 on a GPU and fp32 on a CPU, and gradients are taken of it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return (drawn(*shape, device=device, seed=seed) * scale).to(dtype).requires_grad_()


def time_in_turns(
    calls: dict[str, Callable[[], Any]], device: torch.device, budget_s: float
) -> dict[str, list[float]]:
    """Milliseconds of each call, one after another in rounds, caches flushed before each; CUDA events, or a clock."""
    for call in calls.values():  # compile, allocate
        call()
        call()
    flush = torch.empty(L2_FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8).to(device)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    began_s = time.perf_counter()
    for number in range(MAX_ROUNDS):
        for name, call in calls.items():
            flush.zero_()
            milliseconds[name].append(_time_one(call, device))
        if number + 1 >= MIN_ROUNDS and time.perf_counter() - began_s > budget_s:
            break
    return milliseconds


def _time_one(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began_s)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(case: Case, device: torch.device, budget_s: float) -> list[dict[str, Any]]:
    """One row per provider: milliseconds, rates, peak memory and disagreement. A provider that fails has its error instead."""
    rows: dict[str, dict[str, Any]] = {}
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    expected: list[Tensor] | None = None
    for name, provider in case.providers.items():
        rows[name] = {"case": case.name, "provider": name}
        try:
            results, rows[name]["peak_mib"] = _run_once(provider, device)
        except Exception as error:  # a peer may not support a shape
            rows[name]["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        forward[name] = provider.forward
        both[name] = provider.forward
        if provider.inputs:
            both[name] = lambda provider=provider: _forward_backward(provider)
        if expected is None:
            expected = [t.detach().float() for t in results]
        elif provider.comparable:
            rows[name]["differs_by"] = _difference(results, expected)
    for what, calls in (("forward", forward), ("forward_backward", both)):
        if what not in case.phases:
            continue
        for name, samples in time_in_turns(calls, device, budget_s / len(case.phases)).items():
            median = statistics.median(samples)
            parts = slice(0, 1) if what == "forward" else slice(0, 2)
            rows[name][what] = {
                "ms": median,
                "ms_least": min(samples),
                "ms_most": max(samples),
                "rounds": len(samples),
                "gb_per_s": sum(case.bytes[parts]) / median / 1e6,
                "tflops": sum(case.flops[parts]) / median / 1e9,
            }
            if case.documents:
                rows[name][what]["documents_per_s"] = 1e3 * case.documents / median
    return list(rows.values())


def _upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each output, the same for every provider. Values of a few bits, which every dtype holds."""
    return [
        (torch.arange(o.numel(), device=o.device) % 7 - 3).to(o.dtype).view_as(o) for o in outputs
    ]


def _forward_backward(provider: Provider) -> tuple[Tensor, ...]:
    outputs = provider.forward()
    return torch.autograd.grad(outputs, provider.inputs, _upstream(outputs))


def _run_once(provider: Provider, device: torch.device) -> tuple[list[Tensor], float | None]:
    """Outputs and gradients, and by how many MiB memory grew at most while they were made."""
    before = _memory_mib(device, reset=True)
    outputs = provider.forward()
    results = [*outputs]
    if provider.inputs:
        results += torch.autograd.grad(outputs, provider.inputs, _upstream(outputs))
    peak = _memory_mib(device)
    return results, None if before is None or peak is None else peak - before


def _memory_mib(device: torch.device, *, reset: bool = False) -> float | None:
    """Most memory in use since the last reset, which gives what is in use now. None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, AttributeError):  # not a Linux with glibc
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory counts until it is given back
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else None
    return None


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |a - b| / |b| of any output or gradient, as norms."""
    pairs = zip(results, expected, strict=True)
    return max(float((a.detach().float() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def ceilings(device: torch.device, *, tiny: bool) -> dict[str, float]:
    """What this device does at most: a copy's bytes read and written, and a square product (bf16 on a GPU, fp32 on a CPU), on random data.
    tiny: nothing large, to test the code or for a sanitizer; then these are no ceilings, and are named so."""
    on_gpu = device.type == "cuda"
    copied, size = (1 << 30, 8192) if on_gpu else (1 << 28, 2048)
    copied, size = (1 << 22, 256) if tiny else (copied, size)
    dtype, name = (torch.bfloat16, "bf16") if on_gpu else (torch.float32, "fp32")
    source = torch.empty(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = time_in_turns(calls, device, 2.0 if not tiny else 0.0)
    copy_ms, product_ms = (statistics.median(times[name]) for name in ("copy", "product"))
    of = "tiny_" if tiny else ""
    return {
        f"{of}copy_gb_per_s": 2 * source.numel() / copy_ms / 1e6,
        f"{of}{name}_tflops": 2 * size**3 / product_ms / 1e9,
    }
