"""Records to texts: what is prefix, what is response, which characters carry loss, where BOS and
EOS stand.

    pairs   prefix = the prompt up to where the assistant is to speak; one response per answer,
            tokenised separately
    sft     empty prefix; response 0 = the whole dialogue, with loss on the answer's or on all
            assistant turns

A last assistant turn that its template does not close gets the tokenizer's EOS, with loss. Plain
text gets BOS in front (if the tokenizer has one) and EOS behind each answer; a template of the
tokenizer's or the user's writes its own BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nova_sys.data.chat import ChatTemplate, Span, TemplateChoice, choose_template
from nova_sys.data.formats import Kind
from nova_sys.data.records import DialogueRecord, Message, TextPair, TurnPair, transcript_spans
from nova_sys.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
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


class Renderer:
    """Turns records into parts `[prefix, response_0, ...]`; fixed by a tokenizer, a template
    setting and a kind."""

    def __init__(self, tokenizer: Tokenizer, template: str, kind: Kind) -> None:
        self.tokenizer = tokenizer
        self.kind = kind
        self.choice: TemplateChoice = choose_template(
            template,
            tokenizer_template=tokenizer.chat_template,
            special_texts=tokenizer.special_texts,
        )

    def parts(self, record: DialogueRecord | TextPair | TurnPair) -> list[Part]:
        """Raises ValueError when the template does not suit the record."""
        if isinstance(record, TextPair) and not self.choice.for_text:
            return self._text_parts(record)
        if isinstance(record, TextPair):
            record = record.to_turns()
        if isinstance(record, DialogueRecord):
            return self._dialogue_parts(record.messages, record.tools, first=0)
        if self.kind == "sft":
            messages = record.prompt + record.chosen
            return self._dialogue_parts(messages, record.tools, first=len(record.prompt))
        return self._pair_parts(record)

    def prompt_chunk(self, prompt: str | list[Message], tools: list[Any] | None = None) -> Chunk:
        """The text in front of an answer, up to where the assistant is to speak."""
        if isinstance(prompt, str):
            if not self.choice.for_text:
                return Chunk(prompt, bos=True)
            prompt = TextPair(prompt, "", "").to_turns().prompt
        template = self._template()
        text = template.render(prompt, tools=tools, add_generation_prompt=True)
        return Chunk(text, bos=template.is_built_in, control=True)

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """`prompt_chunk` as tokens: where generation starts."""
        return tokenise([(self.prompt_chunk(prompt),)], self.tokenizer)[0].tokens.tolist()

    def stop_ids(self) -> set[int]:
        """Tokens that end an answer: EOS, and the template's end-of-turn if that is one token."""
        stops = {self.tokenizer.eos_id} - {None}
        template = self.choice.template
        if template is not None and template.closes_turns:
            ids = self.tokenizer.encode(template.end_of_turn, continues=True, control=True)
            stops |= set(ids) if len(ids) == 1 else set()
        return stops  # pyright: ignore[reportReturnType]

    def _text_parts(self, pair: TextPair) -> list[Part]:
        """Prompt and answer are tokenised apart for SFT too, so that both kinds, and generation,
        see the same tokens."""
        prompt = self.prompt_chunk(pair.prompt)
        answers = [self._answer_chunk(pair, answer) for answer in (pair.chosen, pair.rejected)]
        if self.kind == "sft":
            return [(), (prompt, answers[0])]
        return [(prompt,), (answers[0],), (answers[1],)]

    def _answer_chunk(self, pair: TextPair, answer: str) -> Chunk:
        spans = transcript_spans(answer) if pair.is_transcript else [(0, len(answer))]
        end = (
            spans[-1][1] if spans else 0
        )  # behind the assistant's last word nothing is learned but EOS
        return Chunk(answer[:end], tuple(spans), eos=True, continues=True)

    def _dialogue_parts(
        self, messages: list[Message], tools: list[Any] | None, first: int
    ) -> list[Part]:
        template = self._template()
        text, spans = template.render_with_spans(messages, tools=tools, first=first)
        return [(), (self._closing_chunk(text, spans, start=0, bos=template.is_built_in),)]

    def _pair_parts(self, pair: TurnPair) -> list[Part]:
        template = self._template()
        prompt = self.prompt_chunk(pair.prompt, pair.tools)
        parts: list[Part] = [(prompt,)]
        for answer in (pair.chosen, pair.rejected):
            text, spans = template.render_with_spans(
                pair.prompt + answer, tools=pair.tools, first=len(pair.prompt)
            )
            if not text.startswith(prompt.text):
                raise ValueError(
                    f"the chat template {template.name} renders the prompt differently when an "
                    "answer follows; the prompt must be the start of the whole dialogue. Use "
                    "another data.template."
                )
            parts.append((self._closing_chunk(text, spans, start=len(prompt.text)),))
        return parts

    def _template(self) -> ChatTemplate:
        if self.choice.template is None:
            raise ValueError(
                'the record has turns, but data.template is "none"; turns need a template. '
                'Set data.template to "auto", a built-in name or a file.'
            )
        return self.choice.template

    def _closing_chunk(self, text: str, spans: list[Span], start: int, bos: bool = False) -> Chunk:
        """`text[start:]` up to the last character with loss (nothing is learned behind it), and EOS
        if need be."""
        if not spans:
            raise ValueError(
                f"the chat template {self._template().name} renders no text for the answer; a "
                "response must have text. Correct the record or the template."
            )
        end = spans[-1][1]
        eos_text = self.tokenizer.special_texts.get("eos_token")
        closed = self._template().closes_turns or (
            eos_text is not None and text.endswith(eos_text, start, end)
        )
        return Chunk(
            text[start:end],
            tuple((a - start, b - start) for a, b in spans),
            bos=bos,
            eos=not closed,
            continues=start > 0,
            control=True,
        )


def tokenise(parts: Sequence[Part], tokenizer: Tokenizer) -> list[TokenPart]:
    """Tokens and loss flags of many parts at once (the tokenizer works in batches, on all
    cores)."""
    chunks = [chunk for part in parts for chunk in part]
    encoded: list[TokenPart] = [TokenPart(np.empty(0, np.int32), np.empty(0, np.uint8))] * len(
        chunks
    )
    for continues in (False, True):
        for control in (False, True):
            places = [
                i for i, c in enumerate(chunks) if c.continues is continues and c.control is control
            ]
            for masked in (False, True):
                chosen = [i for i in places if _needs_offsets(chunks[i]) is masked]
                batch = _encode_chunks([chunks[i] for i in chosen], tokenizer, masked)
                for i, part in zip(chosen, batch, strict=True):
                    encoded[i] = part
    result, place = [], 0
    for part in parts:
        pieces = encoded[place : place + len(part)]
        place += len(part)
        result.append(_join(pieces))
    return result


def _join(pieces: list[TokenPart]) -> TokenPart:
    if len(pieces) == 1:
        return pieces[0]
    tokens = np.concatenate([p.tokens for p in pieces] or [np.empty(0, np.int32)])
    return TokenPart(tokens, np.concatenate([p.loss for p in pieces] or [np.empty(0, np.uint8)]))


def _needs_offsets(chunk: Chunk) -> bool:
    return bool(chunk.spans) and chunk.spans != ((0, len(chunk.text)),)


def _encode_chunks(chunks: list[Chunk], tokenizer: Tokenizer, masked: bool) -> list[TokenPart]:
    """Chunks that agree in `continues` and `control`; masked: their spans cover only some of the
    text."""
    if not chunks:
        return []
    texts = [c.text for c in chunks]
    continues, control = chunks[0].continues, chunks[0].control
    if not masked:
        all_ids = tokenizer.encode_batch(texts, continues=continues, control=control)
        flags = [
            np.full(len(ids), bool(c.spans), np.uint8)
            for ids, c in zip(all_ids, chunks, strict=True)
        ]
    else:
        encoded = tokenizer.encode_batch_with_offsets(texts, continues=continues, control=control)
        all_ids = [ids for ids, _ in encoded]
        flags = [_flags(o, c) for (_, o), c in zip(encoded, chunks, strict=True)]
    parts = []
    for ids, loss, chunk in zip(all_ids, flags, chunks, strict=True):
        bos = [tokenizer.bos_id] if chunk.bos and tokenizer.bos_id is not None else []
        eos = [tokenizer.eos_id] if chunk.eos and tokenizer.eos_id is not None else []
        loss = np.concatenate([np.zeros(len(bos), np.uint8), loss, np.ones(len(eos), np.uint8)])
        parts.append(TokenPart(np.array([*bos, *ids, *eos], np.int32), loss))
    return parts


def _flags(offsets: list[Span], chunk: Chunk) -> np.ndarray:
    """A token carries loss when it covers a character that does (a token may reach across a span's
    edge)."""
    counts = np.zeros(len(chunk.text) + 1, np.int64)
    for start, end in chunk.spans:
        counts[start + 1 : end + 1] = 1
    counts = np.cumsum(counts)
    ranges = np.array(offsets, np.int64).reshape(-1, 2)
    return (counts[ranges[:, 1]] > counts[ranges[:, 0]]).astype(np.uint8)
