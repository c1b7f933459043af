"""Where a run begins: random weights, another run's checkpoint, or its own last checkpoint."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nova_sys.checkpoint_files import (
    describe_model,
    latest_checkpoint,
    read_description,
    refuse_damaged,
)
from nova_sys.config import ModelConfig, RunConfig
from nova_sys.config_io import to_toml
from nova_sys.hf.config_json import is_hf_folder, read_model
from nova_sys.saved_config import resolve_any, tokenizer_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
NEWER_FIELDS = ("train.precision", "parallel.distributed_optimizer")
"""Older checkpoints do not have these `run_fields`."""
NEWER_MODEL_FIELDS = (
    "qkv_bias",
    "qk_norm",
    "sliding_window",
    "window_layers",
    "window_heads",
    "window_kv_heads",
    "rope_scaling",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_positions",
)
"""Older checkpoints do not have these either; their models are those of the defaults."""
LENGTH = ("train.steps", "train.epochs")


@dataclass(frozen=True)
class Start:
    """resume_from: the run's own newest checkpoint. init_from: where its first weights lie, None: random ones.
    identity: names those first weights; the reference log-probs are theirs, also when the run is resumed.
    tokenizer_dir: the tokenizer that comes with the weights, if any."""

    resume_from: Path | None
    init_from: Path | None
    identity: str
    tokenizer_dir: Path | None


def find_start(config: RunConfig) -> Start:
    """Decides, on one rank. Raises: ValueError when the run folder may not be touched, or `model.init_from` holds nothing."""
    run_dir = Path(config.run.dir)
    newest = latest_checkpoint(run_dir)
    begun = (run_dir / "metrics.jsonl").exists()
    if config.run.resume == "never" and (newest or begun):
        raise ValueError(
            f"run.dir={run_dir} already holds a run and run.resume='never'; choose another run.dir, or set run.resume='auto'"
        )
    init_from = Path(config.model.init_from) if config.model.init_from else None
    if newest is not None:
        saved = read_description(newest)
        refuse_damaged(newest)
        _refuse_another_run(run_dir, saved.run, run_fields(config))
        _tell_changes(newest, config)
        return Start(newest, init_from, saved.start_identity, newest / "tokenizer")
    if begun:  # and ended before its first checkpoint: the same run starts over, another one may not take its place
        _refuse_another_run(run_dir, _left_by(run_dir), run_fields(config))
    if init_from is not None:
        init_from = resolve_any(init_from)
        if not is_hf_folder(init_from):
            refuse_damaged(init_from)
        return Start(None, init_from, _identity_of(init_from, config), tokenizer_of(init_from))
    return Start(None, None, _identity_of(None, config), None)


def claim(run_dir: Path, config: RunConfig, data_key: str, *, resumes: bool) -> None:
    """Writes whose folder this is, on one rank, before the first step. Raises: ValueError when it is that of a run on other data."""
    ours = {**run_fields(config), "data": data_key}
    if (run_dir / "metrics.jsonl").exists() and not resumes:
        _refuse_another_run(run_dir, _left_by(run_dir), ours)
    partial = run_dir / f".{RUN_FILE}.tmp"
    try:
        partial.write_text(json.dumps(ours, indent=1))
        partial.replace(run_dir / RUN_FILE)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ValueError(f"run.dir={run_dir} cannot be written to: {error}; make room") from None


def _left_by(run_dir: Path) -> dict[str, Any]:
    """What the run in this folder is."""
    try:
        fields = json.loads((run_dir / RUN_FILE).read_text())
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        return fields
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"run.dir={run_dir} holds metrics of a run, but not which one ({RUN_FILE}: {error}); choose another run.dir, or remove "
            "metrics.jsonl to start over there"
        ) from None


def first_weights(start: Start, config: RunConfig) -> Path | None:
    """The checkpoint that holds the weights of step 0, or None for random ones. Raises: ValueError when it is another one by now."""
    if start.init_from is None:
        return None
    folder = resolve_any(start.init_from)
    if _identity_of(folder, config) != start.identity:
        raise ValueError(
            f"model.init_from={config.model.init_from} is no longer the checkpoint that this run started from, and the reference needs "
            "those weights; put the old checkpoint back, or start a new run in another run.dir"
        )
    return folder


def starting_tokenizer(config: RunConfig) -> Path | None:
    """The tokenizer that the run's weights come with, for commands that prepare data without training."""
    if is_hf_folder(config.model.init_from) and latest_checkpoint(Path(config.run.dir)) is None:
        return Path(config.model.init_from)  # without reading the weights
    return find_start(config).tokenizer_dir


def run_fields(config: RunConfig) -> dict[str, Any]:
    """What must not change between a run and its continuation, besides the data: model, loss, batches, numbers' precision, and the
    form of the optimizer's state. Optimizer settings and the number of steps may change, and are told: see `_tell_changes`."""
    from nova_sys.parallel import (
        choose_dtype,
    )  # Megatron: seconds, for commands that need none of it

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **{f"model.{key}": value for key, value in describe_model(config.model).items()},
        "model.init_from": config.model.init_from,
        "algo": asdict(config.algo) | {"reference": None},  # cache and online are the same numbers
        "train.seed": config.train.seed,
        "train.global_batch_packs": config.train.global_batch_packs,
        "train.precision": _precision(config, choose_dtype(config.train.precision, device)),
        "parallel.distributed_optimizer": config.parallel.distributed_optimizer,
        "data.pack_length": config.data.pack_length,
        "data.max_length": config.data.max_length,
        "data.share_prefix": config.data.share_prefix,
    }


def _precision(config: RunConfig, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if config.train.precision != "fp8":
        return name
    first, last = config.fp8.edge_layers
    return f"fp8 {config.fp8.recipe}, the first {first} and last {last} layers {name}"


def _refuse_another_run(run_dir: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    ours, saved = _flat(json.loads(json.dumps(ours))), _flat(saved)  # lists and tuples alike
    defaults = describe_model(ModelConfig())
    saved = {f"model.{name}": defaults[name] for name in NEWER_MODEL_FIELDS} | saved
    differing = [
        f"{k}: {saved.get(k)} there, {v} here"
        for k, v in ours.items()
        if saved.get(k) != v and (k in saved or k not in NEWER_FIELDS)
    ]
    if differing:
        raise ValueError(
            f"run.dir={run_dir} holds another run ({'; '.join(differing)}); choose another run.dir, or restore these settings"
        )


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """{"algo": {"beta": 0.1}} as {"algo.beta": 0.1}, so that a message has only what differs."""
    nested = {k: v if isinstance(v, dict) else {"": v} for k, v in table.items()}
    return {
        f"{k}.{name}".rstrip("."): v for k, inner in nested.items() for name, v in inner.items()
    }


def _tell_changes(checkpoint: Path, config: RunConfig) -> None:
    """Warns of settings that a run may change when it continues, but hardly by accident."""
    try:
        then = tomllib.loads((checkpoint / "config.toml").read_text())
    except (OSError, ValueError):  # only for people to read
        return
    now = tomllib.loads(to_toml(config))
    before, after = (
        {k: v for k, v in _flat(table).items() if k.startswith(("optimizer.", *LENGTH))}
        for table in (then, now)
    )
    changes = [
        f"{key}: {before.get(key, 'not set')} before, {after.get(key, 'not set')} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changes:
        logger.warning(
            "the run goes on with other settings (%s), so not as it would have without a stop",
            "; ".join(changes),
        )


def _identity_of(init_from: Path | None, config: RunConfig) -> str:
    """Checkpoints carry a name of their own; random weights are named by everything that determines them."""
    model, seed = config.model, config.train.seed
    if init_from is None:
        return json.dumps(["random", asdict(model) | {"init_from": None}, seed, torch.__version__])
    if is_hf_folder(init_from):
        from nova_sys.hf.folder import HFFolder, identity_of

        shifts = read_model(init_from)[1].kv_shift
        identity = identity_of(init_from, HFFolder(init_from).files)
    else:
        saved = read_description(init_from)
        shifts, identity = saved.model["kv_shift"], saved.identity
    drawn = [model.kv_shift_init, seed] if model.kv_shift and not shifts else None
    return json.dumps([identity, drawn])
