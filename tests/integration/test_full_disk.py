"""A disk that is full, or a quota: the run ends with what is needed and what is free, and loses nothing that was saved."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_sys.checkpoint_files import file_sizes, refuse_damaged


class SmallDisk:
    """A file system in memory, of a size that may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self, num_bytes: int, *options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={num_bytes}", *options]), "tmpfs"]
        done = subprocess.run([*command, self.folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def fill(self) -> Path:
        filler = self.folder / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as out:
            while True:
                out.write(bytes(4096))
        return filler


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk.folder], capture_output=True)


def move(run: Any, disk: SmallDisk) -> None:
    run.folder = disk.folder / "run"
    run.settings = {**run.settings, "checkpoint.keep": 100, "checkpoint.every_steps": 4}


@pytest.mark.parametrize(("nproc", "asynchronous"), [(1, True), (2, False)])
def test_no_room_for_the_next_checkpoint(
    make_run: Callable[..., Any],
    undisturbed: Callable[[int], Any],
    small_disk: SmallDisk,
    nproc: int,
    asynchronous: bool,
) -> None:
    size = sum(file_sizes(undisturbed(1).checkpoints()[-1]).values())
    small_disk.mount(int(2.8 * size) + (1 << 20))
    run = make_run(checkpoint__asynchronous=asynchronous)
    move(run, small_disk)
    run.start(nproc)
    assert run.wait() == 2, run.text
    assert all(process.poll() == 2 for process in run.processes)
    found = re.search(r"the checkpoint (\S+) could not be saved: the disk is too full. It needs ([\d,]+) bytes; ([\d,]+) are free", run.text)  # fmt: skip
    assert found and found[1].startswith(str(run.folder / "checkpoints")), run.text
    needed, free = (int(number.replace(",", "")) for number in found.groups()[1:])
    assert size < needed < 1.5 * size + (2 << 20) and free < needed
    names = ["step_00000004", "step_00000008"]
    assert [path.name for path in run.checkpoints()] == names[: len(run.checkpoints())] != []
    assert f"continues from {run.checkpoints()[-1]}" in run.text and "Traceback" not in run.text
    run.assert_tidy()
    for checkpoint in run.checkpoints():
        refuse_damaged(checkpoint)
    small_disk.mount(100 << 20, "remount")
    run.finish(nproc)
    assert "resumed from" in run.text
    run.assert_same_as(undisturbed(nproc))


@pytest.mark.parametrize(
    ("nproc", "asynchronous", "fault"),
    [
        (1, False, "quota"),
        (2, True, "quota"),
        (1, True, "race"),
        (2, False, "race"),
        (2, True, "fork"),
    ],
)
def test_a_write_that_fails(
    make_run: Callable[..., Any],
    small_disk: SmallDisk,
    nproc: int,
    asynchronous: bool,
    fault: str,
) -> None:
    """What no look at the disk foretells, a quota or somebody else's files: the writers fail in the middle of theirs. Or one
    rank cannot start its own."""
    small_disk.mount(100 << 20)
    run = make_run(checkpoint__asynchronous=asynchronous, train__steps=4)
    move(run, small_disk)
    run.finish(nproc)
    run.settings["train.steps"] = 24
    if fault == "quota":
        most = 100_000 // nproc**2  # bytes of a file: the second is used up before the save begins
        run.first = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most},) * 2)"
        problem = "File too large"
    elif fault == "fork":
        run.first = (
            "import os\ndef fork(): raise OSError(12, 'Cannot allocate memory')\n"
            "if os.environ['RANK'] == '1': os.fork = fork"
        )
        problem = "Cannot allocate memory"
    else:
        run.first = (
            "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(0, 0, 10**15)"
        )
        problem = "No space left on device"
        small_disk.mount(int(1.5 * shutil.disk_usage(small_disk.folder).used), "remount")
    run.start(nproc)
    assert run.wait() == 2, run.text
    assert all(process.poll() == 2 for process in run.processes)
    assert re.search(rf"could not be saved: .*{problem}.*It needs [\d,]+ bytes", run.text), run.text
    assert f"continues from {run.folder}/checkpoints/step_00000004" in run.text
    assert "Traceback" not in run.text
    run.assert_tidy()
    assert len(run.checkpoints()) == 1
    small_disk.mount(100 << 20, "remount")
    run.first = ""
    run.finish(nproc)
    assert [row["step"] for row in run.rows()] == [*range(1, 25)]


def test_no_room_for_metrics(
    make_run: Callable[..., Any], undisturbed: Callable[[int], Any], small_disk: SmallDisk
) -> None:
    """The run ends without a checkpoint of steps that the metrics lack, so that the next start leaves no gap in them."""
    small_disk.mount(20 << 20)
    run = make_run(log__tensorboard=True)
    move(run, small_disk)
    run.settings["checkpoint.every_steps"] = 0  # no save is in the way
    run.start()
    run.until(lambda: len(run.rows()) >= 5)
    filler = small_disk.fill()
    assert run.wait() == 2, run.text
    assert "Traceback" not in run.text
    found = re.search(
        r"step (\d+): the metrics cannot be written into (\S+) \(No space left", run.text
    )
    assert found and found[2] == str(run.folder), run.text
    assert "could not be saved" not in run.text and not run.checkpoints()
    filler.unlink()
    run.finish()
    run.assert_same_as(undisturbed(1))


def test_a_folder_that_cannot_be_written_to(
    make_run: Callable[..., Any], small_disk: SmallDisk
) -> None:
    small_disk.mount(1 << 20, "ro")
    run = make_run()
    move(run, small_disk)
    run.start()
    assert run.wait() == 2, run.text
    assert f"run.dir={run.folder} cannot be written to (Read-only file system)" in run.text
    assert shutil.disk_usage(small_disk.folder).used == 0


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_writer_that_gets_nothing_written(
    make_run: Callable[..., Any], asynchronous: bool
) -> None:
    """It is named, and the job ends: waiting for it would never end."""
    run = make_run(
        checkpoint__asynchronous=asynchronous,
        checkpoint__every_steps=4,
        parallel__timeout_s=5,
        train__steps=100_000,
    )
    run.first = (
        "import os, signal; from nova_sys.shards import PlannedShards; write = PlannedShards.write\n"
        "def stopped(self):\n"
        "    if os.environ['RANK'] == '1' and 'step_00000008' in str(self._folder):\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return write(self)\n"
        "PlannedShards.write = stopped"
    )
    run.start(2)
    assert run.wait() == 3, run.text
    assert all(process.poll() == 3 for process in run.processes)
    text = " ".join(run.text.split())
    assert re.search(rf"the checkpoint {run.folder}/checkpoints/\.step_00000008\S* could not be saved: the writing process of rank 1 \(host \S+, pid \d+\) has written nothing for parallel.timeout_s = 5", text), text  # fmt: skip
    began = time.monotonic()
    while left := run.alive():
        assert time.monotonic() - began < 30, left
        time.sleep(0.05)
    assert [path.name for path in run.checkpoints()] == ["step_00000004"]
