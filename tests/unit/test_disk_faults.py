"""Disks that fail where no other process sees it: what is told, and what is left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nova_sys import shards, trainer
from nova_sys.config import DataConfig, LogConfig, RunConfig, RunSection
from nova_sys.errors import is_user_error
from nova_sys.forked import ForkedCall
from nova_sys.shards import PlannedShards
from nova_sys.start import claim
from nova_sys.stopping import StopRequest
from nova_sys.telemetry import Telemetry
from nova_sys.trainer import Trainer


def no_room(*args: Any) -> Any:
    raise OSError(28, "No space left on device")


def written(name: str, file: str, offset: int, length: int) -> Any:
    place = SimpleNamespace(relative_path=file, offset=offset, length=length)
    return SimpleNamespace(index=SimpleNamespace(fqn=name), storage_data=place)


@pytest.mark.parametrize(
    ("sizes", "names", "problem"),
    [
        ({"__0_0.distcp": 30, "__1_0.distcp": 5}, "ab", None),
        ({"__0_0.distcp": 29, "__1_0.distcp": 5}, "ab", "__0_0.distcp has 29 of the 30 bytes"),
        ({"__0_0.distcp": 30}, "ab", "__1_0.distcp has 0 of the 5 bytes"),
        ({"__0_0.distcp": 30, "__1_0.distcp": 5}, "abc", "no rank has written c"),
    ],
)
def test_a_checkpoint_is_as_planned_before_it_gets_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, int],
    names: str,
    problem: str | None,
) -> None:
    """Rank 0 may see another machine's files late, or never."""
    monkeypatch.setattr(shards, "LATE_S", 0.0)
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    planned = PlannedShards.__new__(PlannedShards)
    planned._folder = tmp_path
    planned._metadata = SimpleNamespace(state_dict_metadata=dict.fromkeys(names))
    results = [
        written("a", "__0_0.distcp", 20, 10),
        written("a", "__0_0.distcp", 0, 20),
        written("b", "__1_0.distcp", 0, 5),
    ]
    if problem is None:
        planned._refuse_incomplete(results)
        return
    with pytest.raises(OSError, match=problem):
        planned._refuse_incomplete(results)


def test_metrics_that_cannot_be_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A problem to tell, on every rank, and no torn copy."""
    rows = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows)
    monkeypatch.setattr(os, "replace", no_room)
    telemetry = Telemetry(
        tmp_path,
        algorithm="dpo",
        log=LogConfig(tensorboard=False, progress=False),
        start_step=2,
        total_steps=4,
        config_text="",
        is_main=True,
    )
    with pytest.raises(ValueError, match=r"metrics cannot be written into .*No space left"):
        telemetry.refuse_problem()
    telemetry.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_metrics_are_on_the_disk_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    telemetry = Telemetry(
        tmp_path,
        algorithm="dpo",
        log=LogConfig(tensorboard=False, progress=False),
        start_step=0,
        total_steps=4,
        config_text="",
        is_main=True,
    )
    telemetry.step({"step": 1})
    telemetry.refuse_problem()
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(ValueError, match=r"metrics cannot be written into .*No space left"):
        telemetry.refuse_problem()
    telemetry.close()


def test_a_run_folder_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(run=RunSection(dir=str(tmp_path)), data=DataConfig(train="x.jsonl"))
    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(ValueError, match=r"cannot be written to: .*No space left"):
        claim(tmp_path, config, "key", resumes=False)
    assert not [*tmp_path.iterdir()]


def test_a_process_that_cannot_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told when the outcome is asked for, as every other fault of a writer: other ranks ask then too."""
    monkeypatch.setattr(os, "fork", no_room)
    call = ForkedCall(int)
    assert not call.is_running()
    with pytest.raises(OSError, match=r"cannot be started: .*No space left"):
        call.result()
    ForkedCall(int).kill()


def test_a_fault_is_told_whatever_fails_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is left to end comes to its end."""
    ended: list[str] = []

    def fail() -> None:
        raise ValueError("the checkpoint could not be saved")

    def end(name: str) -> Any:
        return SimpleNamespace(
            **dict.fromkeys(("release", "close", "stop"), lambda: ended.append(name))
        )

    run: Any = Trainer.__new__(Trainer)
    run.config, run.run_dir, run.start_step, run.total_steps = RunConfig(), Path(), 0, 1
    run.parallel, run.stop = SimpleNamespace(is_main=False), StopRequest()
    run.lock, run.telemetry = end("lock"), SimpleNamespace(close=fail)
    run.clock = end("clock")
    run.loader = SimpleNamespace(start=lambda step: None, stop=fail)
    run.checkpointer = SimpleNamespace(wait=fail, close=lambda: ended.append("save"))
    run._one_step = lambda step: run._end_with(FloatingPointError("the loss is nan"))
    monkeypatch.setattr(trainer, "on_any_rank", lambda parallel, here: here)
    both = "the loss is nan. Besides, the checkpoint could not be saved"
    with pytest.raises(FloatingPointError, match=both) as stopped:
        run.train()
    assert is_user_error(stopped.value)
    assert ended == ["clock", "save", "lock"]
