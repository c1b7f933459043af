"""A block of lines to tokenised documents: parse, render, tokenise, check, truncate.

A pure function of the block, so that any process may do it. Legend: N documents, W parts per document (1 + responses).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from nova_sys.data.encode import Part, TokenPart, TokenParts, tokenise
from nova_sys.data.formats import block_objects, parse_record
from nova_sys.data.lines import Block
from nova_sys.data.records import DataError, Source, TextPair, UnusableRecord
from nova_sys.data.render import Renderer
from nova_sys.data.token_store import StoreReport
from nova_sys.data.tokenizer import Tokenizer
from nova_sys.data.truncate import truncate


@dataclass(frozen=True)
class DocumentRules:
    """How records become documents; the same in every process."""

    renderer: Renderer
    max_length: int
    pack_length: int
    share_prefix: bool


@dataclass(frozen=True)
class Documents:
    """What a block's records became."""

    tokens: np.ndarray
    """int32: all parts of all documents."""
    loss: np.ndarray
    """uint8, of the same length."""
    lengths_NW: np.ndarray
    """int64: tokens of each part."""
    source: np.ndarray
    """int32 (N, 2): file index, line."""
    report: StoreReport
    first_problem: str | None
    """What was wrong with the first record that could not be used."""


def documents_of(block: Block, rules: DocumentRules) -> Documents:
    """Raises: DataError for the first line that is no record, or does not suit the template or the tokenizer."""
    report = StoreReport()
    problems: dict[int, UnusableRecord] = {}  # by line
    sources: list[Source] = []
    rendered: list[list[Part]] = []
    mistake: DataError | None = None
    try:
        for source, value in block_objects(block):
            report.num_records += 1
            try:
                parts = _render(value, source, rules.renderer, report)
            except UnusableRecord as problem:
                problems[source.line] = problem
                continue
            sources.append(source)
            rendered.append(parts)
    except DataError as error:
        mistake = error
    width = len(rendered[0]) if rendered else 2
    parts = _tokenise(rendered, sources, rules.renderer.tokenizer)
    if mistake is not None:  # behind one of an earlier line, which the tokenizer finds
        raise mistake
    lengths_NW = np.diff(parts.offsets).reshape(-1, width)
    if (
        width == 2
    ):  # SFT has no prefix: nothing stands before a document's first token to predict it
        parts.loss[parts.offsets[1::2][lengths_NW[:, 1] > 0]] = 0
    for i in _suspects(parts, lengths_NW):
        problem = _token_problem([parts[width * i + j] for j in range(width)], sources[i])
        if problem is not None:
            problems[sources[i].line] = problem
    report.skipped = dict(Counter(problem.reason for problem in problems.values()))
    for line in sorted(problems):
        report.note(problems[line].reason, Source(block.path, block.file, line))
    keep_N = np.array([source.line not in problems for source in sources], bool)
    tokens, loss, lengths_NW = _fit(parts, lengths_NW, keep_N, sources, rules, report)
    lines = np.array([source.line for source in sources], np.int32)[keep_N]
    report.num_documents = len(lines)
    report.num_tokens, report.num_loss_tokens = len(tokens), int(loss.sum())
    return Documents(
        tokens=tokens,
        loss=loss,
        lengths_NW=lengths_NW,
        source=np.stack([np.full_like(lines, block.file), lines], axis=1),
        report=report,
        first_problem=str(problems[min(problems)]) if problems else None,
    )


def _tokenise(
    rendered: list[list[Part]], sources: list[Source], tokenizer: Tokenizer
) -> TokenParts:
    try:
        return tokenise([part for document in rendered for part in document], tokenizer)
    except ValueError:
        for document, source in zip(rendered, sources, strict=True):  # which of them was it?
            try:
                tokenise(document, tokenizer)
            except ValueError as error:
                raise DataError(f"{source}: {error}") from error
        raise


def _render(value: Any, source: Source, renderer: Renderer, report: StoreReport) -> list[Part]:
    record = parse_record(value, source, renderer.kind)
    if isinstance(record, TextPair) and record.has_blank_answer(renderer.kind == "pairs"):
        report.blank_answers += 1
        report.note("blank_answer", source)
    try:
        return renderer.parts(record)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error


def _suspects(parts: TokenParts, lengths_NW: np.ndarray) -> np.ndarray:
    """Documents that `_token_problem` must look at: a response without loss, two of equal length, or no prefix for them."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(parts.loss, dtype=np.int64)])
    loss_NW = np.diff(before[parts.offsets]).reshape(lengths_NW.shape)
    suspect_N = (loss_NW[:, 1:] == 0).any(axis=1)
    if lengths_NW.shape[1] == 3:
        suspect_N |= (lengths_NW[:, 1] == lengths_NW[:, 2]) | (lengths_NW[:, 0] == 0)
    return np.flatnonzero(suspect_N)


def _token_problem(document: list[TokenPart], source: Source) -> UnusableRecord | None:
    """What only shows after tokenising: answers without tokens, or equal in all of them."""
    prefix, *responses = document
    if len(responses) == 2 and not len(prefix.tokens):
        message = "the prompt has no tokens, and nothing would predict an answer's first one. Give a prompt, or a tokenizer with BOS."
        return UnusableRecord("empty_prompt", f"{source}: {message}")
    if not all(part.loss.any() for part in responses):
        message = "an answer has no tokens to learn; an answer must have text. Fill it or remove the line."
        return UnusableRecord("empty_answer", f"{source}: {message}")
    if len(responses) == 2 and np.array_equal(responses[0].tokens, responses[1].tokens):
        message = "chosen and rejected have the same tokens; a pair must differ. Remove the line."
        return UnusableRecord("identical_answers", f"{source}: {message}")
    return None


def _fit(
    parts: TokenParts,
    lengths_NW: np.ndarray,
    keep_N: np.ndarray,
    sources: list[Source],
    rules: DocumentRules,
    report: StoreReport,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, loss and lengths of the documents to keep, those that are too long cut by the rule of truncate.py."""
    width = lengths_NW.shape[1]
    copies = 1 if rules.share_prefix else width - 1
    longest_N = lengths_NW[:, 0] + lengths_NW[:, 1:].max(axis=1, initial=0)
    total_N = copies * lengths_NW[:, 0] + lengths_NW[:, 1:].sum(axis=1)
    fits_N = (longest_N <= rules.max_length) & (total_N <= rules.pack_length)
    if (fits_N & keep_N).all():
        return parts.tokens, parts.loss, lengths_NW
    truncated: Counter[str] = Counter()
    pieces = [TokenPart(np.empty(0, np.int32), np.empty(0, np.uint8))]
    lengths_NW = lengths_NW.copy()
    for i in np.flatnonzero(keep_N):
        if fits_N[i]:
            pieces.append(parts.between(width * i, width * (i + 1)))
            continue
        cut, kinds = truncate(
            [parts[width * i + j] for j in range(width)],
            max_length=rules.max_length,
            pack_length=rules.pack_length,
            share_prefix=rules.share_prefix,
        )
        truncated.update(["documents", *kinds])
        for kind in kinds:
            report.note(kind, sources[i])
        lengths_NW[i] = [len(part.tokens) for part in cut]
        pieces += cut
    report.truncated = dict(truncated)
    tokens = np.concatenate([piece.tokens for piece in pieces])
    return tokens, np.concatenate([piece.loss for piece in pieces]), lengths_NW[keep_N]
