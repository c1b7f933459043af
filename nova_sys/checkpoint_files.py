"""A checkpoint as a folder: what it says of itself, whether it is whole, and whether it is harmless to load."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nova_sys.config import FORBID_UNKNOWN_KEYS, ModelConfig

FORMAT = 3
"""2: sizes of files, random states as tensors, nothing but tensors in the shards. 3: what a resumed run must keep, template file."""
DESCRIPTION = "nova.json"
TEMPLATE = "template.jinja"
"""The chat template, where it was a file: `data.template` may be edited, or be a path in another folder."""
METADATA, COMMON = ".metadata", "common.pt"
_CHECKPOINT = "torch.distributed.checkpoint"
PLAIN_CLASSES = {
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
"""All that torch's own metadata file refers to besides dtypes: classes that hold fields and run nothing."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint says of itself. `identity` is unique to the save: caches of what these weights computed are keyed by it."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_UNKNOWN_KEYS

    step: int
    model: dict[str, Any]
    vocab_size: int
    run: dict[str, Any]
    """`start.run_fields`: what a continuation must have the same."""
    data_key: str
    start_identity: str
    """Names the weights of step 0, which the reference log-probs belong to."""
    world_size: int
    device: str
    identity: str
    skipped_in_a_row: int = 0
    """Steps up to this one that were left out because they were not finite."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes by relative path: all files of the folder but this one."""
    format: int = FORMAT


_ADAPTER = TypeAdapter(Description)


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first. Whether they are whole is found out when one is used."""
    found = checkpoints_dir(run_dir).glob("step_*")
    return sorted(
        (path for path in found if re.fullmatch(r"step_\d+", path.name)),
        key=lambda path: int(path.name[len("step_") :]),
    )


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(all_checkpoints(run_dir)), None)


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder, or a run folder's newest checkpoint. Raises: ValueError when there is none."""
    path = Path(path)
    try:
        if (path / DESCRIPTION).is_file():
            return path
        newest = latest_checkpoint(path)
    except OSError as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    if newest is None:
        raise ValueError(
            f"{path} is not a checkpoint (no {DESCRIPTION}) and no run folder with one (no checkpoints/step_*); "
            "give a folder like runs/NAME or runs/NAME/checkpoints/step_00000050, or one of Hugging Face (config.json and safetensors)"
        )
    return newest


def read_description(checkpoint: Path) -> Description:
    """Raises: ValueError when the file is missing or malformed, or of another format."""
    description = _describe(checkpoint)
    if isinstance(description, str):
        raise ValueError(_damaged(checkpoint, description))
    return description


def refuse_damaged(checkpoint: Path) -> None:
    """Raises: ValueError when a file is missing or has another size than when it was saved."""
    problem = _damage(checkpoint)
    if problem is not None:
        raise ValueError(_damaged(checkpoint, problem))


def _describe(checkpoint: Path) -> Description | str:
    """What the checkpoint says of itself, or why it cannot be understood."""
    try:
        data = (checkpoint / DESCRIPTION).read_bytes()
        fields = json.loads(data)
        found = fields["format"] if isinstance(fields, dict) else None
        if found == FORMAT:
            description = _ADAPTER.validate_json(data, strict=True)
            if "kv_shift" not in description.model:
                return f"{DESCRIPTION} is malformed: model has no kv_shift"
            return description
    except OSError as error:
        return f"{DESCRIPTION} cannot be read: {error.strerror}"
    except ValidationError as error:
        first = error.errors()[0]
        return f"{DESCRIPTION} is malformed: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (ValueError, KeyError, RecursionError) as error:
        return f"{DESCRIPTION} is malformed: {error}"
    if not isinstance(found, int):
        return f"{DESCRIPTION} is malformed: it names no format"
    raise ValueError(
        f"{checkpoint}: checkpoint format {found}, this version reads {FORMAT}; use the version that wrote it, or train again"
    )


def _damage(checkpoint: Path) -> str | None:
    """Which file is missing or has another size than when it was saved; None when all is well."""
    description = _describe(checkpoint)
    if isinstance(description, str):
        return description
    for name, expected in description.files.items():
        try:
            seen = (checkpoint / name).stat().st_size
        except OSError as error:
            return f"{name} ({expected:,} bytes) cannot be read: {error.strerror}"
        if seen != expected:
            return f"{name} has {seen:,} bytes, {expected:,} expected"
    return None


def _damaged(checkpoint: Path, problem: str) -> str:
    """The message: there may be an earlier checkpoint that is whole, but going back to it is the user's decision."""
    siblings = all_checkpoints(checkpoint.parent.parent)
    earlier = [p for p in siblings if p.name < checkpoint.name and _damage(p) is None]
    remedy = (
        f"{earlier[-1]} is whole; to go on from there, remove the damaged folder"
        if earlier
        else "No earlier one is there: restore it from a copy, or start again in another run.dir"
    )
    return f"{checkpoint} is damaged: {problem}. {remedy}"


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide the weights' shapes and meaning."""
    fields = asdict(model) | {"window_layers": list(model.window_layers)}  # as JSON gives it back
    for how_it_began in ("init_from", "init_std", "kv_shift_init", "vocab_size"):
        fields.pop(how_it_began)
    return fields


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def sync_to_disk(folder: Path) -> None:
    """Returns when every file and directory below `folder` survives a loss of power."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_harmful(checkpoint: Path) -> None:
    """Raises: ValueError when loading the checkpoint could run code that it holds.

    torch unpickles the metadata file without restriction, and so it does with every shard entry that the metadata file declares to
    be bytes instead of a tensor. Ours holds plain classes only, and declares no bytes. Tensors and common.pt are loaded with
    weights_only.
    """
    problem = _harm(checkpoint, read_description(checkpoint).files)
    if problem is not None:
        raise ValueError(
            f"{checkpoint} is not loaded, because that could run code hidden in it: {problem}. Use a checkpoint from a source you trust"
        )


def _harm(folder: Path, sizes: dict[str, int]) -> str | None:
    try:
        torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return f"{COMMON} holds more than plain values: {str(error).splitlines()[0]}"
    except Exception as error:
        return f"{COMMON} cannot be read: {error}"
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        assert isinstance(metadata, Metadata) and isinstance(metadata.storage_data, dict)
        for name, kind in metadata.state_dict_metadata.items():
            if not isinstance(kind, TensorStorageMetadata):
                return f"{METADATA} declares {name} to be bytes instead of a tensor, and bytes may hold anything"
        for place in metadata.storage_data.values():
            if place.relative_path not in sizes:
                return f"{METADATA} refers to {place.relative_path}, which is no file of this checkpoint"
    except Exception as error:
        return f"{METADATA} is not a metadata file: {error}"
    return None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
