"""From a run's configuration to its tokenizer and token store; what is already there is reused.

The tokenizer is the one that `data.tokenizer` names, else that of the checkpoint in `model.init_from`, else one trained on the
run's own text. Either way a copy lies in `<run.dir>/tokenizer`, so that a checkpoint can carry it.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nova_sys.config import RunConfig
from nova_sys.data.chat import TURN_MARKERS, choose_template
from nova_sys.data.digests import hash_files, note_digests, noted_digests
from nova_sys.data.disk import FullDisk, telling_full_disk
from nova_sys.data.formats import Kind, expand_files
from nova_sys.data.sample import texts_of
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import TokenStore
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece

logger = logging.getLogger(__name__)

_TOKENIZER_BYTES = 32 << 20
"""More than the files of any."""


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

    verify: False on the ranks behind it, which take its word for what the data files and the store hold.
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
        remedy = "Make room, or choose another run.dir"
        with telling_full_disk(run_dir, lambda: _TOKENIZER_BYTES, remedy):
            tokenizer = _tokenizer(config, checkpoint_tokenizer, tokenizer_dir)
        store = _store(config, tokenizer, cache_dir, verify=verify)
    except FullDisk:
        raise
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
    files = expand_files(config.data.train)
    hashed = None if verify else noted_digests(cache_dir, files)
    if hashed is None:
        hashed = hash_files(files, with_bar=config.log.progress)
    spec = StoreSpec(
        train=config.data.train,
        tokenizer=tokenizer,
        kind=kind_of(config.algo.name),
        pack_length=config.data.pack_length,
        max_length=config.data.max_length,
        template=config.data.template,
        share_prefix=config.data.share_prefix,
        hashed=hashed,
    )
    folder = cache_dir / f"tokens-{spec.key[:24]}"
    is_new = not folder.exists()
    if is_new:
        build_store(
            spec,
            folder,
            num_workers=config.data.workers,
            max_skipped=config.data.max_skipped,
            with_bar=config.log.progress,
        )
    store = TokenStore.open(folder, verify=verify, with_bar=config.log.progress)
    store.report.check_skipped(config.data.max_skipped)
    if store.key != spec.key:
        raise ValueError(
            f"{folder} holds the token store of other data or settings (its key is {store.key[:24]}); a store has the folder of its "
            "key. Delete the folder to build the right one"
        )
    logger.info("data%s: %s", "" if is_new else " (tokenised before)", store.report)
    if verify:
        note_digests(cache_dir, files, hashed)
    return store


def _tokenizer(
    config: RunConfig, checkpoint_tokenizer: Path | None, tokenizer_dir: Path
) -> Tokenizer:
    source = Path(config.data.tokenizer) if config.data.tokenizer else checkpoint_tokenizer
    if source is not None:
        tokenizer = load_tokenizer(source)
        if checkpoint_tokenizer not in (None, source):
            refuse_other_ids(tokenizer, checkpoint_tokenizer, config.data.tokenizer)
        if tokenizer.is_partly_in(tokenizer_dir):
            _keep(tokenizer, tokenizer_dir)  # on the main rank; the others come later and find it
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
    files = expand_files(config.data.train)
    texts = texts_of(files, kind_of(config.algo.name), with_bar=config.log.progress)
    path = _partial(tokenizer_dir) / "tokenizer.model"
    tokenizer = train_sentencepiece(texts, config.model.vocab_size, path, markers)
    _keep(tokenizer, tokenizer_dir)
    return tokenizer


def _keep(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    """A copy that is there whole, or not at all."""
    partial = _partial(tokenizer_dir)
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    if tokenizer_dir.is_dir():  # without a tokenizer in it, or with parts of this one
        for path in partial.iterdir():
            path.replace(tokenizer_dir / path.name)
        partial.rmdir()
    else:
        partial.rename(tokenizer_dir)


def _partial(tokenizer_dir: Path) -> Path:
    return tokenizer_dir.with_name(f"{tokenizer_dir.name}.partial")


def refuse_other_ids(tokenizer: Tokenizer, of_weights: Path, name: str) -> None:
    """Raises: ValueError when an id means another text to the tokenizer `name` than to the one the weights were trained with."""
    conflict = tokenizer.conflict_with(load_tokenizer(of_weights))
    if conflict is not None:
        raise ValueError(
            f"the tokenizer {name} is not the one that the weights in {of_weights.parent} were trained with ({conflict}); an id must "
            "keep its meaning. Leave data.tokenizer out, or name that one"
        )
