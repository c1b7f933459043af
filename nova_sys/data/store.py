"""From JSON lines to a folder of tokens, in several processes and with bounded memory; what a killed build has done is kept.

`lines.py` reads blocks of whole lines, `workers.py` spreads them over processes, `documents.py` makes them documents, `building.py`
writes these in input order. The result is the same, to the bit, for any number of processes and any number of interruptions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nova_sys.data.building import GrowingStore, Progress, building_folder, growing_folder, publish
from nova_sys.data.digests import HashedFile, hash_files, stamp
from nova_sys.data.disk import telling_full_disk
from nova_sys.data.documents import DocumentRules
from nova_sys.data.formats import Kind, expand_files, refuse_empty
from nova_sys.data.lines import Block, read_blocks
from nova_sys.data.progress import Meter
from nova_sys.data.records import DataError
from nova_sys.data.render import Renderer
from nova_sys.data.token_store import StoreReport, TokenStore
from nova_sys.data.tokenizer import Tokenizer
from nova_sys.data.workers import available_cores, tokenise_blocks

_SMALL_FILES_BYTES = 1 << 16

FORMAT_VERSION = 3
"""Part of the key: raise it when the same input would give other tokens, or other files."""

MOST_WORKERS = 32
"""Unless more are asked for: one process reads and writes for all of them, and each takes some 100 MB."""

MIN_LENGTH = 16
"""Smallest max_length and pack_length accepted."""


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
    hashed: Sequence[HashedFile] = ()
    """Of the files, when it is known already."""

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
    def rules(self) -> DocumentRules:
        renderer = Renderer(self.tokenizer, self.template, self.kind)
        return DocumentRules(renderer, self.sequence_length, self.pack_length, self.share_prefix)

    @cached_property
    def hashed_files(self) -> Sequence[HashedFile]:
        return self.hashed or hash_files(self.files)

    @property
    def template_text(self) -> str | None:
        template = self.rules.renderer.choice.template
        return template.text if template else None

    @cached_property
    def key(self) -> str:
        """sha256 over the files' contents and every setting; equal keys mean equal stores."""
        identity = [
            FORMAT_VERSION,
            [digest for digest, _ in self.hashed_files],
            self.tokenizer.fingerprint,
            self.template_text,
            self.rules.renderer.choice.for_text,
            self.kind,
            self.sequence_length,
            self.pack_length,
            self.share_prefix,
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _sizes(spec: StoreSpec) -> list[int]:
    return [size for _, (size, _) in spec.hashed_files]


def build_store(
    spec: StoreSpec,
    folder: str | Path,
    *,
    num_workers: int = 1,
    max_skipped: float = 1.0,
    with_bar: bool = False,
) -> StoreReport:
    """Reads, renders, tokenises and writes; a folder that already holds this very store is left as
    it is.

    A build that was killed is continued. Several processes may call this for one folder: one of them builds, the others wait.

    Args:     num_workers: processes, 0: one per core, at most 32.   max_skipped: largest share of records that may be unusable.
              with_bar: on a terminal; otherwise, or elsewhere, a line per tenth.
    Raises:   ValueError for bad input (file and line in it), for more unusable records than max_skipped allows, and when
              `folder` holds another store; FullDisk, a ValueError, when there is no room.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        num_workers = num_workers or min(available_cores(), MOST_WORKERS)
        remedy = "Make room, or choose another data.cache_dir. What is done is kept: the same command goes on from there"
        with (
            telling_full_disk(folder.parent, lambda: _bytes_needed(spec, folder), remedy),
            building_folder(folder) as growing,
        ):
            if not folder.exists():  # another process may have built it while this one waited
                meter = Meter(sum(_sizes(spec)), "tokenised", with_bar=with_bar)
                _build(spec, growing, num_workers, max_skipped, meter)
                publish(growing, folder)
    store = TokenStore.open(folder, verify=False)
    if store.key != spec.key:
        raise ValueError(
            f"{folder} holds another token store (key {store.key[:12]}, needed "
            f"{spec.key[:12]}); a store is never overwritten. Choose another data.cache_dir or "
            "delete the folder."
        )
    store.report.check_skipped(max_skipped)
    return store.report


def _build(
    spec: StoreSpec, folder: Path, num_workers: int, max_skipped: float, meter: Meter
) -> None:
    """Makes `folder` a store. What is there already stays when the build can go on later: not when the data must change first."""
    growing = GrowingStore(folder, spec.key, share_prefix=spec.share_prefix)
    try:
        with meter:
            _tokenise(spec, growing, num_workers, meter)
        if [stamp(path) for path in spec.files] != [before for _, before in spec.hashed_files]:
            raise DataError(
                "a data file was changed while it was read; it must stay as it is. Start again when its writer has finished."
            )
        growing.progress.report.check_skipped(max_skipped)
        growing.finish(_meta(spec, growing.progress.report))
    except DataError:
        growing.close()
        shutil.rmtree(folder)
        raise
    finally:
        growing.close()


def _bytes_needed(spec: StoreSpec, folder: Path) -> int:
    """For the rest of the store, if that is like what is done of it; a store without a block is taken to be as large as its text."""
    total = sum(_sizes(spec))
    try:
        at = Progress.read(growing_folder(folder))
    except (OSError, ValueError, TypeError):
        return total
    done = sum(_sizes(spec)[: at.file]) + at.bytes_on_disk
    rest = round(at.bytes_written * (total - done) / done) if done else total
    return rest + _SMALL_FILES_BYTES


def _tokenise(spec: StoreSpec, growing: GrowingStore, num_workers: int, meter: Meter) -> None:
    at = growing.progress
    sizes = _sizes(spec)
    for block, documents in tokenise_blocks(_blocks(spec.files, at), spec.rules, num_workers):
        while at.file < block.file:
            _end_file(spec.files[at.file], growing)
        growing.append(block, documents)
        meter.show(sum(sizes[: block.file]) + block.bytes_on_disk, at.report)
    while at.file < len(spec.files):
        _end_file(spec.files[at.file], growing)


def _blocks(files: Sequence[Path], at: Progress) -> Iterator[Block]:
    first, start, first_line = at.file, at.start, at.first_line  # `at` moves on while this runs
    for file in range(first, len(files)):
        yield from read_blocks(files[file], file, start=start, first_line=first_line)
        start, first_line = 0, 1


def _end_file(path: Path, growing: GrowingStore) -> None:
    at = growing.progress
    if at.file_records == 0:
        refuse_empty(path)
    if at.file_documents == 0:
        raise DataError(f"no usable record in {path}. The first: {at.first_problem}")
    growing.next_file()


def _meta(spec: StoreSpec, report: StoreReport) -> dict[str, Any]:
    return {
        "key": spec.key,
        "version": FORMAT_VERSION,
        "kind": spec.kind,
        "files": [
            {"path": str(path), "sha256": digest}
            for path, (digest, _) in zip(spec.files, spec.hashed_files, strict=True)
        ],
        "tokenizer": spec.tokenizer.fingerprint,
        "vocab_size": spec.tokenizer.vocab_size,
        "template": spec.template_text,
        "max_length": spec.sequence_length,
        "pack_length": spec.pack_length,
        "share_prefix": spec.share_prefix,
        "counts": vars(report),
    }
