"""What this rank's GPU does, from NVIDIA's management library (NVML): sampled in a thread of its own, so that no step waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

SAMPLE_S = 1.0
COUNTER = "energy_j"
QUERIES: dict[str, Callable[[Any, Any], float]] = {
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "utilization_percent": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(
        gpu, nvml.NVML_TEMPERATURE_GPU
    ),
    "used_gib": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30,
    COUNTER: lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,
}
MAXIMA = ("temperature_c", "used_gib")
"""Of these the largest sample counts, of the others the mean."""


class Sample(NamedTuple):
    at_s: float
    values: dict[str, float]


def gpu_uuid(device: torch.device) -> str | None:
    """As CUDA knows the device, whatever CUDA_VISIBLE_DEVICES made its number; None without a GPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


class GpuMonitor:
    """Samples the GPU every `sample_s` seconds until `close()`. Without a uuid it does nothing.

    What cannot be asked is missing: one log line says so, and nothing is ever raised. The slice of a GPU that MIG makes has memory,
    but no power or clocks of its own.
    """

    def __init__(self, uuid: str | None, *, sample_s: float = SAMPLE_S) -> None:
        self._uuid, self._sample_s = uuid, sample_s
        self._samples: list[Sample] = []
        self._draw_w: float | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        if uuid is not None:
            self._thread.start()

    def since_last(self) -> dict[str, float]:
        """Of the samples since the last call; of the newest one when there is none since. Empty when there is no sample.

        `draw_w`: mean power from the energy counter between the first and the last of them, or else from samples of the power.
        """
        with self._lock:
            samples, self._samples = self._samples, self._samples[-1:]
        if not samples:
            return {}
        fresh = samples[1:] or samples  # the first one ended the last call's stretch
        found: dict[str, float] = {}
        for name in QUERIES:
            values = [sample.values[name] for sample in fresh if name in sample.values]
            if values and name != COUNTER:
                found[name] = max(values) if name in MAXIMA else sum(values) / len(values)
        first, last = (s.values.get(COUNTER) for s in (samples[0], samples[-1]))
        if len(samples) > 1:
            self._draw_w = None
            if first is not None and last is not None:
                self._draw_w = (last - first) / (samples[-1].at_s - samples[0].at_s)
        draw_w = found.get("power_w") if self._draw_w is None else self._draw_w
        return found if draw_w is None else {**found, "draw_w": draw_w}

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)  # a lost GPU may keep the driver from answering

    def _run(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:  # not installed, no library, no driver, no permission
            logger.info("no gpu/ metrics: NVML cannot be used (%s)", error or type(error).__name__)
            return
        try:
            gpu = self._find(pynvml)
            while self._add(pynvml, gpu) and not self._closed.wait(self._sample_s):
                pass
        except Exception as error:
            logger.warning("no gpu/ metrics: NVML says of GPU %s: %s", self._uuid, error)
        finally:
            with suppress(Exception):
                pynvml.nvmlShutdown()

    def _find(self, nvml: Any) -> Any:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{self._uuid}")
        except nvml.NVMLError:  # torch gives a MIG slice's uuid in the same form
            return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{self._uuid}")

    def _add(self, nvml: Any, gpu: Any) -> bool:
        """Adds a sample of all that answers; False when nothing does: the GPU is lost."""
        values: dict[str, float] = {}
        refused: dict[str, Exception] = {}
        for name, query in QUERIES.items():
            try:
                values[name] = float(query(nvml, gpu))
            except (nvml.NVMLError, AttributeError) as error:  # not for this GPU, driver or release
                refused[name] = error
        first = not self._samples
        with self._lock:
            self._samples.append(Sample(time.monotonic(), values))
        if not values:
            logger.warning("no gpu/ metrics from now on: %s", next(iter(refused.values())))
        elif first and refused:
            logger.info("NVML does not tell %s of this GPU", ", ".join(refused))
        return bool(values)
