"""The FLOP count behind MFU, against a count by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nova_sys.config import LogConfig, ModelConfig, RunConfig
from nova_sys.data.batch import Pack
from nova_sys.metrics import (
    KV_SHIFT_TAGS,
    StepClock,
    attention_area,
    kv_shift_histograms,
    training_flops,
)


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


class _Attention(torch.nn.Module):
    """A layer's scalars: previous 10 l + head, current 100 more; the values' are negative."""

    def __init__(self, layer: int, heads: range) -> None:
        super().__init__()
        previous = torch.tensor([10.0 * layer + head for head in heads])
        mix_K2 = torch.stack([previous, previous + 100], dim=1)
        self.k_mix_K2 = torch.nn.Parameter(mix_K2.bfloat16())
        self.v_mix_K2 = torch.nn.Parameter(-mix_K2.bfloat16())
        self.weight = torch.nn.Parameter(torch.zeros(3))


def _kv_shift_run(**log: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(kv_shift=True), log=LogConfig(every_steps=5, **log))


def test_kv_shift_histograms_hold_every_head_of_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks: two pipeline stages of two chunks each, two tensor-parallel ranks of two heads each."""

    def chunks_of(stage: int, tensor: int) -> list[torch.nn.Module]:
        heads = range(2 * tensor, 2 * tensor + 2)
        return [torch.nn.Sequential(_Attention(layer, heads)) for layer in (stage, stage + 2)]

    def all_gather(outputs: list[torch.Tensor], ours: torch.Tensor, group: Any) -> None:
        """What the other ranks would send: the same tensor, of their chunks."""
        assert group == "mp"
        for output, rank in zip(outputs, range(4), strict=True):
            layers = [chunk[0] for chunk in chunks_of(rank // 2, rank % 2)]  # pyright: ignore[reportIndexIssue]
            k, v = (torch.cat([getattr(x, name) for x in layers]) for name in KV_SHIFT_TAGS)
            output.copy_(torch.stack([k, v]).detach())
            if rank == 2:
                assert torch.equal(output, ours)

    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    parallel: Any = SimpleNamespace(groups=SimpleNamespace(mp="mp"))
    config = _kv_shift_run()
    found = kv_shift_histograms(chunks_of(1, 0), config, parallel, 10)
    every = sorted(10.0 * layer + head for layer in range(4) for head in range(4))
    assert {tag: sorted(values.tolist()) for tag, values in found.items()} == {
        "kv_shift/k_previous": every,
        "kv_shift/k_current": [100 + value for value in every],
        "kv_shift/v_previous": sorted(-value for value in every),
        "kv_shift/v_current": sorted(-100 - value for value in every),
    }


@pytest.mark.parametrize(
    ("config", "step"),
    [
        (_kv_shift_run(), 4),
        (_kv_shift_run(tensorboard=False), 5),
        (RunConfig(log=LogConfig(every_steps=5)), 5),
    ],
)
def test_no_histograms_between_log_steps_or_without_scalars(config: RunConfig, step: int) -> None:
    """Without a word to other ranks: there is no group here to talk to."""
    parallel: Any = SimpleNamespace()
    assert kv_shift_histograms([], config, parallel, step) == {}
