"""This package's side of benchmarks/parity.py: what is compared, on which pairs and weights, and our numbers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from step import SOURCE
from step_variants import PEER_BATCH_PAIRS, Source, in_order

from nova_kernels import preference_loss
from nova_sys.config import RunConfig
from nova_sys.config_io import config_from
from nova_sys.data.formats import parse_record
from nova_sys.data.records import ASSISTANT, HUMAN, TextPair, UnusableRecord
from nova_sys.data.records import Source as Place
from nova_sys.data.tasks import write_tasks
from nova_sys.evaluate import evaluate_pairs
from nova_sys.hf.convert import to_hf
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.trainer import Trainer

PAIRS, STEPS, MAX_LENGTH = 32, 3, 1024
MOST_CHARACTERS = 120
"""Of an answer: TRL adds log-probs in fp32, where a sum of 1,000 nats is known to 6e-5 and its difference from another to twice that."""
TRAINING = {
    "learning_rate": 3e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,  # divided by less, a gradient of 1e-8, which is rounding, moves its weight by a whole learning rate
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,  # none
}
VOCAB = 1000
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """ours: fields of [algo].   theirs: of the TRL trainer's configuration.   data: pairs, or answers (the same without their prompts).
    pairs_at_once: TRL's batch; it accumulates to a step's pairs.   reference: another model than the policy's first weights.
    odds_ratio_alone: of ORPO's loss, without its NLL."""

    trainer: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    data: str = "pairs"
    pairs_at_once: int = PEER_BATCH_PAIRS
    reference: bool = True
    trains: bool = True
    odds_ratio_alone: bool = False


def _dpo(loss: str, beta: float, **more: float) -> Case:
    theirs = {"loss_type": [loss], "beta": beta, **more}
    return Case(trainer="DPOTrainer", ours={"loss": loss, "beta": beta, **more}, theirs=theirs)


ORPO: dict[str, Any] = {"trainer": "ORPOTrainer", "ours": {"loss": "orpo", "beta": 0.1}, "theirs": {"beta": 0.1}}  # fmt: skip
CASES = {
    "sigmoid": _dpo("sigmoid", 0.1),
    "sigmoid, first weights as reference": Case(
        trainer="DPOTrainer",
        ours={"loss": "sigmoid", "beta": 0.1},
        theirs={"loss_type": ["sigmoid"], "beta": 0.1},
        reference=False,
    ),
    "ipo": _dpo("ipo", 0.5),
    "hinge": _dpo("hinge", 0.1),
    "robust": _dpo("robust", 0.1, label_smoothing=0.1),
    "simpo": Case(
        trainer="CPOTrainer",
        ours={"loss": "simpo", "beta": 2.0, "target_margin": 1.0},
        theirs={"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "orpo, odds ratio": Case(**ORPO, trains=False, odds_ratio_alone=True),
    "orpo, answers without prompt": Case(**ORPO, data="answers", pairs_at_once=1),
}


def text_pairs(data: Path | None, work: Path) -> tuple[list[TextPair], int]:
    """The first pairs that suit, and how many records before the last of them do not."""
    if data is None:
        tasks = [json.loads(line) for line in _task_pairs(work).read_text().splitlines()]
        return [_as_transcript(task) for task in tasks], 0
    pairs: list[TextPair] = []
    left_out = 0
    with (gzip.open if data.suffix == ".gz" else open)(data, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                pair = parse_record(json.loads(line), Place(data.name, 0, number), "pairs")
            except UnusableRecord:
                left_out += 1
                continue
            if not suits(pair):
                left_out += 1
                continue
            pairs.append(pair)
            if len(pairs) == PAIRS:
                return pairs, left_out
    raise ValueError(
        f"{data}: {len(pairs)} pairs of text with answers of one turn, not blank, of at most {MOST_CHARACTERS} characters, and {PAIRS} are compared; give a file with more, such as {SOURCE}"
    )


def suits(pair: Any) -> bool:
    """Answers of one turn, for TRL would learn what a human says in them, too; with words, for only transcripts may have blank ones,
    and an answer without its prompt is none; and short."""
    if not isinstance(pair, TextPair) or HUMAN in pair.chosen + pair.rejected:
        return False
    if pair.has_blank_answer(True):
        return False
    return max(len(pair.chosen), len(pair.rejected)) <= MOST_CHARACTERS


def _task_pairs(work: Path) -> Path:
    return write_tasks(work / "tasks", seed=0, num_sft=1, num_pairs=PAIRS, num_eval=1).pairs


def _as_transcript(task: dict[str, str]) -> TextPair:
    prompt = f"{HUMAN} {task['prompt']}{ASSISTANT}"
    return TextPair(prompt, f" {task['chosen']}", f" {task['rejected']}")


def write_pairs(pairs: Sequence[TextPair], work: Path) -> None:
    for name, kept in (("pairs", True), ("answers", False)):
        with (work / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for pair in pairs:
                row = {**vars_of(pair), "prompt": pair.prompt if kept else ""}
                out.write(json.dumps(row) + "\n")


def vars_of(pair: TextPair) -> dict[str, str]:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def make_folders(pairs: Sequence[TextPair], work: Path) -> dict[str, Any]:
    """Policy and reference, random and not far from each other, with a tokenizer of the pairs' text. Returns what the models are."""
    tokenizer = make_tokenizer([text for pair in pairs for text in vars_of(pair).values()])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **SHAPE)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)  # else one that is left out would not show
        for name in ("reference", "policy"):
            model.save_pretrained(work / name)
            tokenizer.save_pretrained(work / name)
            for parameter in model.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    parameters = sum(p.numel() for p in model.parameters())
    return {"architecture": "Llama", "parameters": parameters, "vocab_size": len(tokenizer)} | SHAPE


def make_tokenizer(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def folder_of(case: str) -> str:
    return case.replace(", ", "_").replace(" ", "_")


def score(work: Path, data: str) -> dict[str, Any]:
    """What `nova evaluate` gives each pair: ids, tokens, and log-probs [chosen, rejected] of policy and reference."""
    out = work / f"{data}.scores.jsonl"
    evaluate_pairs(
        work / "policy",
        work / f"{data}.jsonl",
        work / "reference",
        overrides=[f"data.pack_length={MAX_LENGTH}", 'train.precision="fp32"', "data.workers=1"],
        per_pair=out,
        with_ids=True,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]

    def both(name: str) -> list[list[float]]:
        return [[row[name.format("chosen")], row[name.format("rejected")]] for row in rows]

    return {
        "ids": [[row[f"{k}_ids"] for k in ("prompt", "chosen", "rejected")] for row in rows],
        "tokens": both("{}_tokens"),
        "logp": {"policy": both("{}_logp"), "reference": both("ref_{}_logp")},
    }


@torch.no_grad()
def exact_logps(policy: Path, ids: list[list[list[int]]]) -> list[list[float]]:
    """Summed log-probs [chosen, rejected] of each pair, by transformers in fp64: what both sides come near to."""
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)

    def logp(prompt: list[int], answer: list[int]) -> float:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())

    return [[logp(prompt, answer) for answer in answers] for prompt, *answers in ids]


def pair_losses(case: Case, scored: dict[str, Any]) -> list[float]:
    def flat(values: list[list[float]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).flatten()

    logp_S, tokens_S = flat(scored["logp"]["policy"]), flat(scored["tokens"])
    ref_logp_S = flat(scored["logp"]["reference"]) if case.reference else logp_S
    loss_P = preference_loss(logp_S, ref_logp_S, tokens_S.long(), **case.ours).loss_P
    if case.odds_ratio_alone:
        loss_P = loss_P + (logp_S / tokens_S)[0::2]
    return loss_P.tolist()


def config_of(case: Case, work: Path, run_dir: Path) -> RunConfig:
    values: dict[str, Any] = {
        "model.init_from": str(work / "policy"),
        "run.dir": str(run_dir),
        "data.train": str(work / f"{case.data}.jsonl"),
        "data.cache_dir": str(work / "cache"),
        "data.pack_length": MAX_LENGTH,
        "data.workers": 1,
        "train.steps": STEPS,
        "train.precision": "fp32",
        "train.check_first_loss": not case.reference,
        "optimizer.lr": TRAINING["learning_rate"],
        "optimizer.min_lr": TRAINING["learning_rate"],
        "optimizer.betas": [TRAINING["adam_beta1"], TRAINING["adam_beta2"]],
        "optimizer.eps": TRAINING["adam_epsilon"],
        "optimizer.weight_decay": TRAINING["weight_decay"],
        "optimizer.grad_clip": TRAINING["max_grad_norm"],
        "checkpoint.asynchronous": False,
        "log.tensorboard": False,
        "log.progress": False,
    }
    values |= {f"algo.{key}": value for key, value in case.ours.items()}
    return config_from([f"{key}={json.dumps(value)}" for key, value in values.items()], work)


def train(
    name: str, case: Case, scored: dict[str, Any], work: Path, parallel: Parallel
) -> list[float]:
    """Trains on the pairs in their order, exports the last checkpoint, and returns the loss of each step."""
    config = config_of(case, work, work / "runs" / folder_of(name))
    trainer = Trainer(config, parallel)
    loader, store = trainer.loader, trainer.data.store
    if case.reference:
        ref_logp = np.array(scored["logp"]["reference"]).flatten()
        source = Source(store, MAX_LENGTH, config.data.share_prefix, ref_logp)
    else:
        source = Source.of(loader, store, MAX_LENGTH, config.data.share_prefix)
    loader.micro_batches = lambda step: in_order(source, step, [])
    trainer.train()
    to_hf(Path(config.run.dir), work / "ours" / folder_of(name))
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run_ours(work: Path, cases: dict[str, Case], threads: int) -> dict[str, Any]:
    scored = {data: score(work, data) for data in {case.data for case in cases.values()}}
    answer: dict[str, Any] = {**scored, "cases": {}}
    config = config_from([f"model.init_from={json.dumps(str(work / 'policy'))}"], work)
    with parallel_run(config.parallel, seed=config.train.seed) as parallel:
        torch.set_num_threads(threads)
        for name, case in cases.items():
            print(f"this package: {name}", flush=True)
            found: dict[str, Any] = {"losses": pair_losses(case, scored[case.data])}
            if case.trains:
                found["step_losses"] = train(name, case, scored[case.data], work, parallel)
            answer["cases"][name] = found
    return answer
