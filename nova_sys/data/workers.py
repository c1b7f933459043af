"""Blocks to documents in several processes, in the order of the blocks.

The processes are fresh interpreters that import this package's data modules only (a quarter of a second, no torch): a fork would
copy a process that may run threads of torch, gloo or a tokenizer, and a spawn of multiprocessing would import the caller's main
module. They end when their standard input does, that is with the process that started them, however that one ends.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NoReturn

from nova_sys.data.documents import DocumentRules, Documents, documents_of
from nova_sys.data.lines import Block
from nova_sys.data.records import DataError

_END_S = 10.0

BLOCKS_ALONE = 4
"""So many blocks are done before processes are started: small data would wait for them longer than for its tokens."""

PATIENCE_S = 600.0
"""A process that needs longer for a block has stopped."""

# Without the current folder, which -c would search first, and which may hold anything.
_COMMAND = "import sys; sys.path = [p for p in sys.path if p]; from nova_sys.data.workers import main; main()"

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that this process may use: its CPU set (taskset, a container's cpuset), or fewer where a cgroup limits CPU time."""
    counted = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if counted else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *_quotas()])))


def _quotas() -> Iterator[float]:
    """CPU seconds per second that this process's cgroup and those around it may use; version 2, then 1."""
    for line in _text(_OWN_CGROUPS).splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS if number == "0" else _CGROUPS / "cpu"
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            limit = _text(folder / "cpu.max") or " ".join(
                _text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")
            )
            quota, _, period = limit.partition(" ")
            if quota.isdecimal() and period.strip().isdecimal():  # not "max" or -1
                yield int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def tokenise_blocks(
    blocks: Iterator[Block], rules: DocumentRules, num_workers: int
) -> Iterator[tuple[Block, Documents]]:
    """Each block with its documents, in order, whatever the number of workers; 1 is this process.

    Raises: DataError for the first mistake in input order; RuntimeError when a process dies, stops, or has a fault.
    """
    for block in blocks if num_workers == 1 else islice(blocks, BLOCKS_ALONE):
        yield block, documents_of(block, rules)
    if num_workers > 1:
        pool = _Pool(rules, num_workers)
        try:
            yield from pool.run(blocks)
        finally:
            pool.end()


@dataclass
class _Job:
    block: Block | None
    """Without its data once it was handed out."""
    documents: Documents | None = None
    problem: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.documents is not None or self.problem is not None

    def result(self) -> tuple[Block, Documents]:
        if self.problem is not None:
            raise self.problem
        assert self.block is not None and self.documents is not None
        return self.block, self.documents


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    is_free: bool = False
    """False while it starts, too: its first message says that it is there."""
    job: _Job | None = None


class _Pool:
    """A process has one block at a time, and is only written to when it reads: neither side waits for the other in a circle."""

    def __init__(self, rules: DocumentRules, num_workers: int) -> None:
        self._rules, self._num_workers = rules, num_workers
        self._workers: list[_Worker] = []

    def run(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Documents]]:
        unreturned: deque[_Job] = deque()  # in input order; its bound is what bounds the memory
        job = _next_job(blocks)
        while unreturned or job is not None:
            while job is not None and len(unreturned) < 2 * self._num_workers:
                if job.problem is None and not self._hand_out(job):
                    break
                unreturned.append(job)
                job = _next_job(blocks) if job.problem is None else None
            if unreturned and unreturned[0].is_done:
                yield unreturned.popleft().result()
            else:
                self._collect()

    def _hand_out(self, job: _Job) -> bool:
        """Whether a process was free; if not, one more is started, so that there are no more of them than blocks to do."""
        worker = next((worker for worker in self._workers if worker.is_free), None)
        if worker is None:
            if len(self._workers) < self._num_workers:
                self._start()
            return False
        assert job.block is not None
        try:
            worker.connection.send(job.block)
        except BlockingIOError:
            self._tell_stop(worker)
        except OSError:
            self._tell_death(worker)
        worker.is_free, worker.job = False, job
        job.block = replace(job.block, data=b"")
        return True

    def _collect(self) -> None:
        """Waits for at least one message, and takes all that are there."""
        busy = {worker.connection: worker for worker in self._workers if not worker.is_free}
        ready = wait(list(busy), PATIENCE_S)
        if not ready:
            self._tell_stop(next(iter(busy.values())))
        for connection in ready:
            worker = busy[connection]  # pyright: ignore[reportArgumentType]
            try:
                message = worker.connection.recv()
                if worker.job is None:
                    worker.connection.send(self._rules)
                else:
                    worker.job.documents, worker.job.problem = message
            except BlockingIOError:
                self._tell_stop(worker)
            except (EOFError, OSError):
                self._tell_death(worker)
            worker.is_free, worker.job = True, None

    def _tell_stop(self, worker: _Worker) -> NoReturn:
        at = worker.job.block if worker.job else None
        where = f" at {at.path}:{at.first_line}-{at.next_line - 1}" if at else ""
        raise RuntimeError(
            f"process {worker.process.pid}, which tokenises, does not answer{where}: it had {PATIENCE_S:.0f} s for it. Is it stopped, or "
            "the machine out of memory? What is done so far is kept: the same command goes on from there"
        ) from None

    def _tell_death(self, worker: _Worker) -> NoReturn:
        try:
            code = worker.process.wait(_END_S)
        except subprocess.TimeoutExpired:  # it has hung up, but does not end
            self._tell_stop(worker)
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        why = "; is the machine out of memory? Then set data.workers lower" if code == -9 else ""
        raise RuntimeError(
            f"a process that tokenises {how}{why}. What is done so far is kept: the same command goes on from there"
        ) from None

    def _start(self) -> None:
        ours, theirs = Pipe()
        here = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **here},
            start_new_session=True,  # Ctrl-C is for the process that started this one
        )
        theirs.close()
        _limit_waiting(ours)
        self._workers.append(_Worker(process, ours))

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.connection.close()
            assert worker.process.stdin is not None
            worker.process.stdin.close()
            worker.process.wait()


def _next_job(blocks: Iterator[Block]) -> _Job | None:
    """A block to hand out, or what went wrong with reading it: that is told when its turn has come."""
    try:
        block = next(blocks, None)
    except (ValueError, OSError) as error:
        return _Job(None, problem=error)
    return None if block is None else _Job(block)


def _limit_waiting(connection: Connection) -> None:
    """Sending, or receiving the rest of a message, fails with BlockingIOError when the other side stops in the middle of it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            seconds, rest = divmod(PATIENCE_S, 1)
            limit = struct.pack("ll", int(seconds), int(1e6 * rest))
            end.setsockopt(socket.SOL_SOCKET, option, limit)


def main() -> None:
    """A process: says that it is there, gets the rules, then blocks until the connection ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    try:
        connection.send("ready")
        rules: DocumentRules = connection.recv()
        while True:
            connection.send(_outcome(connection.recv(), rules))
    except (EOFError, OSError):
        pass  # the parent wants no more


def _outcome(block: Block, rules: DocumentRules) -> tuple[Documents | None, Exception | None]:
    try:
        return documents_of(block, rules), None
    except DataError as error:
        return None, DataError(str(error))
    except Exception:
        return None, RuntimeError(f"in a process that tokenises: {traceback.format_exc()}")


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
