"""The toy experiments of KV shifting's paper, through `nova train`: `python benchmarks/kv_shift_induction.py [--seeds 0 1 2]`.

Trains launch/recipes/kv_shift_induction_cpu.toml in the variants of `CASES` (what is there already is kept), measures every checkpoint on
held-out sequences, and writes results/kv_shift_induction_cpu.json, docs/images/kv_shift_induction.png and the table in the op's README.

    --data-only     only makes the data, for a recipe that is then trained by itself; with --published for kv_shift_induction_gpu.toml
    --report-only   only renders again what the JSON holds; --check: only says whether the README shows it

Accuracy is the share of answers, over all held-out sequences, to which the checkpoint gives the highest logit of all ids.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nova_sys.data.induction import ToyFiles, write_induction, write_trigrams

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "launch/recipes/kv_shift_induction_cpu.toml"
RESULT = ROOT / "benchmarks" / "results" / "kv_shift_induction_cpu.json"
PICTURE = ROOT / "docs" / "images" / "kv_shift_induction.png"
README = ROOT / "kernels" / "nova_kernels" / "kv_shift_rope" / "README.md"
BEGIN, END = "<!-- induction: rendered by benchmarks/kv_shift_induction.py -->", "<!-- /induction -->"  # fmt: skip
DATA_SEED = 0
INDUCTION = {"num_train": 33_000, "num_eval": 128, "length": 64, "num_distinct": 32, "num_ids": 64}
TRIGRAMS = {"num_train": 10_000, "num_eval": 128, "length": 64, "num_rules": 200, "num_ids": 64}
PUBLISHED = {"num_train": 200_000, "num_eval": 256, "length": 512, "num_distinct": 512, "num_ids": 7989}  # fmt: skip
LEARNED = 0.8
"""An accuracy that counts as having learned the task."""

VANILLA = {"model.kv_shift": False, "model.kv_shift_init": "identity"}
HIDDEN_8 = {
    "model.hidden_size": 8,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.ffn_hidden_size": 22,
    "train.steps": 800,
}


@dataclass(frozen=True)
class Case:
    """One line of the plot. panel: where it is drawn; task: the data; settings: what differs from the recipe."""

    panel: str
    label: str
    task: str
    settings: dict[str, Any]


WIDE, NARROW, TRIGRAM = "induction, hidden size 64", "induction, hidden size 8", "3-grams, hidden size 64"  # fmt: skip
CASES = {
    "vanilla-1": Case(WIDE, "1 layer", "induction", VANILLA),
    "vanilla-2": Case(WIDE, "2 layers", "induction", VANILLA | {"model.num_layers": 2}),
    "kv-1": Case(WIDE, "1 layer, KV shifting", "induction", {"train.steps": 500}),
    "narrow-vanilla-2": Case(
        NARROW, "2 layers", "induction", VANILLA | HIDDEN_8 | {"model.num_layers": 2}
    ),
    "narrow-kv-1": Case(NARROW, "1 layer, KV shifting", "induction", HIDDEN_8),
    "trigram-vanilla-1": Case(TRIGRAM, "1 layer", "trigrams", VANILLA | {"train.steps": 300}),
    "trigram-kv-1": Case(TRIGRAM, "1 layer, KV shifting", "trigrams", {"train.steps": 300}),
}
LEGENDS = {WIDE: (0.52, 0.14), NARROW: "upper left", TRIGRAM: "lower right"}
COLORS = {"1 layer": "#8b939a", "2 layers": "#c26a2d", "1 layer, KV shifting": "#1f6f8b"}


def make_data(runs: Path, *, published: bool = False) -> dict[str, ToyFiles]:
    if published:
        return {"induction": write_induction(runs / "published", seed=DATA_SEED, **PUBLISHED)}
    return {
        "induction": write_induction(runs / "data", seed=DATA_SEED, **INDUCTION),
        "trigrams": write_trigrams(runs / "trigrams", seed=DATA_SEED, **TRIGRAMS),
    }


def overrides_of(case: Case, seed: int, files: ToyFiles, run_dir: Path) -> list[str]:
    settings = {
        "run.dir": str(run_dir),
        "data.train": str(files.train),
        "data.tokenizer": str(files.tokenizer),
        "data.template": str(files.template),
        "data.cache_dir": str(run_dir.parent / "cache"),  # tokenised once for all runs
        "train.seed": seed,
        "log.tensorboard": False,
        **case.settings,
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def train(case: Case, seed: int, files: ToyFiles, run_dir: Path, threads: int) -> float:
    """One run of `nova train`, to its end. Returns its seconds, start-up included."""
    command = [sys.executable, "-m", "nova_sys.cli", "train", RECIPE]
    for override in overrides_of(case, seed, files, run_dir):
        command += ["--set", override]
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    return time.perf_counter() - began


def accuracies(run_dir: Path, evaluation: Path, threads: int) -> list[tuple[int, float]]:
    """(step, accuracy) of every checkpoint of a run."""
    import torch

    from nova_sys.checkpoint_files import all_checkpoints
    from nova_sys.data.loader import PackLoader
    from nova_sys.data.prepare import prepare_data
    from nova_sys.inference import load_model
    from nova_sys.parallel import parallel_run
    from nova_sys.saved_config import EVALUATE, config_for

    torch.set_num_threads(threads)
    own = {"data.train": evaluation, "data.cache_dir": run_dir.parent / "cache"}
    own["run.dir"] = run_dir / "evaluation"
    overrides = [f"{key}={json.dumps(str(path))}" for key, path in own.items()]
    last, config = config_for(EVALUATE, run_dir, [], 1, overrides)
    loader = PackLoader(
        prepare_data(config, last / "tokenizer").store, pack_length=config.data.pack_length,
        global_batch_packs=1, data_rank=0, data_size=1, seed=0, share_prefix=True, epochs=1.0,
    )  # fmt: skip
    packs = [pack for step in range(loader.steps_for(1.0)) for pack in loader.micro_batches(step)]
    with parallel_run(config.parallel, seed=config.train.seed) as parallel:
        return [
            (int(folder.name[5:]), accuracy(load_model(folder, config, parallel)[0], packs))
            for folder in all_checkpoints(run_dir)
        ]


def accuracy(model: Any, packs: Sequence[Any]) -> float:
    """The share of all packs' answers that have the highest logit."""
    import torch

    from nova_sys.model.attention import PackLayout

    right = total = 0
    device = next(model.parameters()).device
    for pack in (pack.to(device) for pack in packs):
        layout = PackLayout(pack.segments_S4, pack.index)
        with torch.no_grad():
            logits_RV = model.run(pack.tokens_T, layout, pack.row_R, None)
        right += int((logits_RV.argmax(dim=1) == pack.target_R).sum())
        total += pack.target_R.numel()
    return right / total


def run_case(name: str, seed: int, files: ToyFiles, runs: Path, threads: int) -> dict[str, Any]:
    """The curve of one run; from its folder if it has been measured."""
    run_dir = runs / f"{name}-{seed}"
    measured = run_dir / "accuracy.json"
    if not measured.exists():
        train_s = train(CASES[name], seed, files, run_dir, threads)
        began = time.perf_counter()
        curve = accuracies(run_dir, files.evaluation, threads)
        curve_s = {"train": train_s, "evaluate": time.perf_counter() - began}
        row = {"steps": [s for s, _ in curve], "accuracy": [round(a, 4) for _, a in curve]}
        measured.write_text(json.dumps({"seed": seed, **row, "seconds": curve_s}))
    return json.loads(measured.read_text())


def circumstances(threads: int) -> dict[str, Any]:
    from run import cpu_model, git

    sources = ["kernels", "nova_sys", "benchmarks/kv_shift_induction.py", RECIPE]
    versions = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    return {
        "hardware": "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **versions},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", *sources)),
    }


def learned_at(run: dict[str, Any]) -> int | None:
    """The first measured step with an accuracy of at least `LEARNED`."""
    pairs = zip(run["steps"], run["accuracy"], strict=True)
    return next((step for step, value in pairs if value >= LEARNED), None)


def table(record: dict[str, Any]) -> str:
    """The README's: accuracy of each seed at the end, and when it had learned the task."""
    seconds = sum(sum(r["seconds"].values()) for c in record["cases"].values() for r in c["runs"])
    num_runs = sum(len(case["runs"]) for case in record["cases"].values())
    lines = [
        f"`{record['command']}`: {num_runs} runs on {record['threads']} thread of an {record['cpu']}, {seconds / 60:.0f} minutes together"
        f"{', ' + record['note'] if record['note'] else ''}.",
        "",
        f"| task | model | steps | accuracy at the end, by seed | {LEARNED:.0%} reached at step, by seed |",
        "|---|---|---|---|---|",
    ]
    for case in record["cases"].values():
        final = ", ".join(f"{run['accuracy'][-1]:.1%}" for run in case["runs"])
        when = ", ".join(str(learned_at(run) or "never") for run in case["runs"])
        lines.append(
            f"| {case['panel']} | {case['label']} | {case['runs'][0]['steps'][-1]} | {final} | {when} |"
        )
    return "\n".join(lines)


def draw(record: dict[str, Any]) -> None:
    """A panel per task and width: each seed as a thin line, their median as a thick one."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(case["panel"] for case in record["cases"].values()))
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        for case in (c for c in record["cases"].values() if c["panel"] == panel):
            color, curves = COLORS[case["label"]], [run["accuracy"] for run in case["runs"]]
            steps = case["runs"][0]["steps"]
            for curve in curves:
                axes.plot(steps, curve, color=color, linewidth=0.9, alpha=0.45)
            median = [statistics.median(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, median, color=color, linewidth=2.2, label=case["label"])
        axes.set(title=panel, xlabel="step", ylim=(0, 1.03), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6e8", linewidth=0.8)
        axes.legend(frameon=False, fontsize=9, loc=LEGENDS[panel])
    figure.axes[0].set_ylabel("accuracy on held-out sequences")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def rendered(record: dict[str, Any]) -> str:
    """The README with the table of the record."""
    before, rest = README.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{rest.split(END)[1]}"


def report(record: dict[str, Any]) -> None:
    draw(record)
    README.write_text(rendered(record))
    print(table(record))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "induction")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1, help="of each run, one at a time")
    parser.add_argument(
        "--note", default="", help="what the JSON should say besides, as of a busy machine"
    )
    parser.add_argument("--published", action="store_true", help="with --data-only: its size")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--data-only", action="store_true")
    only.add_argument("--report-only", action="store_true")
    only.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.report_only:
        return report(json.loads(RESULT.read_text()))
    if arguments.check:
        if rendered(json.loads(RESULT.read_text())) != README.read_text():
            sys.exit(
                f"{README.relative_to(ROOT)} does not show {RESULT.name}: run {Path(__file__).name} --report-only"
            )
        return None
    files = make_data(arguments.runs, published=arguments.published)
    if arguments.data_only:
        return print(f"wrote {', '.join(str(f.train.parent) for f in files.values())}")
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.cases}
    for seed in arguments.seeds:  # seed by seed: a run that is stopped early has whole ones
        for name in arguments.cases:
            of_task = files[CASES[name].task]
            curves[name].append(run_case(name, seed, of_task, arguments.runs, arguments.threads))
    record = {
        **circumstances(arguments.threads),
        "command": "python benchmarks/kv_shift_induction.py",
        "note": arguments.note,
        "recipe": RECIPE,
        "data_seed": DATA_SEED,
        "tasks": {"induction": INDUCTION, "trigrams": TRIGRAMS},
        "cases": {name: {**vars(CASES[name]), "runs": runs} for name, runs in curves.items()},
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    report(record)


if __name__ == "__main__":
    main(sys.argv[1:])
