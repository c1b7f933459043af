"""The same numbers as TRL: `python benchmarks/parity.py --data PAIRS` starts this package's trainer and TRL's from one Hugging Face folder,
and compares log-probs, losses and what is left of the folder after three steps. Writes results/parity_cpu.json; fails when a bound is exceeded.

Both read the same text and tokenise it themselves. The policy is not its reference, so margins are not 0 and every loss has something to
say; one case has the policy's first weights as reference, as users have. Nothing is clipped or decayed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_ours import (
    CASES,
    MAX_LENGTH,
    STEPS,
    TRAINING,
    Case,
    exact_logps,
    folder_of,
    make_folders,
    run_ours,
    text_pairs,
    write_pairs,
)
from run import ROOT, circumstances, git
from safetensors.torch import load_file
from step import SOURCE
from step_variants import PEER_BATCH_PAIRS

LOGP_BOUND, LOSS_BOUND, PARAMETER_BOUND = 1e-4, 1e-5, 1e-5
UPDATE_BOUND = 1e-3
"""Of what three steps do to a tensor, as norms. The bound on weights alone would let another beta2 pass: that changes the update by 9e-3,
another beta of the loss by 6e-2, another order of batches by 1 (measured)."""


def hand_over(work: Path, cases: dict[str, Case], threads: int) -> Path:
    """What TRL's side is given."""
    given = {
        "policy": str(work / "policy"),
        "reference": str(work / "reference"),
        "pairs": str(work / "pairs.jsonl"),
        "answers": str(work / "answers.jsonl"),
        "threads": threads,
        "steps": STEPS,
        "pairs_per_step": PEER_BATCH_PAIRS,
        "max_length": MAX_LENGTH,
        "training": TRAINING,
        "cases": {
            name: {**asdict(case), "folder": folder_of(name)} for name, case in cases.items()
        },
    }
    path = work / "given.json"
    path.write_text(json.dumps(given, indent=2))
    return path


def run_trl(python: Path, given: Path, out: Path, threads: int) -> dict[str, Any]:
    """Raises: RuntimeError with what it said when it fails."""
    out.mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "0",
        "HF_HOME": str(out / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(python), str(ROOT / "benchmarks" / "parity_trl.py")]
    command += ["--given", str(given), "--out", str(out)]
    done = subprocess.run(command, env=environment, text=True, stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"TRL's side ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads((out / "answer.json").read_text())


def largest(ours: Any, theirs: Any) -> float:
    """Largest difference of two arrays of one shape; infinite when it is no number."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.nan_to_num(np.abs(a - b).max(), nan=np.inf))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def compare_folders(ours: Path, theirs: Path, start: Path) -> dict[str, Any]:
    """Of the tensor that differs most: its difference, and how far training moved it, relative to its largest element; and the
    largest difference of an update, relative to the update (norms)."""
    a, b, before = tensors_of(ours), tensors_of(theirs), tensors_of(start)
    if not a.keys() == b.keys() == before.keys():
        raise ValueError(f"{ours} and {theirs} hold other tensors: {sorted(a.keys() ^ b.keys())}")
    rows = []
    for name, first in before.items():
        scale = b[name].abs().max()
        off, moved = (a[name] - b[name]), (b[name] - first)
        rows.append(
            {
                "tensor": name,
                "difference": float(off.abs().max() / scale),
                "moved": float(moved.abs().max() / scale),
                "update": float(off.norm() / moved.norm()),
            }
        )
    worst = max(rows, key=lambda row: row["difference"])
    least = min(row["moved"] for row in rows)
    return {**worst, "update": max(row["update"] for row in rows), "moved_least": least}


def compare_logps(ours: dict[str, Any], theirs: dict[str, Any], policy: Path) -> dict[str, float]:
    """Largest differences of summed log-probs, nats; and both sides' from fp64."""
    exact = exact_logps(policy, ours["ids"])
    found = {model: largest(ours["logp"][model], theirs[model]) for model in theirs}
    return {
        **found,
        "ours_from_fp64": largest(ours["logp"]["policy"], exact),
        "theirs_from_fp64": largest(theirs["policy"], exact),
        "least": float(np.min(exact)),
        "most_tokens": int(np.max(ours["tokens"])),
    }


def check_ids(case: str, ours: list[Any], theirs: list[Any]) -> None:
    """Raises: ValueError when the two sides do not train on the same ids."""
    if ours == theirs:
        return
    differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    raise ValueError(
        f"{case}: {len(ours)} pairs here, {len(theirs)} in TRL, with other ids in {differ or 'none'}; only the same ids can be "
        "compared. Look at how each side cuts and tokenises those"
    )


def compare(
    ours: dict[str, Any], theirs: dict[str, Any], cases: dict[str, Case], work: Path
) -> dict[str, Any]:
    """Raises: ValueError when the two sides do not train on the same ids."""
    rows: list[dict[str, Any]] = []
    logps: dict[str, float] = {}
    for name, case in cases.items():
        mine, peer = ours["cases"][name], theirs["cases"][name]
        check_ids(name, ours[case.data]["ids"], peer["ids"])
        row: dict[str, Any] = {"case": name, "trainer": case.trainer, "ours": case.ours}
        row |= {"theirs": case.theirs, "pairs": largest(mine["losses"], peer["losses"])}
        row["loss_range"] = [min(peer["losses"]), max(peer["losses"])]
        if "logp" in peer:
            logps = compare_logps(ours[case.data], peer["logp"], work / "policy")
        if case.trains:
            row["steps"] = largest(mine["step_losses"], peer["step_losses"])
            folder = folder_of(name)
            row["parameters"] = compare_folders(
                work / "ours" / folder, work / "trl" / folder, work / "policy"
            )
        rows.append(row)
    return {"logp": logps, "results": rows}


def problems(record: dict[str, Any]) -> list[str]:
    """Every bound that is exceeded."""
    found = [
        (f"log-probs of the {model}", record["logp"][model], LOGP_BOUND)
        for model in ("policy", "reference")
    ]
    for row in record["results"]:
        found.append((f"{row['case']}: losses of single pairs", row["pairs"], LOSS_BOUND))
        if "parameters" in row:
            after, tensor = row["parameters"], row["parameters"]["tensor"]
            found.append((f"{row['case']}: losses of the steps", row["steps"], LOSS_BOUND))
            found.append((f"{row['case']}: {tensor}", after["difference"], PARAMETER_BOUND))
            found.append((f"{row['case']}: updates", after["update"], UPDATE_BOUND))
    return [f"{what}: {value:.1e}, allowed {bound:.0e}" for what, value, bound in found if not value <= bound]  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help=f"preference pairs: {SOURCE}; without it, tasks of `nova demo`"
    )
    parser.add_argument(
        "--peer-venv",
        type=Path,
        default=ROOT / ".venv" / "peer-trl",
        help="made by `make peer-trl`",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="new folder to keep; else a temporary one")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "parity_cpu.json"
    )
    arguments = parser.parse_args()
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(
            f"--data {arguments.data}: no such file; download hh-rlhf from {SOURCE}, or leave it out"
        )
    if not (arguments.peer_venv / "bin" / "python").exists():
        parser.error(
            f"--peer-venv {arguments.peer_venv}: no environment there; run `make peer-trl`"
        )
    return arguments


def about_this_run(data: Path | None, threads: int) -> dict[str, Any]:
    record = circumstances()
    record["versions"] |= {name: version(name) for name in ("megatron-core", "transformers")}
    measured = ["csrc", "kernels", "nova_sys", "benchmarks/*.py"]
    return {
        **record,
        "threads": threads,
        "command": " ".join(["make parity", *([f"DATA={data.name}"] if data else [])]),
        "uncommitted": bool(git("status", "--porcelain", "--", *measured)),
    }


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    pairs, left_out = text_pairs(arguments.data, work)
    write_pairs(pairs, work)
    model = make_folders(pairs, work)
    given = hand_over(work, CASES, arguments.threads)
    theirs = run_trl(arguments.peer_venv / "bin" / "python", given, work / "trl", arguments.threads)
    ours = run_ours(work, CASES, arguments.threads)
    if theirs["torch"] != torch.__version__ or theirs["threads"] != torch.get_num_threads():
        raise RuntimeError(f"TRL ran with torch {theirs['torch']} and {theirs['threads']} threads")
    source = arguments.data.name if arguments.data else "tasks of nova demo"
    return {
        "data": {"file": source, "pairs": len(pairs), "left_out": left_out},
        "model": model,
        "training": {**TRAINING, "steps": STEPS, "pairs_per_step": PEER_BATCH_PAIRS},
        "peer_versions": theirs["versions"],
        "bounds": {
            "logp": LOGP_BOUND,
            "loss": LOSS_BOUND,
            "parameters": PARAMETER_BOUND,
            "update": UPDATE_BOUND,
        },
        **compare(ours, theirs, CASES, work),
    }


def main() -> int:
    arguments = parse_arguments()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both sides on the CPU, wherever this runs
    torch.set_num_threads(arguments.threads)
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        record = about_this_run(arguments.data, arguments.threads) | run(arguments, work.resolve())
    found = problems(record)
    if found:
        print("not the same numbers as TRL:", *found, sep="\n  ", file=sys.stderr)
        return 1
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
