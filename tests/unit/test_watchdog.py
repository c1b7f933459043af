"""The watchdog of one rank: what trips it, what does not, what it leaves behind. Several ranks: tests/integration/test_hangs.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nova_sys.hang_report import Sighting, explain
from nova_sys.watchdog import FIRST_STEP_S, collective_timeout_s, grace_s

STARTED = "20260102-030405"
SETUP = f"""
import ctypes, multiprocessing, os, sys, time
from pathlib import Path
import nova_sys.watchdog as module
module.POLL_S, module.FIRST_STEP_S, module.grace_s = 0.1, 0.0, lambda timeout_s: 0.5

folder = Path(sys.argv[1])
dog = module.Watchdog(
    rank=0, world_size=1, timeout_s=2.0, folder=folder, started="{STARTED}"
)
dog.step = 7

def stuck():
    while True:
        pass
"""


CODE = {
    "loop": """
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
child.start()
print(child.pid, flush=True)
with dog.phase("data"):
    stuck()
""",
    "held": """
def held():  # native code that keeps the GIL stops every Python thread, the watchdog's too
    ctypes.PyDLL(None).sleep(100)

with dog.phase("forward and backward"):
    held()
""",
    "slow": """
with dog.phase("step"):
    for _ in range(3):
        with dog.phase("data"):
            time.sleep(0.9)  # together more than the timeout
    for _ in range(3):
        time.sleep(0.9)
        dog.progress()
    with dog.phase("save", watched=False):
        ctypes.PyDLL(None).sleep(3)
ctypes.PyDLL(None).sleep(3)
dog.raised(ValueError("rope_base timed out of range"))
dog.raised(RuntimeError("shapes differ"))
dog.close()
""",
    "first step": """
module.FIRST_STEP_S = 100.0
with dog.phase("forward and backward"):
    time.sleep(3)
dog.warm = True
print("warm", flush=True)
with dog.phase("forward and backward"):
    stuck()
""",
    "collective": """
def all_reduce():
    raise RuntimeError("[unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation")

try:
    all_reduce()
except RuntimeError as error:
    dog.raised(error)
""",
    "no folder": """
dog.close()
dog = module.Watchdog(rank=0, world_size=1, timeout_s=2.0)
with dog.phase("data"):
    stuck()
""",
    "full disk": """
dog._out = open("/dev/full", "w")
with dog.phase("data"):
    stuck()
""",
    "no report file": """
dog.close()
folder.write_text("no folder")
dog = module.Watchdog(rank=0, world_size=1, timeout_s=2.0, folder=folder, started="now")
with dog.phase("data"):
    stuck()
""",
    "stopped neighbour": """
class Store:  # another rank's last beat for ever
    def clone(self):
        return self

    def check(self, keys):
        return not keys[0].endswith(("call", "report/1", "seen/1"))

    def get(self, key):
        return b"5"

    def add(self, key, number):
        return 1

    def set(self, key, value):
        self.said = {**getattr(self, "said", {}), key: value}

    def wait(self, keys, timeout):
        time.sleep(timeout.total_seconds())

dog.close()
store = Store()
store.get = lambda key: store.said[key].encode() if key in store.said else b"5"
dog = module.Watchdog(
    rank=0, world_size=2, timeout_s=2.0, store=store, folder=folder, started="now"
)
with dog.phase("one rank works, the others wait", watched=False):
    time.sleep(30)
""",
    "neighbour at its end": """
class Store:
    def clone(self):
        return self

    def check(self, keys):
        return not keys[0].endswith("call")

    def get(self, key):
        return b"gone"

    def set(self, key, value):
        print(value, flush=True) if value == "gone" else None

dog.close()
dog = module.Watchdog(rank=0, world_size=2, timeout_s=1.0, store=Store(), folder=folder)
time.sleep(3)
dog.close()
""",
    "no store": """
class Gone:
    def clone(self):
        time.sleep(100)

dog.close()
dog = module.Watchdog(
    rank=3, world_size=4, timeout_s=2.0, store=Gone(), folder=folder, started="now"
)
with dog.phase("data"):
    stuck()
""",
}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    folder: Path

    def report(self) -> str:
        return (self.folder / f"{STARTED}-rank0.txt").read_text()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Every piece of CODE behind SETUP, each in a process of its own that the watchdog ends, all at once."""
    started = {}
    for name, code in CODE.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_")) / "hangs"
        if name == "loop":
            folder.mkdir()
            (folder / "20250101-000000-rank0.txt").write_text("")  # of a job that was killed
            (folder / "20250101-000000-rank1.txt").write_text("(most recent call first):")
        command = [sys.executable, "-c", SETUP + code, str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = (folder, subprocess.Popen(command, **pipes))
    found = {}
    for name, (folder, process) in started.items():
        out, err = process.communicate(timeout=90)
        found[name] = Done(process.returncode, out, err, folder)
    return found


def test_an_endless_loop_is_reported_and_ended(done: dict[str, Done]) -> None:
    loop = done["loop"]
    assert loop.code == 3, loop.err
    message = " ".join(loop.err.split())
    assert "error: step 7: rank 0 did not answer within parallel.timeout_s = 2" in message
    assert "step 7, data, at" in message and "in stuck" in message
    assert str(loop.folder) in loop.err and "resumes from the last checkpoint" in message
    assert not is_running(loop.out.strip())  # its child
    names = sorted(path.name for path in loop.folder.iterdir())
    assert names == ["20250101-000000-rank1.txt", f"{STARTED}-rank0.txt"]
    report = loop.report()
    for part in ("rank 0 (host ", "step 7, data, for ", "MainThread", "watchdog", "in stuck"):
        assert part in report
    assert "most recent call first" in report


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_held_interpreter_is_reported_and_ended(done: dict[str, Done]) -> None:
    held = done["held"]
    assert held.code == 1, held.err
    assert "Timeout" in held.report() and "in held" in held.report()


def test_what_may_take_long_does_not_trip(done: dict[str, Done]) -> None:
    slow = done["slow"]
    assert slow.code == 0, slow.err
    assert not slow.folder.exists()  # no report, no folder


def test_the_first_step_may_compile(done: dict[str, Done]) -> None:
    first = done["first step"]
    assert (first.code, first.out) == (3, "warm\n"), first.err


def test_a_collective_that_timed_out_is_a_hang(done: dict[str, Done]) -> None:
    """In a phase that is not watched, such as a save, the collectives' own timeout remains."""
    collective = done["collective"]
    assert collective.code == 3, collective.err
    report = collective.report()
    assert "step 7, between phases" in report
    assert "Timed out waiting 600000ms" in report and "in all_reduce" in report


def test_without_a_folder_the_report_goes_to_standard_error(done: dict[str, Done]) -> None:
    no_folder = done["no folder"]
    assert no_folder.code == 3
    assert "most recent call first" in no_folder.err and "Every stack: above" in no_folder.err


def test_a_full_disk_does_not_stop_the_watchdog(done: dict[str, Done]) -> None:
    full = done["full disk"]
    assert full.code == 3, full.err
    assert "no report: [Errno 28]" in full.err and "in stuck" in full.err


def test_a_report_that_cannot_be_opened_does_not_end_a_run(done: dict[str, Done]) -> None:
    no_file = done["no report file"]
    assert no_file.code == 3, no_file.err
    assert "no report file: [Errno 17]" in no_file.err and "in stuck" in no_file.err
    assert "Traceback" not in no_file.err


def test_a_stopped_rank_is_noticed_in_every_phase(done: dict[str, Done]) -> None:
    stopped = done["stopped neighbour"]
    assert stopped.code == 3, (stopped.out, stopped.err)
    assert "rank 1 did not answer within parallel.timeout_s = 2" in " ".join(stopped.err.split())
    report = (stopped.folder / "now-rank0.txt").read_text()
    assert "rank 1 has given no sign of life" in report
    leaving = done["neighbour at its end"]
    assert (leaving.code, leaving.out) == (0, "gone\n"), leaving.err


def test_a_dead_store_does_not_stop_the_watchdog(done: dict[str, Done]) -> None:
    no_store = done["no store"]
    assert no_store.code == 3, no_store.err
    message = " ".join(no_store.err.split())
    assert "data: rank 3 waited longer than parallel.timeout_s = 2, and the job's store" in message
    assert "in stuck" in (no_store.folder / "now-rank3.txt").read_text()


def test_collectives_give_up_after_the_watchdog() -> None:
    for timeout_s in (1.0, 10.0, 600.0, 7200.0):
        assert grace_s(timeout_s) >= 5
        first_step_s = max(timeout_s, FIRST_STEP_S)
        assert first_step_s + grace_s(timeout_s) < collective_timeout_s(timeout_s)
    assert collective_timeout_s(600.0) == 660


def sighting(rank: int, phase: str, passed: int, *, waits: bool = True, step: int = 5) -> Sighting:
    return Sighting(rank, "n1", 100 + rank, step, phase, passed, "a.py:1 in f", waits)


def told(reports: list[Sighting], silent: dict[int, Sighting | None] | None = None) -> list[str]:
    return explain({r.rank: r for r in reports}, silent or {}, 10.0, "runs/x/hangs/*").splitlines()


def test_the_rank_behind_in_its_own_code_is_named() -> None:
    reports = [sighting(r, "forward and backward", 12) for r in (0, 2, 3)]
    lines = told([*reports, sighting(1, "data", 10, waits=False)])
    assert lines[0].startswith("step 5: rank 1 did not answer within parallel.timeout_s = 10")
    assert lines[1] == "  rank 1 (host n1, pid 101): step 5, data, at a.py:1 in f"
    assert lines[2] == "  waiting: ranks 0, 2, 3 in step 5, forward and backward"
    assert "runs/x/hangs/*" in lines[3] and len(lines) == 4


def test_a_silent_rank_is_named_with_its_last_place() -> None:
    reports = [sighting(0, "forward and backward", 12), sighting(1, "data", 10, waits=False)]
    lines = told(reports, {2: sighting(2, "optimizer", 9, step=4), 3: None})
    assert lines[0].startswith("step 5: ranks 1, 2, 3 did not answer")
    assert "rank 2 (host n1, pid 102) left no report; last seen in step 4, optimizer: " in lines[1]
    assert lines[2].startswith("  rank 3: stopped, dead")
    assert lines[3] == "  rank 1 (host n1, pid 101): step 5, data, at a.py:1 in f"


def test_nobody_is_blamed_without_reason() -> None:
    lines = told([sighting(r, "forward and backward", 12) for r in range(2)])
    assert lines[0].startswith("step 5: a rank did not answer")
    assert lines[1].startswith("  waiting for one another, none behind the others: ranks 0, 1 in")
    # on GPUs a main thread that waits is seen in our own code, at the first value that it reads
    waiting = [sighting(r, "forward and backward", 12, waits=False) for r in (0, 1)]
    lines = told(waiting, {2: sighting(2, "forward and backward", 12)})
    assert lines[0].startswith("step 5: rank 2 did not answer")
    assert len(lines) == 4


@pytest.mark.parametrize("count", [8, 9, 500])
def test_lists_of_ranks_end(count: int) -> None:
    lines = told([sighting(count, "x", 1)], dict.fromkeys(range(count)))
    assert ("and" in lines[0].split(" did ")[0]) == (count > 8)
    assert len(lines) == 1 + 8 + 1 + 1
