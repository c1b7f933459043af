"""The configuration in a checkpoint, as `evaluate` and `generate` use it, and the keys of it that they let a user change."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nova_sys.checkpoint_files import (
    DESCRIPTION,
    TEMPLATE,
    read_description,
    refuse_damaged,
    resolve_checkpoint,
)
from nova_sys.config import Fp8Config, RunConfig
from nova_sys.config_io import TYPES, check, config_from, load_recipe
from nova_sys.hf.config_json import CONFIG, is_hf_folder

logger = logging.getLogger(__name__)

# A checkpoint remembers the layout it was trained on; it is used on one rank unless the caller says otherwise.
ONE_RANK = (
    "parallel.tensor=1",
    "parallel.context=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.sequence=false",
)
NO_DATA = 'data.train="none"'
"""A converted model has no training data; commands that read data name it."""


@dataclass(frozen=True)
class Command:
    """keys: what --set may change.   instead: what to use for some others; the rest is the checkpoint's."""

    name: str
    keys: tuple[str, ...]
    instead: dict[str, str]


_BOTH = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.sequence",
    "parallel.timeout_s",
    "train.precision",
    "train.kernels",
    "data.pack_length",
    "data.template",
)
EVALUATE = Command(
    "evaluate",
    (
        *_BOTH,
        "parallel.context",
        "train.seed",
        "data.max_length",
        "data.share_prefix",
        "data.max_skipped",
        "data.workers",
        "algo.loss",
        "algo.beta",
        "algo.label_smoothing",
        "algo.target_margin",
        "algo.length_normalize",
        "log.progress",
    ),
    {"data.train": "--data", "model.init_from": "the argument CHECKPOINT"},
)
GENERATE = Command(
    "generate",
    _BOTH,
    {
        "data.train": "--file",
        "model.init_from": "the argument CHECKPOINT",
        "train.seed": "--seed",
        "parallel.context": "parallel.tensor: context parallelism shares out the tokens of packs, and generation makes them one by one",
    },
)


def as_toml(value: str | list[str]) -> str:
    """The value of an override, whatever is in the text."""
    return json.dumps(value, ensure_ascii=False)


def checkpoint_config(
    checkpoint: str | Path, overrides: Sequence[str] = ()
) -> tuple[Path, RunConfig]:
    """The checkpoint folder and the configuration it was saved with, overridden; of a Hugging Face folder the defaults, and its model.

    Raises: ValueError for a folder that is no checkpoint, or a damaged one, and for overrides that are none.
    """
    if is_hf_folder(checkpoint):
        folder, text = Path(checkpoint), as_toml(str(checkpoint))
        own = [f"model.init_from={text}", f"data.tokenizer={text}", NO_DATA]
        return folder, config_from([*own, *overrides], folder / CONFIG)
    folder = resolve_checkpoint(checkpoint)
    refuse_damaged(folder)
    own = [f"data.tokenizer={as_toml(str(tokenizer_of(folder)))}", NO_DATA, 'model.init_from=""']
    if (folder / TEMPLATE).is_file():
        own.append(f"data.template={as_toml(str(folder / TEMPLATE))}")
    return folder, load_recipe(folder / "config.toml", [*ONE_RANK, *own, *overrides])


def config_for(
    command: Command,
    checkpoint: str | Path,
    overrides: Sequence[str],
    world_size: int,
    own: Sequence[str] = (),
) -> tuple[Path, RunConfig]:
    """`checkpoint_config` for a command on so many ranks, checked. own: overrides of the command itself.

    Raises: ValueError also for an override of a key that the command does not read, and for a layout that does not fit.
    """
    for override in overrides:
        _refuse_ignored(command, override)
    folder, config = checkpoint_config(checkpoint, [*own, *overrides])
    # blocks of layers that are recomputed fit the stages of the training
    train = replace(config.train, recompute="none", recompute_layers="auto")
    config = replace(config, train=replace(train, global_batch_packs=world_size))
    config = _without_fp8(command, config, overrides)
    check(config, world_size)
    return folder, config


def _without_fp8(command: Command, config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """FP8 is a way to train: it wants whole packs, and scales that only a run has. Its weights are kept in bf16."""
    if config.train.precision == "fp8":
        for override in (o for o in overrides if o.partition("=")[0].strip() == "train.precision"):
            raise ValueError(
                f'--set {override}: nova {command.name} does not run in FP8, which is for training; leave it out, or set it to "bf16"'
            )
        logger.info("trained in FP8; nova %s runs in bf16 on a GPU, in fp32 on a CPU", command.name)
        config = replace(config, train=replace(config.train, precision="auto"))
    return replace(config, fp8=Fp8Config())


def _refuse_ignored(command: Command, override: str) -> None:
    key = override.partition("=")[0].strip()
    if key in command.keys or key not in TYPES:  # an unknown key is told by `load_recipe`
        return
    instead = command.instead.get(key)
    remedy = f"use {instead}" if instead else "it is the checkpoint's own: leave it out"
    raise ValueError(
        f"--set {override}: nova {command.name} does not take {key} from --set; {remedy}. Its keys are {', '.join(command.keys)}"
    )


def resolve_any(path: str | Path) -> Path:
    """`resolve_checkpoint`, which a Hugging Face folder passes as it is."""
    return Path(path) if is_hf_folder(path) else resolve_checkpoint(path)


def tokenizer_of(checkpoint: Path) -> Path:
    """The folder of the tokenizer of a checkpoint, or of a Hugging Face folder."""
    return checkpoint if is_hf_folder(checkpoint) else checkpoint / "tokenizer"


def rows_of_vocabulary(checkpoint: Path, config: RunConfig) -> int:
    """Ids that the model of a checkpoint, or of a Hugging Face folder, has a row for. config: what `checkpoint_config` gave for it."""
    if is_hf_folder(checkpoint):
        return config.model.vocab_size
    return read_description(checkpoint).vocab_size


def files_of(checkpoint: Path) -> list[Path]:
    """The files that a checkpoint consists of."""
    if is_hf_folder(checkpoint):
        return sorted(path for path in checkpoint.iterdir() if path.is_file())
    return [checkpoint / name for name in (DESCRIPTION, *read_description(checkpoint).files)]
