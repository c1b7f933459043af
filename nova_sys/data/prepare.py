"""From a run's configuration to its tokenizer and token store; what is already there is reused.

The tokenizer is the one that `data.tokenizer` names, else that of the checkpoint in `model.init_from`, else one trained on the
run's own text. Either way a copy lies in `<run.dir>/tokenizer`, so that a checkpoint can carry it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nova_sys.config import RunConfig
from nova_sys.data.chat import TURN_MARKERS, choose_template
from nova_sys.data.formats import Kind, expand_files, parse_record, read_objects
from nova_sys.data.records import DialogueRecord, Message, TextPair, UnusableRecord
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import TokenStore
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    tokenizer: Tokenizer
    tokenizer_dir: Path
    store: TokenStore
    cache_dir: Path


def kind_of(algorithm: str) -> Kind:
    return "sft" if algorithm == "sft" else "pairs"


def prepare_data(
    config: RunConfig, checkpoint_tokenizer: Path | None = None, *, verify: bool = True
) -> PreparedData:
    """Tokenises what is not tokenised yet, and opens it. Call on one rank first, and let that one verify what it opens.

    Raises: ValueError for bad data or settings, or a damaged store.
    """
    run_dir = Path(config.run.dir)
    cache_dir = Path(config.data.cache_dir) if config.data.cache_dir else run_dir / "cache"
    tokenizer_dir = run_dir / "tokenizer"
    # A mistake in a named template is told before a tokenizer is trained.
    choose_template(config.data.template, tokenizer_template=None, special_texts={})
    is_new = not tokenizer_dir.exists()
    _make_folder(run_dir, "run.dir")
    _make_folder(cache_dir, "data.cache_dir")
    try:
        tokenizer = _tokenizer(config, checkpoint_tokenizer, tokenizer_dir)
        store = _store(config, tokenizer, cache_dir, verify=verify)
    except ValueError:
        if is_new:  # it was made for data or settings that will be others next time
            shutil.rmtree(tokenizer_dir, ignore_errors=True)
        raise
    return PreparedData(tokenizer, tokenizer_dir, store, cache_dir)


def _make_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK) else "it is read-only"
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        raise ValueError(f"{key}={folder} cannot be written to ({problem}); choose another {key}")


def _store(config: RunConfig, tokenizer: Tokenizer, cache_dir: Path, *, verify: bool) -> TokenStore:
    if config.model.vocab_size and tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; the model needs a row for "
            "each. Raise model.vocab_size, or set it to 0 for the tokenizer's size"
        )
    spec = StoreSpec(
        train=config.data.train,
        tokenizer=tokenizer,
        kind=kind_of(config.algo.name),
        pack_length=config.data.pack_length,
        max_length=config.data.max_length,
        template=config.data.template,
        share_prefix=config.data.share_prefix,
    )
    folder = cache_dir / f"tokens-{spec.key[:24]}"
    if not folder.exists():
        report = build_store(
            spec,
            folder,
            num_workers=config.data.workers,
            max_skipped=config.data.max_skipped,
            with_bar=config.log.progress,
        )
        logger.info("data: %s", report)
    store = TokenStore.open(folder, verify=verify)
    store.report.check_skipped(config.data.max_skipped)
    if store.key != spec.key:
        raise ValueError(
            f"{folder} holds the token store of other data or settings (its key is {store.key[:24]}); a store has the folder of its "
            "key. Delete the folder to build the right one"
        )
    return store


def _tokenizer(
    config: RunConfig, checkpoint_tokenizer: Path | None, tokenizer_dir: Path
) -> Tokenizer:
    source = Path(config.data.tokenizer) if config.data.tokenizer else checkpoint_tokenizer
    if source is not None:
        tokenizer = load_tokenizer(source)
        if checkpoint_tokenizer not in (None, source):
            refuse_other_ids(tokenizer, checkpoint_tokenizer, config.data.tokenizer)
        if not tokenizer_dir.is_dir():
            tokenizer.save(tokenizer_dir)  # on the main rank; the others come later and find it
        elif load_tokenizer(tokenizer_dir).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{tokenizer_dir} holds another tokenizer than {source}; the run in that folder needs its own. "
                "Choose another run.dir, or delete that folder"
            )
        return tokenizer
    if (tokenizer_dir / "tokenizer.model").is_file():
        return load_tokenizer(tokenizer_dir)
    if not config.model.vocab_size:
        raise ValueError(
            "no tokenizer: data.tokenizer is empty, and so is model.vocab_size, the number of pieces to train. "
            "Set data.tokenizer to a SentencePiece .model file or a folder with tokenizer.json, or model.vocab_size to a number such as 4096"
        )
    logger.info(
        "training a SentencePiece tokenizer of %d pieces on the data", config.model.vocab_size
    )
    markers = TURN_MARKERS.get(config.data.template, TURN_MARKERS["dialogue"])
    partial = tokenizer_dir / ".partial" / "tokenizer.model"
    train_sentencepiece(_texts(config), config.model.vocab_size, partial, markers)
    partial.rename(tokenizer_dir / "tokenizer.model")
    partial.parent.rmdir()
    return load_tokenizer(tokenizer_dir)


def _texts(config: RunConfig) -> Iterator[str]:
    """What the documents say, without their templates."""
    kind = kind_of(config.algo.name)
    for number, path in enumerate(expand_files(config.data.train)):
        num_usable, first_problem = 0, None
        for source, value in read_objects(path, number):
            try:
                record = parse_record(value, source, kind)
            except UnusableRecord as problem:
                first_problem = first_problem or problem
                continue
            num_usable += 1
            if isinstance(record, TextPair):
                yield from (record.prompt, record.chosen, record.rejected)
            elif isinstance(record, DialogueRecord):
                yield from _contents(record.messages)
            else:
                yield from _contents(record.prompt + record.chosen + record.rejected)
        if not num_usable:
            raise ValueError(f"no usable record in {path}. The first: {first_problem}")


def refuse_other_ids(tokenizer: Tokenizer, of_weights: Path, name: str) -> None:
    """Raises: ValueError when an id means another text to the tokenizer `name` than to the one the weights were trained with."""
    conflict = tokenizer.conflict_with(load_tokenizer(of_weights))
    if conflict is not None:
        raise ValueError(
            f"the tokenizer {name} is not the one that the weights in {of_weights.parent} were trained with ({conflict}); an id must "
            "keep its meaning. Leave data.tokenizer out, or name that one"
        )


def _contents(messages: list[Message]) -> Iterator[str]:
    yield from (str(message.get("content") or "") for message in messages)
