"""Tokenised documents on disk: flat memory-mapped arrays in one folder, keyed by everything that
shaped them.

    tokens.npy          int32 (tokens)         all parts: per document prefix, response_0, ...
    loss.npy            uint8 (tokens)         1: this token carries loss
    part_offsets.npy    int64 (parts + 1)      part i is tokens[part_offsets[i]:part_offsets[i + 1]]
    document_parts.npy  int64 (documents + 1)  parts of document d: from document_parts[d] up to,
                                               not including, document_parts[d + 1]
    source.npy          int32 (documents, 2)   file index, line number
    meta.json           key, files, tokenizer, template, counts

Responses are numbered consecutively over documents: response i of document d has the id
document_parts[d] - d + i.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nova_sys.data.formats import Kind
from nova_sys.data.records import Source
from nova_sys.data.render import TokenPart

DTYPES = {
    "tokens": np.int32,
    "loss": np.uint8,
    "part_offsets": np.int64,
    "document_parts": np.int64,
    "source": np.int32,
}
"""The arrays of a store."""

ATTENTION_PAIRS_PER_TOKEN = 6 * 4096
"""Query-key pairs that cost as much as one token's linear layers: 24 D^2 against 4 D FLOPs per
layer, at D = 4096."""

_HEADER_BYTES = 128


@dataclass
class StoreReport:
    """What became of the records."""

    num_records: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """By reason: empty_answer, identical_answers, no_common_start, no_assistant_turn."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Documents that were cut, by kind (see store.py); a document may count in several kinds, once
    in `documents`."""
    blank_answers: int = 0
    """hh-rlhf transcripts with an answer of white space only; they are used."""
    first_seen: dict[str, str] = field(default_factory=dict)
    """`path:line` of the first record of each kind above."""

    def __str__(self) -> str:
        """One line for the log."""
        total = f"{self.num_records:,} records -> {self.num_documents:,} documents, "
        parts = [total + f"{self.num_tokens:,} tokens ({self.num_loss_tokens:,} with loss)"]
        parts += self._list("skipped", self.skipped)
        parts += self._list("truncated", self.truncated)
        if self.blank_answers:
            parts += self._list("used with a blank answer", {"blank_answer": self.blank_answers})
        return "; ".join(parts)

    def _list(self, title: str, counts: dict[str, int]) -> list[str]:
        if not counts:
            return []
        items = [
            f"{n:,} {kind}"
            + (f" (first: {self.first_seen[kind]})" if kind in self.first_seen else "")
            for kind, n in sorted(counts.items())
        ]
        return [f"{title}: {', '.join(items)}"]

    def note(self, kind: str, source: Source) -> None:
        self.first_seen.setdefault(kind, str(source))


class TokenStore:
    """An opened store. The arrays are read-only memory maps."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self.key: str = meta["key"]
        self.kind: Kind = meta["kind"]
        self.vocab_size: int = meta["vocab_size"]
        self.report = StoreReport(**meta["counts"])
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in DTYPES}
        self.tokens, self.loss = arrays["tokens"], arrays["loss"]
        self.part_offsets, self.document_parts = arrays["part_offsets"], arrays["document_parts"]
        self.source = arrays["source"]
        if len(self.tokens) != self.part_offsets[-1] or len(self.source) != self.num_documents:
            raise ValueError("its arrays disagree")

    @staticmethod
    def open(folder: str | Path) -> TokenStore:
        folder = Path(folder)
        try:
            return TokenStore(folder, json.loads((folder / "meta.json").read_text()))
        except (OSError, KeyError, TypeError, EOFError, ValueError) as error:
            raise ValueError(
                f"{folder} is not a complete token store ({error!r}); its arrays must be whole. "
                "Delete the folder to build it again."
            ) from error

    @property
    def num_documents(self) -> int:
        return len(self.document_parts) - 1

    @property
    def num_responses(self) -> int:
        return int(self.document_parts[-1]) - self.num_documents

    def part(self, i: int) -> TokenPart:
        """Part i of the flat list."""
        start, stop = self.part_offsets[i], self.part_offsets[i + 1]
        return TokenPart(self.tokens[start:stop], self.loss[start:stop])

    def source_of(self, document: int) -> str:
        """`path:line` of a document."""
        file, line = self.source[document]
        return f"{self.meta['files'][file]['path']}:{line}"

    def document_lengths(self, share_prefix: bool) -> np.ndarray:
        """int32 (num_documents,): tokens that each document takes in a pack."""
        return self._lengths(share_prefix).astype(np.int32)

    def _lengths(self, share_prefix: bool) -> np.ndarray:
        prefix, total, num_responses = self._sizes()
        return total if share_prefix else total + (num_responses - 1) * prefix

    def _sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per document: tokens of the prefix, tokens of all parts, number of responses."""
        first = self.document_parts[:-1]
        start = self.part_offsets[first]
        return (
            self.part_offsets[first + 1] - start,
            self.part_offsets[self.document_parts[1:]] - start,
            np.diff(self.document_parts) - 1,
        )

    def document_work(self, share_prefix: bool) -> np.ndarray:
        """float64 (num_documents,): estimated cost in token-equivalents, for balancing ranks.

        work = tokens + (allowed query-key pairs) / ATTENTION_PAIRS_PER_TOKEN
        """
        prefix, _, num_responses = self._sizes()
        lengths = np.diff(self.part_offsets).astype(np.float64)
        owner = np.repeat(np.arange(self.num_documents), num_responses + 1)
        pairs = lengths * (lengths + 1) / 2 + lengths * prefix[owner]
        pairs[self.document_parts[:-1]] = 0  # the prefix itself: below, once per copy
        area = np.add.reduceat(pairs, self.document_parts[:-1]) + prefix * (prefix + 1) / 2 * (
            1 if share_prefix else num_responses
        )
        return self._lengths(share_prefix) + area / ATTENTION_PAIRS_PER_TOKEN


class ArrayWriter:
    """A .npy file that grows: the header, whose size is fixed, is written last."""

    def __init__(self, path: Path, dtype: type) -> None:
        self._stream = open(path, "wb")  # noqa: SIM115 closed by close()
        self._stream.write(bytes(_HEADER_BYTES))
        self._dtype = np.dtype(dtype)
        self._num_rows = 0
        self._row_shape: tuple[int, ...] = ()

    def append(self, rows: np.ndarray) -> None:
        self._num_rows += len(rows)
        self._row_shape = rows.shape[1:]
        self._stream.write(rows.astype(self._dtype).tobytes())

    def close(self) -> None:
        self._stream.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._stream, header)
        assert self._stream.tell() == _HEADER_BYTES
        self._stream.close()
