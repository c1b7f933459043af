"""A step's throughput, GPU figures and MFU over the ranks of a job; the scalars of KV shifting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nova_sys.config import LogConfig, ModelConfig, RunConfig
from nova_sys.metrics import KV_SHIFT_TAGS, StepClock, kv_shift_histograms, peak_flops
from nova_sys.telemetry import TAGS


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H200", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0)],
)
def test_the_peak_is_the_data_sheets(
    name: str, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 1e12 * tflops


@pytest.mark.parametrize("name", ["NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_the_peak_of_another_gpu_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own names begin like those of faster ones."""
    on_cpu = torch.randn(2, 64, 64)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: on_cpu)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) not in (989e12, 312e12)


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
    clock = StepClock(ModelConfig(), parallel, vocab_size=9, dtype=torch.float32)  # pyright: ignore[reportArgumentType]
    pack: Any = SimpleNamespace(num_tokens=30, tokens_T=np.zeros(40), document_P=np.zeros(3))
    record = clock.record([pack], step_time_s=2.0, data_wait_s=0.08)
    assert record["data_wait_ms"] == pytest.approx(80.0)
    assert record["peak_gib"] == 3.0
    assert (record["tokens_per_s"], record["pairs_per_s"], record["fill"]) == (60, 6, 0.75)


GPUS = [
    {"power_w": 400.0, "draw_w": 500.0, "temperature_c": 60.0, "used_gib": 70.0},
    {"power_w": 600.0, "draw_w": 700.0, "temperature_c": 80.0, "used_gib": 40.0},
    {"power_w": 650.0, "draw_w": 300.0, "utilization_percent": 90.0},
    {"draw_w": 500.0, "utilization_percent": 70.0, "sm_clock_mhz": 1200.0},
]


def record_of_job(
    monkeypatch: pytest.MonkeyPatch, gpus: list[dict[str, float]], data_size: int
) -> dict[str, float]:
    """What the ranks with these GPUs agree on: each has a pack of 30 tokens in 2 s, which ranks beside it may share."""
    sent: list[list[torch.Tensor]] = []

    def of_rank(gpu: dict[str, float], all_reduce: Any) -> dict[str, float]:
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        monkeypatch.setattr("nova_sys.metrics.peak_flops", lambda *_: 1e9)
        monkeypatch.setattr("nova_sys.metrics.training_flops", lambda *_: 1e9)
        parallel: Any = SimpleNamespace(
            device=torch.device("cpu"), world_size=len(gpus), data_size=data_size
        )
        clock = StepClock(ModelConfig(), parallel, vocab_size=9, dtype=torch.float32)
        monkeypatch.setattr(clock.gpu, "since_last", lambda: gpu)
        pack: Any = SimpleNamespace(num_tokens=30, tokens_T=np.zeros(40), document_P=np.zeros(3))
        return clock.record([pack], step_time_s=2.0, data_wait_s=0.0)

    def keep(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        sent[-1].append(tensor.clone())

    for gpu in gpus:
        sent.append([])
        of_rank(gpu, keep)
    both = [torch.stack(tensors) for tensors in zip(*sent, strict=True)]

    def answer(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        is_sum = op == dist.ReduceOp.SUM
        tensor.copy_(both[0].sum(0) if is_sum else both[1].amax(0))

    return of_rank(gpus[0], answer)


def test_gpu_figures_are_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of_job(monkeypatch, GPUS, data_size=4)
    assert {name: value for name, value in record.items() if name.startswith("gpu_")} == {
        "gpu_power_w": 550.0,  # means over those that know
        "gpu_utilization_percent": 80.0,
        "gpu_sm_clock_mhz": 1200.0,
        "gpu_temperature_c": 80.0,  # the hottest
        "gpu_used_gib": 70.0,
        "gpu_energy_mj_per_token": pytest.approx(1e3 * 2000 * 2 / 120),  # 2 kW for 2 s, 120 tokens
    }
    assert set(record) <= set(TAGS)
    assert record["mfu"] == pytest.approx(4e9 / 2 / 4 / 1e9)


def test_ranks_that_share_a_pack_count_its_tokens_once_and_all_their_energy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four GPUs, two of them for one model: half as many tokens for the same energy."""
    record = record_of_job(monkeypatch, GPUS, data_size=2)
    assert record["tokens_per_s"] == 30.0
    assert record["pairs_per_s"] == 3.0
    assert record["gpu_energy_mj_per_token"] == pytest.approx(1e3 * 2000 * 2 / 60)
    assert record["mfu"] == pytest.approx(2e9 / 2 / 4 / 1e9)


def test_no_energy_per_token_when_a_gpu_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum without one GPU would look like a saving."""
    record = record_of_job(monkeypatch, [*GPUS[:3], {"utilization_percent": 70.0}], data_size=4)
    assert "gpu_energy_mj_per_token" not in record
    assert record["gpu_power_w"] == 550.0


def test_without_gpus_a_record_does_not_speak_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of_job(monkeypatch, [{}, {}], data_size=2)
    assert not [name for name in record if name.startswith("gpu_")]


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
