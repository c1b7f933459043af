"""What is seen of a long preparation: a bar, or a line per tenth; nothing of a short one."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from nova_sys.data import progress
from nova_sys.data.token_store import StoreReport


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, with_bar: bool) -> None:
    """A minute of 60 MB: a million tokens per second."""
    seconds = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)
    with progress.Meter(60_000_000, "tokenised", with_bar=with_bar) as meter:
        for second in range(61):
            seconds = float(second)
            report = StoreReport(num_records=1000 * second, num_tokens=10**6 * second)
            meter.show(10**6 * second, report)


def test_a_line_per_tenth(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    show(monkeypatch, with_bar=True)  # standard error is no terminal here
    assert len(caplog.messages) == 10
    expected = "data: 50% tokenised, 1,000 records/s, 1,000,000 tokens/s, 0:30 left"
    assert caplog.messages[4] == expected
    caplog.clear()
    monkeypatch.setattr(sys, "stderr", Screen())
    show(monkeypatch, with_bar=False)
    assert len(caplog.messages) == 10


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    caplog.set_level("INFO")
    show(monkeypatch, with_bar=True)
    assert caplog.messages == []
    assert "1,000,000 tokens/s" in screen.getvalue() and "100%" in screen.getvalue()


def test_small_data_shows_nothing(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    caplog.set_level("INFO")
    with progress.Meter(100, "tokenised", with_bar=True) as meter:
        meter.show(100, StoreReport(num_records=3))
    assert caplog.messages == [] and screen.getvalue() == ""
