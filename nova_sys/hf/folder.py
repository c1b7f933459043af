"""The tensors of a Hugging Face folder: found, checked against a family's table, and read by slices."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nova_sys.data.digests import hash_files, stamp
from nova_sys.hf.config_json import CONFIG, read_model
from nova_sys.hf.families import Row, dims_of, shape_of, table_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
IGNORED = (".rotary_emb.inv_freq", ".self_attn.rotary_emb.cos_cached")
"""Buffers that old exports hold, and that follow from config.json."""
NUM_LISTED = 12


class HFFolder:
    """A checked folder: `slice` reads any part of any of its tensors, and nothing else.

    Raises: ValueError that lists every missing, surplus or malformed tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.family, self.model = read_model(self.path)
        self.rows = table_of(self.family, self.model)
        self.file_of = self._find()
        self._refuse_endless_layers()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._look()
        _refuse_problems(self.path, self._problems())

    @property
    def files(self) -> list[Path]:
        return [self.path / name for name in sorted(set(self.file_of.values()))]

    def dtype_of(self, ours: str) -> torch.dtype:
        """The narrowest that holds the folder's tensors of which ours is made, in any layer."""
        names = [name for row in self.rows if row.ours == ours for name in self.names_of(row)]
        return functools.reduce(torch.promote_types, (DTYPES[self.dtypes[name]] for name in names))

    def dims(self, layer: int | None) -> dict[str, int]:
        return dims_of(self.model, self.model.vocab_size, layer)

    def layers_of(self, row: Row) -> list[int] | list[None]:
        return list(range(self.model.num_layers)) if row.in_layers else [None]

    def names_of(self, row: Row) -> list[str]:
        return [row.in_layer(layer) for layer in self.layers_of(row)]

    def slice(self, name: str, rows: slice, columns: slice | None = None) -> torch.Tensor:
        """Some rows (and columns) of a tensor, in its dtype; only they are read."""
        with _told(self.path / self.file_of[name]):
            part = self._file(self.file_of[name]).get_slice(name)
            shape = self.shapes[name]
            if len(shape) > 2:
                return part[:].reshape(flat_shape(shape))[rows, columns or slice(None)]
            return part[rows] if columns is None else part[rows, columns]

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that config.json asks for, with its shape."""
        return {
            row.in_layer(layer): shape_of(row.shape, self.dims(layer))
            for row in self.rows
            for layer in self.layers_of(row)
        }

    def _find(self) -> dict[str, str]:
        """The file of each tensor."""
        try:
            if (self.path / INDEX).is_file():
                weight_map = json.loads((self.path / INDEX).read_bytes())["weight_map"]
                outside = [file for file in weight_map.values() if Path(file).name != file]
                if outside:
                    raise ValueError(f"it names {outside[0]}, which is no file of the folder")
                return dict(weight_map)
            files = sorted(path.name for path in self.path.glob("*.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path / INDEX} cannot be read ({error}); it tells which file holds which tensor. Download it again"
            ) from None
        if SINGLE in files:
            files = [SINGLE]
        if len(files) != 1:
            found = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors"
            raise ValueError(
                f"{self.path} has {CONFIG}, but {found}; weights are read from {SINGLE}, or from several files with {INDEX}. Download "
                "them, or save the model with save_pretrained"
            )
        with _told(self.path / files[0]):
            return dict.fromkeys(self._handle(files[0]).keys(), files[0])

    def _handle(self, name: str) -> Any:
        if not (self.path / name).is_file():
            raise ValueError(f"{self.path / name} is missing; download it")
        return safe_open(str(self.path / name), framework="pt")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._handle(name)
        return self._open[name]

    def _refuse_endless_layers(self) -> None:
        """Before the names of a billion tensors are written out to be missed."""
        layers, tensors = self.model.num_layers, len(self.file_of)
        if layers > tensors:
            raise ValueError(
                f"{self.path / CONFIG}: num_hidden_layers = {layers}: every layer has several tensors, and the folder holds {tensors} in "
                f"all. Download it again, or correct {CONFIG}"
            )

    def _look(self) -> None:
        """Shapes and dtypes, from the headers."""
        names = defaultdict(list)
        for name, file in self.file_of.items():
            names[file].append(name)
        for file, tensors in names.items():
            with _told(self.path / file):
                there = set(self._file(file).keys())
                for name in there.intersection(tensors):
                    part = self._file(file).get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = part.get_dtype()

    def _problems(self) -> dict[str, list[str]]:
        expected = self.expected()
        ignored = (*IGNORED, *(["lm_head.weight"] if self.model.tied_embeddings else []))
        known = {n for n in self.file_of if n in expected or not n.endswith(ignored)}
        shared = known & expected.keys() & self.shapes.keys()
        return {
            "missing": sorted(expected.keys() - self.shapes.keys()),
            "surplus, which the architecture does not have": sorted(known - expected.keys()),
            f"of another shape than {CONFIG} says": [
                f"{name}: {list(self.shapes[name])}, not {list(expected[name])}"
                for name in sorted(shared)
                if self.shapes[name] != expected[name]
            ],
            f"of a dtype other than {', '.join(DTYPES)}": [
                f"{name}: {self.dtypes[name]}"
                for name in sorted(shared)
                if self.dtypes[name] not in DTYPES
            ],
        }


def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(1, 1, K, 1, 2), which are KV shifting's scalars, as (K, 2); others as they are."""
    return (shape[2], shape[4]) if len(shape) > 2 else shape


def _refuse_problems(folder: Path, problems: dict[str, list[str]]) -> None:
    lines = []
    for kind, names in problems.items():
        more = f", and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
        lines += [f"  {len(names)} {kind}: {', '.join(names[:NUM_LISTED])}{more}"] if names else []
    if lines:
        told = "\n".join([f"{folder}: its tensors are not those of its {CONFIG}:", *lines])
        raise ValueError(f"{told}\nDownload the folder again, or correct {CONFIG}")


@contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}); download it again"
        ) from error


_digests: dict[tuple[Path, tuple[int, int]], str] = {}


def identity_of(path: Path, files: Sequence[Path]) -> str:
    """sha256 over config.json and the weights: caches of what these weights computed are keyed by it.

    Reads every byte, once in a process: whoever changes a single row of the embeddings changes the model.
    """
    everything = [path / CONFIG, *files]
    stamped = [(file.resolve(), stamp(file)) for file in everything]
    unread = [place for place in stamped if place not in _digests]
    with ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        hashed = pool.map(lambda place: hash_files([place[0]])[0][0], unread)
        _digests.update(zip(unread, hashed, strict=True))
    return hashlib.sha256("".join(_digests[place] for place in stamped).encode()).hexdigest()
