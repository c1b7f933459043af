"""benchmarks/parity.py without TRL: a loop over transformers' model stands in for it. What differs is found, and what is measured is shown."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from nova_sys import metrics

transformers = pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASE, TERM = "sigmoid", "orpo, odds ratio"


class Sides(NamedTuple):
    parity: Any
    report: Any
    work: Path
    cases: dict[str, Any]
    ours: dict[str, Any]
    theirs: dict[str, Any]

    def compared(self, theirs: dict[str, Any] | None = None) -> dict[str, Any]:
        parity = self.parity
        return parity.compare(self.ours, theirs or self.theirs, self.cases, self.work)


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, Any]]:
    """The modules parity, parity_ours and report, which import their neighbours by plain names: taken back afterwards."""
    before = dict(sys.modules)
    with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        yield {name: importlib.import_module(name) for name in ("parity", "parity_ours", "report")}
    for name in [name for name in sys.modules if name not in before]:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture(scope="module")
def sides(benchmarks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Sides:
    parity, own = benchmarks["parity"], benchmarks["parity_ours"]
    work = tmp_path_factory.mktemp("parity")
    cases = {name: own.CASES[name] for name in (CASE, TERM)}
    pairs, left_out = own.text_pairs(None, work)
    assert (len(pairs), left_out) == (32, 0)
    own.write_pairs(pairs, work)
    with (
        mock.patch.dict(own.SHAPE, {"num_hidden_layers": 1, "hidden_size": 32}),
        mock.patch.object(metrics, "peak_flops", lambda *_: 1e12),  # else measured
    ):
        own.make_folders(pairs, work)
        ours = own.run_ours(work, cases, threads=1)
    return Sides(parity, benchmarks["report"], work, cases, ours, stand_in(work, ours, own))


def stand_in(work: Path, ours: dict[str, Any], own: Any) -> dict[str, Any]:
    """What parity_trl.py would answer, computed with transformers' model, torch's AdamW and the losses' equations."""
    ids = ours["pairs"]["ids"]

    def load(name: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32)

    def logps(model: Any, pairs: list[Any]) -> torch.Tensor:
        rows = []
        for prompt, *answers in pairs:
            for answer in answers:
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())
        return torch.stack(rows).view(-1, 2)

    def losses(policy_P2: torch.Tensor, reference_P2: torch.Tensor) -> torch.Tensor:
        ratio_P2 = policy_P2 - reference_P2
        return torch.nn.functional.softplus(-0.1 * (ratio_P2[:, 0] - ratio_P2[:, 1]))

    model = load("policy")
    with torch.no_grad():
        reference, start = logps(load("reference"), ids), logps(model, ids)
    probability = (start / torch.tensor(ours["pairs"]["tokens"])).exp()
    odds = probability / (1 - probability)
    step, step_losses = torch.optim.AdamW(model.parameters(), 3e-5, (0.9, 0.95), 1e-6, 0.0), []
    for first in range(0, 24, 8):
        batch = slice(first, first + 8)
        loss = losses(logps(model, ids[batch]), reference[batch]).mean()
        step.zero_grad()
        loss.backward()
        step.step()
        step_losses.append(float(loss.detach()))
    model.save_pretrained(work / "trl" / own.folder_of(CASE))
    found = {
        "ids": ids,
        "logp": {"policy": start.tolist(), "reference": reference.tolist()},
        "losses": losses(start, reference).tolist(),
        "step_losses": step_losses,
    }
    term = -0.1 * (odds[:, 0] / (odds[:, 0] + odds[:, 1])).log()
    return {"cases": {CASE: found, TERM: {"ids": ids, "losses": term.tolist()}}}


def test_within_bounds(sides: Sides) -> None:
    record = sides.compared()
    assert sides.parity.problems(record) == []
    trained, term = record["results"]
    least, most = trained["loss_range"]
    assert most - least > 0.01  # the pairs' losses differ, so an error in one would show
    assert trained["parameters"]["moved_least"] > 5 * sides.parity.PARAMETER_BOUND
    assert "parameters" not in term


def test_differences_are_found(sides: Sides) -> None:
    def problem(change: Any) -> str:
        theirs = copy.deepcopy(sides.theirs)
        change(theirs["cases"])
        (found,) = sides.parity.problems(sides.compared(theirs))
        return found

    def add(values: list[Any], i: int, what: float) -> None:
        values[i] += what

    assert "log-probs of the reference" in problem(
        lambda c: add(c[CASE]["logp"]["reference"][5], 1, 3e-4)
    )
    assert "sigmoid: losses of single" in problem(lambda c: add(c[CASE]["losses"], 31, 3e-5))
    assert "of the steps" in problem(lambda c: add(c[CASE]["step_losses"], 2, float("nan")))
    assert "odds ratio: losses" in problem(lambda c: add(c[TERM]["losses"], 0, -3e-5))
    theirs = copy.deepcopy(sides.theirs)
    theirs["cases"][CASE]["ids"][3][1][-1] += 1
    with pytest.raises(ValueError, match=r"with other ids in \[3\]"):
        sides.compared(theirs)


def test_weights_that_differ_are_found(sides: Sides, tmp_path: Path) -> None:
    exported, peer, start = (
        sides.work / name for name in (f"ours/{CASE}", f"trl/{CASE}", "policy")
    )
    same = sides.parity.compare_folders(exported, peer, start)
    tensors = sides.parity.tensors_of(exported)
    tensors["model.norm.weight"][3] += 1e-4
    save_file(tensors, tmp_path / "model.safetensors")
    found = sides.parity.compare_folders(tmp_path, peer, start)
    assert found["tensor"] == "model.norm.weight"
    assert found["difference"] > sides.parity.PARAMETER_BOUND > same["difference"]
    assert found["update"] > sides.parity.UPDATE_BOUND > same["update"]
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        sides.parity.compare_folders(tmp_path, peer, start)


def test_table(sides: Sides) -> None:
    record = sides.compared() | {
        "cpu": "a CPU",
        "cores": 2,
        "threads": 1,
        "command": "make parity",
        "peer_versions": {"trl": "9.9"},
        "data": {"file": "pairs.jsonl", "pairs": 32, "left_out": 7},
        "model": {"architecture": "Llama", "parameters": 1234},
        "training": {"steps": 3},
        "bounds": {"logp": 1e-4, "loss": 1e-5, "parameters": 1e-5, "update": 1e-3},
    }
    shown = sides.report.parity(json.loads(json.dumps(record)))
    trained, term = record["results"]
    assert f"| sigmoid | `DPOTrainer` | {trained['pairs']:.1e} | {trained['steps']:.1e} |" in shown
    assert f"| ORPO, odds ratio | `ORPOTrainer` | {term['pairs']:.1e} |  |  |  |  |" in shown
    assert "TRL 9.9" in shown and "1,234" in shown and "7 records passed over" in shown
