"""A reference in host memory: the numbers of the online one, bit for bit, and at no time more than one module's weights elsewhere.

A CPU has one memory. Here "in the host's memory" is made visible by keeping the weights negated: only what the reference fetches for a
module that is about to run is put right. Pinned memory and copies to a GPU are not shown.
"""

from __future__ import annotations

import importlib.util
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nova_kernels.testing import run_ranks

spec = importlib.util.spec_from_file_location(
    "layout_runs", Path(__file__).with_name("layout_runs.py")
)
assert spec is not None and spec.loader is not None
layout_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layout_runs)

ALL_KINDS = {"model.kv_shift": True, "model.qkv_bias": True, "model.qk_norm": True}
TIED = {"model.tied_embeddings": True, "model.norm_head": True}
MODELS: dict[int, dict[str, dict[str, Any]]] = {  # by ranks
    1: {"one": ALL_KINDS, "one tied": TIED},
    2: {
        "tp2": {**ALL_KINDS, "parallel.tensor": 2, "parallel.sequence": True},
        "pp2 tied": {**TIED, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
    },
}

KINDS = ("cache", "host, as it is", "online", "host")


class Fetched:
    """Negated weights, and what of them was put right: the most bytes at a time, and which."""

    def __init__(self) -> None:
        self.alive: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self.most, self.count, self.seen = 0, 0, set[int]()

    def move(self, chunks: Sequence[Any], device: torch.device) -> None:
        from nova_sys.host_weights import fetch_when_used

        assert device.type == "cpu"
        self.chunks = chunks
        for parameter in self.parameters():
            parameter.data.neg_()
        fetch_when_used(chunks, self.bring)

    def bring(self, weight: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.seen.add(weight.data_ptr())
        self.alive[self.count] = there = -weight
        self.most = max(self.most, sum(tensor.nbytes for tensor in self.alive.values()))
        return there

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def result(self) -> dict[str, Any]:
        modules = [module for chunk in self.chunks for module in chunk.modules()]
        own = [sum(p.nbytes for p in module.parameters(recurse=False)) for module in modules]
        return {
            "most": self.most,
            "largest": max(own),
            "all": sum(p.nbytes for p in self.parameters()),
            "left": len(self.alive),
            "unseen": [p.shape for p in self.parameters() if p.data_ptr() not in self.seen],
        }


def train(rank: int, data: str, cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """`run_ranks` worker: each case with each kind of reference; what was fetched where it lies on the host. The first case also with a
    host's as it is, which on a CPU changes nothing."""
    from nova_sys.reference import move_to_host

    found = []
    for out, settings in cases:
        for reference in KINDS if out.endswith("one") else KINDS[2:]:
            fetched = Fetched()
            run = f"{out} {reference}/run"
            move = move_to_host if reference == "host, as it is" else fetched.move
            with mock.patch("nova_sys.reference.move_to_host", move):
                kind = reference.partition(",")[0]
                settings = {**settings, "algo.reference": kind, "train.steps": 3}
                settings["data.cache_dir"] = str(Path(data).with_name("cache"))
                case = (run, settings, ())
                (result,) = layout_runs.run_layouts(rank, data, [case])
            assert hasattr(fetched, "chunks") == (reference == "host")
            found.append((result, fetched.result() if reference == "host" else None))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By model, what every rank returned for each kind of reference: all KINDS of the first model, of the others the last two."""
    folder = tmp_path_factory.mktemp("host")
    pairs = (
        {
            "prompt": f"Q{i} {'ab' * (i % 7)}",
            "chosen": f" A{i * i}",
            "rejected": " no" * (i % 3 + 1),
        }
        for i in range(40)
    )
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found: dict[str, list[Any]] = {}
    for ranks, models in MODELS.items():
        cases = [(str(folder / name), settings) for name, settings in models.items()]
        if ranks == 1:
            by_rank = [train(0, str(data), cases)]
        else:
            by_rank = run_ranks(train, ranks, str(data), cases, timeout_s=400)
        for name in models:
            found[name] = [
                [rank.pop(0) for _ in (KINDS if name == "one" else KINDS[2:])] for rank in by_rank
            ]
    return found


@pytest.mark.parametrize("name", [name for models in MODELS.values() for name in models])
def test_same_numbers_as_online_and_cached(results: dict[str, list[Any]], name: str) -> None:
    *others, host = [result for result, _ in results[name][0]]  # rank 0 has the records
    for other in others:
        for row, expected in zip(host["records"], other["records"], strict=True):
            for key in ("loss", "margin", "grad_norm", "chosen_reward", "drift"):
                assert row[key] == expected[key], key
        for key, weight in other["weights"].items():
            assert (host["weights"][key] == weight).all(), key
    assert abs(host["records"][2]["margin"]) > 1e-3


@pytest.mark.parametrize("name", [name for models in MODELS.values() for name in models])
def test_one_module_at_a_time(results: dict[str, list[Any]], name: str) -> None:
    for rank in results[name]:
        fetched = rank[-1][1]
        assert fetched["unseen"] == [] and fetched["left"] == 0
        assert 0 < fetched["most"] <= fetched["largest"] < fetched["all"] / 3, fetched
