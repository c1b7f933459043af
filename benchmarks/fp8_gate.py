"""Does DPO in FP8 learn as it does in bf16? `python benchmarks/fp8_gate.py --out FILE.json [--plot FILE.png]`, on a GPU with Transformer Engine.

Trains 200 DPO steps from one SFT checkpoint (the demo's tasks, a model made for this) in bf16 and in every FP8 recipe, with 3 seeds each; a seed
orders the pairs, the same ones in every precision. Exit code 1 when a recipe leaves the band, 2 when one
cannot run here.

The band: losses are averaged over windows of 10 steps. The width comes from bf16 alone: within a window its seeds differ by some standard deviation;
pooled over all windows that is s. A recipe's curve, the mean over its seeds, must stay within 2 s of bf16's mean in every window: then nobody could
tell it from one more seed of bf16.

    --simulate   on a CPU, tiny: fp32 takes the place of bf16, and bf16 that of the recipes
    --recipes    some of them, or param_gather: blockwise with weights kept in FP8; --steps, --seeds: fewer, for less time

The file is written after every recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import circumstances

from nova_sys.config import Fp8Config, ParallelConfig
from nova_sys.config_io import check, load_recipe
from nova_sys.data.tasks import TaskFiles, write_tasks
from nova_sys.log import setup_logging
from nova_sys.model.te import check_precision
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.trainer import Trainer

Curves = dict[str, list[float]]
"""Losses by seed."""
Settings = dict[str, Any]
WINDOW = 10
"""Steps that are averaged."""
WIDTH = 2.0
"""Half of the band, in pooled standard deviations between the baseline's seeds."""
NARROWEST = 1e-3
"""Half of the band at least: what the first loss may be off ln 2 by in bf16."""
DATA_SEED = 0
RECIPES = ("blockwise", "tensorwise", "delayed")
COMMON: Settings = {
    "model.vocab_size": 320,
    "model.init_std": 0.06,
    "data.template": "dialogue",
    "data.pack_length": 1024,
    "train.global_batch_packs": 1,
    "parallel.tensor": 1,
    "log.tensorboard": False,
    "log.progress": False,
    "log.every_steps": 1_000_000,
    "checkpoint.asynchronous": False,
}


@dataclass(frozen=True)
class Gate:
    """model: settings of both phases.   candidates: what differs from the baseline, by name."""

    model: Settings
    num_sft: int
    num_pairs: int
    sft_steps: int
    baseline: str
    candidates: dict[str, Settings]


ON_A_GPU = Gate(
    model={
        "model.num_layers": 6,
        "model.hidden_size": 256,
        "model.num_heads": 8,
        "model.num_kv_heads": 4,
        "model.ffn_hidden_size": 704,
    },
    num_sft=40_000,
    num_pairs=6_000,
    sft_steps=1_000,
    baseline="bf16",
    candidates={
        **{name: {"train.precision": "fp8", "fp8.recipe": name} for name in RECIPES},
        "param_gather": {"train.precision": "fp8", "fp8.param_gather": True},
    },
)
SIMULATED = Gate(
    model={
        "model.num_layers": 2,
        "model.hidden_size": 32,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 64,
        "data.pack_length": 256,
    },
    num_sft=300,
    num_pairs=120,
    sft_steps=10,
    baseline="fp32",
    candidates={"bf16": {"train.precision": "bf16"}},
)
FOLDER = Path(__file__).resolve().parents[1] / "launch" / "recipes"


def train(recipe: str, settings: Settings, parallel: Parallel) -> list[float]:
    """Losses of a run of the product's own trainer, to its end."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in (COMMON | settings).items()]
    config = load_recipe(FOLDER / recipe, overrides)
    check(config, 1)
    Trainer(config, parallel).train()
    _forget_scales()
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _forget_scales() -> None:
    """Transformer Engine keeps the scales of every model of a process, and would go on adjusting those of runs that have ended."""
    engine = sys.modules.get("transformer_engine.pytorch.quantization")
    if engine is not None:
        engine.FP8GlobalStateManager.reset()


def curves_of(
    gate: Gate, seeds: Sequence[int], steps: int, work: Path, parallel: Parallel
) -> Iterator[tuple[str, Curves]]:
    """Losses by seed, of one precision after the other; the baseline comes first."""
    files: TaskFiles = write_tasks(
        work / "data",
        seed=DATA_SEED,
        num_sft=gate.num_sft,
        num_pairs=gate.num_pairs,
        num_eval=1,
    )
    sft = {
        **gate.model,
        "run.dir": str(work / "sft"),
        "data.train": str(files.sft),
        "train.precision": gate.baseline,
        "train.steps": gate.sft_steps,
        "optimizer.warmup_steps": min(40, gate.sft_steps // 4),
    }
    train("demo_sft_cpu.toml", sft, parallel)
    dpo = {
        **gate.model,
        "data.train": str(files.pairs),
        "data.cache_dir": str(work / "cache"),
        "model.init_from": str(work / "sft"),
        "train.precision": gate.baseline,
        "train.steps": steps,
        "optimizer.warmup_steps": min(10, steps // 4),
    }
    for name, settings in {gate.baseline: {}, **gate.candidates}.items():
        found: Curves = {}
        for seed in seeds:
            own = {"run.dir": str(work / f"{name}-{seed}"), "train.seed": seed}
            began = time.perf_counter()
            losses = train("demo_dpo_tp2_cpu.toml", dpo | settings | own, parallel)
            found[str(seed)] = losses
            print(
                f"{name}, seed {seed}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {time.perf_counter() - began:.1f} s",
                flush=True,
            )
        yield name, found


def smooth(curves: Curves) -> np.ndarray:
    """(seeds, windows): means over windows; steps that fill no window are left out."""
    losses = np.array(list(curves.values()), dtype=np.float64)
    windows = max(1, losses.shape[1] // WINDOW)
    size = min(WINDOW, losses.shape[1])
    return losses[:, : windows * size].reshape(len(losses), windows, size).mean(2)


def half_width(baseline: Curves) -> float:
    """Half of the band, nats."""
    pooled = float(np.sqrt(smooth(baseline).var(axis=0, ddof=1).mean()))
    return max(NARROWEST, WIDTH * pooled)


def judge(baseline: Curves, candidate: Curves) -> dict[str, Any]:
    """Whether a curve stays in the band; a loss that is not finite is outside of any."""
    difference = smooth(candidate).mean(0) - smooth(baseline).mean(0)
    finite = bool(np.isfinite(difference).all())
    inside = np.abs(difference) <= half_width(baseline)
    return {
        "largest_difference": float(np.abs(difference).max()) if finite else None,
        "windows_outside": np.flatnonzero(~inside).tolist(),
        "passed": bool(inside.all()),
    }


def measure(gate: Gate, seeds: Sequence[int], steps: int, out: Path) -> dict[str, Any]:
    """The record, which `out` holds as far as it has come. Raises: ValueError when a candidate cannot run here."""
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="nova_fp8_gate_") as work,
        parallel_run(ParallelConfig(), seed=0) as parallel,
    ):
        for settings in gate.candidates.values():
            fp8 = Fp8Config(recipe=settings.get("fp8.recipe", "blockwise"))
            check_precision(settings.get("train.precision", ""), fp8, parallel.device)
        record: dict[str, Any] = {
            **circumstances(parallel.device),
            "command": " ".join(["python", "benchmarks/fp8_gate.py", *sys.argv[1:]]),
            "simulated": gate is SIMULATED,
            "steps": steps,
            "window": min(WINDOW, steps),
            "candidates": {},
        }
        baseline: Curves = {}
        for name, curves in curves_of(gate, seeds, steps, Path(work), parallel):
            if name == gate.baseline:
                baseline = curves
                record["baseline"] = {"name": name, "losses": curves}
                record["half_width"] = half_width(curves)
            else:
                record["candidates"][name] = judge(baseline, curves) | {"losses": curves}
            record["seconds"] = round(time.perf_counter() - began, 1)
            out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def describe(record: dict[str, Any]) -> str:
    """A paragraph and a table, for a report."""
    name, seeds = record["baseline"]["name"], len(record["baseline"]["losses"])
    lines = [
        f"{record['steps']} DPO steps from one SFT checkpoint, {seeds} seeds each: the mean loss over {record['window']} steps against {name}'s, "
        f"allowed {record['half_width']:.4f} nats (two standard deviations between {name}'s own seeds).",
        "",
        f"| precision | largest difference from {name} | in the band |",
        "|---|---|---|",
    ]
    for candidate, result in record["candidates"].items():
        outside = result["windows_outside"]
        verdict = "yes" if result["passed"] else f"no, {len(outside)} windows outside"
        largest = result["largest_difference"]
        shown = "not finite" if largest is None else f"{largest:.4f}"
        lines.append(f"| {candidate} | {shown} | {verdict} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """The band, the baseline's seeds in it, and every candidate's mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    baseline = smooth(record["baseline"]["losses"])
    steps = (np.arange(baseline.shape[1]) + 1) * record["window"]
    mean, half = baseline.mean(0), record["half_width"]
    name = record["baseline"]["name"]
    axes.fill_between(steps, mean - half, mean + half, color="#d9dee2", label="band")
    for curve in baseline:
        axes.plot(steps, curve, color="#8b939a", linewidth=0.8)
    axes.plot(steps, mean, color="#4a5157", linewidth=2.0, label=name)
    colors = ("#1f6f8b", "#c26a2d", "#6a8f3c", "#7d5a8f")  # of ON_A_GPU.candidates
    for (candidate, result), color in zip(record["candidates"].items(), colors, strict=False):
        axes.plot(steps, smooth(result["losses"]).mean(0), color=color, label=candidate)
    axes.set_xlabel("step")
    axes.set_ylabel(f"DPO loss, mean of {record['window']} steps")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--plot", type=Path, help="PNG file of the curves")
    parser.add_argument("--simulate", action="store_true", help="on a CPU, tiny")
    known = list(ON_A_GPU.candidates)
    parser.add_argument("--recipes", nargs="+", choices=known, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < 2:
        parser.error(f"--seeds {arguments.seeds}: two or more, for they give the band its width")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    setup_logging()
    torch.set_num_threads(1)
    gate = SIMULATED
    if not arguments.simulate:
        chosen = {name: ON_A_GPU.candidates[name] for name in arguments.recipes}
        gate = Gate(**{**ON_A_GPU.__dict__, "candidates": chosen})
    try:
        record = measure(gate, arguments.seeds, arguments.steps, arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.plot:
        plot(record, arguments.plot)
    print(describe(record))
    return 0 if all(result["passed"] for result in record["candidates"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
