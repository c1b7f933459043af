"""This package's trainer as a provider of benchmarks/step.py, and what a peer is given so that it trains the same."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import megatron.core
import torch
from gate import Gate, denormals_are_flushed
from step_profile import profile_steps
from step_variants import PEER_BATCH_PAIRS, VARIANTS, Source

from nova_sys.config import RunConfig
from nova_sys.config_io import load_recipe
from nova_sys.data.prepare import prepare_data
from nova_sys.model.build import head_dim, padded_vocab_size
from nova_sys.parallel import parallel_run
from nova_sys.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[1] / "launch" / "recipes" / "dpo_hh_small.toml"
QUIET = ["log.tensorboard=false", "log.progress=false", "log.every_steps=1000000"]


def recipe(work: Path, name: str, changes: Sequence[str]) -> RunConfig:
    """dpo_hh_small on the pairs in `work`, with a constant learning rate: no step is cheaper or other than another."""
    values = {
        "data.train": work / "pairs.jsonl",
        "data.tokenizer": work / "tokenizer",
        "data.cache_dir": work / "cache",
        "run.dir": work / "runs" / name,
    }
    settings = [f"{key}={json.dumps(str(value))}" for key, value in values.items()]
    settings += [f"optimizer.min_lr={load_recipe(RECIPE).optimizer.lr}", "optimizer.warmup_steps=0"]
    settings += ["train.steps=1000000", "checkpoint.every_steps=0", *QUIET]
    return load_recipe(RECIPE, [*settings, *changes])


def prepare(data: Path, num_pairs: int, work: Path, changes: Sequence[str]) -> None:
    """Into `work`: the first `num_pairs` lines of `data`, and a tokenizer trained on all of them."""
    with (
        (gzip.open if data.suffix == ".gz" else open)(data, "rt") as lines,
        (work / "pairs.jsonl").open("w") as out,
    ):
        out.writelines(islice(lines, num_pairs))
    paths = {"data.train": data, "run.dir": work / "whole"}
    settings = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
    prepare_data(load_recipe(RECIPE, [*settings, *changes])).tokenizer.save(work / "tokenizer")


def hand_over(trainer: Trainer, folder: Path) -> None:
    """Model, initial weights, token ids and settings, as a Hugging Face trainer takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = trainer.config
    model, optimizer, store = config.model, config.optimizer, trainer.data.store
    run = {
        "model": {
            "vocab_size": padded_vocab_size(trainer.vocab_size),
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": head_dim(model),
            "max_position_embeddings": config.data.max_length,
            "rms_norm_eps": model.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        },
        "max_length": config.data.max_length,
        "batch_pairs": PEER_BATCH_PAIRS,
        "training": {
            "beta": config.algo.beta,
            "learning_rate": optimizer.lr,
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "adam_epsilon": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "max_grad_norm": optimizer.grad_clip,
            "seed": config.train.seed,
        },
    }
    (folder / "run.json").write_text(json.dumps(run, indent=2))
    with (folder / "pairs.jsonl").open("w") as out:
        for document in range(store.num_documents):
            first = int(store.document_parts[document])
            prompt, chosen, rejected = (store.part(first + i) for i in range(3))
            # a peer counts every token of an answer, and its first one needs a token before it
            assert len(prompt.tokens) and chosen.loss.all() and rejected.loss.all()
            ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            out.write(json.dumps({k: part.tokens.tolist() for k, part in ids.items()}) + "\n")
    torch.save(llama_weights(trainer), folder / "weights.pt")


def what_is_trained(trainer: Trainer, data: Path) -> dict[str, Any]:
    store = trainer.data.store
    return {
        "file": data.name,
        "pairs": store.num_documents,
        "pairs_truncated": store.report.truncated.get("documents", 0),
        "pairs_skipped": sum(store.report.skipped.values()),
        "tokens_shared": int(store.document_lengths(True).sum()),
        "tokens_unshared": int(store.document_lengths(False).sum()),
        "tokens_with_loss": store.report.num_loss_tokens,
        "max_length": trainer.config.data.max_length,
        "parameters": sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters()),
        "peer_batch_pairs": PEER_BATCH_PAIRS,
    }


def llama_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The policy's weights under the names and in the layout of transformers' LlamaForCausalLM."""
    model = trainer.config.model
    ours = {k: v.detach() for k, v in trainer.chunks[0].named_parameters()}
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    group = model.num_heads // model.num_kv_heads
    for i in range(model.num_layers):
        layer, into = f"decoder.layers.{i}.", f"model.layers.{i}."
        # Megatron keeps each key head behind the query heads that read it, and its value head behind that
        qkv = ours[f"{layer}self_attention.linear_qkv.weight"]
        q, k, v = qkv.view(model.num_kv_heads, group + 2, head_dim(model), model.hidden_size).split(
            [group, 1, 1], dim=1
        )
        gate, up = ours[f"{layer}mlp.linear_fc1.weight"].chunk(2)
        theirs |= {
            f"{into}self_attn.q_proj.weight": q.flatten(0, 2),
            f"{into}self_attn.k_proj.weight": k.flatten(0, 2),
            f"{into}self_attn.v_proj.weight": v.flatten(0, 2),
            f"{into}self_attn.o_proj.weight": ours[f"{layer}self_attention.linear_proj.weight"],
            f"{into}mlp.gate_proj.weight": gate,
            f"{into}mlp.up_proj.weight": up,
            f"{into}mlp.down_proj.weight": ours[f"{layer}mlp.linear_fc2.weight"],
            f"{into}input_layernorm.weight": ours[f"{layer}input_layernorm.weight"],
            f"{into}post_attention_layernorm.weight": ours[f"{layer}pre_mlp_layernorm.weight"],
        }
    return {name: weight.clone() for name, weight in theirs.items()}


def gated(trainer: Trainer, gate: Gate) -> None:
    """Lets the trainer go on only while the gate is open: it closes where a step has been recorded."""
    record_step = trainer.telemetry.step

    def step(record: Any, histograms: Any) -> None:
        record_step(record, histograms)
        tokens = round(record["tokens_per_s"] * record["step_time_s"])
        gate.step_done(
            pairs=record["num_pairs"],
            tokens=tokens,
            positions=round(tokens / record["fill"]),
            loss=record["loss"],
        )

    trainer.telemetry.step = step


def rebuilt(trainer: Trainer, name: str) -> None:
    """Gives the trainer the packs of a variant."""
    rebuild = VARIANTS[name][1]
    if rebuild is None:
        return
    loader, data = trainer.loader, trainer.config.data
    source = Source.of(loader, trainer.data.store, data.pack_length, data.share_prefix)
    packs_of = loader.micro_batches
    loader.micro_batches = lambda step: rebuild(source, step, packs_of(step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="full")
    parser.add_argument("--prepare", type=Path, metavar="DATA", help="make --work from this file")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument(
        "--profile", type=int, metavar="STEPS", help="answer where time goes instead"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # before the first parallel operation: worker threads inherit it
    gate = Gate()
    changes = [*VARIANTS[arguments.variant][0], *arguments.set]
    if arguments.prepare:
        prepare(arguments.prepare, arguments.pairs, arguments.work, arguments.set)
    config = recipe(arguments.work, arguments.variant, changes)
    with parallel_run(config.parallel, seed=config.train.seed) as parallel:
        trainer = Trainer(config, parallel)
        if arguments.prepare:
            hand_over(trainer, arguments.work / "given")
            gate.answer(what_is_trained(trainer, arguments.prepare))
            return
        if arguments.profile:
            gate.answer(profile_steps(trainer, arguments.profile))
            return
        rebuilt(trainer, arguments.variant)
        gated(trainer, gate)
        gate.ready(
            {
                "torch": torch.__version__,
                "megatron-core": megatron.core.__version__,
                "batch_packs": config.train.global_batch_packs,
                "pack_length": config.data.pack_length,
                "threads": torch.get_num_threads(),
                "denormals_flushed": denormals_are_flushed(torch),
            }
        )
        trainer.train()


if __name__ == "__main__":
    main()
