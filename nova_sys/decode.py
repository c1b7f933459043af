"""Decoding with a key/value cache: prompts are computed once, in packs, and every step runs the new tokens alone.

The same code serves every layout. A forward pass is one micro-batch that travels through the pipeline's chunks in order, so stages
take turns; prompts are several micro-batches when they fill several packs, and overlap.

B sequences, P prompts, T packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from nova_kernels.segments import segment_index
from nova_sys.data.packing import pack_documents
from nova_sys.model.attention import PackLayout
from nova_sys.model.cache import DecodeLayout, KVCache, PromptRows
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel
from nova_sys.sampling import Sampling, choose_tokens, chosen_logps

COMPACT_BELOW = 0.75
"""Finished sequences stay in the batch until less than this share is alive: leaving them out copies the cache."""


@dataclass(frozen=True)
class Continuation:
    """ids: the new tokens, with the stop token if there is one.   logp: their summed log-probability under the model, nats."""

    ids: list[int]
    logp: float
    finish_reason: Literal["stop", "length"]


class Decoder:
    """A model and the cached sequences of one batch. Every rank of a data-parallel replica makes the same calls.

    pack_length: most tokens of a prefill pack.   num_ids: ids of the tokenizer; the vocabulary may have more rows, which no text has.
    """

    def __init__(
        self, chunks: Sequence[PackedGPT], parallel: Parallel, *, pack_length: int, num_ids: int
    ) -> None:
        self.chunks, self.parallel, self.num_ids = chunks, parallel, num_ids
        self._pack_length = pack_length
        self._multiple = parallel.tensor_size if parallel.sequence else 1
        self._cache = KVCache(0, 0)
        self._lengths = np.empty(0, np.int64)  # of the cached sequences

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> torch.Tensor | None:
        """Starts a batch: caches the prompts (P, each 1 .. pack_length tokens) with room for `max_new_tokens` more.

        Returns: logits_PV fp32 of each prompt's next token, on the last stage; None on the others.
        """
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._cache = KVCache(len(prompts), int(self._lengths.max()) + max_new_tokens)
        plan = pack_documents(self._lengths.astype(np.int32), self._pack_length, seed=0, epoch=0)
        packs = [plan.documents(number).astype(np.int64) for number in range(plan.num_packs)]
        logits = [self._prefill_pack(prompts, places) for places in packs]
        if logits[0] is None:
            return None
        order_P = torch.from_numpy(np.argsort(np.concatenate(packs))).to(self.parallel.device)
        return torch.cat([part for part in logits if part is not None])[order_P]

    def _prefill_pack(
        self, prompts: Sequence[Sequence[int]], places: np.ndarray
    ) -> torch.Tensor | None:
        """Each prompt is a trunk; under sequence parallelism a few tokens of padding follow."""
        device = self.parallel.device
        lengths = np.array([len(prompts[place]) for place in places])
        ends = np.cumsum(lengths)
        num_tokens = -(-int(ends[-1]) // self._multiple) * self._multiple
        tokens_T = np.zeros(num_tokens, dtype=np.int64)
        tokens_T[: ends[-1]] = np.concatenate([prompts[place] for place in places])
        bounds = np.concatenate([[0], ends, [num_tokens]])
        segments_S4 = np.stack([bounds[:-1], bounds[1:], bounds[:-1], bounds[:-1]], axis=1)
        segments = torch.from_numpy(segments_S4.astype(np.int32))
        rows = PromptRows(
            self._cache,
            row_t=torch.from_numpy(np.repeat(places, lengths)).to(device),
            row_P=torch.from_numpy(places).to(device),
            last_P=torch.from_numpy(ends - 1).to(device),
        )
        layout = PackLayout(
            segments.to(device), segment_index(segments, num_tokens).to(device), rows
        )
        return self._forward(torch.from_numpy(tokens_T).to(device), layout, rows.last_P)

    @torch.no_grad()
    def step(self, token_B: torch.Tensor) -> torch.Tensor | None:
        """Appends one token (B,) int64 to each sequence. Returns logits_BV fp32 of the next one on the last stage, else None."""
        device = self.parallel.device
        row_B = torch.arange(len(token_B), device=device)
        position_B = torch.from_numpy(self._lengths).to(device)
        self._lengths = self._lengths + 1
        layout = DecodeLayout(self._cache, row_B, position_B, longest=int(self._lengths.max()))
        token_T = pad(token_B, (0, -len(token_B) % self._multiple))
        return self._forward(token_T, layout, row_B)

    def select(self, rows: Sequence[int] | np.ndarray) -> None:
        """Keeps these sequences, in this order; one that is named twice goes on as two."""
        if list(rows) != list(range(len(self._lengths))):
            self._cache.select(torch.as_tensor(rows, device=self.parallel.device))
            self._lengths = self._lengths[rows]

    def _forward(
        self, tokens_T: torch.Tensor, layout: PackLayout | DecodeLayout, row_R: torch.Tensor
    ) -> torch.Tensor | None:
        """One micro-batch through the pipeline: every chunk waits for its input, runs, and hands its output on."""
        parallel, group = self.parallel, self.parallel.groups.pp
        before, after = (
            dist.get_global_rank(group, (parallel.pipeline_rank + way) % parallel.pipeline_size)
            for way in (-1, 1)
        )
        for number, chunk in enumerate(self.chunks):
            if not parallel.first_stage(number):
                shape = (len(tokens_T) // self._multiple, 1, chunk.config.hidden_size)
                hidden_SBD = torch.empty(
                    shape, dtype=chunk.config.params_dtype, device=parallel.device
                )
                dist.recv(hidden_SBD, before, group=group)  # now the output of the chunk before
                chunk.set_input_tensor(hidden_SBD)
            out = chunk.run(tokens_T, layout, row_R, None)
            if parallel.last_stage(number):
                return out
            dist.send(out, after, group=group)
        return None


def continue_prompts(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    uniform_BS: torch.Tensor | None,
    stop_ids: set[int],
    sampling: Sampling,
) -> list[Continuation]:
    """A continuation of prompts[row] for each row, as one batch; the same on every rank.

    Waits for the device once per step: the host has to see which sequences have stopped.

    Args:     uniform_BS (len(rows), max_new_tokens), see sampling.uniforms; None when greedy.
    Raises:   ValueError when the model's logits are not finite.
    """
    num_rows, num_steps = len(rows), sampling.max_new_tokens
    ids, logps = np.zeros((num_rows, num_steps), np.int64), np.zeros((num_rows, num_steps))
    length = np.full(num_rows, num_steps)
    stops = np.array(sorted(stop_ids), np.int64)
    row_B = np.arange(num_rows)  # the row that each cached sequence continues
    if uniform_BS is not None:
        uniform_BS = uniform_BS.to(decoder.parallel.device)
    logits_BV = decoder.prefill(prompts, num_steps)
    decoder.select(rows)
    logits_BV = None if logits_BV is None else logits_BV[list(rows)]
    for step in range(num_steps):
        decoder.parallel.watchdog.progress()
        uniform_B = None if uniform_BS is None else uniform_BS[row_B, step]
        token_B, chosen = _choose(decoder, logits_BV, uniform_B, len(row_B), sampling)
        ids[row_B, step], logps[row_B, step] = chosen
        stopped = row_B[np.isin(ids[row_B, step], stops)]
        length[stopped] = np.minimum(length[stopped], step + 1)
        alive = np.flatnonzero(length[row_B] == num_steps)
        if len(alive) == 0 or step + 1 == num_steps:
            break
        if len(alive) < COMPACT_BELOW * len(row_B):
            decoder.select(alive)
            row_B, token_B = row_B[alive], token_B[alive]
        logits_BV = decoder.step(token_B)
    return [
        Continuation(
            ids=ids[row, :n].tolist(),
            logp=float(logps[row, :n].sum()),
            finish_reason="stop" if ids[row, n - 1] in stop_ids else "length",
        )
        for row, n in enumerate(length.tolist())
    ]


def _choose(
    decoder: Decoder,
    logits_BV: torch.Tensor | None,
    uniform_B: torch.Tensor | None,
    num_sequences: int,
    sampling: Sampling,
) -> tuple[torch.Tensor, np.ndarray]:
    """The next token of each sequence on the device, and (token, logp) (2, B) on the host; one rank chooses for its replica."""
    parallel = decoder.parallel
    chosen = torch.empty(2, num_sequences, dtype=torch.float64, device=parallel.device)
    if logits_BV is not None:
        token_B = choose_tokens(logits_BV[:, : decoder.num_ids], uniform_B, sampling)
        chosen = torch.stack([token_B.double(), chosen_logps(logits_BV, token_B).double()])
    group = parallel.groups.mp
    source = dist.get_global_rank(group, group.size() - parallel.tensor_size)
    dist.broadcast(chosen, source, group=group)  # now what the last stage's first rank chose
    host = chosen.cpu().numpy()
    if not np.isfinite(host[1]).all():
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or its values exceed the range of the precision; "
            "try --set train.precision=fp32, or an earlier checkpoint"
        )
    return chosen[0].long(), host
