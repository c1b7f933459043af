"""Tokenised documents on disk: flat memory-mapped arrays in one folder, keyed by everything that
shaped them.

    tokens.npy          int32 (tokens)         all parts: per document prefix, response_0, ...
    loss.npy            uint8 (tokens)         1: this token carries loss
    part_offsets.npy    int64 (parts + 1)      part i is tokens[part_offsets[i]:part_offsets[i + 1]]
    document_parts.npy  int64 (documents + 1)  parts of document d: from document_parts[d] up to,
                                               not including, document_parts[d + 1]
    lengths.npy         int32 (documents)      tokens that a document takes in a pack
    source.npy          int32 (documents, 2)   file index, line number
    meta.json           key, files, tokenizer, template, counts, and checksums (CRC-32) of all that

Responses are numbered consecutively over documents: response i of document d has the id
document_parts[d] - d + i.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nova_sys.data.encode import TokenPart
from nova_sys.data.formats import Kind
from nova_sys.data.progress import Meter
from nova_sys.data.records import Source

ARRAYS: dict[str, tuple[type, tuple[int, ...]]] = {
    "tokens": (np.int32, ()),
    "loss": (np.uint8, ()),
    "part_offsets": (np.int64, ()),
    "document_parts": (np.int64, ()),
    "lengths": (np.int32, ()),
    "source": (np.int32, (2,)),
}
"""The arrays of a store: type and shape of a row."""

_BLOCK_BYTES = 16 << 20

ATTENTION_PAIRS_PER_TOKEN = 6 * 4096
"""Query-key pairs that cost as much as one token's linear layers: 24 D^2 against 4 D FLOPs per
layer, at D = 4096."""


@dataclass
class StoreReport:
    """What became of the records."""

    num_records: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """By reason: empty_answer, empty_prompt, identical_answers, no_common_start, no_assistant_turn."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Documents that were cut, by kind (see truncate.py); a document may count in several kinds, once
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

    def add(self, later: StoreReport) -> None:
        """Takes in what became of the records behind these."""
        self.num_records += later.num_records
        self.num_documents += later.num_documents
        self.num_tokens += later.num_tokens
        self.num_loss_tokens += later.num_loss_tokens
        self.blank_answers += later.blank_answers
        for counts, more in ((self.skipped, later.skipped), (self.truncated, later.truncated)):
            for kind, count in more.items():
                counts[kind] = counts.get(kind, 0) + count
        for kind, place in later.first_seen.items():
            self.first_seen.setdefault(kind, place)

    def check_skipped(self, limit: float) -> None:
        """Raises: ValueError when more than this share of the records could not be used."""
        share = sum(self.skipped.values()) / max(self.num_records, 1)
        if share > limit:
            raise ValueError(
                f"{sum(self.skipped.values()):,} of {self.num_records:,} records ({share:.1%}) cannot be used, and data.max_skipped "
                f"allows {limit:.1%}. {self._list('skipped', self.skipped)[0]}. Correct the data, or raise data.max_skipped to train "
                "without these records"
            )


def seal(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` with a checksum over itself."""
    return {**meta, "checksum": zlib.crc32(json.dumps(meta, sort_keys=True).encode())}


class TokenStore:
    """An opened store. The arrays are read-only memory maps."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self.key: str = meta["key"]
        self.kind: Kind = meta["kind"]
        self.vocab_size: int = meta["vocab_size"]
        self.report = StoreReport(**meta["counts"])
        # As plain arrays: numpy's class for maps costs microseconds at every access.
        arrays = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS
        }
        for name, array in arrays.items():
            dtype, row = ARRAYS[name]
            if array.dtype != dtype or array.shape[1:] != row or not array.flags.c_contiguous:
                raise ValueError(f"{name}.npy is an array {array.shape} of {array.dtype}")
        self.tokens, self.loss = arrays["tokens"], arrays["loss"]
        self.part_offsets, self.document_parts = arrays["part_offsets"], arrays["document_parts"]
        self.lengths, self.source = arrays["lengths"], arrays["source"]
        rows = [len(self.tokens), len(self.loss), len(self.part_offsets) - 1]
        rows += [len(self.lengths), len(self.source)]
        ends = [int(self.part_offsets[-1])] * 2 + [int(self.document_parts[-1])]
        if rows != ends + [self.num_documents] * 2:
            raise ValueError("its arrays disagree")

    @staticmethod
    def open(folder: str | Path, *, verify: bool = True, with_bar: bool = False) -> TokenStore:
        """verify: reads all of it once, a second per GB; one rank of a job is enough. Raises: ValueError for a damaged store."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if seal({k: v for k, v in meta.items() if k != "checksum"}) != meta:
                raise ValueError("meta.json is not as it was written")
            store = TokenStore(folder, meta)
            if verify:
                store._verify(with_bar)
            return store
        except Exception as error:  # numpy, json and damaged arrays fail in many ways
            raise ValueError(
                f"{folder} is not a complete token store ({str(error) or type(error).__name__}); its arrays must be whole. "
                "Delete the folder to build it again."
            ) from error

    def _verify(self, with_bar: bool) -> None:
        arrays = {name: getattr(self, name).reshape(-1).view(np.uint8) for name in ARRAYS}
        done = 0
        with Meter(sum(map(len, arrays.values())), "checked", with_bar=with_bar) as meter:
            for name, data in arrays.items():
                found = 0
                for start in range(0, len(data), _BLOCK_BYTES):
                    block = data[start : start + _BLOCK_BYTES]
                    found, done = zlib.crc32(block, found), done + len(block)
                    meter.show(done)
                if found != self.meta["checksums"][name]:
                    raise ValueError(f"{name}.npy is not as it was written")

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
        """int32 (num_documents,): tokens that each document takes in a pack. A memory map, unless the store was built for the other
        way of sharing."""
        if share_prefix == self.meta["share_prefix"]:
            return self.lengths
        documents = np.arange(self.num_documents)
        prefix, total, num_responses = self._sizes(documents)
        return (total if share_prefix else total + (num_responses - 1) * prefix).astype(np.int32)

    def document_work(self, documents: np.ndarray, share_prefix: bool) -> np.ndarray:
        """float64 (len(documents),): estimated cost in token-equivalents, for balancing ranks.

        work = tokens + (allowed query-key pairs) / ATTENTION_PAIRS_PER_TOKEN
        """
        prefix, total, num_responses = self._sizes(documents)
        owner = np.repeat(np.arange(len(documents)), num_responses)
        part = ranges(self.document_parts[documents] + 1, num_responses)
        lengths = (self.part_offsets[part + 1] - self.part_offsets[part]).astype(np.float64)
        pairs = lengths * (lengths + 1) / 2 + lengths * prefix[owner]
        copies = 1 if share_prefix else num_responses
        area = np.bincount(owner, weights=pairs, minlength=len(documents))
        area += prefix * (prefix + 1) / 2 * copies
        return total + (copies - 1) * prefix + area / ATTENTION_PAIRS_PER_TOKEN

    def _sizes(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per document: tokens of the prefix, tokens of all parts, number of responses."""
        first, last = self.document_parts[documents], self.document_parts[documents + 1]
        start = self.part_offsets[first]
        return (
            self.part_offsets[first + 1] - start,
            self.part_offsets[last] - start,
            last - first - 1,
        )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All ranges [start, start + length) end to end."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
