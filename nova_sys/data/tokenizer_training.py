"""A SentencePiece tokenizer from a run's own text, for runs that name none."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from nova_sys.data.tokenizer import Tokenizer, load_tokenizer

_MAX_TRAINING_LINES = 200_000
_MAX_LINE_CHARS = 4000
_MAX_TRAINING_CHARS = 64_000_000
"""The trainer needs a multiple of it in memory."""


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_path: str | Path, user_symbols: Sequence[str] = ()
) -> Tokenizer:
    """Trains a unigram model that gives any text back exactly, writes it to `model_path` and loads
    it.

    Nothing is normalised, white space is kept, unseen characters are spelt in bytes, digits stand
    alone, and "\n" and `user_symbols` (turn markers) are one piece each. Deterministic in `texts`;
    at most 200,000 lines and 64 million characters, drawn evenly, are used. A corpus too small for `vocab_size` pieces gives
    a smaller vocabulary.
    """
    symbols = list(dict.fromkeys(["\n", *user_symbols]))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(_sample_lines(texts)),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _MAX_LINE_CHARS,
            user_defined_symbols=symbols,
            num_threads=4,  # fixed: the sums, and so the pieces, depend on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot train a tokenizer of {vocab_size} pieces ({error}); it needs some text, and "
            f"pieces for 256 bytes, 3 control tokens, {len(symbols)} symbols and the characters of "
            "the text. Raise model.vocab_size."
        ) from error
    Path(model_path).parent.mkdir(parents=True, exist_ok=True)
    Path(model_path).write_bytes(model.getvalue())
    return load_tokenizer(model_path)


def _sample_lines(texts: Iterable[str]) -> list[str]:
    """Lines of all texts, or an even random sample of them (a reservoir with a fixed seed); long
    lines are cut up. The reservoir becomes smaller when it would hold too many characters."""
    rng = random.Random(0)
    sample: list[str] = []
    num_lines = num_chars = 0
    capacity = _MAX_TRAINING_LINES
    for line in _cut_lines(texts):
        num_lines += 1
        if len(sample) < capacity:
            sample.append(line)
        elif (place := rng.randrange(num_lines)) < capacity:
            num_chars -= len(sample[place])
            sample[place] = line
        else:
            continue
        num_chars += len(line)
        while num_chars > _MAX_TRAINING_CHARS:
            place = rng.randrange(len(sample))
            sample[place], sample[-1] = sample[-1], sample[place]
            num_chars -= len(sample.pop())
            capacity = len(sample)
    return sample


def _cut_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_LINE_CHARS):
                yield line[start : start + _MAX_LINE_CHARS]
