"""What a Hugging Face folder holds besides weights and tokenizer, and a checkpoint carries along for the day of its export.

It lies in the checkpoint as `hf.<name>`. config.json there tells the architecture, and has the keys that nothing here reads; code
files are those of models that transformers does not know by itself (Baichuan's).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nova_sys.hf.config_json import CONFIG, is_hf_folder

PREFIX = "hf."
GENERATION = "generation_config.json"
MAX_CODE_BYTES = 1 << 20
"""Of one file of code; Baichuan's have a twentieth of it."""


def carried_texts(source: Path | None) -> dict[str, str]:
    """Those files by their names in a checkpoint, from a Hugging Face folder or from a checkpoint that has them."""
    if source is None:
        return {}
    if not is_hf_folder(source):
        return {path.name: _text(path) for path in sorted(source.glob(f"{PREFIX}*"))}
    config = json.loads(_text(source / CONFIG))
    code = sorted(source.glob("*.py")) if "auto_map" in config else []
    paths = [source / CONFIG, source / GENERATION, *code]
    return {f"{PREFIX}{path.name}": _text(path) for path in paths if path.is_file()}


def exported_texts(checkpoint: Path) -> dict[str, str]:
    """The files that `carried_texts` has put into a checkpoint, by their own names, without config.json."""
    texts = {name[len(PREFIX) :]: text for name, text in carried_texts(checkpoint).items()}
    texts.pop(CONFIG, None)
    return texts


def carried_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json that the model came with; {} if it did not come from such a folder."""
    path = checkpoint / f"{PREFIX}{CONFIG}"
    return json.loads(_text(path)) if path.is_file() else {}


def carried_generation(checkpoint: Path) -> dict[str, Any]:
    """The generation_config.json that the model came with; {} if there was none."""
    return _object(checkpoint / f"{PREFIX}{GENERATION}")


def more_stop_ids(source: Path) -> set[int]:
    """Ids that end an answer by generation_config.json, or without one by config.json, of a Hugging Face folder or a checkpoint that
    carries it: some models have more than the tokenizer's one EOS."""
    prefix = "" if is_hf_folder(source) else PREFIX
    table = _object(source / f"{prefix}{GENERATION}") or _object(source / f"{prefix}{CONFIG}")
    found = table.get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return {token for token in listed if isinstance(token, int)}


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; {} if it is not there."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(_text(path))
        if not isinstance(table, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is malformed ({error}); correct or remove it") from None
    return table


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_CODE_BYTES:
            raise ValueError(f"it has more than {MAX_CODE_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); correct or remove it") from None
