"""Every accepted format, and every refusal with its file and line."""

import gzip
import json

import pytest

from nova_sys.data.formats import expand_files, parse_record, read_objects
from nova_sys.data.records import (
    DialogueRecord,
    Source,
    TextPair,
    TurnPair,
    UnusableRecord,
    parse_transcript,
    transcript_spans,
)

HERE = Source("some/file.jsonl", 0, 7)
USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}


def parse(value, kind="pairs"):
    return parse_record(value, HERE, kind)


# Accepted


def test_strings():
    pair = parse({"prompt": "2+2=", "chosen": "4", "rejected": "5", "score": 3})
    assert pair == TextPair("2+2=", "4", "5")
    assert pair.to_turns() == TurnPair([{"role": "user", "content": "2+2="}], [FOUR], [FIVE])


def test_message_lists_and_strings_mix():
    expected = TurnPair([USER], [FOUR], [FIVE])
    assert parse({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}) == expected
    assert parse({"prompt": [USER], "chosen": "4", "rejected": "5"}) == expected
    assert parse({"prompt": "2+2?", "chosen": [FOUR], "rejected": "5"}) == expected


def test_answers_that_repeat_the_prompt():
    value = {"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}
    assert parse(value) == TurnPair([USER], [FOUR], [FIVE])


def test_hh_transcript():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
    pair = parse({"chosen": start + " 4", "rejected": start + " 5"})
    assert pair == TextPair(start, " 4", " 5")
    assert pair.to_turns() == TurnPair(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "2+2?"},
        ],
        [FOUR],
        [FIVE],
    )


def test_hh_transcript_that_parts_before_the_last_turn():
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    rejected = "\n\nHuman: a\n\nAssistant: bad"
    pair = parse({"chosen": chosen, "rejected": rejected})
    assert pair == TextPair("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " bad")
    assert [pair.chosen[a:b] for a, b in transcript_spans(pair.chosen)] == [" b", " d"]


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        (" a", [" a"]),
        (" a\n\nAssistant: b", [" a\n\nAssistant: b"]),  # hh-rlhf has such answers
        (" a\n\nHuman: b", [" a"]),
        (" a\n\nHuman: b\n\nHuman: c\n\nAssistant: d\n\nHuman:\n\nAssistant:e", [" a", " d", "e"]),
        ("", []),
    ],
)
def test_answers_carry_loss_but_for_human_turns(answer, learned):
    assert [answer[a:b] for a, b in transcript_spans(answer)] == learned


def test_blank_answer_of_a_transcript_is_a_judgement_but_an_empty_one_is_not():
    start = "\n\nHuman: a\n\nAssistant:"
    assert parse({"chosen": start + " ", "rejected": start + " b"}).has_blank_answer(True)
    with pytest.raises(UnusableRecord, match="no answer"):
        parse({"chosen": start, "rejected": start + " b"})


def test_whole_message_dialogues():
    system = {"role": "system", "content": "s"}
    value = {"chosen": [system, USER, FOUR], "rejected": [system, USER, FIVE]}
    assert parse(value) == TurnPair([system, USER], [FOUR], [FIVE])
    longer = {"chosen": [USER, FOUR], "rejected": [USER, FOUR, USER, FIVE]}
    assert parse(longer) == TurnPair([USER], [FOUR], [FOUR, USER, FIVE])


def test_messages_with_tools():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    value = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4", "name": "add"},
            FOUR,
        ],
        "tools": [{"name": "add"}],
    }
    record = parse(value, "sft")
    assert isinstance(record, DialogueRecord)
    assert record.tools == [{"name": "add"}]
    assert record.messages[0] == USER
    assert record.messages[1]["content"] == ""
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}
    assert record.messages[2]["name"] == "add"


def test_tool_arguments_that_cannot_be_tokenised_stay_text():
    for arguments in ('"\\ud800"', "[" * 100_000, "two plus two"):
        call = {"function": {"name": "add", "arguments": arguments}}
        record = parse({"messages": [USER, FOUR | {"tool_calls": [call]}]}, "sft")
        assert isinstance(record, DialogueRecord)
        assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_transcripts_round_trip():
    text = "\n\nHuman: a  \n\n b\n\nAssistant: \n\nHuman:  two spaces\n\nHuman: again"
    turns = parse_transcript(text)
    names = {"user": "Human", "assistant": "Assistant"}
    assert "".join(f"\n\n{names[t['role']]}: {t['content']}" for t in turns) == text
    with pytest.raises(ValueError, match="must start"):
        parse_transcript("Once upon a time\n\nHuman: a")


# Refused: well formed, teaches nothing


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "pairs", "identical_answers"),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FOUR]}, "pairs", "identical_answers"),
        ({"chosen": [USER, FOUR], "rejected": [USER, FOUR]}, "pairs", "identical_answers"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b"} | {"rejected": "\n\nHuman: a\n\nAssistant: b"},
         "pairs", "identical_answers"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "pairs", "empty_answer"),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "sft", "empty_answer"),
        ({"prompt": [USER], "chosen": [], "rejected": [FOUR]}, "pairs", "empty_answer"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "pairs", "no_common_start"),
        ({"chosen": "once", "rejected": "once upon"}, "pairs", "no_common_start"),
        ({"chosen": [USER, FOUR], "rejected": [FOUR]}, "pairs", "no_common_start"),
        ({"messages": [USER]}, "sft", "no_assistant_turn"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "sft", "no_assistant_turn"),
    ],
)  # fmt: skip
def test_unusable(value, kind, reason):
    with pytest.raises(UnusableRecord, match=r"some/file\.jsonl:7: ") as caught:
        parse(value, kind)
    assert caught.value.reason == reason


def test_sft_ignores_the_rejected_answer():
    assert parse({"prompt": "p", "chosen": "a", "rejected": "a"}, "sft") == TextPair("p", "a", "a")
    assert parse({"prompt": "p", "chosen": "a", "rejected": ""}, "sft") == TextPair("p", "a", "")


# Refused: malformed


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ([1], "pairs", "a JSON list; each line must be one JSON object"),
        ("x", "pairs", "a JSON string"),
        ({"text": "x"}, "pairs", "keys 'text'; a record must be one of"),
        ({}, "pairs", "keys none"),
        ({"prompt": "p", "chosen": "a"}, "pairs", "keys 'prompt', 'chosen'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "pairs", '"prompt" is a number'),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "pairs", '"chosen" is a null'),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "pairs", '"prompt" is an empty list'),
        ({"prompt": "p", "chosen": [USER], "rejected": "b"}, "pairs", "a turn of role 'user'"),
        ({"chosen": "a", "rejected": [USER]}, "pairs", '"chosen" is a string'),
        ({"messages": [USER, FOUR]}, "pairs", 'a "messages" record; preference training needs'),
        ({"messages": "hello"}, "sft", '"messages" is a string'),
        ({"messages": ["hello"]}, "sft", r"messages\[0\] has a string"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "sft", r"messages\[0\] has role 'bot'"),
        ({"messages": [{"role": "user"}]}, "sft", r"messages\[0\].content is a null"),
        ({"messages": [USER | {"content": [{"type": "image"}]}]}, "sft", "content is a list"),
        ({"messages": [FOUR | {"tool_calls": "f"}]}, "sft", "tool_calls is not a list"),
        ({"messages": [FOUR | {"tool_calls": [{"function": {}}]}]}, "sft", "without a func"),
        ({"messages": [USER, FOUR], "tools": "f"}, "sft", '"tools" is a string'),
    ],
)  # fmt: skip
def test_malformed(value, kind, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse(value, kind)
    assert not isinstance(caught.value, UnusableRecord)
    assert str(caught.value).startswith("some/file.jsonl:7: ")


# Files


def test_plain_and_gzip_are_told_apart_by_content(tmp_path):
    lines = b'\xef\xbb\xbf{"a": 1}\n\n  {"b": "\xc3\xa9"}\r\n{"c": 3}'
    (tmp_path / "plain.gz").write_bytes(lines)
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(lines, mtime=0))
    for name in ("plain.gz", "packed.jsonl"):
        path = tmp_path / name
        found = [(str(source), value) for source, value in read_objects(path, 2)]
        assert found == [
            (f"{path}:1", {"a": 1}),
            (f"{path}:3", {"b": "é"}),
            (f"{path}:4", {"c": 3}),
        ]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b'{"a": 1}\n{"a": \n', 2, "not valid JSON"),
        (b'{"a": 1}\n{"a": 1} {"b": 2}\n', 2, "not valid JSON"),
        (b'{"a": "\\ud800"}\n', 1, "not valid JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', 1, r"not valid JSON \(the key 'c' occurs twice"),
        (b"[" * 100_000, 1, "not valid JSON"),
        (b'{"a": 1}\nPAR1\x15\x04\x00\x00', 2, "byte 7 of the line is 0x00"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', 2, "byte 8 of the line is 0xe9"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], None, "damaged gzip data"),
        (b"\x1f\x8b" + b"x" * 50, 1, "damaged gzip data"),
        (b"", None, "no records in it"),
        (b"\n \n", None, "no records in it"),
        (gzip.compress(b"", mtime=0), None, "no records in it"),
    ],
)
def test_bad_files(tmp_path, content, line, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        list(read_objects(path))
    where = f"{path}:{line}: " if line else f"{path}:"
    assert str(caught.value).startswith(where)


def test_files_globs_and_lists(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.gz", "odd[1].jsonl"):
        (tmp_path / name).write_text(json.dumps({}))
    (tmp_path / "folder.jsonl").mkdir()
    names = lambda patterns: [p.name for p in expand_files(patterns)]  # noqa: E731
    assert names(str(tmp_path / "[ab].jsonl")) == ["a.jsonl", "b.jsonl"]
    assert names([str(tmp_path / "c.gz"), str(tmp_path / "*.jsonl")]) == [
        "c.gz", "a.jsonl", "b.jsonl", "odd[1].jsonl",
    ]  # fmt: skip
    assert names(str(tmp_path / "odd[1].jsonl")) == ["odd[1].jsonl"]


def test_missing_files(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"no such file.*Did you mean .*train\.jsonl"):
        expand_files(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match="no file matches"):
        expand_files(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match=r"this is a folder.*Try '.*/\*\.jsonl"):
        expand_files(str(tmp_path))
    with pytest.raises(ValueError, match="it is empty"):
        expand_files([])
    with pytest.raises(ValueError, match="a device or pipe; data must be regular files"):
        expand_files("/dev/null")
    with pytest.raises(ValueError, match=r"cannot be read .File name too long"):
        expand_files("x" * 300)
    with pytest.raises(ValueError, match="no such file"):
        expand_files("")
