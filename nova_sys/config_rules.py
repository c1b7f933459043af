"""Rules that tie fields to each other and to the number of processes, for `config_io.check`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict

from nova_sys.config import (
    REFERENCE_FREE_LOSSES,
    VOCAB_MULTIPLE,
    AlgoConfig,
    ParallelConfig,
    RunConfig,
)
from nova_sys.fp8_rules import fp8_problems
from nova_sys.memory import layers_per_chunk
from nova_sys.model_rules import divisors, heads_of_all_layers, model_problems

LOSSES_WITH = {  # options of [algo] that only these values of algo.loss read
    "label_smoothing": ("conservative", "robust"),
    "target_margin": ("simpo",),
    "length_normalize": ("sigmoid", "conservative", "robust", "hinge"),
}

POSITIVE = [
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.ffn_hidden_size",
    "model.rope_base",
    "model.rope_factor",
    "model.rope_low_freq_factor",
    "model.rope_high_freq_factor",
    "model.norm_eps",
    "data.pack_length",
    "algo.beta",
    "train.global_batch_packs",
    "optimizer.lr",
    "optimizer.eps",
    "parallel.tensor",
    "parallel.context",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.timeout_s",
    "checkpoint.keep",
    "log.every_steps",
]
NOT_NEGATIVE = [
    "model.head_dim",
    "model.vocab_size",
    "model.sliding_window",
    "model.window_heads",
    "model.window_kv_heads",
    "model.rope_original_positions",
    "model.init_std",
    "data.max_length",
    "data.max_skipped",
    "data.workers",
    "train.steps",
    "train.epochs",
    "train.seed",
    "algo.label_smoothing",
    "algo.target_margin",
    "algo.nll_weight",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.grad_clip",
    "checkpoint.every_steps",
]

LARGEST_WHOLE_NUMBER, LARGEST_NUMBER = 2**31 - 1, 3e38
LARGEST = {
    "model.vocab_size": 2**22,
    "data.pack_length": 2**24,  # the packing's own limit
    "data.max_skipped": 1,
    "data.workers": 4096,
    "train.epochs": 1e6,
    "train.seed": 2**63 - 1,
    "parallel.timeout_s": 30 * 86400.0,
}
"""Other whole numbers end at LARGEST_WHOLE_NUMBER, other numbers where fp32 does."""


def broken_rules(config: RunConfig, world_size: int) -> list[str]:
    """One line per broken rule: the key, its value, the rule in numbers, and what to change."""
    out_of_range = [*_range_problems(config), *_text_problems(config)]
    if out_of_range:  # the other rules divide by these numbers
        return out_of_range
    return [
        *_folder_problems(config),
        *model_problems(config),
        *_algo_problems(config.algo),
        *_data_problems(config),
        *fp8_problems(config),
        *_schedule_problems(config),
        *_tensor_problems(config),
        *_context_problems(config),
        *_layout_problems(config, world_size),
    ]


def _range_problems(config: RunConfig) -> list[str]:
    problems = [
        f"{key} = {value}: must be finite and {rule}; the default is {default}"
        for key, value, default in _numbers(config)
        if (rule := _broken_range(key, value))
    ]
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        problems.append(
            f"optimizer.betas = {list(config.optimizer.betas)}: each must be at least 0 and below "
            f"1; the default is {list(RunConfig().optimizer.betas)}"
        )
    return problems


def _numbers(config: RunConfig) -> Iterator[tuple[str, float, float]]:
    """Each key that has a range, with its value and its default."""
    for key in [*POSITIVE, *NOT_NEGATIVE]:
        section, _, name = key.partition(".")
        values = (getattr(getattr(run, section), name) for run in (config, RunConfig()))
        yield (key, *values)


def _broken_range(key: str, value: float) -> str | None:
    """The range in words if the value is outside. By comparisons: isfinite fails on huge ints."""
    bound = "above 0" if key in POSITIVE else "0 or more"
    largest = LARGEST.get(key, LARGEST_WHOLE_NUMBER if isinstance(value, int) else LARGEST_NUMBER)
    large_enough = value > 0 or (value == 0 and key in NOT_NEGATIVE)
    if large_enough and value <= largest and value < math.inf:
        return None
    return f"{bound}, at most {largest}" if large_enough and value < math.inf else bound


def _text_problems(config: RunConfig) -> list[str]:
    """No file name holds a zero byte: opening such a path fails in its own way in each place."""
    return [
        f"{section}.{name} = {json.dumps(value)}: must not hold a zero character; remove it"
        for section, body in asdict(config).items()
        for name, value in body.items()
        if any(
            "\0" in text
            for text in (value if isinstance(value, list) else [value])
            if isinstance(text, str)
        )
    ]


def _folder_problems(config: RunConfig) -> list[str]:
    problems = []
    if not config.run.dir:
        problems.append('run.dir = "": must name a folder; for example runs/first')
    folders = {
        "run.dir": config.run.dir,
        "model.init_from": config.model.init_from,
        "data.cache_dir": config.data.cache_dir,
    }
    for key, folder in folders.items():
        if folder.startswith("~"):
            written_out = os.path.expanduser(folder)
            problems.append(
                f"{key} = {json.dumps(folder)}: must be written out, since the shell does not expand "
                f"a ~ there and this program would make a folder of that name; write {written_out}"
            )
    return problems


def _algo_problems(algo: AlgoConfig) -> list[str]:
    """Every key of [algo] that is set must change the result."""
    default = AlgoConfig()
    if algo.name == "sft":
        return [
            f"algo.{key} = {json.dumps(getattr(algo, key))}: has no effect on algo.name = "
            f'"sft", which knows no pairs; leave algo.{key} out, or set algo.name to "dpo"'
            for key in ("loss", "reference", "nll_weight", *LOSSES_WITH)
            if getattr(algo, key) != getattr(default, key)
        ]
    problems = []
    if algo.loss in LOSSES_WITH["label_smoothing"] and not 0 < algo.label_smoothing < 0.5:
        problems.append(
            f'algo.label_smoothing = {algo.label_smoothing}: algo.loss = "{algo.loss}" needs the '
            'share of swapped labels, above 0 and below 0.5; set it, or use algo.loss = "sigmoid", '
            "which is the same loss without smoothing"
        )
    for key, losses in LOSSES_WITH.items():
        if getattr(algo, key) != getattr(default, key) and algo.loss not in losses:
            problems.append(
                f"algo.{key} = {json.dumps(getattr(algo, key))}: has no effect on algo.loss = "
                f'"{algo.loss}"; leave it out, or use one of {", ".join(losses)}'
            )
    if algo.reference != "cache" and algo.loss in REFERENCE_FREE_LOSSES:
        problems.append(
            f'algo.reference = "{algo.reference}": algo.loss = "{algo.loss}" reads no reference; '
            "leave algo.reference out, or use another algo.loss"
        )
    return problems


def _data_problems(config: RunConfig) -> list[str]:
    data, problems = config.data, []
    files = [data.train] if isinstance(data.train, str) else data.train
    if not files or "" in files:
        problems.append(
            f"data.train = {json.dumps(data.train)}: must name at least one JSON-lines file; "
            "set it to a path, a glob, or a list of them (--set data.train=PATH)"
        )
    if data.max_length > data.pack_length:
        problems.append(
            f"data.max_length = {data.max_length}: must not exceed data.pack_length = "
            f"{data.pack_length}, since a document lies in one pack; lower it, or raise "
            "data.pack_length"
        )
    if not (data.tokenizer or config.model.init_from or config.model.vocab_size):
        problems.append(
            "model.vocab_size = 0: a tokenizer that is trained on the data needs a size; set "
            "model.vocab_size (e.g. 4096), or name a tokenizer with data.tokenizer, or a "
            "checkpoint with model.init_from"
        )
    return problems


def _schedule_problems(config: RunConfig) -> list[str]:
    train, optimizer, problems = config.train, config.optimizer, []
    if train.steps == 0 and train.epochs == 0:
        problems.append(
            "train.epochs = 0: with train.steps = 0 there is nothing to train; "
            "set one of them above 0"
        )
    if 0 < train.steps < optimizer.warmup_steps:
        problems.append(
            f"optimizer.warmup_steps = {optimizer.warmup_steps}: must not exceed train.steps = "
            f"{train.steps}; lower it, or train longer"
        )
    if optimizer.min_lr > optimizer.lr:
        problems.append(
            f"optimizer.min_lr = {optimizer.min_lr}: must not exceed optimizer.lr = "
            f"{optimizer.lr}, from which the rate decays; lower it"
        )
    layers = layers_per_chunk(config)
    if train.recompute_layers != "auto" and train.recompute_layers < 1:
        problems.append(
            f'train.recompute_layers = {train.recompute_layers}: must be "auto" or 1 and more; '
            "it is the number of layers per recomputed block"
        )
    elif train.recompute_layers != "auto" and train.recompute != "full":
        problems.append(
            f"train.recompute_layers = {train.recompute_layers}: has no effect with "
            f'train.recompute = "{train.recompute}"; set that to "full", or leave this out'
        )
    elif train.recompute_layers != "auto" and layers % min(train.recompute_layers, layers or 1):
        problems.append(
            f"train.recompute_layers = {train.recompute_layers}: must divide the {layers} layers that a pipeline stage has in one "
            f'piece; choose one of {divisors(layers)}, or "auto"'
        )
    profile = config.log.profile_steps
    if profile and not 1 <= profile[0] <= profile[1]:
        problems.append(
            f"log.profile_steps = {list(profile)}: must be [first, last] with 1 <= first <= last; "
            "for example [10, 12]"
        )
    elif train.steps:
        problems += profile_problems(config, train.steps)
    return problems


def profile_problems(config: RunConfig, num_steps: int) -> list[str]:
    """A range that the run does not reach; its number of steps may be known only when the data is."""
    profile = config.log.profile_steps
    if not profile or profile[1] <= num_steps:
        return []
    return [
        f"log.profile_steps = {list(profile)}: must end by the last step, which is {num_steps} "
        "here (train.steps, or what train.epochs need); choose earlier steps"
    ]


def _tensor_problems(config: RunConfig) -> list[str]:
    model, parallel, problems = config.model, config.parallel, []
    split = {
        **heads_of_all_layers(model),
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "the vocabulary's padding": VOCAB_MULTIPLE,
    }
    uneven = [f"{name} = {size}" for name, size in split.items() if size % parallel.tensor]
    if uneven:
        problems.append(
            f"parallel.tensor = {parallel.tensor}: must divide {' and '.join(uneven)}; "
            f"choose one of {divisors(math.gcd(*split.values()))}"
        )
    if parallel.sequence and parallel.tensor == 1:
        problems.append(
            "parallel.sequence = true: splits tokens over the tensor-parallel ranks, but "
            "parallel.tensor is 1; set that to 2 or more, or parallel.sequence to false"
        )
    elif parallel.sequence and config.data.pack_length % parallel.tensor:
        problems.append(
            f"data.pack_length = {config.data.pack_length}: must be a multiple of parallel.tensor "
            f"= {parallel.tensor} with parallel.sequence; for example "
            f"{_next_multiple(config.data.pack_length, parallel.tensor)}"
        )
    return problems


def model_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the model between them, and work on one pack at a time."""
    return parallel.tensor * parallel.context * parallel.pipeline


def _context_problems(config: RunConfig) -> list[str]:
    model, parallel, problems = config.model, config.parallel, []
    ranks = parallel.tensor * parallel.context
    if parallel.context == 1:
        return problems
    heads = heads_of_all_layers(model)
    uneven = [f"{name} = {size}" for name, size in heads.items() if size % ranks]
    if uneven:
        problems.append(
            f"parallel.tensor * parallel.context = {parallel.tensor} * {parallel.context} = {ranks}: must divide {' and '.join(uneven)}, because "
            f"each rank attends with heads of its own; choose a product among {divisors(math.gcd(*heads.values()))}"
        )
    pieces = ranks if parallel.sequence else parallel.context
    if config.data.pack_length % pieces:
        problems.append(
            f"data.pack_length = {config.data.pack_length}: must be a multiple of the {pieces} ranks that share its tokens (parallel.context"
            f"{' * parallel.tensor' if parallel.sequence else ''}); for example {_next_multiple(config.data.pack_length, pieces)}"
        )
    return problems


def _layout_problems(config: RunConfig, world_size: int) -> list[str]:
    parallel, problems = config.parallel, []
    pipeline, chunks = parallel.pipeline, parallel.virtual_pipeline
    if config.model.num_layers % (pipeline * chunks):
        problems.append(
            f"model.num_layers = {config.model.num_layers}: must be a multiple of parallel.pipeline"
            f" * parallel.virtual_pipeline = {pipeline} * {chunks} = {pipeline * chunks}; "
            "change one of the three"
        )
    if chunks > 1 and pipeline == 1:
        problems.append(
            f"parallel.virtual_pipeline = {chunks}: interleaving needs two or more pipeline "
            "stages; set parallel.pipeline to 2 or more, or parallel.virtual_pipeline to 1"
        )
    ranks = model_ranks(parallel)
    if world_size % ranks:
        names = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": pipeline}
        used = {name: size for name, size in names.items() if size > 1 or name != "context"}
        problems.append(
            f"{' * '.join(f'parallel.{name}' for name in used)} = {' * '.join(map(str, used.values()))} = {ranks}:"
            f" must divide the number of processes, {world_size}; start a multiple of "
            f"{ranks} (--nproc {ranks}), or lower one of them"
        )
        return problems
    packs, data_size = config.train.global_batch_packs, world_size // ranks
    if packs % data_size:
        problems.append(
            f"train.global_batch_packs = {packs}: must be a multiple of the data-parallel size, "
            f"{world_size} processes / {ranks} = {data_size}; for example "
            f"{_next_multiple(packs, data_size)}"
        )
    elif chunks > 1 and (packs // data_size) % pipeline:
        problems.append(
            f"train.global_batch_packs = {packs}: gives each of {data_size} data-parallel ranks "
            f"{packs // data_size} micro-batches, which interleaving needs to be a multiple of "
            f"parallel.pipeline = {pipeline}; for example "
            f"{_next_multiple(packs, data_size * pipeline)}"
        )
    return problems


def _next_multiple(number: int, step: int) -> int:
    return math.ceil(number / step) * step
