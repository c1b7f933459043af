"""Ranks that stop answering, in jobs of the user's own launchers: reports, one message, no process left."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "dpo_hh_small.toml"
TIMEOUT_S = 12
SETTINGS = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 300,
    "data.pack_length": 256,
    "data.max_length": 128,
    "train.steps": 50,
    "train.global_batch_packs": 6,
    "log.tensorboard": False,
    "checkpoint.every_steps": 2,
    "parallel.timeout_s": TIMEOUT_S,
}
FAULTS = '''
"""Python imports a module of this name by itself: in the ranks that FAULTS names, the call of a function goes wrong."""

import ctypes
import os
import signal
import time
from pathlib import Path


def endless():
    while True:
        pass


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def slow():
    time.sleep(25)


def held():
    ctypes.PyDLL(None).sleep(1000)


def undefined():
    """What the function returns is multiplied by NaN."""
    nan = float("nan")
    return lambda out: type(out)(out.loss_sum * nan, out.count, out.metric_sums * nan)


def install(module, name, method, call, fault):
    owner, calls = __import__(module, fromlist=["_"]), [0]
    owner = getattr(owner, name) if name else owner
    original = getattr(owner, method)

    def replaced(*args, **options):
        calls[0] += 1
        change = fault() if calls[0] == call else None
        result = original(*args, **options)
        return change(result) if change else result

    setattr(owner, method, replaced)


PLACES = {
    "prepare": ("nova_sys.trainer", "", "prepare_data"),
    "data": ("nova_sys.data.loader", "PackLoader", "next"),
    "forward": ("nova_sys.data.batch", "Pack", "to"),
    "loss": ("nova_sys.algo.dpo", "DPO", "loss"),
    "save": ("nova_sys.checkpoint", "Checkpointer", "save"),
}
rank = os.environ.get("RANK")
if rank is not None and "FIRST_STEP_S" in os.environ:
    import nova_sys.watchdog

    nova_sys.watchdog.FIRST_STEP_S = float(os.environ["FIRST_STEP_S"])
for entry in os.environ["FAULTS"].split() if rank is not None else []:
    at_rank, place, call, fault = entry.split(":")
    if at_rank == rank:
        install(*PLACES[place], int(call), globals()[fault])
if rank is not None:
    (Path(__file__).parent / f"pid{os.getpid()}").touch()
'''


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with path.open("w") as out:
        for _ in range(200):
            words = ["".join(" " + rng.choice("abcdef") for _ in range(n)) for n in (5, 6, 9)]
            pair = dict(zip(("prompt", "chosen", "rejected"), words, strict=True))
            out.write(json.dumps(pair) + "\n")
    return path


def run_with_faults(
    folder: Path, pairs: Path, faults: str, launcher: list[str], **changes: object
) -> subprocess.CompletedProcess[str]:
    """A job with `rank:place:call:fault` entries. Asserts that it fails and that none of its processes is left."""
    plugin = folder / "plugin"
    plugin.mkdir()
    (plugin / "sitecustomize.py").write_text(FAULTS)
    merged = {**SETTINGS, "run.dir": str(folder / "run"), "data.train": str(pairs)}
    merged |= {key.replace("__", "."): value for key, value in changes.items()}
    sets = [
        part for key, value in merged.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    python_path = os.pathsep.join(filter(None, [str(plugin), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": python_path,
        "FAULTS": faults,
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",  # SIGTERM does not end a stopped process, SIGKILL does
    }
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *sets],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    left = [pid for pid in (path.name[3:] for path in plugin.glob("pid*")) if is_running(pid)]
    assert not left, f"processes {left} are left\n{done.stderr}"
    return done


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def nova(nproc: int) -> list[str]:
    return ["nova_sys.cli", "train", str(RECIPE), "--nproc", str(nproc)]


def reports(folder: Path) -> dict[int, str]:
    """The reports with stacks, by rank."""
    found = {path.stem.rpartition("rank")[2]: path for path in (folder / "run/hangs").iterdir()}
    texts = {int(rank): path.read_text() for rank, path in found.items()}
    return {rank: text for rank, text in texts.items() if "most recent call first" in text}


def test_a_looping_and_a_stopped_rank(tmp_path: Path, pairs: Path) -> None:
    """Rank 1 loops in its own Python code and rank 2 is stopped, both at step 3; rank 0 waits for them in the reduction."""
    done = run_with_faults(tmp_path, pairs, "1:data:3:endless 2:data:3:stopped", nova(3))
    text = done.stderr
    assert done.returncode == 3, text
    assert "Traceback" not in text and text.count("did not answer") == 1, text
    assert (
        f"error: step 3: ranks 1, 2 did not answer within parallel.timeout_s = {TIMEOUT_S}" in text
    )
    lines = text.splitlines()
    (stopped,) = [line for line in lines if line.startswith("  rank 2 ")]
    assert "left no report; last seen in step " in stopped
    (looping,) = [line for line in lines if line.startswith("  rank 1 ")]
    assert (
        "step 3, data, at " in looping and "in endless, called from nova_sys/trainer.py" in looping
    )
    (waiting,) = [line for line in lines if line.startswith("  waiting:")]
    assert waiting == "  waiting: rank 0 in step 3, forward and backward"
    assert str(tmp_path / "run" / "hangs") in text
    found = reports(tmp_path)
    assert sorted(found) == [0, 1]
    assert "rank 1 (host " in found[1] and "step 3, data, for " in found[1]
    assert "in endless" in found[1]
    assert "step 3, forward and backward" in found[0] and "in train_step" in found[0]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


@pytest.mark.slow
def test_a_rank_stopped_in_the_forward_pass(tmp_path: Path, pairs: Path) -> None:
    """Everyone is in the same phase; the one that says nothing is named."""
    layout = {"parallel__tensor": 2, "parallel__pipeline": 2}
    done = run_with_faults(tmp_path, pairs, "3:forward:33:stopped", nova(4), **layout)
    assert done.returncode == 3, done.stderr
    assert ": rank 3 did not answer within" in done.stderr
    assert sorted(reports(tmp_path)) == [0, 1, 2]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_the_run_resumes(tmp_path: Path, pairs: Path) -> None:
    """Three packs per rank and step: the eighth is in the third step, behind the checkpoint of the second."""
    done = run_with_faults(tmp_path, pairs, "1:loss:8:undefined", nova(2))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error: step 3: the loss is nan; weights and optimizer are as before" in done.stderr
    assert "(data rank 1, micro-batch 1; its " in done.stderr
    assert "pairs.jsonl:" in done.stderr
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step_00000002"]
    (tmp_path / "again").mkdir()
    run_dir = {"run__dir": str(tmp_path / "run")}
    faults = "1:loss:2:undefined 1:data:4:stopped"  # skipped at step 3, and an end at step 6
    done = run_with_faults(
        tmp_path / "again", pairs, faults, nova(2), train__non_finite="skip", **run_dir
    )
    assert "step 2 is done" in done.stderr and "The step is skipped (1 in a row" in done.stderr
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    told = [(row["step"], row["skipped"], row["loss"] is None) for row in map(json.loads, rows)]
    assert told == [(1, 0, False), (2, 0, False), (3, 1, True), (4, 0, False), (5, 0, False)]


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path, pairs: Path) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    launcher += ["nova_sys.train", str(RECIPE)]
    done = run_with_faults(tmp_path, pairs, "0:data:3:endless", launcher)
    assert done.returncode != 0
    assert "error: step 3: rank 0 did not answer within" in done.stderr
    assert sorted(reports(tmp_path)) == [0, 1]


@pytest.mark.slow
def test_a_rank_held_in_native_code(tmp_path: Path, pairs: Path) -> None:
    """Its interpreter runs no thread any more; faulthandler's timer in C writes its stacks all the same."""
    done = run_with_faults(tmp_path, pairs, "1:data:3:held", nova(2))
    assert done.returncode == 3, done.stderr
    assert "step 3: rank 1 did not answer within" in done.stderr
    found = reports(tmp_path)
    assert sorted(found) == [0, 1] and "in held" in found[1]


@pytest.mark.slow
def test_the_first_step_may_take_longer_than_the_timeout(tmp_path: Path, pairs: Path) -> None:
    """On one rank, while the others wait for it in a collective."""
    changes = {"parallel__timeout_s": 7, "train__steps": 6, "checkpoint__every_steps": 0}
    done = run_with_faults(tmp_path, pairs, "1:loss:1:slow", nova(2), **changes)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "hangs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stops_while_data_are_prepared(tmp_path: Path, pairs: Path, rank: int) -> None:
    """However long that may take, a rank shows that it lives."""
    done = run_with_faults(tmp_path, pairs, f"{rank}:prepare:1:stopped", nova(2))
    assert done.returncode == 3, done.stderr
    assert f"rank {rank} did not answer within" in done.stderr
    found = reports(tmp_path)
    assert sorted(found) == [1 - rank]
    assert f"rank {rank} has given no sign of life" in found[1 - rank]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["endless", "stopped"])
def test_a_rank_lost_in_a_save(
    tmp_path: Path, pairs: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save may take long, but a stopped process shows; a loop without end shows by the timeout of the others' collective."""
    monkeypatch.setenv("FIRST_STEP_S", "20")
    done = run_with_faults(tmp_path, pairs, f"1:save:1:{fault}", nova(2))
    assert done.returncode == 3, done.stderr
    assert "rank 1 did not answer within" in done.stderr
    found = reports(tmp_path)
    assert sorted(found) == ([0, 1] if fault == "endless" else [0])
    assert ("imed out" if fault == "endless" else "no sign of life") in found[0]
