"""What one line of a data file means, whatever its format: a dialogue, or a prompt with a chosen
and a rejected answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role` (system, user, assistant or tool), `content` (a string), and what a template may use:
`tool_calls`, `name`, ..."""

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_HUMAN_TURN = re.compile(r"\n\nHuman:(?:.*?\n\nAssistant:|.*)", re.DOTALL)
_ROLE_OF_SPEAKER = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Source:
    """Where a record stands; prints as `path:line`."""

    path: str
    file: int
    """Index into the list of files of a run."""
    line: int
    """1 is the first line."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class DataError(ValueError):
    """A mistake in a data file: nothing goes on before the file is changed."""


class UnusableRecord(ValueError):
    """A well-formed line that teaches nothing. Real data has them: they are counted by `reason`,
    not fatal one by one."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class DialogueRecord:
    """`{"messages": [...]}`: every assistant turn is learned."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TurnPair:
    """A prompt in turns and two answers, each an assistant turn and whatever follows it."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TextPair:
    """A prompt and two answers as plain text."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def is_transcript(self) -> bool:
        """True for hh-rlhf text: the prompt ends where the assistant is to speak."""
        return self.prompt.startswith(HUMAN) and self.prompt.endswith(ASSISTANT)

    def has_blank_answer(self, look_at_rejected: bool) -> bool:
        return not self.chosen.strip() or (look_at_rejected and not self.rejected.strip())

    def to_turns(self) -> TurnPair:
        """The same pair as messages: a transcript by its speakers, any other prompt as one user
        turn."""
        if not self.is_transcript:
            return TurnPair(
                prompt=[{"role": "user", "content": self.prompt}],
                chosen=[{"role": "assistant", "content": self.chosen}],
                rejected=[{"role": "assistant", "content": self.rejected}],
            )
        return TurnPair(
            prompt=parse_transcript(self.prompt[: -len(ASSISTANT)]),
            chosen=parse_transcript(ASSISTANT + self.chosen),
            rejected=parse_transcript(ASSISTANT + self.rejected),
        )


def parse_transcript(text: str) -> list[Message]:
    """Turns of hh-rlhf text; the one space behind each speaker's colon is layout, everything else
    is content.

    Rendering the result with the built-in template `dialogue` gives the text back, if each colon
    had its space.
    """
    before, *rest = _TURN.split(text)
    if before:
        raise ValueError(
            f"the transcript starts with {before[:40]!r}; it must start with {HUMAN!r} or "
            f"{ASSISTANT!r}"
        )
    return [
        {"role": _ROLE_OF_SPEAKER[speaker], "content": content.removeprefix(" ")}
        for speaker, content in zip(rest[::2], rest[1::2], strict=True)
    ]


def transcript_spans(answer: str) -> list[tuple[int, int]]:
    """Character ranges of `answer` (what follows a prompt's last `Assistant:`) that carry loss.

    All of it, but for a human's turns in it and the marker behind them: almost always one range.
    """
    spans, start = [], 0
    for turn in _HUMAN_TURN.finditer(answer):
        spans.append((start, turn.start()))
        start = turn.end()
    spans.append((start, len(answer)))
    return [span for span in spans if span[0] < span[1]]
