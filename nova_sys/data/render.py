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

from typing import Any

from nova_sys.data.chat import ChatTemplate, Span, TemplateChoice, choose_template
from nova_sys.data.encode import Chunk, Part, tokenise
from nova_sys.data.formats import Kind
from nova_sys.data.records import DialogueRecord, Message, TextPair, TurnPair, transcript_spans
from nova_sys.data.tokenizer import Tokenizer


class Renderer:
    """Turns records into parts `[prefix, response_0, ...]`; fixed by a tokenizer, a template
    setting and a kind."""

    def __init__(self, tokenizer: Tokenizer, template: str, kind: Kind) -> None:
        self.tokenizer = tokenizer
        self.kind: Kind = kind
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

    def prompt_ids(self, prompt: str | list[Message], tools: list[Any] | None = None) -> list[int]:
        """`prompt_chunk` as tokens: where generation starts."""
        return tokenise([(self.prompt_chunk(prompt, tools),)], self.tokenizer)[0].tokens.tolist()

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
                pair.prompt + answer,
                tools=pair.tools,
                first=len(pair.prompt),
                prompt=prompt.text,
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
