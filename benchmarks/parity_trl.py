"""TRL's side of benchmarks/parity.py. Runs in an environment of its own (constraints/peer-trl.txt).

It is given two Hugging Face folders, pairs as text, and settings. Tokenising, padding, reference log-probs, losses, loop and optimizer are
TRL's own; this file only notes what they give. It writes answer.json and, per case, what `save_pretrained` writes.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

KINDS = {
    "DPOTrainer": (trl.DPOTrainer, trl.DPOConfig),
    "CPOTrainer": (CPOTrainer, CPOConfig),
    "ORPOTrainer": (ORPOTrainer, ORPOConfig),
}


def noting(kind: Any) -> Any:
    """The trainer, with every loss that it trains on kept."""

    class Noting(kind):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.noted.append(float(loss))
            return loss

    return Noting


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def settings_of(case: dict[str, Any], given: dict[str, Any], out: Path) -> dict[str, Any]:
    batch, at_once = given["pairs_per_step"], case["pairs_at_once"]
    return {
        "output_dir": str(out / "trainer"),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": batch // at_once,
        "max_steps": given["steps"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_length": given["max_length"],
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": case["trainer"] == "DPOTrainer",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **given["training"],
        **case["theirs"],
    }


def make_trainer(case: dict[str, Any], given: dict[str, Any], out: Path) -> Any:
    trainer_class, config_class = KINDS[case["trainer"]]
    settings, more = settings_of(case, given, out), {}
    if case["trainer"] == "DPOTrainer":
        settings["precompute_ref_log_probs"] = True
        if case["reference"]:
            more["ref_model"] = load(given["reference"])
    rows = [json.loads(line) for line in Path(given[case["data"]]).read_text().splitlines()]
    trainer = noting(trainer_class)(
        model=load(given["policy"]),
        args=config_class(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(given["policy"]),
        **more,
    )
    trainer.noted = []
    return trainer


def ids_of(row: dict[str, Any]) -> list[list[int]]:
    """Prompt, chosen and rejected answer of a row that a trainer has tokenised."""
    if "prompt_ids" in row:
        return [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
    answers = []
    for which in ("chosen", "rejected"):
        carries_loss = [label != -100 for label in row[f"{which}_labels"]]
        start = carries_loss.index(True)
        assert all(carries_loss[start:])
        prompt, answer = row[f"{which}_input_ids"][:start], row[f"{which}_input_ids"][start:]
        answers.append(answer)
    return [prompt, *answers]


@torch.no_grad()
def losses_of(trainer: Any, batch: Any, case: dict[str, Any]) -> float:
    """Of one batch; for ORPO's odds ratio without the NLL of prompt and answer, which TRL adds."""
    if case["trainer"] == "DPOTrainer":
        return float(trainer.compute_loss(trainer.model, batch))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    return float(loss) - (metrics["nll_loss"] if case["odds_ratio_alone"] else 0.0)


def logps_of(trainer: Any, given: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Summed log-probs [chosen, rejected] of each pair."""
    data = trainer.train_dataset
    score = partial(trainer.compute_ref_log_probs, trainer.model)
    at_once = given["pairs_per_step"]
    batches = [
        trainer.data_collator([data[i] for i in range(first, first + at_once)])
        for first in range(0, len(data), at_once)
    ]
    policy = [torch.stack(score(batch), dim=1) for batch in batches]
    reference = zip(data["ref_chosen_logps"], data["ref_rejected_logps"], strict=True)
    return {"policy": torch.cat(policy).tolist(), "reference": [list(pair) for pair in reference]}


def run_case(case: dict[str, Any], given: dict[str, Any], out: Path) -> dict[str, Any]:
    trainer = make_trainer(case, given, out)
    data = trainer.train_dataset
    answer: dict[str, Any] = {"ids": [ids_of(row) for row in data]}
    if case["trainer"] == "DPOTrainer" and case["reference"]:
        answer["logp"] = logps_of(trainer, given)
    answer["losses"] = [losses_of(trainer, trainer.data_collator([row]), case) for row in data]
    if case["trains"]:
        trainer.noted = []
        trainer.train()
        each = len(trainer.noted) // given["steps"]
        assert each * case["pairs_at_once"] == given["pairs_per_step"]
        answer["step_losses"] = [
            sum(trainer.noted[i : i + each]) / each for i in range(0, len(trainer.noted), each)
        ]
        trainer.model.save_pretrained(out / case["folder"])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--given", type=Path, required=True, help="written by parity.py")
    parser.add_argument("--out", type=Path, required=True, help="folder that TRL may write to")
    arguments = parser.parse_args()
    given = json.loads(arguments.given.read_text())
    torch.set_num_threads(given["threads"])
    answer: dict[str, Any] = {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cases": {},
    }
    for name, case in given["cases"].items():
        print(f"TRL: {name}", flush=True)
        answer["cases"][name] = run_case(case, given, arguments.out)
    (arguments.out / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
