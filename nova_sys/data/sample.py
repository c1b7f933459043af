"""Texts of a run's data, for a tokenizer to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nova_sys.data.formats import Kind, block_objects, parse_record, refuse_empty
from nova_sys.data.lines import Block, read_blocks
from nova_sys.data.progress import Meter
from nova_sys.data.records import DataError, DialogueRecord, Message, TextPair, UnusableRecord

SAMPLE_BYTES = 512 << 20
"""Of data that is twice as large or more, every n-th block is parsed: more would change the pieces little, and take minutes."""


def texts_of(files: Sequence[Path], kind: Kind, *, with_bar: bool = False) -> Iterator[str]:
    """What the documents say, without their templates; of large data, blocks at even distances.

    Raises: DataError for a line that is no record, and for a file without a usable one, if all of it is parsed.
    """
    sizes = [path.stat().st_size for path in files]
    every = max(1, sum(sizes) // SAMPLE_BYTES)
    num_blocks = 0
    with Meter(sum(sizes), "read for a tokenizer", with_bar=with_bar) as meter:
        for number, path in enumerate(files):
            problems: list[UnusableRecord] = []  # the first
            num_records = num_usable = 0
            for block in read_blocks(path, number):
                num_blocks += 1
                if (num_blocks - 1) % every == 0:
                    for texts in _block_texts(block, kind, problems):
                        num_records += 1
                        num_usable += texts is not None
                        yield from texts or ()
                meter.show(sum(sizes[:number]) + block.bytes_on_disk)
            if every == 1 and num_records == 0:
                refuse_empty(path)
            if every == 1 and num_usable == 0:
                raise DataError(f"no usable record in {path}. The first: {problems[0]}")


def _block_texts(
    block: Block, kind: Kind, problems: list[UnusableRecord]
) -> Iterator[list[str] | None]:
    """The texts of each record; None of one that cannot be used."""
    for source, value in block_objects(block):
        try:
            record = parse_record(value, source, kind)
        except UnusableRecord as problem:
            problems += [problem] if not problems else []
            yield None
            continue
        if isinstance(record, TextPair):
            yield [record.prompt, record.chosen, record.rejected]
        elif isinstance(record, DialogueRecord):
            yield _contents(record.messages)
        else:
            yield _contents(record.prompt + record.chosen + record.rejected)


def _contents(messages: list[Message]) -> list[str]:
    return [str(message.get("content") or "") for message in messages]
