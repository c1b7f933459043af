"""`--dry-run`: what a run would do, without starting its ranks. The data is tokenised and packed, because the steps depend on it."""

from __future__ import annotations

from nova_sys.config import ModelConfig, RunConfig
from nova_sys.config_io import check, check_profile
from nova_sys.data.loader import PackLoader
from nova_sys.data.prepare import prepare_data
from nova_sys.hf.config_json import is_hf_folder
from nova_sys.hf.folder import HFFolder
from nova_sys.memory import fullest_rank, recompute_block
from nova_sys.model.build import count_parameters, padded_vocab_size
from nova_sys.start import starting_tokenizer


def plan_text(config: RunConfig, world_size: int) -> str:
    """Layout, parameters, packs and steps of the run on `world_size` ranks, one fact per line. Raises: ValueError as the run would."""
    check(config, world_size)
    if is_hf_folder(config.model.init_from):
        HFFolder(config.model.init_from)  # are all tensors there? Without reading them
    data = prepare_data(config, starting_tokenizer(config))
    model, parallel, train = config.model, config.parallel, config.train
    vocab_size = model.vocab_size or data.tokenizer.vocab_size
    data_size = world_size // (parallel.tensor * parallel.context * parallel.pipeline)
    loader = PackLoader(
        data.store,
        pack_length=config.data.pack_length,
        global_batch_packs=train.global_batch_packs,
        data_rank=0,
        data_size=data_size,
        seed=train.seed,
        share_prefix=config.data.share_prefix,
    )
    steps = train.steps or loader.steps_for(train.epochs)
    check_profile(config, steps)
    tokens = int(data.store.document_lengths(config.data.share_prefix).sum())
    context = f"x context {parallel.context} " if parallel.context > 1 else ""
    lines = {
        "algorithm": config.algo.name + (f" (beta {config.algo.beta}, reference: {config.algo.reference})" if config.algo.name == "dpo" else ""),
        "layout": f"{world_size} ranks = tensor {parallel.tensor} {context}x pipeline {parallel.pipeline} x data {data_size}"
        + (f", {parallel.virtual_pipeline} chunks per stage" if parallel.virtual_pipeline > 1 else "")
        + (", sequence parallel" if parallel.sequence else ""),
        "model": f"{model.num_layers} layers, hidden {model.hidden_size}, {_heads_text(model)}, "
        f"FFN {model.ffn_hidden_size}, vocabulary {vocab_size:,} (padded to {padded_vocab_size(vocab_size):,})",
        "parameters": f"{count_parameters(model, vocab_size):,}",
        "documents": f"{data.store.num_documents:,} ({tokens:,} tokens)",
        "packs per epoch": f"{loader.packs_per_epoch:,} of {config.data.pack_length:,} tokens, {tokens / loader.packs_per_epoch / config.data.pack_length:.1%} filled",
        "global batch": f"{train.global_batch_packs} packs = {train.global_batch_packs // data_size} micro-batches on each of {data_size} replicas",
        "steps": f"{steps:,} ({steps * train.global_batch_packs / loader.packs_per_epoch:.2f} epochs)",
        "recomputation": train.recompute
        + (f" in blocks of {recompute_block(config)} layers" if train.recompute == "full" else ""),
    }  # fmt: skip
    if train.precision != "fp8":  # whose rounded copies of the weights no formula here counts
        fullest = fullest_rank(config, vocab_size, world_size)
        lines["memory"] = f"{fullest} on a GPU of the fullest stage (docs/memory.md)"
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _heads_text(model: ModelConfig) -> str:
    """All that there are: layers may differ."""
    texts = {
        f"{heads}/{kv_heads} heads of {dim}" + (f", window {window:,}" if window else ""): count
        for (heads, kv_heads, dim, window), count in model.kinds_of_layers().items()
    }
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{count} with {text}" for text, count in texts.items())
