"""Chat templates (Jinja2, as tokenizers ship them) with the exact character ranges that carry loss.

An assistant turn's loss covers its content, its tool calls and its end-of-turn token; not its
header, which the prompt supplies, and not white space behind the end-of-turn token. The ranges come
from the template's own `{% generation %}` blocks; without them, from rendering the dialogue up to
each assistant turn (with the generation prompt) and through it: what the second adds to the first
is the turn.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nova_sys.data.records import Message

Span = tuple[int, int]
"""Characters [start, end)."""

CHATML = """\
{% macro calls(message) %}
{% for call in message.tool_calls or [] %}
{% set function = call.function or call %}
{% set call_json = {'name': function.name, 'arguments': function.arguments} | tojson %}
{{ '\\n<tool_call>\\n' + call_json + '\\n</tool_call>' }}
{%- endfor %}
{% endmacro %}
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content + calls(message) + '<|im_end|>' }}{% endgeneration +%}
{% else %}
{{ message.content + '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""`<|im_start|>role` newline content `<|im_end|>` newline; tool calls as JSON between tags."""

DIALOGUE = """\
{% set speakers = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System', 'tool': 'Tool'} %}
{% macro calls(message) %}
{% for call in message.tool_calls or [] %}
{% set function = call.function or call %}
{% set call_json = {'name': function.name, 'arguments': function.arguments} | tojson %}
{{ '\\n<tool_call>\\n' + call_json + '\\n</tool_call>' }}
{%- endfor %}
{% endmacro %}
{% for message in messages %}
{{ '\\n\\n' + speakers[message.role] + ':' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ ' ' + message.content + calls(message) }}{% endgeneration %}
{% else %}
{{ ' ' + message.content }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"""
"""The text of hh-rlhf. No end-of-turn token: only the last answer ends with one, the tokenizer's
EOS."""

BUILT_IN = {"chatml": CHATML, "dialogue": DIALOGUE}
TURN_MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "dialogue": ("\n\nHuman:", "\n\nAssistant:"),
}
"""Texts that should be one piece each of a tokenizer trained for a built-in template."""

_OPEN, _CLOSE = (
    f"\ufdd0{secrets.token_hex(8)}{side}" for side in "<>"
)  # no text can hold these by chance or intent


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: its output is put between two marks."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return _OPEN + caller() + _CLOSE


class _Undefined(jinja2.Undefined):
    """May be tested and looped over, as tokenizers' templates do, but not written: a misspelt name would silently render as
    nothing. A tokenizer without BOS is no mistake: that name writes nothing."""

    def __str__(self) -> str:
        return "" if self._undefined_name == "bos_token" else self._fail_with_undefined_error()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML characters; tokenizers' templates expect plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
        undefined=_Undefined,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """One compiled template.

    name: for messages.   text: the Jinja2 source.
    is_built_in: BOS is ours to add, not the template's.
    end_of_turn: the text that ends an assistant turn, "" if the template has none; not the EOS that some (Phi-3's) write once more
    behind the last turn.
    closes_turns: it has one.
    """

    def __init__(
        self,
        text: str,
        *,
        name: str,
        special_texts: dict[str, str] | None = None,
        is_built_in: bool = False,
    ) -> None:
        self.text = text
        self.name = name
        self.is_built_in = is_built_in
        self._special_texts = special_texts or {}
        try:
            self._template = _environment().from_string(text)
        except Exception as error:  # besides TemplateError whatever Python's own compiler raises
            raise ValueError(
                f"the chat template {name}{_line_of(error)} does not compile ({_said(error)}); it must be Jinja2 "
                f"as Hugging Face tokenizers use it. Correct it, or choose a built-in one: {', '.join(BUILT_IN)}."
            ) from error
        self.end_of_turn = self._probe_end_of_turn()
        self.closes_turns = bool(self.end_of_turn)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_template"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._template = _environment().from_string(self.text)  # compiled code has no pickle

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The dialogue as text; add_generation_prompt: with the header of an assistant turn to
        come."""
        return _strip_marks(self._render(messages, tools, add_generation_prompt))[0]

    def render_with_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        first: int = 0,
        prompt: str | None = None,
    ) -> tuple[str, list[Span]]:
        """The dialogue as text, and the ranges of it that the assistant turns from index `first` on
        must learn. prompt: what `render` makes of the turns before `first`, if that is known."""
        if self._drops_text:
            raise ValueError(
                f"the chat template {self.name} leaves out what the assistant says when that is plain text (those of models that see "
                "images want lists of parts); there would be nothing to learn. Use another data.template"
            )
        text, blocks = _strip_marks(self._render(messages, tools, False))
        if not blocks:
            return text, self._spans_by_prefixes(text, messages, tools, first, prompt)
        if first and prompt is None:
            prompt = self.render(messages[:first], tools=tools, add_generation_prompt=True)
        start = len(prompt or "")
        spans = [(max(a, start), self._end_of_loss(text, b)) for a, b in blocks if b >= start]
        return text, [(a, b) for a, b in spans if a < b]

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool
    ) -> str:
        try:
            return self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_texts,
            )
        except Exception as error:  # a template is a program of the user's: it may raise anything
            roles = ", ".join(m["role"] for m in messages) or "none"
            raise ValueError(
                f"the chat template {self.name}{_line_of(error)} failed ({_said(error)}) on turns: {roles}; every "
                "dialogue must suit it. Correct the data or the template, or choose another data.template."
            ) from error

    def _spans_by_prefixes(
        self,
        text: str,
        messages: Sequence[Message],
        tools: list[Any] | None,
        first: int,
        prompt: str | None,
    ) -> list[Span]:
        spans = []
        for i in range(first, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            before = prompt if i == first else None
            if before is None:
                before = self.render(messages[:i], tools=tools, add_generation_prompt=True)
            is_last = i == len(messages) - 1
            through = text if is_last else self.render(messages[: i + 1], tools=tools)
            if self.closes_turns:
                through = through.rstrip()
                if not through.endswith(self.end_of_turn):
                    through = self._without_eos(through)
            if not (text.startswith(through) and through.startswith(before)):
                raise ValueError(
                    f"the chat template {self.name} renders turn {i} (assistant) differently when "
                    "later turns follow, or its generation prompt is not how it begins that turn; "
                    "the loss mask would be a guess. Use a template with {% generation %} blocks "
                    "(data.template = a file), or a built-in one, or end the dialogue there."
                )
            spans.append((len(before), len(through)))
        return spans

    def _end_of_loss(self, text: str, end: int) -> int:
        """A block's end, moved to just behind the end-of-turn token: a model that never learns it
        never stops."""
        if not self.closes_turns:
            return end
        if text.startswith(self.end_of_turn, end):
            return end + len(self.end_of_turn)
        without_space = len(text[:end].rstrip())
        return without_space if text.endswith(self.end_of_turn, 0, without_space) else end

    def _probe_end_of_turn(self) -> str:
        """What the template writes behind an answer, without trailing white space; "" if
        nothing."""
        answer, self._drops_text = "forty-two", False
        try:
            marked = self._render(
                [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}],
                None,
                False,
            )
        except ValueError:
            return ""  # it needs other turns: the dialogue itself will tell
        _, found, behind = _strip_marks(marked)[0].rpartition(answer)
        self._drops_text = not found
        return (self._without_eos(behind.rstrip()) or behind.rstrip()) if found else ""

    def _without_eos(self, text: str) -> str:
        return text.removesuffix(self._special_texts.get("eos_token", "")).rstrip()


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__  # MemoryError says nothing


def _line_of(error: Exception) -> str:
    """`:line` of the template where it failed, if that is known."""
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f":{line}" if line else ""


def _strip_marks(marked: str) -> tuple[str, list[Span]]:
    """The text without the marks, and the ranges that stood between them."""
    pieces, spans = [], []
    length = 0
    for i, piece in enumerate(marked.split(_OPEN)):
        inside, closed, outside = piece.partition(_CLOSE) if i else ("", "", piece)
        if (i and not closed) or _CLOSE in outside:
            raise ValueError(
                "generation blocks of the chat template overlap; each must end before the next "
                "begins. Correct the template."
            )
        if i:
            spans.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(pieces), spans


@dataclass(frozen=True)
class TemplateChoice:
    """template: None if there is none.   for_text: plain strings become turns too."""

    template: ChatTemplate | None
    for_text: bool


def is_template_file(setting: str) -> bool:
    """Whether this `data.template` is the path of a file."""
    return setting not in ("auto", "none", *BUILT_IN)


def choose_template(
    setting: str, *, tokenizer_template: str | None, special_texts: dict[str, str]
) -> TemplateChoice:
    """`data.template` to a template: auto, none, a built-in name, or a Jinja2 file."""
    if setting == "none":
        return TemplateChoice(None, for_text=False)
    if setting == "auto" and tokenizer_template is not None:
        template = ChatTemplate(
            tokenizer_template, name="of the tokenizer", special_texts=special_texts
        )
        return TemplateChoice(template, for_text=False)
    name = "dialogue" if setting == "auto" else setting
    if name in BUILT_IN:
        template = ChatTemplate(
            BUILT_IN[name], name=name, special_texts=special_texts, is_built_in=True
        )
        return TemplateChoice(template, for_text=setting != "auto")
    try:
        text = Path(os.path.expanduser(setting)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.template is {setting!r}, which cannot be read ({error}); it must be auto, none, "
            f"{', '.join(BUILT_IN)}, or a Jinja2 file. Correct the name or the path."
        ) from error
    return TemplateChoice(
        ChatTemplate(text, name=setting, special_texts=special_texts), for_text=True
    )
