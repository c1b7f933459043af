"""One truth: metrics, every parameter's gradient and the final weights do not depend on how a step is computed.

Each case below is one more way to compute the same steps: layouts (TP, PP, VPP, SP, DP), recomputation, reference mode, optimizer,
packs and sharing. It must agree with the plain single-rank run of the same model and data.

The bounds. A gradient element is a sum of about 1e4 products, whose fp32 rounding (6e-8 each, in another order on another layout)
adds up like a random walk to 6e-6 of the largest element at worst; a few 1e-7 are usual. In fp64 the same walk ends at 1e-14. So
1e-5 and 1e-10 leave room for rounding and none for a fault: one pair weighed twice changes a gradient by a part in a hundred.

NOVA_RECORD=PATH writes what was measured as JSON (`make truth`); docs/trust.md shows it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nova_kernels.testing import run_ranks

spec = importlib.util.spec_from_file_location(
    "layout_runs", Path(__file__).with_name("layout_runs.py")
)
assert spec is not None and spec.loader is not None
layout_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layout_runs)

# Speeds, and what depends on how the packs are filled.
NOT_COMPARED = {
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "pairs_per_s",
    "step_time_s",
    "data_wait_ms",
}
NOT_COMPARED |= {"peak_gib", "mfu", "fill", "epoch"}
FLOORS = {"margin": 0.1, "chosen_reward": 0.1, "rejected_reward": 0.1, "drift": 1.0}
"""What starts at 0, where only its rounding would be compared, is compared with at least so much."""
NUM_PAIRS = 64


@dataclass(frozen=True)
class Case:
    """One way to compute the run of `family`; the family's first case is the truth that the others are held to."""

    family: str
    ranks: int
    title: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> tuple[str, ...]:
        return ("fp64",) if "fp64" in self.family else ()

    @property
    def bound(self) -> float:
        return 1e-10 if "fp64" in self.family else 1e-5


KV = {"model.kv_shift": True, "model.kv_shift_init": "random"}
WINDOWS = {"model.sliding_window": 24, "model.window_layers": [1, 2], "model.window_heads": 2}
TIED = {"model.tied_embeddings": True, "model.norm_head": True}
FULL = {"train.recompute": "full"}
SELECTIVE = {"train.recompute": "selective"}
ONLINE = {"algo.reference": "online"}
OWN_CACHE = {"data.cache_dir": ""}  # the others share the reference log-probs of one rank
PLAIN = {"parallel.distributed_optimizer": False}
TP2 = {"parallel.tensor": 2}
TP2_SP = {**TP2, "parallel.sequence": True}
PP2 = {"parallel.pipeline": 2}
CP2 = {"parallel.context": 2}
PP2_VPP2 = {**PP2, "parallel.virtual_pipeline": 2}
FOUR = {**TP2_SP, **PP2}


def every_document(packs: int, pack_length: int) -> dict[str, Any]:
    """All documents in each of three steps: an epoch fills exactly `packs` packs (test_every_document_is_in_every_step)."""
    return {"data.pack_length": pack_length, "train.global_batch_packs": packs, "train.steps": 3}


ONE_PACK, TWO_PACKS, FOUR_PACKS = (
    every_document(*sizes) for sizes in ((1, 8192), (2, 3000), (4, 1400))
)
UNSHARED = {**every_document(4, 2048), "data.share_prefix": False}
EPOCH = {"train.steps": 0, "train.epochs": 1.0}
HALF_EMPTY = {**FOUR_PACKS, **EPOCH, "train.global_batch_packs": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "5 steps": {},
    "5 steps, KV shift": KV,
    "5 steps, tied, NormHead": TIED,
    "5 steps, SFT": {"algo.name": "sft"},
    "5 steps, KV shift, 4 KV heads": {**KV, "model.num_kv_heads": 4},
    "5 steps, KV shift, windows and other heads in two layers": {**KV, **WINDOWS},
    "every document": {},
    "every document, KV shift": KV,
    "every document, fp64": {**PLAIN, "optimizer.grad_clip": 0.0},  # Megatron clips fp32 only
    "one epoch": {},
}
CASES = {
    "one": Case("5 steps", 1, "one rank, reference cache"),
    "one-online": Case("5 steps", 1, "online reference", ONLINE),
    "one-full": Case("5 steps", 1, "recomputation: full", FULL),
    "one-selective": Case("5 steps", 1, "recomputation: selective", SELECTIVE),
    "one-plain": Case("5 steps", 1, "plain optimizer", PLAIN),
    "tp2": Case("5 steps", 2, "TP2", TP2),
    "tp2-sp": Case("5 steps", 2, "TP2, SP, own reference cache", {**TP2_SP, **OWN_CACHE}),
    "pp2": Case("5 steps", 2, "PP2", PP2),
    "pp2-vpp2": Case(
        "5 steps", 2, "PP2, VPP2, own reference cache", {**PP2_VPP2, **OWN_CACHE}
    ),
    "dp2": Case("5 steps", 2, "DP2"),
    "cp2": Case("5 steps", 2, "CP2, own reference cache", {**CP2, **OWN_CACHE}),
    "cp2-dp2": Case("5 steps", 4, "CP2, DP2, recomputation: full", {**CP2, **FULL}),
    "tp2-dp2": Case("5 steps", 4, "TP2, DP2", TP2),
    "tp2-pp2-sp": Case("5 steps", 4, "TP2, SP, PP2", FOUR),
    "pp2-vpp2-dp2": Case("5 steps", 4, "PP2, VPP2, DP2", PP2_VPP2),
    "one-kv": Case("5 steps, KV shift", 1, "one rank"),
    "tp2-sp-kv": Case("5 steps, KV shift", 2, "TP2, SP", TP2_SP),
    "everything": Case(
        "5 steps, KV shift",
        4,
        "TP2, SP, PP2, VPP2, recomputation: full, online reference",
        {**FOUR, **PP2_VPP2, **FULL, **ONLINE},
    ),
    "cp2-pp2-kv": Case("5 steps, KV shift", 4, "CP2, PP2, VPP2", {**CP2, **PP2_VPP2}),
    "one-kv4": Case("5 steps, KV shift, 4 KV heads", 1, "one rank"),
    "tp2-cp2-sp": Case("5 steps, KV shift, 4 KV heads", 4, "TP2, SP, CP2", {**TP2_SP, **CP2}),
    "one-windows": Case(
        "5 steps, KV shift, windows and other heads in two layers", 1, "one rank"
    ),
    "windows": Case(
        "5 steps, KV shift, windows and other heads in two layers",
        4,
        "TP2, SP, PP2, VPP2",
        {**FOUR, **PP2_VPP2},
    ),
    "one-tied": Case("5 steps, tied, NormHead", 1, "one rank"),
    "pp2-tied": Case("5 steps, tied, NormHead", 2, "PP2", PP2),
    "tp2-sp-tied": Case("5 steps, tied, NormHead", 2, "TP2, SP", TP2_SP),
    "one-sft": Case("5 steps, SFT", 1, "one rank"),
    "pp2-sft": Case("5 steps, SFT", 2, "PP2", PP2),
    "all": Case("every document", 1, "1 pack", ONE_PACK),
    "all-2": Case("every document", 1, "2 packs", TWO_PACKS),
    "all-4": Case("every document", 1, "4 packs", FOUR_PACKS),
    "all-unshared": Case("every document", 1, "4 packs, nothing shared", UNSHARED),
    "all-kv": Case("every document, KV shift", 1, "1 pack", ONE_PACK),
    "all-unshared-kv": Case("every document, KV shift", 1, "4 packs, nothing shared", UNSHARED),
    "all64": Case("every document, fp64", 1, "1 pack", ONE_PACK),
    "all64-4": Case("every document, fp64", 1, "4 packs", FOUR_PACKS),
    "all64-unshared": Case("every document, fp64", 1, "4 packs, nothing shared", UNSHARED),
    "all64-dp2": Case("every document, fp64", 2, "4 packs, DP2", FOUR_PACKS),
    "all64-tp2-sp": Case("every document, fp64", 2, "4 packs, TP2, SP", {**FOUR_PACKS, **TP2_SP}),
    "all64-vpp2": Case("every document, fp64", 2, "4 packs, PP2, VPP2", {**FOUR_PACKS, **PP2_VPP2}),
    "all64-cp2": Case("every document, fp64", 2, "4 packs, CP2", {**FOUR_PACKS, **CP2}),
    "all64-four": Case("every document, fp64", 4, "4 packs, TP2, SP, PP2", {**FOUR_PACKS, **FOUR}),
    "epoch": Case("one epoch", 1, "1 pack", {**ONE_PACK, **EPOCH}),
    "epoch-empty": Case("one epoch", 1, "4 packs and 4 empty ones", HALF_EMPTY),
    "epoch-empty-dp2": Case("one epoch", 2, "4 packs and 4 empty ones, DP2", HALF_EMPTY),
    "epoch-empty-tp2-sp": Case("one epoch", 2, "4 packs and 4 empty ones, TP2, SP", {**HALF_EMPTY, **TP2_SP}),
}  # fmt: skip
TRUTH = {family: next(n for n, c in CASES.items() if c.family == family) for family in FAMILIES}
BROKEN = Case("5 steps", 2, "TP2 that forgets to sum", TP2)


def differences(got: dict[str, Any], truth: dict[str, Any]) -> dict[str, float | None]:
    """Largest relative differences; for an array, the largest of an element over the array's largest element."""

    def of_records(keys: set[str]) -> float:
        found = [0.0]
        for ours, theirs in zip(got["records"], truth["records"], strict=True):
            for key in keys:
                scale = max(abs(theirs[key]), FLOORS.get(key, 1e-30))
                found.append(abs(ours[key] - theirs[key]) / scale)
        return max(found)

    def of_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
        assert set(ours) == set(theirs)
        return max(
            float(np.abs(ours[key] - array).max() / np.abs(array).max())
            for key, array in theirs.items()
        )

    in_fp64 = any(array.dtype == np.float64 for array in got["weights"].values())
    metrics = set(truth["records"][0]) - NOT_COMPARED - {"loss", "grad_norm", "reward_accuracy"}
    return {
        "loss": of_records({"loss"}),
        "metrics": of_records(metrics),
        "grad_norm": None if in_fp64 else of_records({"grad_norm"}),  # Megatron's norm is fp32
        "gradients": of_arrays(got["gradients"], truth["gradients"]),
        "weights": of_arrays(got["weights"], truth["weights"]),
    }


def beyond(bound: float, found: dict[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in found.items() if value is not None and not value <= bound}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    data = write_pairs(folder, NUM_PAIRS)
    found: dict[str, dict[str, Any]] = {}
    for ranks in (1, 2, 4):
        cases = {name: case for name, case in CASES.items() if case.ranks == ranks}
        listed = [
            (str(folder / name), {**FAMILIES[case.family], **case.settings}, case.changes)
            for name, case in cases.items()
        ]
        if ranks == BROKEN.ranks:
            listed.append((str(folder / "broken"), BROKEN.settings, (layout_runs.BROKEN,)))
        outcome = run_ranks(layout_runs.run_layouts, ranks, str(data), listed, timeout_s=600)[0]
        found |= dict(zip([*cases, "broken"], outcome, strict=False))
    if path := os.environ.get("NOVA_RECORD"):
        Path(path).write_text(json.dumps(measured(found), indent=1))
    return found


def measured(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per comparison, for the table in docs/trust.md."""
    return [
        {
            "family": case.family,
            "truth": CASES[TRUTH[case.family]].title,
            "case": case.title,
            "bound": case.bound,
            "steps": len(results[name]["records"]),
            **differences(results[name], results[TRUTH[case.family]]),
        }
        for name, case in CASES.items()
        if name != TRUTH[case.family]
    ]


def write_pairs(folder: Path, count: int) -> Path:
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return "".join(
            " " + "".join(rng.choices("abcdefgh", k=rng.randint(1, 5)))
            for _ in range(rng.randint(low, high))
        )

    data = folder / "pairs.jsonl"
    with data.open("w") as out:
        for _ in range(count):
            pair = {"prompt": f"Q:{words(1, 20)}\nA:"}
            pair |= {"chosen": words(1, 12), "rejected": words(1, 12)}
            out.write(json.dumps(pair) + "\n")
    return data


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if name != TRUTH[case.family]]
)
def test_agrees_with_one_rank(results: dict[str, dict[str, Any]], name: str) -> None:
    got, case = results[name], CASES[name]
    assert "error" not in got, got["error"]
    assert beyond(case.bound, differences(got, results[TRUTH[case.family]])) == {}


@pytest.mark.parametrize("name", list(CASES))
def test_metrics_are_the_same_everywhere(results: dict[str, dict[str, Any]], name: str) -> None:
    """No key and no value vanishes or changes: not on a pipeline, where only the last stage knows the loss."""
    got, truth = results[name]["records"], results[TRUTH[CASES[name].family]]["records"]
    for ours, theirs in zip(got, truth, strict=True):
        assert list(ours) == list(theirs)
        assert all(isinstance(value, int | float) for value in ours.values()), ours
        if ours["step"] > 1 and "reward_accuracy" in ours:
            assert ours["reward_accuracy"] == theirs["reward_accuracy"]
    if (
        CASES[name].settings.get("algo.name", FAMILIES[CASES[name].family].get("algo.name"))
        != "sft"
    ):
        assert got[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_every_document_is_in_every_step(results: dict[str, dict[str, Any]]) -> None:
    for name in (name for name, case in CASES.items() if case.family.startswith("every document")):
        rows = [(row["epoch"], row["num_pairs"]) for row in results[name]["records"]]
        assert rows == [(1, NUM_PAIRS), (2, NUM_PAIRS), (3, NUM_PAIRS)], name
    assert results["epoch-empty"]["records"][0]["epoch"] == 2  # as many empty packs as others


def test_the_comparison_has_teeth(results: dict[str, dict[str, Any]]) -> None:
    """Another model, and the same model five steps later, are far outside the bounds."""
    one = results["one"]
    assert abs(one["records"][4]["loss"] - math.log(2)) > 1e-2
    for other in (results["one-kv"], results["one-sft"]):
        key = "output_layer.weight@()"
        assert np.abs(other["gradients"][key] - one["gradients"][key]).max() > 1e-3
    assert len(one["gradients"]) == len(one["weights"]) > 20


def test_recomputation_recomputes(results: dict[str, dict[str, Any]]) -> None:
    """It changes no number, so it must show elsewhere: 5 steps of 4 packs through the attention of 4 layers, once or twice."""
    calls = {name: results[name]["attention_calls"] for name in ("one", "one-full", "one-selective")}  # fmt: skip
    assert calls == {"one": 80, "one-full": 160, "one-selective": 160}


def test_a_broken_tensor_reduction_stops_the_run(results: dict[str, dict[str, Any]]) -> None:
    """TP2 that forgets to sum, with the reference of a sound run: the first loss is not ln 2. (The case tp2 is the sound one.)"""
    assert "from ln 2" in results["broken"]["error"]
    assert "fault in tensor or sequence parallelism" in results["broken"]["error"]
