"""The segment table of a pack: positions, previous tokens and the rules it must obey.

A pack of T tokens is cut into S segments, int32 rows `start, end, prefix_start, prefix_end`. A
*trunk* has an empty prefix range; a *branch* continues the prefix of the trunk it stands behind:

    tokens    p0 p1 p2 a0 a1 | b0 b1 | c0 | x0 x1 x2        table    0  5  0 0   trunk
    position   0  1  2  3  4    3  4    3    0  1  2                 5  7  0 3   branch
    previous  -1  0  1  2  3    2  5    2   -1  8  9                 7  8  0 3   branch
                                                                     8 11  8 8   trunk

Legend: T packed tokens, S segments, I breaks (segments that hold a token), J branches that do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from nova_kernels.checks import check_dtype, check_shape

HostSegments = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class SegmentIndex:
    """What ops derive from a segment table; built once per pack, then passed as `schedule=`.

    Index tensors are int64 on one device. `host_segments` are the table's rows as Python integers,
    so that no op has to read the device.
    """

    host_segments: HostSegments
    position_T: torch.Tensor  # RoPE position of each token
    previous_T: torch.Tensor  # index of the previous token, -1 where there is none
    break_I: torch.Tensor  # first token of each segment: the one before it is not its previous
    branch_J: torch.Tensor  # those of them that have a previous token: first tokens of branches
    branch_previous_J: torch.Tensor  # last prefix token of those branches; repeats for siblings
    attention_tiles: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)
    """Tile lists that packed_attention has made of the table, by tile size, for all layers; they move along."""

    @property
    def num_tokens(self) -> int:
        return self.position_T.shape[0]

    @cached_property
    def num_positions(self) -> int:
        """One more than the largest position in the pack."""
        return max((p1 - p0 + end - start for start, end, p0, p1 in self.host_segments), default=0)

    @cached_property
    def successors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Branches by the token they continue, int32: the first tokens of those behind token t are
        `tokens_J[offset_T1[t]:offset_T1[t + 1]]`, in pack order; t + 1 itself is not among them.

        Made on first use, without reading the device, and then kept for all layers.
        """
        order_J = torch.argsort(self.branch_previous_J, stable=True)
        every_T1 = torch.arange(self.num_tokens + 1, device=self.position_T.device)
        offset_T1 = torch.searchsorted(self.branch_previous_J[order_J], every_T1)
        return offset_T1.int(), self.branch_J[order_J].int()

    def to(self, device: torch.device | str) -> SegmentIndex:
        """A copy on `device`; from the host to a GPU through pinned memory, without waiting for it."""
        pin = torch.device(device).type == "cuda" and self.position_T.device.type == "cpu"

        def moved(index: torch.Tensor) -> torch.Tensor:
            return (index.pin_memory() if pin else index).to(device, non_blocking=pin)

        return SegmentIndex(
            self.host_segments,
            moved(self.position_T),
            moved(self.previous_T),
            moved(self.break_I),
            moved(self.branch_J),
            moved(self.branch_previous_J),
            {size: tuple(map(moved, lists)) for size, lists in self.attention_tiles.items()},
        )


def segment_index(segments_S4: torch.Tensor, T: int) -> SegmentIndex:
    """Validates the table and derives what the ops need, on the table's device.

    Reads the table to the host once: build it from a CPU table, then use `.to(device)`.
    Raises:   ValueError when the table breaks a rule (see `validate_segments`).
    """
    rows = validate_segments(segments_S4, T)
    held = [row for row in rows if row[1] > row[0]]
    branches = [row for row in held if row[3] > row[2]]

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=segments_S4.device)

    return SegmentIndex(
        rows,
        positions(segments_S4, T),
        previous_token(segments_S4, T),
        index([start for start, _, _, _ in held]),
        index([start for start, _, _, _ in branches]),
        index([prefix_end - 1 for _, _, _, prefix_end in branches]),
    )


def schedule_of(schedule: SegmentIndex | None, segments_S4: torch.Tensor, T: int) -> SegmentIndex:
    """The caller's schedule after a check, or a new one when there is none."""
    if schedule is None:
        return segment_index(segments_S4, T)
    if schedule.num_tokens != T:
        raise ValueError(
            f"schedule was built for a pack of {schedule.num_tokens} tokens, but this pack has {T}. "
            f"Build it from this pack's table with segment_index(segments_S4, {T})."
        )
    return schedule


def segment_ids(segments_S4: torch.Tensor, T: int) -> torch.Tensor:
    """The segment each token belongs to: (T,) int64."""
    lengths_S = (segments_S4[:, 1] - segments_S4[:, 0]).long()
    rows_S = torch.arange(len(segments_S4), device=segments_S4.device)
    return torch.repeat_interleave(rows_S, lengths_S, output_size=T)


def positions(segments_S4: torch.Tensor, T: int) -> torch.Tensor:
    """RoPE positions (T,) int64: t - start in a trunk, prefix_length + (t - start) in a branch."""
    start_S, _, prefix_start_S, prefix_end_S = segments_S4.long().unbind(1)
    first_T = (start_S - (prefix_end_S - prefix_start_S))[segment_ids(segments_S4, T)]
    return torch.arange(T, device=segments_S4.device) - first_T


def previous_token(segments_S4: torch.Tensor, T: int) -> torch.Tensor:
    """Index of each token's previous token (T,) int64: see the page's picture; -1 where none."""
    start_S, _, prefix_start_S, prefix_end_S = segments_S4.long().unbind(1)
    before_S = torch.where(prefix_end_S > prefix_start_S, prefix_end_S - 1, -1)
    segment_T = segment_ids(segments_S4, T)
    token_T = torch.arange(T, device=segments_S4.device)
    return torch.where(token_T == start_S[segment_T], before_S[segment_T], token_T - 1)


def validate_segments(segments_S4: torch.Tensor, T: int) -> HostSegments:
    """Checks the table's rules on the host and returns its rows as Python integers.

    Segments are contiguous and cover the pack; a branch's prefix range is the beginning of the
    last trunk before it, the same for all branches of that trunk.   Raises: ValueError that names the row and the rule.
    """
    check_shape("segments_S4", segments_S4, ("S", 4))
    check_dtype("segments_S4", segments_S4, (torch.int32,))
    rows = tuple(tuple(row) for row in segments_S4.tolist())
    at, trunk, prefix = 0, (0, 0), None
    for number, (start, end, prefix_start, prefix_end) in enumerate(rows):
        problem = None
        if start != at:
            problem = f"segments are contiguous, so its start must be {at}"
        elif not start <= end <= T:
            problem = f"its end must lie between its start and the pack's {T} tokens"
        elif prefix_start > prefix_end:
            problem = "a prefix range must not end before it starts"
        elif prefix_start == prefix_end:
            trunk, prefix = (start, end), None
        elif prefix_start != trunk[0] or prefix_end > trunk[1]:
            problem = (
                f"a branch's prefix must be the beginning of the last trunk before it, "
                f"which is tokens {trunk[0]} to {trunk[1]}"
            )
        elif prefix not in (None, prefix_end):
            problem = f"all branches behind a trunk share one prefix, which ends at token {prefix}"
        else:
            prefix = prefix_end
        if problem:
            raise ValueError(
                f"segments_S4 row {number} is {[start, end, prefix_start, prefix_end]}: {problem}. "
                f"Build the table with whole documents, each a trunk and its branches."
            )
        at = end
    if at != T:
        raise ValueError(
            f"segments_S4 covers {at} of the pack's {T} tokens. "
            f"Add the padding as one more trunk: [{at}, {T}, {at}, {at}]."
        )
    return rows
