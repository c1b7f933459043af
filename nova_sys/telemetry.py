"""What a run shows and leaves behind: metrics.jsonl, TensorBoard, a progress bar. Traces: `profiling.py`."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from nova_sys.config import LogConfig
from nova_sys.log import console

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

TAGS = {  # name in a record and in metrics.jsonl -> TensorBoard tag
    "loss": "{algo}/loss",
    "margin": "{algo}/margin",
    "reward_accuracy": "{algo}/reward_accuracy",
    "chosen_reward": "{algo}/chosen_reward",
    "rejected_reward": "{algo}/rejected_reward",
    "chosen_logp": "{algo}/chosen_logp",
    "rejected_logp": "{algo}/rejected_logp",
    "nll": "{algo}/nll",
    "drift": "{algo}/drift",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped": "optim/skipped",  # 1: the step was not finite and changed nothing, else 0
    "tokens_per_s": "perf/tokens_per_s",
    "tokens_per_s_per_gpu": "perf/tokens_per_s_per_gpu",
    "pairs_per_s": "perf/pairs_per_s",
    "step_time_s": "perf/step_time_s",
    "data_wait_ms": "perf/data_wait_ms",
    "mfu": "perf/mfu",
    "peak_gib": "memory/peak_gib",
    "gpu_power_w": "gpu/power_w",
    "gpu_utilization_percent": "gpu/utilization_percent",
    "gpu_sm_clock_mhz": "gpu/sm_clock_mhz",
    "gpu_memory_clock_mhz": "gpu/memory_clock_mhz",
    "gpu_temperature_c": "gpu/temperature_c",
    "gpu_used_gib": "gpu/used_gib",
    "gpu_energy_mj_per_token": "gpu/energy_mj_per_token",
    "fill": "data/fill",
    "epoch": "data/epoch",
    "num_pairs": "data/num_pairs",
    "num_tokens": "data/num_tokens",
}
SHOWN = {  # what the bar and the plain lines say, in this order
    "loss": "loss {:.4f}",
    "reward_accuracy": "acc {:.3f}",
    "margin": "margin {:+.3f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "pairs_per_s": "{:,.1f} pairs/s",
    "peak_gib": "{:.2f} GiB",
}

Record = Mapping[str, float | int | None]


class Telemetry:
    """Takes one record per optimizer step on the main rank; on other ranks it does nothing.

    A record has `step` (1-based) and any of `TAGS`; None means "no value". What an earlier run
    wrote for steps beyond `start_step` is taken back. A disk that does not take a record is noted in
    `problem`, for the ranks to end together: after it nothing is written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        algorithm: str,
        log: LogConfig,
        start_step: int,
        total_steps: int,
        config_text: str,
        is_main: bool,
    ) -> None:
        self._is_main = is_main
        self.problem: str | None = None
        if not is_main:
            return
        self._run_dir = run_dir
        self._algorithm = algorithm
        self._first_step = start_step + 1
        self._total_steps = total_steps
        self._every_steps = log.every_steps
        self._metrics: TextIO | None = None
        self._writer: SummaryWriter | None = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = _open_metrics(run_dir / "metrics.jsonl", start_step)
            if log.tensorboard:
                self._writer = _open_tensorboard(run_dir / "tensorboard", start_step)
                self._writer.add_text("config/toml", f"```toml\n{config_text}\n```", start_step)
        except OSError as error:
            self._note(error, start_step)
        self._bar: _Bar | None = None
        if self.problem is None and log.progress and console().is_terminal:
            self._bar = _Bar(algorithm, start_step, total_steps)

    def step(self, record: Record, histograms: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes and shows one step; histograms: values by TensorBoard tag. Raises: ValueError for a name that is not in `TAGS`."""
        if not self._is_main:
            return
        unknown = [name for name in record if name != "step" and name not in TAGS]
        if unknown or "step" not in record:
            raise ValueError(_record_problem(record, unknown))
        values = {name: _number(value) for name, value in record.items()}
        step = int(values["step"] or 0)
        finite = {
            name: v if v is not None and math.isfinite(v) else None for name, v in values.items()
        }
        try:
            if self.problem is None and self._metrics:
                self._metrics.write(json.dumps(finite, allow_nan=False) + "\n")
                self._write_tensorboard(step, values, histograms or {})
        except OSError as error:
            self._note(error, step)
        self._show(step, values)

    def refuse_problem(self) -> None:
        """Returns when every record survives a loss of power. Raises: ValueError when one cannot be written. On the main rank."""
        try:
            if self.problem is None and self._metrics:
                os.fsync(self._metrics.fileno())
        except OSError as error:
            self._note(error, None)
        if self.problem is not None:
            raise ValueError(self.problem)

    def _note(self, error: OSError, step: int | None) -> None:
        place = f"step {step}: " if step else ""
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(self._run_dir).free:,}"
        self.problem = (
            f"{place}the metrics cannot be written into {self._run_dir} ({error.strerror}; "
            f"{free} bytes are free there). Make room; the same "
            "command then continues from the last checkpoint, and nothing of the metrics is missing"
        )

    def close(self) -> None:
        if not self._is_main:
            return
        if self._bar:
            self._bar.stop()
        for file in (self._writer, self._metrics):
            with suppress(OSError):  # a full disk, which step has noted
                if file:
                    file.close()

    def _write_tensorboard(
        self,
        step: int,
        values: dict[str, float | int | None],
        histograms: Mapping[str, np.ndarray],
    ) -> None:
        if not self._writer:
            return
        for name, value in values.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(TAGS[name].format(algo=self._algorithm), value, step)
        for tag, numbers in histograms.items():
            self._writer.add_histogram(tag, numbers, step)

    def _show(self, step: int, values: dict[str, float | int | None]) -> None:
        shown = [
            text.format(v) for name, text in SHOWN.items() if (v := values.get(name)) is not None
        ]
        if self._bar:
            self._bar.update(step, "  ".join(shown))
        elif step in (self._first_step, self._total_steps) or step % self._every_steps == 0:
            logger.info("step %d/%d  %s", step, self._total_steps, "  ".join(shown))


def _record_problem(record: Record, unknown: list[str]) -> str:
    if not unknown:
        return f"telemetry record {sorted(record)}: has no step; add the 1-based step number"
    close = get_close_matches(unknown[0], TAGS, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else "add it to TAGS in telemetry.py"
    return f"telemetry record: {unknown[0]!r} is not a known metric; {remedy}"


def _number(value: float | int | None) -> float | int | None:
    return value if value is None or isinstance(value, int) else float(value)  # numpy scalars too


def _open_metrics(path: Path, start_step: int) -> TextIO:
    """Opens metrics.jsonl for appending, without rows beyond `start_step` and torn ones."""
    if path.exists():
        repaired = path.with_suffix(".jsonl.tmp")
        try:
            with path.open("rb") as old, repaired.open("wb") as new:
                new.writelines(row.rstrip() + b"\n" for row in old if _row_step(row) <= start_step)
            os.replace(repaired, path)
        except OSError:
            with suppress(OSError):
                repaired.unlink(missing_ok=True)
            raise
    return path.open("a", encoding="utf-8", buffering=1)  # by line: a kill loses no finished step


def _row_step(row: bytes) -> float:
    """The step of a row; infinity for one that a kill left half-written."""
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _report_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread keeps an OSError for the next record, and need not print it as well."""
    of_writer = type(args.thread).__module__.startswith("tensorboard.")
    if not (of_writer and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)


def _open_tensorboard(folder: Path, start_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = _report_thread
    # purge_step: readers drop what an interrupted run wrote for this step and later ones
    return SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)


class _Bar:
    """Two live lines at the bottom of a terminal: progress and ETA, then the newest values."""

    def __init__(self, algorithm: str, start_step: int, total_steps: int) -> None:
        from rich import progress
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(algorithm, completed=start_step, total=total_steps)
        self._values = Text(no_wrap=True, overflow="ellipsis")
        lines = Group(self._progress, self._values)
        # the refresh thread shares a core with the training loop: 4 per second are enough
        self._live = Live(lines, console=console(), refresh_per_second=4)
        self._live.start()

    def update(self, step: int, values: str) -> None:
        self._progress.update(self._task, completed=step)
        self._values.plain = values

    def stop(self) -> None:
        self._live.stop()
