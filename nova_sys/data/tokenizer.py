"""Tokenizers: SentencePiece models and Hugging Face tokenizer.json folders behind one small
interface.

`encode` never adds BOS or EOS. Prompt and answers are tokenised separately (docs: a pack's prefix
and responses), so a text may continue another one: `continues=True` leaves out the space that
Llama-2-like tokenizers put before a text.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

Encoded = tuple[list[int], list[tuple[int, int]]]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_SPM_FILES = ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
_SPACE = "\u2581"  # SentencePiece's mark for a space, in its pieces
_LEAD = "\ue000"  # private use, part of no piece: what follows is tokenised as a continuation


class Tokenizer(ABC):
    """Text to ids and back; made by `load_tokenizer`."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    chat_template: str | None
    special_texts: dict[str, str]
    """What a chat template may write: bos_token, eos_token, unk_token, pad_token."""
    fingerprint: str
    """sha256 over the files."""
    _files: dict[str, bytes]

    def encode(self, text: str, *, continues: bool = False, control: bool = False) -> list[int]:
        """Ids of `text`. control: the texts of BOS and EOS in it become those ids (for rendered
        chat templates)."""
        return self.encode_batch([text], continues=continues, control=control)[0]

    def encode_with_offsets(
        self, text: str, *, continues: bool = False, control: bool = False
    ) -> Encoded:
        """Ids and, for each, the character range [start, end) of `text` that it covers.

        Pieces of one character (its UTF-8 bytes) each cover the whole character.
        """
        return self.encode_batch_with_offsets([text], continues=continues, control=control)[0]

    def encode_batch(
        self, texts: Sequence[str], *, continues: bool = False, control: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        if not (continues and self._adds_space):
            return self._encode_batch(texts, control)
        return [
            ids for ids, _ in self.encode_batch_with_offsets(texts, continues=True, control=control)
        ]

    def encode_batch_with_offsets(
        self, texts: Sequence[str], *, continues: bool = False, control: bool = False
    ) -> list[Encoded]:
        """`encode_with_offsets` of each text, on all cores."""
        if not (continues and self._adds_space):
            return self._encode_batch_with_offsets(texts, control)
        led = self._encode_batch_with_offsets([_LEAD + text for text in texts], control)
        return [_behind_lead(encoded) for encoded in led]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens that text can spell included."""

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files; `load_tokenizer(folder)` gives an equal one."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (Path(folder) / name).write_bytes(data)

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str], control: bool) -> list[list[int]]: ...

    @abstractmethod
    def _encode_batch_with_offsets(self, texts: Sequence[str], control: bool) -> list[Encoded]: ...

    @abstractmethod
    def _piece(self, token: int) -> str: ...

    def _finish(self, files: dict[str, bytes]) -> None:
        self._files = files
        digest = hashlib.sha256()
        for name, data in sorted(files.items()):
            digest.update(f"{name}:{len(data)}:".encode() + data)
        self.fingerprint = digest.hexdigest()
        self._adds_space = False
        first = self._encode_batch(["a"], False)[0]
        self._adds_space = bool(first) and self._piece(first[0]).startswith((_SPACE, "\u0120"))


def _behind_lead(encoded: Encoded) -> Encoded:
    """Without the lead character; a token that spans it and more (both unknown) stays."""
    ids, offsets = encoded
    first = next((i for i, (_, end) in enumerate(offsets) if end > len(_LEAD)), len(ids))
    shift = len(_LEAD)
    return ids[first:], [(max(start - shift, 0), end - shift) for start, end in offsets[first:]]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. A literal U+2581 in a text is spelt in bytes, since its piece means a
    space."""

    def __init__(
        self, files: dict[str, bytes], config: dict[str, Any], chat_template: str | None
    ) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(files["tokenizer.model"])
        ids = {
            "bos": self._model.bos_id(),
            "eos": self._model.eos_id(),
            "unk": self._model.unk_id(),
        }
        self.special_texts = {
            f"{k}_token": self._model.IdToPiece(i) for k, i in ids.items() if i >= 0
        }
        self.special_texts.update(_special_texts(config))
        self.bos_id = (
            ids["bos"] if ids["bos"] >= 0 and config.get("add_bos_token") is not False else None
        )
        self.eos_id = ids["eos"] if ids["eos"] >= 0 else None
        self.vocab_size = self._model.GetPieceSize()
        self.chat_template = chat_template
        self._control_ids = {
            self._model.IdToPiece(i): [i] for k, i in ids.items() if k != "unk" and i >= 0
        }
        marks = [self._model.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_ids = {_SPACE: marks} if all(self._model.IsByte(i) for i in marks) else {}
        self._finish(files)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.Decode([int(i) for i in ids])

    def _piece(self, token: int) -> str:
        return self._model.IdToPiece(token)

    def _encode_batch(self, texts: Sequence[str], control: bool) -> list[list[int]]:
        fixed = self._fixed(control)
        if not fixed or not any(key in text for key in fixed for text in texts):
            return self._model.Encode(list(texts), return_type=int)
        return [self._encode_in_parts(text, fixed)[0] for text in texts]

    def _encode_batch_with_offsets(self, texts: Sequence[str], control: bool) -> list[Encoded]:
        return [self._encode_in_parts(text, self._fixed(control)) for text in texts]

    def _fixed(self, control: bool) -> dict[str, list[int]]:
        """Texts that must become these very ids, which the model would spell otherwise."""
        return {**self._space_ids, **self._control_ids} if control else self._space_ids

    def _encode_in_parts(self, text: str, fixed: dict[str, list[int]]) -> Encoded:
        parts = re.split("(" + "|".join(map(re.escape, fixed)) + ")", text) if fixed else [text]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        for part in parts:
            if part in fixed:
                piece_ids, piece_offsets = fixed[part], [(0, len(part))] * len(fixed[part])
            else:
                piece_ids, piece_offsets = self._encode_part(part, continues=place > 0)
            ids += piece_ids
            offsets += [(place + start, place + end) for start, end in piece_offsets]
            place += len(part)
        return ids, offsets

    def _encode_part(self, text: str, continues: bool) -> Encoded:
        lead = _LEAD if continues and self._adds_space else ""
        mapping = self._model.Encode(lead + text, return_type="offset_mapping")
        ids, offsets = list(mapping["ids"]), [tuple(pair) for pair in mapping["offsets"]]
        for i in range(
            len(offsets) - 2, -1, -1
        ):  # bytes before a character's last one come as empty ranges
            if offsets[i][0] == offsets[i][1] and offsets[i + 1][0] == offsets[i][0]:
                offsets[i] = offsets[i + 1]
        return _behind_lead((ids, offsets)) if lead else (ids, offsets)


class HuggingFaceTokenizer(Tokenizer):
    """A folder with tokenizer.json; BOS, EOS and the chat template come from the files beside
    it."""

    def __init__(
        self, files: dict[str, bytes], config: dict[str, Any], chat_template: str | None
    ) -> None:
        self._model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.special_texts = _special_texts(config)
        self.bos_id = (
            self._special_id("bos_token") if config.get("add_bos_token") is not False else None
        )
        self.eos_id = self._special_id("eos_token")
        self.chat_template = chat_template
        self._finish(files)

    def _special_id(self, name: str) -> int | None:
        text = self.special_texts.get(name)
        if text is None:
            return None
        token = self._model.token_to_id(text)
        if token is None:
            raise ValueError(
                f"{name} is {text!r} in tokenizer_config.json, but tokenizer.json has no such "
                "token; both must agree. Correct the name or add the token."
            )
        return token

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)

    def _piece(self, token: int) -> str:
        return self._model.id_to_token(token) or ""

    def _encode_batch(self, texts: Sequence[str], control: bool) -> list[list[int]]:
        return [e.ids for e in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def _encode_batch_with_offsets(self, texts: Sequence[str], control: bool) -> list[Encoded]:
        return [
            (e.ids, e.offsets)
            for e in self._model.encode_batch(list(texts), add_special_tokens=False)
        ]


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens are written as strings or as {"content": ...} objects."""
    texts = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            texts[name] = value
    return texts


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A SentencePiece .model file, or a folder with tokenizer.json or tokenizer.model."""
    path = Path(path).expanduser()
    if path.is_dir():
        kind = next(
            (n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()), None
        )
        if kind is None:
            raise ValueError(
                f"the tokenizer folder {path} has neither tokenizer.json nor tokenizer.model; it "
                "needs one. Point data.tokenizer to a .model file or to a Hugging Face folder."
            )
        names = _HF_FILES if kind == "tokenizer.json" else _SPM_FILES
        files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    elif path.is_file():
        kind, files = "tokenizer.model", {"tokenizer.model": path.read_bytes()}
    else:
        raise ValueError(
            f"the tokenizer {path} does not exist; data.tokenizer is a SentencePiece .model file "
            "or a folder with tokenizer.json. Check the path, or leave it empty to train one."
        )
    try:
        config = _json_object(files, "special_tokens_map.json") | _json_object(
            files, "tokenizer_config.json"
        )
        build = HuggingFaceTokenizer if kind == "tokenizer.json" else SentencePieceTokenizer
        return build(files, config, _chat_template(files, config))
    except (
        Exception
    ) as error:  # the libraries raise RuntimeError and plain Exception for damaged files
        raise ValueError(
            f"the tokenizer {path} cannot be read ({error}); it must be a SentencePiece model or a "
            "tokenizer.json of the `tokenizers` library. Download or export it again."
        ) from error


def _json_object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    value = json.loads(files[name]) if name in files else {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def _chat_template(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, which may hold one template or a list of
    named ones."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


_MAX_TRAINING_LINES = 200_000
_MAX_LINE_CHARS = 4000


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_path: str | Path, user_symbols: Sequence[str] = ()
) -> Tokenizer:
    """Trains a unigram model that gives any text back exactly, writes it to `model_path` and loads
    it.

    Nothing is normalised, white space is kept, unseen characters are spelt in bytes, digits stand
    alone, and "\n" and `user_symbols` (turn markers) are one piece each. Deterministic in `texts`;
    at most 200,000 lines, drawn evenly, are used. A corpus too small for `vocab_size` pieces gives
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
    lines are cut up."""
    rng = random.Random(0)
    sample: list[str] = []
    num_lines = 0
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_LINE_CHARS):
                num_lines += 1
                if len(sample) < _MAX_TRAINING_LINES:
                    sample.append(line[start : start + _MAX_LINE_CHARS])
                elif (place := rng.randrange(num_lines)) < _MAX_TRAINING_LINES:
                    sample[place] = line[start : start + _MAX_LINE_CHARS]
    return sample
