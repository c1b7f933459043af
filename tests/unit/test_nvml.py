"""What a GPU tells of itself, with a stand-in for NVIDIA's library: values, what it refuses, and ends of all kinds."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nova_sys.nvml import QUERIES, GpuMonitor, Sample, gpu_uuid

UUID = "3c1f1f68-8ff3-c2dc-3b0d-fafd804516ae"


class NVMLError(Exception):
    pass


class FakeNvml:
    """A GPU under `names`, whose power and energy grow with every sample. refused: functions that raise."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "memory", "gpu"

    def __init__(self, *names: str) -> None:
        self.names = names
        self.refused: set[str] = set()
        self.num_samples, self.inits, self.shutdowns = 0, 0, 0
        self.threads: set[threading.Thread] = set()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def _asked(self, function: str) -> None:
        self.threads.add(threading.current_thread())
        self.may_answer.wait(timeout=60)
        if function in self.refused or "all" in self.refused:
            raise NVMLError("Not Supported" if "all" not in self.refused else "GPU is lost")

    def nvmlInit(self) -> None:
        self._asked("nvmlInit")
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self.shutdowns += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.names:
            raise NVMLError(f"Not Found: {uuid}")
        return uuid

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        assert gpu in self.names
        self.num_samples += 1
        self._asked("power")
        return 400_000 + 1000 * self.num_samples

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        self._asked("utilization")
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: str) -> int:
        self._asked("clock")
        return {"sm": 1755, "memory": 2619}[kind]

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: str) -> int:
        self._asked("temperature")
        return 60 + min(self.num_samples, 5)

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        self._asked("memory")
        return SimpleNamespace(used=3 << 30, total=80 << 30)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> int:
        self._asked("energy")
        return 5_000_000 + 400 * self.num_samples


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(f"GPU-{UUID}")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def start(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], GpuMonitor]]:
    monitors = []

    def started() -> GpuMonitor:
        monitors.append(GpuMonitor(UUID, sample_s=0.01))
        return monitors[-1]

    with caplog.at_level(logging.INFO, "nova_sys"):
        yield started
    for monitor in monitors:
        monitor.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_values_of_the_gpu_with_this_uuid(
    nvml: FakeNvml, start: Callable[[], GpuMonitor], caplog: pytest.LogCaptureFixture
) -> None:
    monitor = start()
    wait_until(lambda: nvml.num_samples > 6)
    found = monitor.since_last()
    assert set(found) == {*QUERIES, "draw_w"} - {"energy_j"}
    assert (found["utilization_percent"], found["used_gib"]) == (97.0, 3.0)
    assert (found["sm_clock_mhz"], found["memory_clock_mhz"]) == (1755.0, 2619.0)
    assert found["temperature_c"] == 65.0  # the hottest sample
    assert 401 < found["power_w"] < 400 + nvml.num_samples  # their mean
    assert 0 < found["draw_w"] <= 0.4 / 0.01
    assert caplog.messages == []


def test_nothing_is_asked_in_the_training_thread(
    nvml: FakeNvml, start: Callable[[], GpuMonitor]
) -> None:
    """A driver that does not answer holds up nobody."""
    nvml.may_answer.clear()
    monitor = start()
    wait_until(lambda: nvml.threads)
    assert monitor.since_last() == {}
    nvml.may_answer.set()
    wait_until(lambda: nvml.num_samples > 1)
    monitor.close()
    assert threading.current_thread() not in nvml.threads


def test_close_ends_the_thread_and_the_library(
    nvml: FakeNvml, start: Callable[[], GpuMonitor]
) -> None:
    monitor = start()
    wait_until(lambda: nvml.num_samples)
    monitor.close()
    assert (nvml.inits, nvml.shutdowns) == (1, 1)
    sampled = nvml.num_samples
    time.sleep(0.05)
    assert nvml.num_samples == sampled
    monitor.close()


def test_what_is_not_supported_is_missing_and_said_once(
    nvml: FakeNvml, start: Callable[[], GpuMonitor], caplog: pytest.LogCaptureFixture
) -> None:
    nvml.refused = {"utilization", "energy"}
    monitor = start()
    wait_until(lambda: nvml.num_samples > 3)
    found = monitor.since_last()
    assert set(found) == {*QUERIES, "draw_w"} - {"energy_j", "utilization_percent"}
    assert found["draw_w"] == found["power_w"]  # no counter
    assert caplog.messages == ["NVML does not tell utilization_percent, energy_j of this GPU"]


def test_an_older_library_without_a_function(
    nvml: FakeNvml, start: Callable[[], GpuMonitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetTotalEnergyConsumption")
    monitor = start()
    wait_until(lambda: nvml.num_samples > 1)
    assert "power_w" in monitor.since_last()


def test_a_gpu_that_is_lost_midway(
    nvml: FakeNvml, start: Callable[[], GpuMonitor], caplog: pytest.LogCaptureFixture
) -> None:
    monitor = start()
    wait_until(lambda: nvml.num_samples > 1)
    assert monitor.since_last()
    nvml.refused = {"all"}
    wait_until(lambda: nvml.shutdowns)
    monitor.since_last()  # of the samples before
    assert monitor.since_last() == monitor.since_last() == {}
    assert caplog.messages == ["no gpu/ metrics from now on: GPU is lost"]


def test_without_the_package(
    start: Callable[[], GpuMonitor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = start()
    wait_until(lambda: caplog.messages)
    assert monitor.since_last() == {}
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("no gpu/ metrics: NVML cannot be used (")


def test_without_a_driver(
    nvml: FakeNvml, start: Callable[[], GpuMonitor], caplog: pytest.LogCaptureFixture
) -> None:
    nvml.refused = {"nvmlInit"}
    monitor = start()
    wait_until(lambda: caplog.messages)
    assert monitor.since_last() == {}
    assert caplog.messages == ["no gpu/ metrics: NVML cannot be used (Not Supported)"]
    assert nvml.shutdowns == 0


def test_a_slice_of_a_gpu_is_found_by_its_own_uuid(
    nvml: FakeNvml, start: Callable[[], GpuMonitor]
) -> None:
    nvml.names = (f"MIG-{UUID}",)
    nvml.refused = {"power", "utilization", "clock", "temperature", "energy"}
    monitor = start()
    wait_until(lambda: nvml.num_samples)
    wait_until(lambda: monitor.since_last() == {"used_gib": 3.0})


def test_an_unknown_gpu(
    nvml: FakeNvml, start: Callable[[], GpuMonitor], caplog: pytest.LogCaptureFixture
) -> None:
    nvml.names = ("GPU-another",)
    start()
    wait_until(lambda: nvml.shutdowns)
    said = f"no gpu/ metrics: NVML says of GPU {UUID}: Not Found: MIG-{UUID}"
    assert caplog.messages == [said]


def samples(monitor: GpuMonitor, *values: tuple[float, dict[str, float]]) -> dict[str, float]:
    monitor._samples += [Sample(*value) for value in values]
    return monitor.since_last()


def test_energy_is_counted_from_the_last_sample_of_the_last_call() -> None:
    monitor = GpuMonitor(None)
    assert monitor.since_last() == {}
    first = samples(monitor, (10.0, {"power_w": 300.0, "energy_j": 1000.0}))
    assert first == {"power_w": 300.0, "draw_w": 300.0}  # one sample: no difference yet
    two = [
        (11.0, {"power_w": 500.0, "energy_j": 1400.0}),
        (12.0, {"power_w": 700.0, "energy_j": 2000.0}),
    ]
    second = samples(monitor, *two)
    assert second == {"power_w": 600.0, "draw_w": 500.0}  # 1000 J in 2 s
    assert samples(monitor) == {"power_w": 700.0, "draw_w": 500.0}  # a step shorter than a second
    assert samples(monitor, (13.0, {"energy_j": 2100.0})) == {"draw_w": 100.0}
    assert samples(monitor, (14.0, {"power_w": 50.0})) == {"power_w": 50.0, "draw_w": 50.0}


def test_the_largest_counts_where_a_mean_would_hide_it() -> None:
    monitor = GpuMonitor(None)
    values = [(float(t), {"temperature_c": c, "used_gib": c / 10}) for t, c in ((1, 60), (2, 80))]
    assert samples(monitor, *values, (3.0, {"temperature_c": 70, "used_gib": 7})) == {
        "temperature_c": 80,
        "used_gib": 8.0,
    }


def test_without_a_gpu_there_is_no_thread() -> None:
    monitor = GpuMonitor(gpu_uuid(torch.device("cpu")))
    assert not monitor._thread.is_alive()
    assert monitor.since_last() == {}
    monitor.close()


def test_the_uuid_is_that_of_torchs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the number, which CUDA_VISIBLE_DEVICES changes."""
    of_device = {torch.device("cuda", 1): SimpleNamespace(uuid=UUID)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", of_device.__getitem__)
    assert gpu_uuid(torch.device("cuda", 1)) == UUID
