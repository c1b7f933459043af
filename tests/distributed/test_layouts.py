"""One model on every layout: losses, gradient norms and final weights equal the single-rank run's to fp32 rounding."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from nova_kernels.testing import run_ranks

spec = importlib.util.spec_from_file_location(
    "layout_runs", Path(__file__).with_name("layout_runs.py")
)
assert spec is not None and spec.loader is not None
layout_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layout_runs)

KV = {"model.kv_shift": True, "model.kv_shift_init": "random"}
EPOCH = {"train.steps": 0, "train.epochs": 1.0, "train.global_batch_packs": 80}
LAYOUTS: dict[int, dict[str, dict]] = {
    1: {
        "one": {},
        "one-online": {"algo.reference": "online"},
        # all documents in one step, padded with empty packs: sharing changes what the packs hold, but not the step
        "epoch": EPOCH,
        "epoch-unshared": {**EPOCH, "data.share_prefix": False},
        "epoch-kv": {**EPOCH, **KV},
        "epoch-unshared-kv": {**EPOCH, **KV, "data.share_prefix": False},
        "one-recompute": {"train.recompute": "full"},
        "one-selective": {"train.recompute": "selective"},
        "one-plain-optimizer": {"parallel.distributed_optimizer": False},
        "one-kv": KV,
        "one-tied": {"model.tied_embeddings": True, "model.norm_head": True},
    },
    2: {
        "tp2": {"parallel.tensor": 2},
        "tp2-sp": {"parallel.tensor": 2, "parallel.sequence": True},
        "pp2": {"parallel.pipeline": 2},
        "pp2-vpp2": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
        "dp2": {},
        "dp2-epoch": EPOCH,  # empty packs on both ranks
        "tp2-sp-epoch": {**EPOCH, "parallel.tensor": 2, "parallel.sequence": True},
        "tp2-sp-kv": {"parallel.tensor": 2, "parallel.sequence": True, **KV},
        "pp2-tied": {
            "parallel.pipeline": 2,
            "model.tied_embeddings": True,
            "model.norm_head": True,
        },
    },
    4: {
        "tp2-pp2-sp": {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True},
        "tp2-dp2": {"parallel.tensor": 2},
        "pp2-vpp2-dp2": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
        "tp2-pp2-vpp2-sp-kv": {
            "parallel.tensor": 2,
            "parallel.pipeline": 2,
            "parallel.virtual_pipeline": 2,
            "parallel.sequence": True,
            **KV,
        },
    },
}


def single_rank_case(name: str) -> str:
    """The single-rank run that a layout must agree with."""
    if "epoch" in name:
        return "epoch-kv" if "kv" in name else "epoch"
    return "one-kv" if "kv" in name else "one-tied" if "tied" in name else "one"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("layouts")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in random_pairs(160)))
    found = {}
    for world_size, cases in LAYOUTS.items():
        listed = [(str(folder / name), overrides) for name, overrides in cases.items()]
        outcome = run_ranks(layout_runs.run_layouts, world_size, str(data), listed, timeout_s=240)
        found |= dict(zip(cases, outcome[0], strict=True))
    return found


def random_pairs(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return "".join(
            " " + "".join(rng.choices("abcdefgh", k=rng.randint(1, 5)))
            for _ in range(rng.randint(low, high))
        )

    return [
        {"prompt": "Q:" + words(1, 20) + "\nA:", "chosen": words(1, 12), "rejected": words(1, 12)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", [name for cases in LAYOUTS.values() for name in cases])
def test_layout_agrees_with_one_rank(results: dict[str, dict], name: str) -> None:
    reference, got = results[single_rank_case(name)], results[name]
    assert len(got["records"]) == (1 if "epoch" in name else 5)
    assert got["records"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for expected, seen in zip(reference["records"], got["records"], strict=True):
        for key in ("loss", "grad_norm", "chosen_logp"):
            assert seen[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), (
                seen["step"],
                key,
            )
        assert seen["num_pairs"] == expected["num_pairs"]
    assert set(got["weights"]) == set(reference["weights"])
    for key, expected in reference["weights"].items():
        seen = got["weights"][key]
        assert not np.isnan(seen).any(), f"{key}: not every part of this weight was seen"
        # Adam divides by the gradient's own size, so rounding of near-zero gradients shows at the scale of the learning rate
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=3e-4, err_msg=key)


def test_runs_differ_where_they_should(results: dict[str, dict]) -> None:
    """The comparisons above have teeth: the weights move, and another model gives other losses."""
    assert abs(results["one"]["records"][4]["loss"] - math.log(2)) > 1e-2
    assert results["one-kv"]["records"][1]["loss"] != results["one"]["records"][1]["loss"]
    assert results["one-tied"]["records"][1]["loss"] != results["one"]["records"][1]["loss"]


def test_resume_on_another_layout(tmp_path: Path) -> None:
    """Three steps on one rank, the fourth on TP2 + SP, the fifth on two stages, against five on one rank."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in random_pairs(160)))
    schedule = {
        "optimizer.warmup_steps": 5
    }  # constant in the number of steps, which differs between the parts
    whole = (str(tmp_path / "whole"), schedule)
    first = (str(tmp_path / "parts"), {**schedule, "train.steps": 3})
    outcome = run_ranks(layout_runs.run_layouts, 1, str(data), [whole, first], timeout_s=240)
    reference = outcome[0][0]
    parts = [
        {**schedule, "parallel.tensor": 2, "parallel.sequence": True, "train.steps": 4},
        {**schedule, "parallel.pipeline": 2, "train.steps": 5},
    ]
    cases = [(str(tmp_path / "parts"), part) for part in parts]
    *_, got = run_ranks(layout_runs.run_layouts, 2, str(data), cases, timeout_s=240)[0]
    assert [row["step"] for row in got["records"]] == [1, 2, 3, 4, 5]
    for expected, seen in zip(reference["records"], got["records"], strict=True):
        assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-5), seen["step"]
        assert seen["lr"] == pytest.approx(expected["lr"])
    for key, expected in reference["weights"].items():
        np.testing.assert_allclose(got["weights"][key], expected, rtol=1e-4, atol=3e-4, err_msg=key)
