"""What to say of a step whose loss or gradient is not finite: its number, the packs at fault, and the documents in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from nova_sys.algo import Algorithm
from nova_sys.data.batch import Pack
from nova_sys.data.loader import PackLoader
from nova_sys.data.token_store import TokenStore
from nova_sys.parallel import Parallel
from nova_sys.step import NonFiniteStep, packs_with_faulty_gradient, response_logps

NUM_LISTED = 3
"""Packs, and documents of a pack, that are named; the others are counted."""


@dataclass(frozen=True)
class Suspect:
    """A pack at fault, by its place in the step. exact: `documents` are those with a log-prob that is not finite, else all of it."""

    data_rank: int
    micro_batch: int
    pack_documents: tuple[int, ...]
    documents: tuple[int, ...]
    exact: bool


def explain_non_finite(
    error: NonFiniteStep,
    *,
    step: int,
    chunks: Sequence[Any],
    packs: Sequence[Pack],
    algorithm: Algorithm,
    parallel: Parallel,
    loader: PackLoader,
    store: TokenStore,
) -> str:
    """The same text on every rank, which all call it: the step's packs run once more, to find those at fault.

    Args: step, counted from 0.   chunks, packs: what `train_step` got.
    """
    if error.only_gradient:
        own = [
            _suspect(parallel, packs, index, None)
            for index in packs_with_faulty_gradient(chunks, packs, algorithm, parallel)
        ]
    else:
        logps = response_logps(chunks, packs, parallel)
        own = [
            _suspect(
                parallel, packs, i, logps[i].cpu().numpy(), reference=algorithm.needs_reference
            )
            for i in error.packs
        ]
    everywhere: list[list[Suspect]] = [[] for _ in range(parallel.world_size)]
    dist.all_gather_object(everywhere, own)  # now every rank knows all packs at fault
    suspects = {(s.data_rank, s.micro_batch): s for found in everywhere for s in found}
    places = [tuple(documents.tolist()) for documents in loader.documents_of(step)]
    first = step * len(places)

    def name(documents: tuple[int, ...]) -> str:
        epoch, number = divmod(first + places.index(documents), loader.packs_per_epoch)
        return f"pack {number} of epoch {epoch}"

    told = [
        f"{name(s.pack_documents)} (data rank {s.data_rank}, micro-batch {s.micro_batch}; {_documents(s, store)})"
        for _, s in sorted(suspects.items())[:NUM_LISTED]
    ]
    if told:
        where = f"At fault: {_and_more(told, len(suspects), 'packs')}"
    else:
        listed = [name(documents) for documents in places if documents]
        where = (
            "No pack of this step gives such a gradient when it runs again by itself, so their sum overflowed or the hardware erred; "
            f"its packs are {_and_more(listed[:NUM_LISTED], len(listed), 'packs')}"
        )
    return f"step {step + 1}: {_what(error)}; weights and optimizer are as before the step. {where}"


def _suspect(
    parallel: Parallel,
    packs: Sequence[Pack],
    index: int,
    logp_B: np.ndarray | None,
    *,
    reference: bool = False,
) -> Suspect:
    pack = packs[index]
    pack_documents = tuple(pack.document_P.tolist())
    named: list[int] = []
    if logp_B is not None and pack_documents:
        faulty_B = ~np.isfinite(logp_B)
        if reference:
            faulty_B |= ~np.isfinite(pack.ref_logp_B)
        responses = len(faulty_B) // len(pack_documents)  # per document
        named = pack.document_P[faulty_B.reshape(-1, responses).any(1)].tolist()
    documents = tuple(named) or pack_documents
    return Suspect(parallel.data_rank, index, pack_documents, documents, exact=bool(named))


def _documents(suspect: Suspect, store: TokenStore) -> str:
    count, total = len(suspect.documents), len(suspect.pack_documents)
    which = (
        f"{count} of its {total} documents with a log-prob that is not finite"
        if suspect.exact
        else f"its {total} documents"
    )
    listed = [f"{d} ({store.source_of(d)})" for d in suspect.documents[:NUM_LISTED]]
    return f"{which}: {_and_more(listed, count, '')}".rstrip()


def _what(error: NonFiniteStep) -> str:
    faulty = {name: value for name, value in error.means.items() if not math.isfinite(value)}
    if not faulty:
        return f"a gradient is not finite (the loss is {error.means['loss']:.6g})"
    name = "loss" if "loss" in faulty else next(iter(faulty))
    return f"the {name} is {faulty[name]}"


def _and_more(listed: list[str], count: int, unit: str) -> str:
    more = count - len(listed)
    return ", ".join(listed) + (f" and {more} more {unit}".rstrip() if more > 0 else "")
