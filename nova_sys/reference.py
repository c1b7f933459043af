"""Reference log-probs: one forward pass over the data, kept on disk; or a frozen copy of the policy's first weights.

The cache is an array (num_responses,) fp64 of summed log-probabilities in nats, in the order of the token store, under a key of
(weights, tokenised data, precision, prefix sharing). A run that starts from the same weights on the same data reuses it; a file that
is damaged, or was written under another key, is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nova_sys.config import RunConfig
from nova_sys.data.batch import Pack
from nova_sys.data.loader import PackLoader
from nova_sys.host_weights import move_to_host
from nova_sys.model.te import read_scales, write_scales
from nova_sys.parallel import Parallel, from_main
from nova_sys.step import response_logps

logger = logging.getLogger(__name__)


def numbers_of(config: RunConfig, dtype: torch.dtype, data_size: int) -> str:
    """What decides how a forward pass rounds, besides the weights. FP8 numbers also depend on what shares a scale with them."""
    if config.train.precision != "fp8":
        return str(dtype)
    recipe, parallel = config.fp8.recipe, config.parallel
    decides = [
        recipe,
        *config.fp8.edge_layers,
        parallel.tensor,
        parallel.context,
        parallel.sequence,
    ]
    if recipe != "blockwise":  # the other tokens of the pack
        decides += [config.data.pack_length, config.train.seed]
    if recipe == "delayed":  # those of the first step
        decides += [config.train.global_batch_packs, data_size, parallel.pipeline]
    return json.dumps(["fp8", *decides])


def cache_key(weights_identity: str, data_key: str, precision: str, share_prefix: bool) -> str:
    text = json.dumps([weights_identity, data_key, precision, share_prefix])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def log_tenths(done: int, total: int) -> None:
    """Tells of every tenth of a long pass."""
    if total >= 10 and done * 10 // total > (done - 1) * 10 // total:
        logger.info("reference: %d%%", 100 * done // total)


def compute_logps(
    chunks: Sequence[torch.nn.Module],
    loader: PackLoader,
    num_responses: int,
    parallel: Parallel,
    *,
    on_step: Callable[[int, int], None] = log_tenths,
) -> np.ndarray:
    """Summed log-probability of every response (num_responses,) fp64, by one pass over an epoch; the same on every rank.

    FP8 scales that forward passes adjust are as before it.
    Raises: RuntimeError when a response was not scored (its log-prob would be silently wrong).
    """
    logp = torch.zeros(num_responses, dtype=torch.float64)
    seen = torch.zeros(num_responses, dtype=torch.float64)
    steps = loader.steps_for(1.0)
    scales = read_scales(chunks)
    for step in range(steps):
        packs = loader.micro_batches(step)
        for pack, logp_B in zip(packs, response_logps(chunks, packs, parallel), strict=False):
            if parallel.counts_once:
                response_B = torch.from_numpy(pack.response_B)
                logp[response_B] = logp_B.cpu()
                seen[response_B] = 1
        on_step(step + 1, steps)
    write_scales(chunks, scales)
    both = torch.stack([logp, seen]).to(parallel.device)
    dist.all_reduce(both)  # now every response's log-prob, from the one rank that scored it
    if not bool((both[1] == 1).all()):
        raise RuntimeError(
            f"{int((both[1] != 1).sum())} of {num_responses} responses were not scored exactly once"
        )
    return both[0].cpu().numpy()


def cached_logps(
    path: Path, num_responses: int, compute: Callable[[], np.ndarray], parallel: Parallel
) -> tuple[np.ndarray, bool]:
    """The array at `path`; computed, and written by the main rank, if it is not there or unfit. Returns (array, was there).

    Raises: ValueError when the file cannot be written.
    """
    found = _read_logps(path, num_responses) if parallel.is_main else None
    if not from_main(parallel, lambda: found is not None):
        logp = compute()
        from_main(parallel, lambda: _write_logps(path, logp))
        return logp, False
    logp = (
        torch.zeros(num_responses, dtype=torch.float64)
        if found is None
        else torch.from_numpy(found)
    )
    logp = logp.to(parallel.device)
    dist.broadcast(logp, src=0)  # now every rank has what the main rank read
    return logp.cpu().numpy(), True


def _read_logps(path: Path, num_responses: int) -> np.ndarray | None:
    """The array at `path`, if it is whole (zip's own checksum), was written under this name and fits; None otherwise."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:  # without pickle, numpy's default
            name, logp = str(file["name"]), file["logp"]
        shape = f"{logp.dtype} {logp.shape}"
        if name != path.stem:
            problem = f"was written as {name}"
        elif logp.shape != (num_responses,) or logp.dtype != np.float64:
            problem = f"holds {shape} instead of float64 {(num_responses,)}"
        elif not np.isfinite(logp).all():
            problem = "holds numbers that are not finite"
        else:
            return logp
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        problem = f"cannot be read: {error or type(error).__name__}"
    logger.warning("%s %s; the reference log-probs are computed again", path, problem)
    return None


def _write_logps(path: Path, logp: np.ndarray) -> None:
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, name=np.array(path.stem), logp=logp)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(
            f"the reference log-probs cannot be kept in {path} ({error.strerror}); a run needs them when it is resumed. Make room, or "
            "choose another data.cache_dir"
        ) from None


class OnlineReference:
    """A frozen copy of the initial weights that scores each global batch just before the policy trains on it."""

    def __init__(self, chunks: Sequence[Any], parallel: Parallel, *, on_host: bool = False) -> None:
        self.chunks = [chunk.eval().requires_grad_(False) for chunk in chunks]
        if on_host:
            move_to_host(self.chunks, parallel.device)
        self.parallel = parallel
        self.scales = read_scales(self.chunks)

    def score(self, packs: list[Pack]) -> list[Pack]:
        """The same packs with `ref_logp_B` filled in, on last-stage ranks; other stages do not need it."""
        write_scales(
            self.chunks, self.scales
        )  # training adjusts those of every model in the process
        scored = response_logps(self.chunks, packs, self.parallel)
        if not scored:
            return packs
        return [
            p.with_reference(logp_B.cpu().numpy()) for p, logp_B in zip(packs, scored, strict=True)
        ]
