"""TRL's DPOTrainer as a provider of benchmarks/step.py. Runs in an environment of its own (constraints/peer-trl.txt).

It is given model, initial weights and token ids by files, so that it trains the same model on the same tokens as ours. Everything else is
TRL's own: collator, padding, reference log-probs (precomputed before the clock starts), loss, loop and optimizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from gate import Gate, denormals_are_flushed
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback


class Timed(trl.DPOTrainer):
    """DPOTrainer on token ids; notes each batch's size and loss for the gate."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # its tokenisation is not what is measured: the ids are those that ours trains on

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.last_batch = {
            "pairs": inputs["input_ids"].size(0) // 2,
            "tokens": int(inputs["attention_mask"].sum()),
            "positions": inputs["input_ids"].numel(),
            "loss": loss.detach(),
        }
        return loss


class GateCallback(TrainerCallback):
    """Opens and closes the gate behind each step, so that fetching the next batch is timed."""

    def __init__(self, gate: Gate, about: dict[str, Any]) -> None:
        self.gate, self.about, self.trainer = gate, about, None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.gate.ready(self.about)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        self.gate.step_done(**self.trainer.last_batch)


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """TRL wants one for its padding token; the text never passes through it."""
    words = {f"<{i}>": i for i in range(vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<0>", eos_token="<0>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--given", type=Path, required=True, help="folder written by step_ours.py")
    parser.add_argument("--out", type=Path, required=True, help="folder that TRL may write to")
    parser.add_argument("--in-order", action="store_true", help="batches in the order of the data")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # before the first parallel operation: worker threads inherit it
    gate = Gate()
    given = json.loads((arguments.given / "run.json").read_text())
    rows = [json.loads(line) for line in (arguments.given / "pairs.jsonl").read_text().splitlines()]

    model = LlamaForCausalLM(LlamaConfig(**given["model"], attn_implementation=arguments.attention))
    weights = torch.load(arguments.given / "weights.pt", weights_only=True)
    model.load_state_dict(weights, strict=True)
    settings = trl.DPOConfig(
        output_dir=str(arguments.out),
        per_device_train_batch_size=given["batch_pairs"],
        max_length=given["max_length"],
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=given["batch_pairs"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        train_sampling_strategy="sequential" if arguments.in_order else "random",
        max_steps=1_000_000,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        **given["training"],
    )
    about = {
        "torch": torch.__version__,
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "attention": arguments.attention,
        "batch_pairs": given["batch_pairs"],
        "optimizer": str(settings.optim),
        "threads": torch.get_num_threads(),
    }
    callback = GateCallback(gate, about)
    trainer = Timed(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(given["model"]["vocab_size"]),
        callbacks=[callback],
    )
    callback.trainer = trainer
    about["denormals_flushed"] = denormals_are_flushed(torch)
    trainer.train()


if __name__ == "__main__":
    main()
