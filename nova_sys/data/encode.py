"""Chunks of text to tokens and loss flags, many at once: the inner loop of preparing data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from nova_sys.data.chat import Span
from nova_sys.data.tokenizer import Tokenizer


class Chunk(NamedTuple):
    """Text that is tokenised in one piece."""

    text: str
    spans: tuple[Span, ...] = ()
    """Characters that carry loss."""
    bos: bool = False
    eos: bool = False
    """EOS behind the text; it carries loss."""
    continues: bool = False
    """Not the start of its sequence."""
    control: bool = False
    """Texts of BOS and EOS become these tokens."""


Part = tuple[Chunk, ...]
"""A prefix or a response."""


@dataclass(frozen=True)
class TokenPart:
    """tokens: int32.   loss: uint8 of the same length, 1 where the token carries loss."""

    tokens: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class TokenParts:
    """Parts end to end. tokens: int32.   loss: uint8.   offsets: int64 (parts + 1), where each part begins."""

    tokens: np.ndarray
    loss: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, i: int) -> TokenPart:
        return self.between(i, i + 1)

    def between(self, first: int, last: int) -> TokenPart:
        """Parts first, first + 1, ..., last - 1 as one."""
        place = slice(self.offsets[first], self.offsets[last])
        return TokenPart(self.tokens[place], self.loss[place])


def tokenise(parts: Sequence[Part], tokenizer: Tokenizer) -> TokenParts:
    """Tokens and loss flags of many parts at once.

    Python's work is per chunk, not per token, and numpy's per call: three small arrays per chunk cost more than its tokens.
    """
    chunks = list(chain.from_iterable(parts))
    ids, flags = _encode(chunks, tokenizer)
    bos = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    eos = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    pieces: list[Sequence[int]] = []  # of tokens
    carries: list[bool] = []  # each piece: loss
    ends: list[int] = []  # each chunk: pieces up to its end
    for chunk, chunk_ids in zip(chunks, ids, strict=True):
        if chunk.bos:
            pieces.append(bos)
            carries.append(False)
        pieces.append(chunk_ids)
        carries.append(bool(chunk.spans))
        if chunk.eos:
            pieces.append(eos)
            carries.append(True)
        ends.append(len(pieces))
    offsets = _offsets(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    loss = np.repeat(np.array(carries, np.uint8), np.diff(offsets))
    for i, chunk_flags in flags.items():
        start = offsets[(ends[i - 1] if i else 0) + chunks[i].bos]
        loss[start : start + len(chunk_flags)] = chunk_flags
    tokens = np.fromiter(chain.from_iterable(pieces), np.int32, int(offsets[-1]))
    chunks_before = _offsets(np.fromiter(map(len, parts), np.int64, len(parts)))
    return TokenParts(tokens, loss, offsets[np.array([0, *ends])[chunks_before]])


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _encode(
    chunks: list[Chunk], tokenizer: Tokenizer
) -> tuple[list[Sequence[int]], dict[int, np.ndarray]]:
    """Ids of each chunk, and loss flags of those that carry loss on some of their text only."""
    alike: dict[tuple[bool, bool, bool], list[int]] = defaultdict(list)
    for i, (text, spans, _, _, continues, control) in enumerate(chunks):
        partly = bool(spans) and spans != ((0, len(text)),)
        alike[continues, control, partly].append(i)
    ids: list[Sequence[int]] = [()] * len(chunks)
    flags: dict[int, np.ndarray] = {}
    for (continues, control, partly), places in alike.items():
        if partly and tokenizer.spelling is None:
            places_left = places
        else:
            texts = [chunks[i].text for i in places]
            encoded = tokenizer.encode_batch(texts, continues=continues, control=control)
            for i, chunk_ids in zip(places, encoded, strict=True):
                ids[i] = chunk_ids
            places_left = _flag_by_spelling(places, chunks, ids, tokenizer, flags) if partly else []
        texts = [chunks[i].text for i in places_left]
        mapped = tokenizer.encode_batch_with_offsets(texts, continues=continues, control=control)
        for i, (chunk_ids, offsets) in zip(places_left, mapped, strict=True):
            ids[i], flags[i] = chunk_ids, _flags(offsets, chunks[i])
    return ids, flags


def _flag_by_spelling(
    places: list[int],
    chunks: list[Chunk],
    ids: list[Sequence[int]],
    tokenizer: Tokenizer,
    flags: dict[int, np.ndarray],
) -> list[int]:
    """Flags of the chunks whose ids spell their text, all in one array; returns the other places, which need offsets."""
    assert tokenizer.spelling is not None
    sizes: list[int] = []  # bytes of each token
    edges: list[int] = []  # begin and end of each span, in bytes of all texts
    found: list[int] = []
    place = 0
    for i in places:
        spelt = [tokenizer.spelling[token] for token in ids[i]]
        text, data = chunks[i].text, chunks[i].text.encode()
        if b"".join(spelt) != data:
            continue
        found.append(i)
        sizes += map(len, spelt)
        is_ascii = len(data) == len(text)
        edges += [
            place + (at if is_ascii else len(text[:at].encode()))
            for span in chunks[i].spans
            for at in span
        ]
        place += len(data)
    change = np.zeros(place + 1, np.int8)
    np.add.at(change, edges[::2], 1)
    np.subtract.at(change, edges[1::2], 1)
    flagged_before = _offsets(np.cumsum(change[:-1], dtype=np.int64))
    ends = _offsets(np.array(sizes, np.int64))
    all_flags = (np.diff(flagged_before[ends]) > 0).astype(np.uint8)
    tokens = np.cumsum([len(ids[i]) for i in found])
    if found:
        flags.update(zip(found, np.split(all_flags, tokens[:-1]), strict=True))
    return [i for i in places if i not in flags]


def _flags(offsets: list[Span], chunk: Chunk) -> np.ndarray:
    """A token carries loss when it covers a character that does (a token may reach across a span's
    edge)."""
    counts = np.zeros(len(chunk.text) + 1, np.int64)
    for start, end in chunk.spans:
        counts[start + 1 : end + 1] = 1
    counts = np.cumsum(counts)
    ranges = np.array(offsets, np.int64).reshape(-1, 2)
    return (counts[ranges[:, 1]] > counts[ranges[:, 0]]).astype(np.uint8)
