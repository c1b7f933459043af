"""Tokenizers: SentencePiece models and Hugging Face tokenizer.json folders behind one small
interface.

`encode` never adds BOS or EOS. Prompt and answers are tokenised separately (docs: a pack's prefix
and responses), so a text may continue another one: `continues=True` leaves out the space that
Llama-2-like tokenizers put before a text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
MAX_IDS = 1 << 22
"""Ten times the largest vocabularies in use: an id beyond it is a mistake that would cost the memory of all rows before it."""
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
    spelling: list[bytes] | None = None
    """UTF-8 of each id, where it is known without a text around it. Ids that spell the very text they come from show which token
    covers what in a fraction of the time that offsets take."""
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
            with _told_as_ours():
                return self._encode_batch(texts, control)
        return [
            ids for ids, _ in self.encode_batch_with_offsets(texts, continues=True, control=control)
        ]

    def encode_batch_with_offsets(
        self, texts: Sequence[str], *, continues: bool = False, control: bool = False
    ) -> list[Encoded]:
        """`encode_with_offsets` of each text, on all cores."""
        with _told_as_ours():
            if not (continues and self._adds_space):
                return self._encode_batch_with_offsets(texts, control)
            led = self._encode_batch_with_offsets([_LEAD + text for text in texts], control)
        return [_behind_lead(encoded) for encoded in led]

    def conflict_with(self, other: Tokenizer) -> str | None:
        """The first id that means another text there, in words; None if one vocabulary begins with the other."""
        for token in range(min(self.vocab_size, other.vocab_size)):
            ours, theirs = self._piece(token), other._piece(token)
            if ours != theirs:
                return f"id {token} is {ours!r} in the one and {theirs!r} in the other"
        return None

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens that text can spell included."""

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files; `load_tokenizer(folder)` gives an equal one."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (Path(folder) / name).write_bytes(data)

    def is_partly_in(self, folder: Path) -> bool:
        """Some of the files, or the first part of some, is there, or nothing: a copy that was begun."""
        there = {
            name: (folder / name).read_bytes() for name in self._files if (folder / name).is_file()
        }
        return there != self._files and all(
            self._files[name].startswith(data) for name, data in there.items()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_files, (self._files,)  # to processes that tokenise

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


@contextlib.contextmanager
def _told_as_ours() -> Iterator[None]:
    """The libraries raise RuntimeError and plain Exception for texts that a tokenizer cannot spell."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the tokenizer fails on the text ({error}); it must have pieces, or an unknown token, for every text. "
            "Correct the text, or choose another data.tokenizer"
        ) from error


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
        self.spelling = [self._spelt(i) for i in range(self.vocab_size)]
        self._finish(files)

    def _spelt(self, token: int) -> bytes:
        piece = self._model.IdToPiece(token)
        if self._model.IsByte(token):
            return bytes([int(piece[3:5], 16)])
        if self._model.IsUnknown(token):
            return b"\xff"  # stands in no text: offsets must tell what it covers
        return piece.replace(_SPACE, " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.Decode([int(i) for i in ids])

    def _piece(self, token: int) -> str:
        return self._model.IdToPiece(token)

    def _encode_batch(self, texts: Sequence[str], control: bool) -> list[list[int]]:
        # One thread: many documents are spread over processes, since most of the work is Python's.
        all_ids = self._model.Encode(list(texts), return_type=int, num_threads=1)
        fixed = self._fixed(control)
        for i in _holding(texts, fixed):
            all_ids[i] = self._encode_in_parts(texts[i], fixed)[0]
        return all_ids

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
        # bytes before a character's last one come as empty ranges
        for i in range(len(offsets) - 2, -1, -1):
            if offsets[i][0] == offsets[i][1] and offsets[i + 1][0] == offsets[i][0]:
                offsets[i] = offsets[i + 1]
        return _behind_lead((ids, offsets)) if lead else (ids, offsets)


def _holding(texts: Sequence[str], fixed: dict[str, list[int]]) -> list[int]:
    """Indices of the texts with one of the keys in them: few, mostly none, so all texts are searched at once first."""
    together = "".join(texts)
    keys = [key for key in fixed if key in together]
    return [i for i, text in enumerate(texts) if any(key in text for key in keys)] if keys else []


class HuggingFaceTokenizer(Tokenizer):
    """A folder with tokenizer.json; BOS, EOS and the chat template come from the files beside
    it. Without `control`, the text of a special token is text like any other."""

    def __init__(
        self, files: dict[str, bytes], config: dict[str, Any], chat_template: str | None
    ) -> None:
        with _panics_as_errors():
            self._model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > MAX_IDS:
            raise ValueError(
                f"its largest id is {self.vocab_size - 1:,}; the model has a row for every id up to the largest, and ids must be "
                f"below {MAX_IDS:,}"
            )
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
        self._model.encode_special_tokens = not control
        with _panics_as_errors():
            encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def _encode_batch_with_offsets(self, texts: Sequence[str], control: bool) -> list[Encoded]:
        self._model.encode_special_tokens = not control
        with _panics_as_errors():
            encoded = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, e.offsets) for e in encoded]


@contextlib.contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic of the `tokenizers` library (a tokenizer.json that it should have refused) is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library stopped at it: {error}") from error


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
    """A SentencePiece .model file, or a folder with tokenizer.json or tokenizer.model.

    Raises: ValueError that names the path, for whatever is wrong with it.
    """
    path = Path(os.path.expanduser(path))  # leaves an unknown user's ~name as it is
    try:
        files = {name: file.read_bytes() for name, file in _tokenizer_files(path).items()}
    except OSError as error:
        raise ValueError(
            f"the tokenizer {path} cannot be read ({error}); its files must be readable. Check the "
            "path and its permissions."
        ) from error
    try:
        return _from_files(files)
    except Exception as error:  # the libraries raise RuntimeError and plain Exception
        raise ValueError(
            f"the tokenizer {path} cannot be read ({error}); it must be a SentencePiece model or a "
            "tokenizer.json of the `tokenizers` library. Download or export it again."
        ) from error


def _tokenizer_files(path: Path) -> dict[str, Path]:
    """The files that make up the tokenizer, by the names that `Tokenizer.save` gives them."""
    if path.name == "tokenizer.json":  # its neighbours belong to it
        path = path.parent
    if path.is_dir():
        for kind, names in (("tokenizer.json", _HF_FILES), ("tokenizer.model", _SPM_FILES)):
            if (path / kind).is_file():
                return {name: path / name for name in names if (path / name).is_file()}
        raise ValueError(
            f"the tokenizer folder {path} has neither tokenizer.json nor tokenizer.model; it "
            "needs one. Point data.tokenizer to a .model file or to a Hugging Face folder."
        )
    if path.is_file():
        return {"tokenizer.model": path}
    raise ValueError(
        f"the tokenizer {path} does not exist; data.tokenizer is a SentencePiece .model file "
        "or a folder with tokenizer.json. Check the path, or leave it empty to train one."
    )


def _from_files(files: dict[str, bytes]) -> Tokenizer:
    config = _json_object(files, "special_tokens_map.json") | _json_object(
        files, "tokenizer_config.json"
    )
    build = HuggingFaceTokenizer if "tokenizer.json" in files else SentencePieceTokenizer
    return build(files, config, _chat_template(files, config))


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
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise ValueError("chat_template in tokenizer_config.json is neither a text nor a list")
    return template
