"""How far a long preparation is: a bar on a terminal, otherwise a line per tenth."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from nova_sys.data.token_store import StoreReport

logger = logging.getLogger(__name__)

QUIET_S = 2.0
"""Nothing is shown of what takes no longer."""


class Meter:
    """Bytes read of a known total, and the speed since this process began.

    done: what becomes of the bytes, in one word such as "tokenised".
    """

    def __init__(self, total_bytes: int, done: str, *, with_bar: bool) -> None:
        self._total_bytes, self._done, self._with_bar = total_bytes, done, with_bar
        self._bar: Bar | None = None
        self._began_s = 0.0
        self._first: tuple[int, int, int] | None = None  # bytes, records, tokens at the first call
        self._tenths = 0

    def __enter__(self) -> Meter:
        self._began_s = time.monotonic()
        return self

    def show(self, bytes_done: int, report: StoreReport | None = None) -> None:
        now = (bytes_done, report.num_records, report.num_tokens) if report else (bytes_done, 0, 0)
        self._first = self._first or now
        seconds = time.monotonic() - self._began_s
        if seconds < QUIET_S:
            return
        done, records, tokens = (b - a for a, b in zip(self._first, now, strict=True))
        left_s = (self._total_bytes - bytes_done) * seconds / max(done, 1)
        speed = f"{records / seconds:,.0f} records/s, {tokens / seconds:,.0f} tokens/s"
        text = f"{speed if report else f'{done / seconds / 1e6:,.0f} MB/s'}, {_clock(left_s)} left"
        if self._bar is None:
            self._bar = _new_bar(self._total_bytes, self._done, self._with_bar)
        self._bar.update(self._bar.task_ids[0], completed=bytes_done, speed=text)
        tenths = 10 * bytes_done // max(self._total_bytes, 1)
        if self._bar.disable and tenths > self._tenths:
            logger.info("data: %d%% %s, %s", 10 * tenths, self._done, text)
        self._tenths = tenths

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _new_bar(total_bytes: int, done: str, with_bar: bool) -> Bar:
    """On standard error, gone when it is done; disabled where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    columns = [
        TextColumn(done),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
    ]
    bar = Progress(
        *columns, console=console, transient=True, disable=not (with_bar and console.is_terminal)
    )
    bar.add_task(done, total=total_bytes, speed="")
    bar.start()
    return bar


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )
