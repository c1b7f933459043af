"""What tests and benchmarks share: seeded inputs, poisoned scratch, earned tolerances, gloo ranks.

Legend: T packed tokens, S segments.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn


def seeded_normal(
    *shape: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal values that depend on the seed and the shape only: drawn in fp64, rounded."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.to(device=device, dtype=dtype)


@contextmanager
def poison() -> Iterator[None]:
    """Inside, torch.empty, empty_like and new_empty return floats full of NaN.

    Scratch that is read before it is written then shows up in the result.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield


def max_error(reference: torch.Tensor, got: torch.Tensor) -> float:
    """max |reference - got| in fp64; equal infinities count as 0, a NaN anywhere gives NaN."""
    if reference.shape != got.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(got.shape)}")
    if reference.numel() == 0:
        return 0.0
    wide, seen = reference.detach().double().cpu(), got.detach().double().cpu()
    difference = torch.where(wide == seen, torch.zeros_like(wide), (wide - seen).abs())
    return float(difference.max())  # max keeps a NaN


def assert_close_to(
    reference_fp64: torch.Tensor,
    got: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    *,
    slack: float | None = None,
    what: str = "result",
) -> None:
    """An earned tolerance: `got` may err twice as much as plain torch does in the same dtype.

    max |got - reference| <= 2 * max |torch_same_dtype - reference| + slack

    Args:  slack: absolute; by default four rounding steps of got's dtype at the largest value.
    """
    if slack is None:
        finite = reference_fp64.detach()[torch.isfinite(reference_fp64)]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        slack = 4 * torch.finfo(got.dtype).eps * largest
    error = max_error(reference_fp64, got)
    earned = 2 * max_error(reference_fp64, torch_same_dtype) + slack
    if not error <= earned:  # written so that a NaN fails
        raise AssertionError(
            f"{what}: max error {error:.3e} exceeds {earned:.3e} "
            f"(2x plain torch's in {got.dtype}, plus {slack:.1e})"
        )


def segment_table(documents: Sequence[tuple[int, Sequence[int]]], padding: int) -> torch.Tensor:
    """The segment table (S, 4) int32 of documents, each (prefix length, response lengths).

    A trunk of prefix and first response, then one branch per further response; branches of an
    empty prefix are trunks. `padding` tokens follow as one more trunk.
    """
    rows: list[tuple[int, int, int, int]] = []
    at = 0
    for prefix, responses in [*documents, (padding, [0])]:
        trunk = at
        at += prefix + responses[0]
        rows.append((trunk, at, trunk, trunk))
        for response in responses[1:]:
            rows.append((at, at + response, trunk, trunk + prefix))
            at += response
    return torch.tensor(rows if padding else rows[:-1], dtype=torch.int32).reshape(-1, 4)


def random_segments(
    rng: np.random.Generator,
    T: int,
    *,
    max_prefix: int = 12,
    max_response: int = 12,
    max_responses: int = 4,
) -> torch.Tensor:
    """A valid random segment table of a T-token pack: documents, then the rest as padding.

    Prefixes may be empty and responses may have one token.
    """
    documents: list[tuple[int, list[int]]] = []
    free, misses = T, 0
    while free and misses < 8:
        prefix = int(rng.integers(0, max_prefix + 1))
        responses = rng.integers(1, max_response + 1, size=int(rng.integers(1, max_responses + 1)))
        if prefix + responses.sum() > free:
            misses += 1
            continue
        documents.append((prefix, responses.tolist()))
        free -= prefix + int(responses.sum())
    return segment_table(documents, free)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Runs fn(rank, *args) on `world_size` spawned processes that share a gloo group.

    Each process computes on one thread. `fn` must be a module-level function; arguments and
    results travel as files, so tensors and picklable objects are fine.
    Returns:  the results in rank order.
    Raises:   RuntimeError with the traceback of the rank that failed first, or TimeoutError; the
              other processes are ended before.
    """
    with tempfile.TemporaryDirectory(prefix="nova_ranks_") as folder:
        torch.save(args, Path(folder) / "args.pt")
        source = (fn.__module__, inspect.getfile(fn), fn.__qualname__)
        rank_args = (world_size, folder, source, timeout_s)
        context = spawn(_rank_main, rank_args, nprocs=world_size, join=False)
        assert context is not None
        deadline = time.monotonic() + timeout_s
        try:
            # A rank that dies makes its peers fail too: report the first, not the one seen first.
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{fn.__qualname__}: ranks still ran after {timeout_s:g} s")
        except (ProcessRaisedException, ProcessExitedException):
            reports = sorted(Path(folder).glob("error_*"), key=lambda file: file.stat().st_mtime_ns)
            if not reports:
                raise
            raise RuntimeError(reports[0].read_text()) from None
        finally:
            for process in filter(None, context.processes):
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _rank_main(
    rank: int, world_size: int, folder: str, source: tuple[str, str, str], timeout_s: float
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    fn = _load_function(*source)  # before the arguments, whose classes may live in its module
    args = torch.load(Path(folder) / "args.pt", weights_only=False)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        torch.save(fn(rank, *args), Path(folder) / f"result_{rank}.pt")
        dist.barrier()  # now no rank waits for one that has left
    except BaseException:
        (Path(folder) / f"error_{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def _load_function(module_name: str, file: str, name: str) -> Callable[..., Any]:
    """The function, also from a test file that no import path leads to."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(module, name)
