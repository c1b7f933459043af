"""What a report of a hang says: where every rank was, and which one the others waited for."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nova_sys.errors import OUR_PACKAGES

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

NUM_LISTED = 8
ADVICE = (
    "Every stack: {files}. Usual causes: a process stopped, swapped or out of memory; a GPU, machine, network or file system that no "
    "longer answers; an endless loop in code or data. If steps are only slow, raise parallel.timeout_s. The same command resumes from "
    "the last checkpoint"
)
WAITING = ("torch.distributed", "megatron.core")
"""Modules in which a main thread waits for other ranks."""


@dataclass(frozen=True)
class Sighting:
    """Where a rank was. where: its main thread's place in the code. waits: that place is inside a collective."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    passed: int
    where: str = ""
    waits: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


def explain(
    reports: dict[int, Sighting],
    silent: dict[int, Sighting | None],
    timeout_s: float,
    files: str,
) -> str:
    """Which rank the others waited for, where everyone was, and what to do.

    reports: of the ranks that answered.   silent: the others, as they were last seen.
    """
    fewest = min(report.passed for report in reports.values())
    stuck = {r: s for r, s in reports.items() if s.passed == fewest and not s.waits}
    if len(stuck) == len(reports) and (silent or len(reports) > 1):
        stuck = {}  # all are at the same place: that tells nothing
    blamed = sorted([*silent, *stuck])
    step = max(report.step for report in reports.values())
    lines = [
        f"{f'step {step}: ' if step else ''}{_ranks(blamed) if blamed else 'a rank'} did not answer within "
        f"parallel.timeout_s = {timeout_s:g}, so the job was ended"
    ]
    for rank, seen in [*silent.items()][:NUM_LISTED]:
        last = f"{seen} left no report; last seen in {seen.place}" if seen else f"rank {rank}"
        lines.append(f"  {last}: stopped, dead, cut off, or held in native code")
    lines += [f"  {seen}: {seen.place}, at {seen.where}" for seen in [*stuck.values()][:NUM_LISTED]]
    others: dict[str, list[int]] = {}
    for rank, seen in reports.items():
        if rank not in stuck:
            others.setdefault(seen.place, []).append(rank)
    verb = "waiting" if blamed else "waiting for one another, none behind the others"
    lines += [f"  {verb}: {_ranks(ranks)} in {place}" for place, ranks in others.items()]
    return "\n".join([*lines, ADVICE.format(files=files)])


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:NUM_LISTED]))
    more = f" and {len(ranks) - NUM_LISTED} more" if len(ranks) > NUM_LISTED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def main_thread_place(error: BaseException | None) -> tuple[str, bool]:
    """Innermost frame of the main thread (or of its error), the innermost of our own, and whether it waits for other ranks."""
    if error is not None and error.__traceback__ is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    else:
        innermost = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = [frame for frame, _ in traceback.walk_stack(innermost)]
    if not frames:
        return "an unknown place", False
    ours = next((f for f in frames if _module(f).split(".")[0] in OUR_PACKAGES), frames[0])
    where = _place(frames[0])
    if ours is not frames[0]:
        where += f", called from {_place(ours)}"
    return where, error is not None or _module(frames[0]).startswith(WAITING)


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} in {code.co_name}"


def to_json(sighting: Sighting) -> str:
    return json.dumps(asdict(sighting))


def from_json(store: Store, key: str) -> Sighting | None:
    return Sighting(**json.loads(store.get(key))) if store.check([key]) else None
