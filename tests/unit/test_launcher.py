"""Jobs of two processes through torch's elastic launcher: exit codes, messages, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nova_sys
from nova_sys.launcher import launch

JOB = """
import os, signal, sys, time
from nova_sys.errors import exit_on_user_error

def main(argv):
    with exit_on_user_error():
        ACTIONS[argv[0]](int(os.environ["RANK"]))

def reduce(rank):
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    print(f"<rank {rank} of {os.environ['WORLD_SIZE']}: {total.item()}, "
          f"{os.environ['OMP_NUM_THREADS']} threads>", flush=True)
    dist.destroy_process_group()

def mistake(rank):
    if rank == 1:
        raise ValueError("beta = 0: must be above 0; raise it")
    time.sleep(60)

def fault(rank):
    if rank == 1:
        raise RuntimeError("a fault of ours")
    time.sleep(60)

def killed(rank):
    if rank == 1:
        os.kill(os.getpid(), 9)
    time.sleep(60)

def wait(rank):
    os.write(1, f"<pid {os.getpid()}>\\n".encode())  # one write: lines of two ranks do not mix
    time.sleep(60)

def leave(rank):
    sys.exit(7)

def stubborn(rank):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait(rank)

def polite(rank):
    def save(number, frame):
        time.sleep(1)
        os.write(1, b"<saved>\\n")
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    wait(rank)

ACTIONS = {f.__name__: f for f in (reduce, mistake, fault, killed, wait, leave, stubborn, polite)}

if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The name of a module that workers can import."""
    (tmp_path / "nova_test_job.py").write_text(JOB)
    paths = [str(tmp_path), str(Path(nova_sys.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield "nova_test_job"
    sys.modules.pop("nova_test_job", None)


def test_two_processes_work_together(job, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert launch(job, ["reduce"], 2) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    output = capfd.readouterr()
    assert f"<rank 0 of 2: 3, {threads} threads>" in output.out
    assert f"<rank 1 of 2: 3, {threads} threads>" in output.out
    assert "error" not in output.err
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert not {"OMP_NUM_THREADS", "NOVA_LAUNCHED", "RANK"} & set(os.environ)


def test_a_mistake_on_any_rank_is_told_once_without_traceback(job, capfd):
    began = time.monotonic()
    assert launch(job, ["mistake"], 2) == 2
    assert capfd.readouterr().err.strip() == "error: beta = 0: must be above 0; raise it"
    assert time.monotonic() - began < 50  # the other rank was not waited for


@pytest.mark.parametrize(
    ("action", "exit_code", "message"),
    [
        ("fault", 1, "rank 1 failed first, with exit code 1. RuntimeError: a fault of ours"),
        ("killed", 137, "rank 1 was ended by SIGKILL; is the machine out of memory?"),
    ],
)
def test_a_failing_worker_gives_exit_code_and_reason(job, capfd, action, exit_code, message):
    assert launch(job, [action], 2) == exit_code
    errors = capfd.readouterr().err
    assert f"error: {message}" in errors
    assert "ChildFailedError" not in errors  # the agent's own report
    assert ("in fault" in errors) == (action == "fault")  # the worker's traceback


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_worker_outlives_the_launcher(job, number, exit_code):
    code = (
        f"import sys; from nova_sys.launcher import launch; sys.exit(launch('{job}', ['wait'], 2))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    workers = [int(launcher.stdout.readline().split()[1].rstrip(">")) for _ in range(2)]
    launcher.send_signal(number)
    assert launcher.wait(40) == exit_code
    patience = time.monotonic() + 20
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < patience, "a worker is still there"
        time.sleep(0.05)
    launcher.stdout.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_one_process_is_this_process(job, capfd):
    environment = dict(os.environ)
    assert launch(job, ["leave"], 1) == 7
    assert launch(job, ["reduce"], 1) == 0
    threads = len(os.sched_getaffinity(0))
    assert f"<rank 0 of 1: 1, {threads} threads>" in capfd.readouterr().out
    assert dict(os.environ) == environment


def test_a_fault_in_one_process_keeps_its_traceback(job, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # an environment that already is a rank's stays as it is
    with pytest.raises(RuntimeError, match="a fault of ours"):
        launch(job, ["fault"], 1)


def test_a_number_of_processes_below_one(job):
    with pytest.raises(ValueError, match="nproc = 0: must be 1 or more"):
        launch(job, [], 0)


def test_a_second_signal_ends_the_job_at_once(job):
    code = (
        "import sys; from nova_sys import launcher; launcher.ONE_SIGNAL_S = 0.1; "
        f"sys.exit(launcher.launch('{job}', ['stubborn'], 2))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    workers = [int(launcher.stdout.readline().split()[1].rstrip(">")) for _ in range(2)]
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # longer than signals count as one
    assert launcher.poll() is None and all(map(is_running, workers))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(40) == 128 + signal.SIGTERM
    assert not any(map(is_running, workers))
    launcher.stdout.close()


def test_workers_that_end_well_after_a_signal_end_the_job_well(job):
    code = f"import sys; from nova_sys import launcher; sys.exit(launcher.launch('{job}', ['polite'], 2))"
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    for _ in range(2):
        launcher.stdout.readline()
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0 and out.count("<saved>") == 2
