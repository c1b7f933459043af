"""A provider's side of a timed comparison: it trains only while it is told to. Standard library only, for it also runs in a peer's environment.

The provider says what it is (one JSON line), then waits. `train N` on standard input lets it train until N pairs are done; it answers with
what that took, and waits again. So several providers live side by side and take turns, and none computes while another is timed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


def denormals_are_flushed(torch: Any) -> bool:
    """Whether all threads of this process flush them: none of many halved smallest normal numbers is left."""
    return not bool((torch.full((1 << 22,), 1.2e-38) * 0.5).any())


class Gate:
    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what libraries print must not stand between the answers
        self._open(0)

    def ready(self, about: dict[str, Any]) -> None:
        """Says what this provider is, and waits for the first command."""
        self.answer(about)
        self._wait()

    def step_done(self, *, pairs: int, tokens: int, positions: int, loss: Any) -> None:
        """Counts one optimizer step; when the wanted pairs are done, answers and waits.

        tokens: without padding; positions: with it. loss: a number, or what float() makes one of.
        """
        now_s, cpu_s = time.perf_counter(), time.process_time()
        self._steps.append((pairs, tokens, positions, loss))
        if sum(step[0] for step in self._steps) < self._wanted:
            return
        pairs, tokens, positions = (sum(step[i] for step in self._steps) for i in range(3))
        block = {
            "seconds": now_s - self._began_s,
            "cpu_seconds": cpu_s - self._began_cpu_s,
            "pairs": pairs,
            "tokens": tokens,
            "positions": positions,
            "losses": [float(step[3]) for step in self._steps],
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        self.answer(block)
        self._wait()

    def answer(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")

    def _wait(self) -> None:
        command = sys.stdin.readline().split()
        if not command:  # the other side is gone, or has seen enough
            raise SystemExit(0)
        assert command[0] == "train", command
        self._open(int(command[1]))

    def _open(self, wanted: int) -> None:
        self._wanted = wanted
        self._steps: list[tuple[int, int, int, Any]] = []
        self._began_s, self._began_cpu_s = time.perf_counter(), time.process_time()
