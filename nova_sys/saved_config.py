"""The configuration in a checkpoint, as `evaluate` and `generate` use it, and the keys of it that they let a user change."""

from __future__ import annotations

import json
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
from nova_sys.config import RunConfig
from nova_sys.config_io import TYPES, check, load_recipe

# A checkpoint remembers the layout it was trained on; it is used on one rank unless the caller says otherwise.
ONE_RANK = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.sequence=false",
)


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
    {"data.train": "--file", "model.init_from": "the argument CHECKPOINT", "train.seed": "--seed"},
)


def as_toml(value: str | list[str]) -> str:
    """The value of an override, whatever is in the text."""
    return json.dumps(value, ensure_ascii=False)


def checkpoint_config(
    checkpoint: str | Path, overrides: Sequence[str] = ()
) -> tuple[Path, RunConfig]:
    """The checkpoint folder and the configuration it was saved with, overridden.

    Raises: ValueError for a folder that is no checkpoint, or a damaged one, and for overrides that are none.
    """
    folder = resolve_checkpoint(checkpoint)
    refuse_damaged(folder)
    own = [f"data.tokenizer={as_toml(str(folder / 'tokenizer'))}"]
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
    config = replace(config, train=replace(config.train, global_batch_packs=world_size))
    check(config, world_size)
    return folder, config


def _refuse_ignored(command: Command, override: str) -> None:
    key = override.partition("=")[0].strip()
    if key in command.keys or key not in TYPES:  # an unknown key is told by `load_recipe`
        return
    instead = command.instead.get(key)
    remedy = f"use {instead}" if instead else "it is the checkpoint's own: leave it out"
    raise ValueError(
        f"--set {override}: nova {command.name} takes {key} from elsewhere; {remedy}. Its keys are {', '.join(command.keys)}"
    )


def files_of(checkpoint: Path) -> list[Path]:
    """The files that a checkpoint consists of."""
    return [checkpoint / name for name in (DESCRIPTION, *read_description(checkpoint).files)]
