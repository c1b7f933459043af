"""The FLOP count behind MFU, against a count by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nova_sys.config import ModelConfig
from nova_sys.data.batch import Pack
from nova_sys.metrics import StepClock, attention_area, training_flops


def test_attention_area_counts_allowed_pairs() -> None:
    segments_S4 = np.array([[0, 5, 0, 0], [5, 7, 0, 3], [7, 10, 7, 7]], dtype=np.int32)
    allowed = np.zeros((10, 10), dtype=bool)
    for start, end, prefix_start, prefix_end in segments_S4:
        for q in range(start, end):
            allowed[q, start : q + 1] = True
            allowed[q, prefix_start:prefix_end] = True
    assert attention_area(segments_S4) == allowed.sum()


def test_training_flops_by_hand() -> None:
    model = ModelConfig(
        num_layers=3, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_hidden_size=40
    )
    none = np.zeros(0)
    pack = Pack(
        tokens_T=np.zeros(10, dtype=np.int64),
        segments_S4=np.array([[0, 5, 0, 0], [5, 7, 0, 3], [7, 10, 7, 7]], dtype=np.int32),
        row_R=np.arange(4),
        target_R=np.arange(4),
        sequence_R=np.zeros(4, dtype=np.int64),
        response_B=none,
        document_P=none,
        ref_logp_B=none,
        num_tokens=7,
        num_loss_tokens=4,
    )
    # per token: q and o are 16 x 16, k and v 16 x 8, the three FFN matrices 16 x 40
    weights = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40
    area = (
        15 + 3 + 2 * 3
    )  # causal 5, causal 2, and 2 branch tokens against 3 prefix tokens; padding does not count
    attention = 2 * 4 * 4 * area  # scores and weighted sum: 4 heads of 4
    forward = 2 * (3 * (7 * weights + attention) + 4 * 16 * 100)
    assert training_flops(model, 4, 100, pack) == pytest.approx(3 * forward)


def test_a_step_waits_for_the_rank_that_waits_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four ranks waits for data; a mean would hide three quarters of it."""

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        """With three ranks that did the same, but did not wait, and need a GiB more."""
        if op == dist.ReduceOp.MAX:
            tensor[0] += 1.0
        else:
            tensor *= 4

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr("nova_sys.metrics.peak_memory_gib", lambda _: 2.0)
    monkeypatch.setattr("nova_sys.metrics.training_flops", lambda *_: 1e9)
    groups = SimpleNamespace(dp=None)
    parallel = SimpleNamespace(device=torch.device("cpu"), groups=groups, world_size=4, data_size=4)
    clock = StepClock(ModelConfig(), parallel, head_dim=4, vocab_size=9, dtype=torch.float32)  # pyright: ignore[reportArgumentType]
    pack: Any = SimpleNamespace(num_tokens=30, tokens_T=np.zeros(40), document_P=np.zeros(3))
    record = clock.record([pack], step_time_s=2.0, data_wait_s=0.08)
    assert record["data_wait_ms"] == pytest.approx(80.0)
    assert record["peak_gib"] == 3.0
    assert (record["tokens_per_s"], record["pairs_per_s"], record["fill"]) == (60, 6, 0.75)
