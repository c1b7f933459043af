"""From files to tokens: masks of every format, truncation, counts, keys, and folders that appear
whole or not at all."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_sys.data.encode import TokenPart
from nova_sys.data.render import Renderer
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import ATTENTION_PAIRS_PER_TOKEN, TokenStore
from nova_sys.data.tokenizer_training import train_sentencepiece
from nova_sys.data.truncate import fit_lengths, truncate

HH = "\n\nHuman: what is 2+2?\n\nAssistant: five\n\nHuman: sure?\n\nAssistant:"
USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [HH + " no, four", "the quick brown fox", "é 你好 0123456789"] * 3
    markers = ("\n\nHuman:", "\n\nAssistant:", "<|im_start|>", "<|im_end|>")
    return train_sentencepiece(texts, 400, tmp_path_factory.mktemp("spm") / "t.model", markers)


@pytest.fixture
def build(tokenizer, tmp_path):
    def run(records, kind="pairs", **settings):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
        spec = StoreSpec(str(path), tokenizer, kind, **({"pack_length": 256} | settings))
        build_store(spec, tmp_path / spec.key[:16])
        return TokenStore.open(tmp_path / spec.key[:16])

    return run


def parts_of(store, document=0):
    first, last = store.document_parts[document], store.document_parts[document + 1]
    return [store.part(i) for i in range(first, last)]


def split(tokenizer, part):
    """The part as runs of (text, loss), with BOS and EOS by name."""
    runs = []
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    for token, loss in zip(part.tokens.tolist(), part.loss.tolist(), strict=True):
        if not runs or runs[-1][1] != loss:
            runs.append(([], loss))
        runs[-1][0].append(token)
    return [
        ("".join(names.get(t) or tokenizer.decode([t]) for t in tokens), loss)
        for tokens, loss in runs
    ]


# Masks of every format

PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
TURNS = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
TRANSCRIPT = {"chosen": HH + " no, four", "rejected": HH + " yes"}
CHAT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("record", "template", "prefix", "answers"),
    [
        (PAIR, "auto", "<s>2+2=", ("4</s>", "5</s>")),
        (PAIR, "none", "<s>2+2=", ("4</s>", "5</s>")),
        (PAIR, "dialogue", "<s>\n\nHuman: 2+2=\n\nAssistant:", (" 4</s>", " 5</s>")),
        (PAIR, "chatml", "<s>" + CHAT.replace("?", "="), ("4<|im_end|>", "5<|im_end|>")),
        (TURNS, "auto", "<s>\n\nHuman: 2+2?\n\nAssistant:", (" 4</s>", " 5</s>")),
        (TURNS, "chatml", "<s>" + CHAT, ("4<|im_end|>", "5<|im_end|>")),
        (TRANSCRIPT, "auto", "<s>" + HH, (" no, four</s>", " yes</s>")),
        (TRANSCRIPT, "dialogue", "<s>" + HH, (" no, four</s>", " yes</s>")),
    ],
)
def test_pairs(build, tokenizer, record, template, prefix, answers):
    chosen, rejected = answers
    store = build([record], template=template)
    expected = [[(prefix, 0)], [(chosen, 1)], [(rejected, 1)]]
    assert [split(tokenizer, part) for part in parts_of(store)] == expected
    sft = build([record], "sft", template=template)
    assert [split(tokenizer, part) for part in parts_of(sft)] == [[], [(prefix, 0), (chosen, 1)]]
    assert (store.num_responses, sft.num_responses) == (2, 1)


@pytest.mark.parametrize("template", ["auto", "dialogue", "chatml"])
@pytest.mark.parametrize("record", [PAIR, TURNS])
def test_prompts_for_generation_are_the_prefixes_of_training(build, tokenizer, record, template):
    store = build([record], template=template)
    prompt = Renderer(tokenizer, template, "pairs").prompt_ids(record["prompt"])
    assert prompt == parts_of(store)[0].tokens.tolist()


def test_pair_answer_with_further_turns_has_loss_on_the_assistant_only(build, tokenizer):
    start = "\n\nHuman: a\n\nAssistant:"
    store = build([{"chosen": start + " b\n\nHuman: c\n\nAssistant: d", "rejected": start + " x"}])
    turns = [(" b", 1), ("\n\nHuman: c\n\nAssistant:", 0), (" d</s>", 1)]
    assert split(tokenizer, parts_of(store)[1]) == turns
    long = {"prompt": [USER], "chosen": [FOUR, USER, FIVE], "rejected": [FIVE]}
    store = build([long], template="chatml")
    assert split(tokenizer, parts_of(store)[1]) == [
        ("4<|im_end|>", 1), ("\n" + CHAT, 0), ("5<|im_end|>", 1),
    ]  # fmt: skip


def test_messages(build, tokenizer):
    call = {"function": {"name": "f", "arguments": {"é": "你"}}}
    messages = [
        {"role": "system", "content": "s"}, USER, FOUR | {"content": "é", "tool_calls": [call]},
        {"role": "tool", "content": "r"}, FOUR, USER,
    ]  # fmt: skip
    store = build([{"messages": messages}], "sft", template="chatml")
    called = '\n<tool_call>\n{"name": "f", "arguments": {"é": "你"}}\n</tool_call>'
    assert split(tokenizer, parts_of(store)[1]) == [
        ("<s><|im_start|>system\ns<|im_end|>\n" + CHAT, 0),
        (f"é{called}<|im_end|>", 1),
        ("\n<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n", 0),
        ("4<|im_end|>", 1),  # the user's last turn is behind all loss: left out
    ]
    with pytest.raises(ValueError, match=r'data\.jsonl:1: .*data\.template is "none"'):
        build([{"messages": messages}], "sft", template="none")


def test_a_template_that_writes_special_tokens_itself(build, tokenizer, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    store = build([TURNS], template=str(path))
    parts = [split(tokenizer, part) for part in parts_of(store)]
    assert parts == [[("<s>user:2+2?assistant:", 0)], [("4</s>", 1)], [("5</s>", 1)]]
    assert parts_of(store)[0].tokens[0] == tokenizer.bos_id
    injected = build([PAIR | {"chosen": "</s>"}], template="none")
    assert tokenizer.eos_id not in parts_of(injected)[1].tokens[:-1]  # plain text cannot end itself


# Counts and refusals


def test_counts(build):
    records = [
        PAIR,
        PAIR | {"rejected": "4"},
        "\n",
        PAIR | {"chosen": ""},
        TRANSCRIPT | {"chosen": HH + " "},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "1", "rejected": "1 " * 999},
        PAIR | {"rejected": "4"},
    ]
    store = build(records)
    report = store.report
    assert (report.num_records, report.num_documents) == (7, 3) == (7, store.num_documents)
    assert report.skipped == {"identical_answers": 2, "empty_answer": 1, "no_common_start": 1}
    assert report.truncated == {"documents": 1, "response": 1}
    assert report.blank_answers == 1
    assert (report.num_tokens, report.num_loss_tokens) == (len(store.tokens), store.loss.sum())
    line = str(report)
    assert "\n" not in line
    assert "7 records -> 3 documents" in line
    assert "2 identical_answers (first: " in line and "data.jsonl:2)" in line
    assert "data.jsonl:5)" in line  # the blank answer; blank lines count as lines
    assert [store.source_of(d).rpartition(":")[2] for d in range(3)] == ["1", "5", "7"]


def test_answers_equal_only_after_rendering_are_counted(build, tmp_path):
    path = tmp_path / "trim.jinja"
    path.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }};{% endfor %}"
                    "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    store = build([PAIR, PAIR | {"rejected": "4 "}], template=str(path))
    assert store.report.skipped == {"identical_answers": 1}


def test_refusals_name_file_and_line(build, tmp_path):
    with pytest.raises(ValueError, match=r"data\.jsonl:2: not valid JSON"):
        build([PAIR, '{"prompt"\n'])
    with pytest.raises(ValueError, match=r"data\.jsonl:2: a \"messages\" record"):
        build([PAIR, {"messages": [USER, FOUR]}])
    with pytest.raises(
        ValueError, match=r"no usable record in .*data\.jsonl:1: chosen and rejected are the same"
    ):
        build([PAIR | {"rejected": "4"}] * 2)
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match=r"data\.jsonl:1: the chat template .* failed \(no\)"):
        build([PAIR], template=str(tmp_path / "t.jinja"))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []  # nothing half-written stays


def test_lengths_are_checked(build):
    with pytest.raises(ValueError, match=r"max_length is 300 and data\.pack_length 256"):
        build([PAIR], max_length=300)
    with pytest.raises(ValueError, match="16 <= max_length"):
        build([PAIR], pack_length=8)


def test_mixed_files_keep_their_order(tokenizer, tmp_path):
    for name, answers in (("b", "12"), ("a", "345")):
        lines = [json.dumps(PAIR | {"chosen": c, "rejected": "x"}) for c in answers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    spec = StoreSpec([str(tmp_path / "b.jsonl"), str(tmp_path / "a*")], tokenizer, "pairs", 64)
    build_store(spec, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    answers = [tokenizer.decode(parts_of(store, d)[1].tokens[:-1]) for d in range(5)]
    assert answers == list("12345")
    assert store.source.tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [1, 3]]
    assert store.source_of(3) == f"{tmp_path}/a.jsonl:2"


# Keys and folders


def test_key_covers_what_shapes_the_tokens(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(PAIR))
    (tmp_path / "copy.jsonl").write_text(json.dumps(PAIR))
    other = train_sentencepiece(["abc abd"] * 9, 300, tmp_path / "o.model")
    base = StoreSpec(str(path), tokenizer, "pairs", 64)
    same = [
        replace(base),
        replace(base, train=str(tmp_path / "copy.jsonl")),
        replace(base, max_length=64),
    ]
    assert {spec.key for spec in same} == {base.key}
    changed = [
        replace(base, tokenizer=other), replace(base, kind="sft"), replace(base, pack_length=128),
        replace(base, max_length=32), replace(base, template="dialogue"),
        replace(base, template="chatml"), replace(base, template="none"),
        replace(base, share_prefix=False), replace(base, train=[str(path), str(tmp_path / "copy.jsonl")]),
    ]  # fmt: skip
    path.write_text(json.dumps(PAIR) + "\n")
    changed.append(replace(base))
    keys = [spec.key for spec in changed]
    assert len({base.key, *keys}) == 1 + len(keys)


def test_a_store_is_reused_and_never_overwritten(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(PAIR))
    spec = StoreSpec(str(path), tokenizer, "pairs", 64)
    report = build_store(spec, tmp_path / "store")
    stamp = (tmp_path / "store" / "tokens.npy").stat().st_mtime_ns
    assert build_store(replace(spec), tmp_path / "store") == report
    assert (tmp_path / "store" / "tokens.npy").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="holds another token store"):
        build_store(replace(spec, kind="sft"), tmp_path / "store")


def test_damaged_stores_are_refused(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(PAIR))
    spec = StoreSpec(str(path), tokenizer, "pairs", 64)
    build_store(spec, tmp_path / "store")
    meta = (tmp_path / "store" / "meta.json").read_text()
    tokens = (tmp_path / "store" / "tokens.npy").read_bytes()
    with pytest.raises(ValueError, match="not a complete token store"):
        TokenStore.open(tmp_path / "nowhere")
    for name, damage in (("meta.json", meta[:50].encode()), ("tokens.npy", tokens[:-4])):
        whole = (tmp_path / "store" / name).read_bytes()
        (tmp_path / "store" / name).write_bytes(damage)
        with pytest.raises(ValueError, match="Delete the folder"):
            TokenStore.open(tmp_path / "store")
        (tmp_path / "store" / name).write_bytes(whole)
    np.save(tmp_path / "store" / "tokens.npy", np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="its arrays disagree"):
        TokenStore.open(tmp_path / "store")


def test_many_records_cross_blocks(build, monkeypatch):
    monkeypatch.setattr("nova_sys.data.lines.BLOCK_BYTES", 150)  # three records
    records = [PAIR | {"chosen": str(i)} for i in range(11)]
    records[3:3] = [PAIR | {"rejected": "4"}]
    store = build([r for r in records if r["chosen"] != "5"])
    assert store.source[:, 1].tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]


# Lengths and work


def test_lengths_and_work(build):
    store = build([PAIR, TRANSCRIPT, PAIR | {"chosen": "44 4"}])
    for share in (True, False):
        lengths, work = [], []
        for d in range(3):
            prefix, *responses = (len(p.tokens) for p in parts_of(store, d))
            if share:
                lengths.append(prefix + sum(responses))
                pairs = prefix * (prefix + 1) / 2 + sum(
                    r * prefix + r * (r + 1) / 2 for r in responses
                )
            else:
                lengths.append(sum(prefix + r for r in responses))
                pairs = sum((prefix + r) * (prefix + r + 1) / 2 for r in responses)
            work.append(lengths[-1] + pairs / ATTENTION_PAIRS_PER_TOKEN)
        assert store.document_lengths(share).dtype == np.int32
        assert store.document_lengths(share).tolist() == lengths
        np.testing.assert_allclose(store.document_work(np.arange(3), share), work, rtol=1e-12)
        backwards = store.document_work(np.array([2, 0]), share)
        np.testing.assert_allclose(backwards, [work[2], work[0]], rtol=1e-12)


# The truncation rule


def fits(kept, responses, max_length, pack_length, share):
    copies = 1 if share else len(responses)
    return kept + max(responses) <= max_length and copies * kept + sum(responses) <= pack_length


@settings(max_examples=400, deadline=None)
@given(
    prefix=st.integers(0, 300), responses=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    pack_length=st.integers(16, 256), short=st.integers(0, 240), share=st.booleans(),
)  # fmt: skip
def test_fit_lengths(prefix, responses, pack_length, short, share):
    max_length = max(16, pack_length - short)
    kept, after = fit_lengths(
        prefix, responses, max_length=max_length, pack_length=pack_length, share_prefix=share
    )
    assert fits(kept, after, max_length, pack_length, share)
    assert min(1, prefix) <= kept <= prefix
    assert all(1 <= a <= r for a, r in zip(after, responses, strict=True))
    limit = min(max_length, pack_length // (1 if share else len(responses)))
    floor = min(prefix, max(limit // 4, 1))
    if after != responses:  # answers are cut only when the prefix is down to a quarter, and equally
        assert kept == floor
        level = max(after)
        assert after == [min(r, level) for r in responses]
        longer = [min(r, level + 1) for r in responses]
        assert not fits(kept, longer, max_length, pack_length, share)
    elif kept < prefix:  # and no more of the prefix goes than must
        assert kept >= floor
        assert not fits(kept + 1, after, max_length, pack_length, share)
    if fits(prefix, responses, max_length, pack_length, share):
        assert (kept, after) == (prefix, responses)


def part(start, stop, loss=1):
    return TokenPart(np.arange(start, stop, dtype=np.int32), np.full(stop - start, loss, np.uint8))


def cut(parts, length=16):
    result, kinds = truncate(parts, max_length=length, pack_length=length, share_prefix=True)
    return [p.tokens.tolist() for p in result], kinds


def test_prefix_loses_its_start_and_responses_their_ends():
    assert cut([part(0, 10, 0), part(20, 23), part(30, 33)]) == (
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [20, 21, 22], [30, 31, 32]], [],
    )  # fmt: skip
    assert cut([part(0, 13, 0), part(20, 23), part(30, 33)]) == (
        [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31, 32]], ["prefix"],
    )  # fmt: skip
    assert cut([part(0, 13, 0), part(20, 30), part(40, 43)]) == (
        [[9, 10, 11, 12], list(range(20, 29)), [40, 41, 42]], ["prefix", "response"],
    )  # fmt: skip


def test_cuts_that_cost_all_loss_or_all_difference_are_counted():
    late = TokenPart(np.arange(20, dtype=np.int32), np.arange(20) // 19)
    assert cut([part(0, 4, 0), late, part(30, 33)])[1] == ["response", "loss"]
    same = TokenPart(np.array([5] * 20 + [6], np.int32), np.ones(21, np.uint8))
    other = TokenPart(np.array([5] * 20 + [7], np.int32), np.ones(21, np.uint8))
    assert cut([part(0, 4, 0), same, other])[1] == ["response", "identical"]


def test_sft_loses_the_start_of_its_prompt_first():
    dialogue = TokenPart(np.arange(20, dtype=np.int32), (np.arange(20) >= 14).astype(np.uint8))
    assert cut([part(0, 0), dialogue]) == ([[], list(range(4, 20))], ["prefix"])
    assert cut([part(0, 0), part(0, 40)]) == ([[], list(range(16))], ["response"])
