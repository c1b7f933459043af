"""Traces: the steps that were asked for, with every part of a step under its name, on one rank and on a pipeline."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nova_kernels.ranges import profiler_range, ranged
from nova_kernels.testing import run_ranks
from nova_sys.profiling import MegatronRanges, Profiler

NUM_LAYERS, PACKS = 2, 2
FIRST, LAST = 2, 3  # profiled, of 4 steps; there is a checkpoint after step 3


def profile_steps(run_dir, steps, first, last):
    profiler = Profiler(run_dir, steps, start_step=first - 1, rank=3)
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(4).sum()
        profiler.step(step)
    profiler.close()
    traces = list((run_dir / "tensorboard").glob("rank3.*.pt.trace.json"))
    if not traces:
        return None
    (trace,) = traces
    events = json.loads(trace.read_text())["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("work of step")}


@pytest.mark.parametrize(
    ("steps", "first", "last", "recorded"),
    [
        ((3, 4), 1, 6, [3, 4]),
        ((2, 2), 1, 3, [2]),
        ((1, 2), 1, 3, [1, 2]),
        ((3, 6), 5, 8, [5, 6]),  # resumed inside the window
        ((3, 9), 1, 4, [3, 4]),  # the run ends inside the window
    ],
)
def test_profiler_records_exactly_the_chosen_steps(tmp_path, steps, first, last, recorded):
    names = profile_steps(tmp_path, steps, first, last)
    assert names == {f"work of step {step}" for step in recorded}


@pytest.mark.parametrize("steps", [None, (1, 2)])
def test_profiler_without_steps_to_record(tmp_path, steps):
    assert profile_steps(tmp_path, steps, 3, 5) is None


def train(rank: int, folder: str, **parallel: int) -> None:
    """`run_ranks` worker, and on one rank an ordinary function: four steps of DPO with KV shifting."""
    from nova_sys import metrics
    from nova_sys.config import (
        CheckpointConfig,
        DataConfig,
        LogConfig,
        ModelConfig,
        ParallelConfig,
        RunConfig,
        RunSection,
        TrainConfig,
    )
    from nova_sys.parallel import parallel_run
    from nova_sys.trainer import Trainer

    config = RunConfig(
        run=RunSection(dir=f"{folder}/run"),
        model=ModelConfig(
            num_layers=NUM_LAYERS,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            vocab_size=300,
            kv_shift=True,
        ),
        data=DataConfig(train=f"{folder}/pairs.jsonl", pack_length=128),
        train=TrainConfig(steps=4, global_batch_packs=PACKS),
        parallel=ParallelConfig(**parallel),
        checkpoint=CheckpointConfig(every_steps=3),
        log=LogConfig(profile_steps=(FIRST, LAST), progress=False),
    )
    with (
        mock.patch.object(metrics, "peak_flops", lambda *_: 1e12),  # else measured
        parallel_run(config.parallel, seed=1) as joined,
    ):
        Trainer(config, joined).train()


def train_on_two_stages(rank: int, folder: str) -> None:
    train(rank, folder, pipeline=2)


def write_pairs(folder: Path) -> None:
    rng = random.Random(3)
    with (folder / "pairs.jsonl").open("w") as out:
        for _ in range(30):
            texts = ["".join(" " + rng.choice("abcdef") for _ in range(n)) for n in (5, 4, 9)]
            pair = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            out.write(json.dumps(pair) + "\n")


@dataclass(frozen=True)
class Range:
    name: str
    start: float
    end: float

    def holds(self, other: Range) -> bool:
        return self is not other and self.start <= other.start and other.end <= self.end


def ranges_of(folder: Path) -> list[Range]:
    (trace,) = (folder / "run" / "tensorboard").glob("rank0.*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    return [
        Range(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation"
    ]


def in_steps(ranges: list[Range]) -> list[Counter[str]]:
    steps = sorted((r for r in ranges if r.name.startswith("ProfilerStep#")), key=lambda r: r.start)
    assert len(steps) == LAST - FIRST + 1
    return [Counter(r.name for r in ranges if step.holds(r)) for step in steps]


def parents(ranges: list[Range]) -> dict[str, set[str]]:
    """For every name, those that ranges of the name are right inside of."""
    found: dict[str, set[str]] = defaultdict(set)
    for inner in ranges:
        around = [outer for outer in ranges if outer.holds(inner)]
        if around:
            found[inner.name].add(min(around, key=lambda r: r.end - r.start).name)
    return found


FORWARD, BACKWARD = "nova.forward-compute", "nova.backward-compute"
IN_A_STEP = {  # on one rank: name -> how many there are in a step
    "nova.data": 1,
    "nova.forward and backward": 1,
    "nova.pack to device": PACKS,
    FORWARD: PACKS,
    BACKWARD: PACKS,
    "nova.loss": PACKS,
    "nova_kernels.kv_shift_rope": PACKS * NUM_LAYERS,
    "nova_kernels.packed_attention": PACKS * NUM_LAYERS,
    "nova_kernels.linear_logprob": PACKS,
    "nova_kernels.kv_shift_rope.backward": PACKS * NUM_LAYERS * 3,  # of q, k and v
    "nova_kernels.packed_attention.backward": PACKS * NUM_LAYERS,
    "nova_kernels.linear_logprob.backward": PACKS,
    "nova.all-grads-sync": 1,
    "nova.optimizer": 1,
    "nova.optimizer-inner-step": 1,
    "nova.metrics": 1,
}


def test_a_steps_parts_have_names(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    train(0, str(tmp_path))
    ranges = ranges_of(tmp_path)
    first, last = in_steps(ranges)
    for step in (first, last):
        assert {name: step[name] for name in IN_A_STEP} == IN_A_STEP
    assert (first["nova.save"], last["nova.save"]) == (0, 1)
    inside = parents(ranges)
    for name in IN_A_STEP:
        if name.startswith("nova_kernels."):
            assert inside[name] == {BACKWARD if name.endswith(".backward") else FORWARD}
    assert inside["nova.pack to device"] == inside["nova.loss"] == {FORWARD}
    assert inside[FORWARD] == inside[BACKWARD] == {"nova.forward-backward"}
    assert inside["nova.forward-backward"] == {"nova.forward and backward"}
    assert inside["nova.all-grads-sync"] == {"nova.forward-backward"}
    assert inside["nova.optimizer-inner-step"] == {"nova.optimizer"}
    phases = ["nova.data", "nova.forward and backward", "nova.optimizer", "nova.metrics"]
    for name in [*phases, "nova.save"]:
        assert all(outer.startswith("ProfilerStep#") for outer in inside[name])


def test_the_first_of_two_stages(tmp_path: Path) -> None:
    """It has its own layers, no loss, and messages to and from the other stage."""
    write_pairs(tmp_path)
    run_ranks(train_on_two_stages, 2, str(tmp_path), timeout_s=300)
    ranges = ranges_of(tmp_path)
    for step in in_steps(ranges):
        assert step[FORWARD] == step[BACKWARD] == PACKS
        assert step["nova_kernels.packed_attention.backward"] == PACKS * NUM_LAYERS // 2
        assert step["nova.loss"] == step["nova_kernels.linear_logprob"] == 0
        sent = step["nova.forward-send"] + step["nova.forward-send-backward-recv"]
        received = step["nova.backward-recv"] + step["nova.forward-send-backward-recv"]
        assert sent == received == PACKS
    assert parents(ranges)["nova_kernels.packed_attention.backward"] == {BACKWARD}


def test_ranges_cost_nothing_when_no_profiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even torch's record_function, which takes ten microseconds."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", refuse)
    with profiler_range("range"):
        pass
    assert ranged("range")(max)(1, 3, key=lambda x: -x) == 1
    ranges = MegatronRanges()
    ranges("outer", log_level=1).start(barrier=True)
    ranges("inner").start()
    ranges("inner").stop()
    ranges("outer").stop()


def test_an_error_inside_a_range_ends_it(tmp_path: Path) -> None:
    @ranged("fails")
    def fails() -> None:
        raise KeyError

    with torch.profiler.profile() as profiler:
        with pytest.raises(KeyError):
            fails()
        with profiler_range("after"):
            torch.ones(1).sum()
    events = {event.name: event for event in profiler.events()}
    assert events["after"].cpu_parent is None
    assert "fails" in events


@pytest.fixture
def nsys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As if under nsys with a GPU: what torch is told to do."""
    calls: list[str] = []

    class Ranges:
        def __enter__(self) -> None:
            calls.append("ranges")

        def __exit__(self, *_: Any) -> None:
            calls.append("no ranges")

    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "7")
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", Ranges)
    with (
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.profiler.start", lambda: calls.append("start")),
        mock.patch("torch.cuda.profiler.stop", lambda: calls.append("stop")),
    ):
        yield calls


@pytest.mark.parametrize(
    ("steps", "first", "last", "captured"),
    [
        ((3, 4), 1, 6, [3, 4]),
        ((1, 2), 1, 3, [1, 2]),
        ((3, 6), 5, 8, [5, 6]),
        ((3, 9), 1, 4, [3, 4]),
    ],
)
def test_under_nsys_the_steps_are_captured_with_nvtx_ranges(
    tmp_path: Path,
    nsys: list[str],
    steps: tuple[int, int],
    first: int,
    last: int,
    captured: list[int],
) -> None:
    profiler = Profiler(tmp_path, steps, start_step=first - 1)
    for step in range(first, last + 1):
        nsys.append(str(step))
        profiler.step(step)
    profiler.close()
    opened, closed = nsys.index("start"), nsys.index("stop")
    assert nsys[opened : opened + 2] == ["start", "ranges"]
    assert nsys[closed - 1 : closed + 1] == ["no ranges", "stop"]
    assert nsys[opened + 2 : closed - 1] == [str(step) for step in captured]
    assert not list(tmp_path.iterdir())
