"""One pack as arrays: tokens, segments, and the response rows that enter the output layer.

T packed tokens, S segments, R response rows, B sequences (responses), P documents in the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch

from nova_kernels.segments import SegmentIndex, segment_index
from nova_sys.data.token_store import TokenStore, ranges

PADDING_SEGMENT = 128


@dataclass(frozen=True)
class DevicePack:
    """A Pack's arrays as tensors on one device; see Pack."""

    tokens_T: torch.Tensor
    segments_S4: torch.Tensor
    row_R: torch.Tensor
    target_R: torch.Tensor
    sequence_R: torch.Tensor
    response_B: torch.Tensor
    document_P: torch.Tensor
    ref_logp_B: torch.Tensor
    num_tokens: int
    num_loss_tokens: int
    index: SegmentIndex
    """What every layer needs of the segments, worked out once per pack."""


@dataclass(frozen=True)
class Pack:
    """A micro-batch. Sequences are numbered in document order: for pairs, 2p is chosen and 2p + 1
    rejected."""

    tokens_T: np.ndarray
    """int64 (pack_length,); 0 in the padding."""
    segments_S4: np.ndarray
    """int32 (S, 4): start, end, prefix_start, prefix_end. A trunk's prefix range is (start,
    start)."""
    row_R: np.ndarray
    """int64 (R,): position whose hidden state predicts a loss-carrying token."""
    target_R: np.ndarray
    """int64 (R,): that token."""
    sequence_R: np.ndarray
    """int64 (R,): the sequence it belongs to, ascending."""
    response_B: np.ndarray
    """int64 (B,): response id of each sequence in the store."""
    document_P: np.ndarray
    """int64 (P,): documents in this pack."""
    ref_logp_B: np.ndarray
    """float64 (B,): reference log-prob of each sequence in nats; NaN where there is none."""
    num_tokens: int
    """Without padding."""
    num_loss_tokens: int
    """R."""

    def to(self, device: torch.device | str) -> DevicePack:
        """A copy on `device`; to a GPU through pinned memory, without waiting for it."""
        pin = torch.device(device).type == "cuda"
        values = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                tensor = torch.from_numpy(value)
                value = (tensor.pin_memory() if pin else tensor.clone()).to(
                    device, non_blocking=pin
                )
            values[field.name] = value
        return DevicePack(**values, index=self.index.to(device))

    @cached_property
    def index(self) -> SegmentIndex:
        """On the host; the loader's thread works it out, so that no step waits for it."""
        return segment_index(torch.from_numpy(self.segments_S4), len(self.tokens_T))

    def with_reference(self, ref_logp_B: np.ndarray) -> Pack:
        """The same pack with these reference log-probs."""
        scored = replace(self, ref_logp_B=ref_logp_B)
        scored.__dict__["index"] = self.index  # what cached_property would work out again
        return scored


@dataclass(frozen=True)
class _Layout:
    """Where each sequence's response and prefix stand, in the store (source) and in the pack."""

    owner_B: np.ndarray
    """Index into the pack's documents."""
    part_B: np.ndarray
    source_B: np.ndarray
    length_B: np.ndarray
    start_B: np.ndarray
    prefix_source_B: np.ndarray
    prefix_length_B: np.ndarray
    prefix_start_B: np.ndarray
    is_trunk_B: np.ndarray
    """A copy of the prefix stands right in front of this response."""

    @property
    def end_B(self) -> np.ndarray:
        return self.start_B + self.length_B

    @property
    def num_tokens(self) -> int:
        return int(self.end_B[-1]) if len(self.start_B) else 0


def _lay_out(store: TokenStore, document_P: np.ndarray, share_prefix: bool) -> _Layout:
    first_part = store.document_parts[document_P]
    num_responses = store.document_parts[document_P + 1] - first_part - 1
    owner_B = np.repeat(np.arange(len(document_P)), num_responses)
    part_B = ranges(first_part + 1, num_responses)
    source_B = store.part_offsets[part_B]
    length_B = store.part_offsets[part_B + 1] - source_B
    prefix_source_B = store.part_offsets[first_part][owner_B]
    prefix_length_B = store.part_offsets[first_part + 1][owner_B] - prefix_source_B
    is_trunk_B = (np.diff(owner_B, prepend=-1) > 0) | (not share_prefix)
    start_B = np.cumsum(length_B + prefix_length_B * is_trunk_B) - length_B
    trunk_B = np.flatnonzero(is_trunk_B)[np.cumsum(is_trunk_B) - 1]  # whose prefix it attends to
    return _Layout(
        owner_B=owner_B,
        part_B=part_B,
        source_B=source_B,
        length_B=length_B,
        start_B=start_B,
        prefix_source_B=prefix_source_B,
        prefix_length_B=prefix_length_B,
        prefix_start_B=(start_B - prefix_length_B)[trunk_B],
        is_trunk_B=is_trunk_B,
    )


def build_pack(
    store: TokenStore,
    documents: Sequence[int] | np.ndarray,
    pack_length: int,
    *,
    share_prefix: bool,
    ref_logp: np.ndarray | None = None,
) -> Pack:
    """Lays documents out in one pack of exactly `pack_length` tokens.

    share_prefix: trunk `prefix | response_0`, then one branch per further response; the last prefix
    row then predicts the first token of every response. Otherwise every response is its own trunk
    `prefix | response_i`. No documents: padding.

    Args:     ref_logp (store.num_responses,) float64: reference log-probs by response id.
    Raises:   ValueError when the documents do not fit.
    """
    document_P = np.asarray(documents, np.int64)
    at = _lay_out(store, document_P, share_prefix)
    if at.num_tokens > pack_length:
        raise ValueError(
            f"{len(document_P)} documents of {at.num_tokens} tokens for a pack of {pack_length}; "
            "they must fit. Use the pack_length and share_prefix the documents were packed for."
        )
    tokens_T = np.zeros(pack_length, np.int64)
    places = ranges(at.start_B, at.length_B)
    sources = ranges(at.source_B, at.length_B)
    tokens_T[places] = store.tokens[sources]
    copied = at.prefix_length_B[at.is_trunk_B]
    copies = ranges(at.prefix_start_B[at.is_trunk_B], copied)
    tokens_T[copies] = store.tokens[ranges(at.prefix_source_B[at.is_trunk_B], copied)]

    row = places - 1  # the row that predicts the token at each place; -1: none
    prefix_end_B = at.prefix_start_B + at.prefix_length_B
    first = np.cumsum(at.length_B) - at.length_B
    row[first] = np.where(at.prefix_length_B > 0, prefix_end_B - 1, -1)
    wanted = (store.loss[sources] == 1) & (row >= 0)
    response_B = at.part_B - document_P[at.owner_B] - 1
    return Pack(
        tokens_T=tokens_T,
        segments_S4=_segments(at, pack_length),
        row_R=row[wanted],
        target_R=tokens_T[places[wanted]],
        sequence_R=np.repeat(np.arange(len(at.part_B)), at.length_B)[wanted],
        response_B=response_B,
        document_P=document_P,
        ref_logp_B=np.full(len(response_B), np.nan, np.float64)
        if ref_logp is None
        else ref_logp[response_B].astype(np.float64),
        num_tokens=at.num_tokens,
        num_loss_tokens=int(wanted.sum()),
    )


def _segments(at: _Layout, pack_length: int) -> np.ndarray:
    """One segment per sequence (a trunk takes its prefix in), then the padding."""
    start_B = np.where(at.is_trunk_B, at.prefix_start_B, at.start_B)
    prefix_end_B = at.prefix_start_B + at.prefix_length_B * ~at.is_trunk_B
    segments = np.stack([start_B, at.end_B, at.prefix_start_B, prefix_end_B], axis=1)
    return np.concatenate([segments, padding_segments(at.num_tokens, pack_length)]).astype(np.int32)


def padding_segments(start: int, pack_length: int) -> np.ndarray:
    """int32 (S, 4): trunks of at most `PADDING_SEGMENT` tokens from `start` to the end of the pack.

    Attention costs the square of a segment: one long padding segment would cost more than the documents.
    """
    starts = np.arange(start, pack_length, PADDING_SEGMENT)
    ends = np.minimum(starts + PADDING_SEGMENT, pack_length)
    return np.stack([starts, ends, starts, starts], axis=1).astype(np.int32)
