"""From JSON lines to a folder of tokens: read, render, tokenise, truncate, write.

The truncation rule. Every sequence `prefix + response_i` must fit `max_length`, and the packed
document must fit `pack_length` (prefix counted once when it is shared, once per response when it
is not). A document that does not fit

1. loses tokens from the START of its prefix (the end, nearest the answer, stays), down to a quarter
   of the limit;
2. then its responses are cut from the END, the longest first, down to a common length that fits.

The limit of step 1 is the longest sequence allowed: min(max_length, what pack_length leaves per
sequence). A prefix and every response keep at least one token. A document without a prefix (SFT) is
cut as if the tokens before its first loss token were the prefix. Nothing is dropped silently:
`StoreReport.truncated` counts each kind of cut.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nova_sys.data.formats import Kind, expand_files, parse_record, read_objects
from nova_sys.data.records import Source, TextPair, UnusableRecord
from nova_sys.data.render import Part, Renderer, TokenPart, tokenise
from nova_sys.data.token_store import DTYPES, ArrayWriter, StoreReport, TokenStore
from nova_sys.data.tokenizer import Tokenizer

__all__ = ["StoreReport", "StoreSpec", "TokenStore", "build_store", "fit_lengths", "truncate"]

FORMAT_VERSION = 1
"""Part of the key: raise it when the same input would give other tokens."""

MIN_LENGTH = 16
"""Smallest max_length and pack_length accepted."""

_RECORDS_PER_BATCH = 2048


def fit_lengths(
    prefix: int, responses: Sequence[int], *, max_length: int, pack_length: int, share_prefix: bool
) -> tuple[int, list[int]]:
    """Lengths that the rule above leaves of a prefix and its responses, in tokens.

    Raises: ValueError when pack_length cannot hold such a prefix and one token per response.
    """
    copies = 1 if share_prefix else len(responses)

    def budget(kept: int) -> int:  # tokens that all responses together may take
        return pack_length - copies * kept

    if prefix + max(responses) <= max_length and sum(responses) <= budget(prefix):
        return prefix, list(responses)
    limit = min(max_length, pack_length // copies)
    wanted = min(max_length - max(responses), (pack_length - sum(responses)) // copies)
    kept = min(prefix, max(wanted, limit // 4, 1))
    if budget(kept) < len(responses):
        raise ValueError(
            f"pack_length {pack_length} cannot hold {len(responses)} responses behind a prefix of "
            f"{kept} tokens; each needs a token. Raise data.pack_length or share the prefix."
        )
    level = min(max_length - kept, _level(sorted(responses), budget(kept)))
    return kept, [min(length, level) for length in responses]


def _level(ascending: list[int], budget: int) -> int:
    """Largest cap with sum(min(length, cap)) <= budget."""
    for i, length in enumerate(ascending):
        cap = budget // (len(ascending) - i)
        if cap < length:
            return cap
        budget -= length
    return ascending[-1]


def truncate(
    parts: list[TokenPart], *, max_length: int, pack_length: int, share_prefix: bool
) -> tuple[list[TokenPart], list[str]]:
    """The document `[prefix, response_0, ...]` by the rule, and the kinds of cut made.

    Kinds: prefix, response, loss (a response lost all its loss tokens), identical (a pair's answers
    became equal).
    """
    prefix, responses = parts[0], parts[1:]
    without_prefix = len(prefix.tokens) == 0
    if without_prefix:
        lead = int(np.argmax(responses[0].loss)) if len(responses) == 1 else 0
        prefix, responses = (
            _cut(responses[0], 0, lead),
            [_cut(responses[0], lead, None), *responses[1:]],
        )
    before = [len(p.tokens) for p in responses]
    kept, after = fit_lengths(
        len(prefix.tokens),
        before,
        max_length=max_length,
        pack_length=pack_length,
        share_prefix=share_prefix,
    )
    if kept == len(prefix.tokens) and after == before:
        return parts, []
    kinds = ["prefix"] if kept < len(prefix.tokens) else []
    prefix = _cut(prefix, len(prefix.tokens) - kept, None)
    cut = [_cut(part, 0, length) for part, length in zip(responses, after, strict=True)]
    if after != before:
        kinds.append("response")
        if any(p.loss.any() and not c.loss.any() for p, c in zip(responses, cut, strict=True)):
            kinds.append("loss")
        if len(cut) == 2 and np.array_equal(cut[0].tokens, cut[1].tokens):
            kinds.append("identical")
    if without_prefix:
        cut[0] = TokenPart(
            np.concatenate([prefix.tokens, cut[0].tokens]),
            np.concatenate([prefix.loss, cut[0].loss]),
        )
        prefix = _cut(prefix, 0, 0)
    return [prefix, *cut], kinds


def _cut(part: TokenPart, start: int, stop: int | None) -> TokenPart:
    return TokenPart(part.tokens[start:stop], part.loss[start:stop])


@dataclass(frozen=True)
class StoreSpec:
    """Everything that decides what a store holds. Raises ValueError for impossible lengths and
    missing files."""

    train: str | list[str]
    """JSON-lines files: a path, a glob, or a list of them."""
    tokenizer: Tokenizer
    kind: Kind
    pack_length: int
    max_length: int = 0
    """0: pack_length."""
    template: str = "auto"
    share_prefix: bool = True

    def __post_init__(self) -> None:
        if not MIN_LENGTH <= self.sequence_length <= self.pack_length:
            raise ValueError(
                f"data.max_length is {self.max_length} and data.pack_length {self.pack_length} "
                f"tokens; they must satisfy {MIN_LENGTH} <= max_length <= pack_length (0: equal). "
                "Change one of them."
            )

    @property
    def sequence_length(self) -> int:
        """Longest prefix + response, in tokens."""
        return self.max_length or self.pack_length

    @cached_property
    def files(self) -> list[Path]:
        return expand_files(self.train)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.template, self.kind)

    @cached_property
    def file_hashes(self) -> list[str]:
        return [_sha256_of_file(path) for path in self.files]

    @property
    def template_text(self) -> str | None:
        template = self.renderer.choice.template
        return template.text if template else None

    @cached_property
    def key(self) -> str:
        """sha256 over the files' contents and every setting; equal keys mean equal stores."""
        identity = [
            FORMAT_VERSION,
            self.file_hashes,
            self.tokenizer.fingerprint,
            self.template_text,
            self.renderer.choice.for_text,
            self.kind,
            self.sequence_length,
            self.pack_length,
            self.share_prefix,
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def build_store(spec: StoreSpec, folder: str | Path) -> StoreReport:
    """Reads, renders, tokenises and writes; a folder that already holds this very store is left as
    it is.

    Raises: ValueError for bad input (file and line in it), and when `folder` holds another store.
    """
    folder = Path(folder)
    if folder.exists():
        store = TokenStore.open(folder)
        if store.key != spec.key:
            raise ValueError(
                f"{folder} holds another token store (key {store.key[:12]}, needed "
                f"{spec.key[:12]}); a store is never overwritten. Choose another data.cache_dir or "
                "delete the folder."
            )
        return store.report
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        report = _write_store(spec, temporary)
        temporary.chmod(0o755)  # mkdtemp gives a private folder
        _publish(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


def _publish(temporary: Path, folder: Path) -> None:
    """Gives the finished store its name, unless another process was faster with the same one."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)


def _write_store(spec: StoreSpec, folder: Path) -> StoreReport:
    report = StoreReport()
    writers = {name: ArrayWriter(folder / f"{name}.npy", dtype) for name, dtype in DTYPES.items()}
    writers["part_offsets"].append(np.zeros(1))
    writers["document_parts"].append(np.zeros(1))
    skipped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    for file, path in enumerate(spec.files):
        documents_before, first_problem = report.num_documents, None
        for source, parts in _documents(spec, path, file, report):
            if isinstance(parts, UnusableRecord):
                skipped[parts.reason] += 1
                report.note(parts.reason, source)
                first_problem = first_problem or parts
                continue
            parts, kinds = truncate(
                parts,
                max_length=spec.sequence_length,
                pack_length=spec.pack_length,
                share_prefix=spec.share_prefix,
            )
            if kinds:
                truncated.update(["documents", *kinds])
            for kind in kinds:
                report.note(kind, source)
            _append(writers, parts, source, report)
        if report.num_documents == documents_before and first_problem is not None:
            raise ValueError(f"no usable record in {path}. The first: {first_problem}")
    for writer in writers.values():
        writer.close()
    report.skipped, report.truncated = dict(skipped), dict(truncated)
    _write_meta(spec, report, folder)
    return report


def _append(
    writers: dict[str, ArrayWriter], parts: list[TokenPart], source: Source, report: StoreReport
) -> None:
    lengths = np.array([len(p.tokens) for p in parts])
    for part in parts:
        writers["tokens"].append(part.tokens)
        writers["loss"].append(part.loss)
        report.num_loss_tokens += int(part.loss.sum())
    writers["part_offsets"].append(report.num_tokens + np.cumsum(lengths))
    report.num_documents += 1
    report.num_tokens += int(lengths.sum())
    writers["document_parts"].append(np.array([report.num_documents * len(parts)]))
    writers["source"].append(np.array([[source.file, source.line]]))


def _documents(
    spec: StoreSpec, path: Path, file: int, report: StoreReport
) -> Iterator[tuple[Source, list[TokenPart] | UnusableRecord]]:
    """Tokenised documents of one file in order; tokenised in batches."""
    waiting: list[tuple[Source, list[Part] | UnusableRecord]] = []
    for source, value in read_objects(path, file):
        report.num_records += 1
        try:
            record = parse_record(value, source, spec.kind)
            if isinstance(record, TextPair) and record.has_blank_answer(spec.kind == "pairs"):
                report.blank_answers += 1
                report.note("blank_answer", source)
            waiting.append((source, _render(spec.renderer, record, source)))
        except UnusableRecord as problem:
            waiting.append((source, problem))
        if len(waiting) == _RECORDS_PER_BATCH:
            yield from _tokenise_batch(spec, waiting)
            waiting = []
    yield from _tokenise_batch(spec, waiting)


def _render(renderer: Renderer, record: Any, source: Source) -> list[Part]:
    try:
        return renderer.parts(record)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _tokenise_batch(
    spec: StoreSpec, batch: list[tuple[Source, list[Part] | UnusableRecord]]
) -> Iterator[tuple[Source, list[TokenPart] | UnusableRecord]]:
    tokenised = iter(
        tokenise(
            [p for _, parts in batch if isinstance(parts, list) for p in parts], spec.tokenizer
        )
    )
    for source, parts in batch:
        if isinstance(parts, UnusableRecord):
            yield source, parts
            continue
        document = [next(tokenised) for _ in parts]
        problem = _token_problem(document, source)
        yield source, problem or document


def _token_problem(document: list[TokenPart], source: Source) -> UnusableRecord | None:
    """What only shows after tokenising: answers without tokens, or equal in all of them."""
    responses = document[1:]
    if not all(part.loss.any() for part in responses):
        message = "an answer has no tokens; an answer must have text. Fill it or remove the line."
        return UnusableRecord("empty_answer", f"{source}: {message}")
    if len(responses) == 2 and np.array_equal(responses[0].tokens, responses[1].tokens):
        message = "chosen and rejected have the same tokens; a pair must differ. Remove the line."
        return UnusableRecord("identical_answers", f"{source}: {message}")
    return None


def _write_meta(spec: StoreSpec, report: StoreReport, folder: Path) -> None:
    meta = {
        "key": spec.key,
        "version": FORMAT_VERSION,
        "kind": spec.kind,
        "files": [
            {"path": str(path), "sha256": digest}
            for path, digest in zip(spec.files, spec.file_hashes, strict=True)
        ],
        "tokenizer": spec.tokenizer.fingerprint,
        "vocab_size": spec.tokenizer.vocab_size,
        "template": spec.template_text,
        "max_length": spec.sequence_length,
        "pack_length": spec.pack_length,
        "share_prefix": spec.share_prefix,
        "counts": vars(report),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
