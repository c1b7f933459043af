"""The DPO step of gpu_step.py in TRL: `python benchmarks/gpu_trl.py --given FOLDER --out FILE.json`, a part of gpu_check.py.

Same weights, token ids, precision (bf16 products, fp32 weights and moments), optimizer and device; FOLDER is what `gpu_step.py --hand-over` wrote.
TRL's options are the fastest that it has for this: Liger's kernels, reference log-probs computed before the clock starts, fused AdamW, no recomputation,
and the batch size with the most pairs per second of those that fit. It has no padding-free DPO (`padding_free` is disabled in 1.16).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

NEEDED = ("trl", "transformers", "datasets", "accelerate")
BATCHES = (16, 8, 32, 4)
"""Pairs per optimizer step, in the order in which they are tried; 4 only where nothing larger fits."""
WARM_UP_STEPS = 3


def train(given: dict[str, Any], rows: list[dict[str, Any]], model: Any, options: Any) -> Any:
    """One run of TRL's loop. options: pairs, steps, folder, on_gpu, liger, known reference log-probs."""
    import torch
    import trl
    from datasets import Dataset
    from step_trl import tokenizer
    from transformers import TrainerCallback

    class Given(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # token ids, those that ours trains on

        def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
            if not options["reference"]:
                scored = super()._precompute_ref_logps(dataset, *args)
                for side in ("ref_chosen_logps", "ref_rejected_logps"):
                    options["reference"][side] = list(scored[side])
            for side, values in options["reference"].items():
                dataset = dataset.add_column(side, values)
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            ended.losses.append(loss.detach())
            ended.positions.append(inputs["input_ids"].numel())
            return loss

    class Ended(TrainerCallback):
        def __init__(self) -> None:
            self.at_s: list[float] = []
            self.losses: list[Any] = []
            self.positions: list[int] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if options["on_gpu"]:
                torch.cuda.synchronize()
            self.at_s.append(time.perf_counter())

    ended = Ended()
    # a hash of all weights, for a cache on disk that is not used here, takes longer than training
    with mock.patch("trl.trainer.dpo_trainer.hash_module", lambda _: "given"):
        trainer = Given(
            model=model,
            args=trl.DPOConfig(**settings(given, options)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(given["model"]["vocab_size"]),
            callbacks=[ended],
        )
    trainer.train()
    return ended


def settings(given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    on_gpu = options["on_gpu"]
    return {
        "output_dir": str(options["folder"]),
        "per_device_train_batch_size": options["pairs"],
        "max_length": given["max_length"],
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": options["pairs"],
        "use_liger_kernel": options["liger"],
        "gradient_checkpointing": False,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "optim": "adamw_torch_fused",
        "max_steps": options["steps"],
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        **given["training"],
    }


def measure(given: dict[str, Any], rows: list[Any], model: Any, options: Any) -> dict[str, Any]:
    import torch

    if options["on_gpu"]:
        torch.cuda.reset_peak_memory_stats()
    ended = train(given, rows, model, options)
    times = [b - a for a, b in zip(ended.at_s[WARM_UP_STEPS - 1 :], ended.at_s[WARM_UP_STEPS:])]  # noqa: B905
    row: dict[str, Any] = {
        "pairs_per_step": options["pairs"],
        "pairs_per_s": options["pairs"] * len(times) / sum(times),
        "positions_per_pair": sum(ended.positions) / len(ended.positions) / options["pairs"],
        "first_loss": float(ended.losses[0]),
        "step_time_s": {"median": statistics.median(times), "all": times},
    }
    if options["on_gpu"]:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def load_model(given: dict[str, Any], folder: Path, on_gpu: bool) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(**given["model"], attn_implementation="sdpa")
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cuda" if on_gpu else "cpu").float()
    weights = torch.load(folder / "weights.pt", weights_only=True, mmap=True, map_location="cpu")
    model.load_state_dict(weights, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.device)  # had no values
    return model


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ["torch", *NEEDED]
    packages += ["liger-kernel"] if importlib.util.find_spec("liger_kernel") else []
    return {package: version(package) for package in packages}


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    measured = [row for row in rows if "pairs_per_s" in row]
    return max(measured, key=lambda row: row["pairs_per_s"]) if measured else None


def compare(record: dict[str, Any], ours: Path | None) -> None:
    """With the first row of what gpu_step.py measured."""
    if record["best"] is None or ours is None or not ours.exists():
        return
    row = json.loads(ours.read_text())["results"][0]
    if "pairs_per_s" in row:
        record["ours_pairs_per_s"] = row["pairs_per_s"]
        record["ours_times_trl"] = row["pairs_per_s"] / record["best"]["pairs_per_s"]


def try_batches(
    given: dict[str, Any], rows: list[Any], model: Any, arguments: argparse.Namespace, record: Any
) -> None:
    import torch

    options = {"on_gpu": torch.cuda.is_available(), "steps": WARM_UP_STEPS + arguments.steps}
    options |= {"liger": record["liger"], "reference": {}}
    for pairs in arguments.batches:
        too_large = [row["pairs_per_step"] for row in record["results"] if row.get("too_large")]
        if pairs >= min(too_large, default=pairs + 1):
            continue
        if pairs == min(BATCHES) and best(record["results"]):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                options |= {"pairs": pairs, "folder": folder}
                row = measure(given, rows, model, options)
        except torch.cuda.OutOfMemoryError as error:
            row = {"pairs_per_step": pairs, "too_large": True, "error": str(error)[:300]}
        except Exception as error:  # of these versions together, say; the next size may go
            row = {"pairs_per_step": pairs, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        record["results"].append(row)
        record["best"] = best(record["results"])
        compare(record, arguments.ours)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k != "step_time_s"}), flush=True)
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--given", type=Path, required=True)
    parser.add_argument("--ours", type=Path, help="what gpu_step.py measured on the same")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--steps", type=int, default=8, help="timed ones per batch size")
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    why = f"{', '.join(missing)}: not installed; `make gpu-wheels` fetches them" if missing else ""
    if not (arguments.given / "run.json").exists():
        why = f"{arguments.given}: gpu_step.py --hand-over left no weights there"
    if why:
        arguments.out.write_text(json.dumps({"skipped": why}) + "\n")
        return 0
    import torch

    on_gpu = torch.cuda.is_available()
    given = json.loads((arguments.given / "run.json").read_text())
    lines = (arguments.given / "pairs.jsonl").read_text().splitlines()
    record: dict[str, Any] = {"versions": versions(), "results": []}
    record["liger"] = on_gpu and "liger-kernel" in record["versions"]
    model = load_model(given, arguments.given, on_gpu)
    try_batches(given, [json.loads(line) for line in lines], model, arguments, record)
    return int(not record["best"])


if __name__ == "__main__":
    sys.exit(main())
