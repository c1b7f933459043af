"""Chat templates: what is rendered, and exactly which characters carry loss."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_sys.data.chat import BUILT_IN, ChatTemplate, choose_template
from nova_sys.data.records import parse_transcript

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "<é>"}}}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": " \nYou are welcome\n"},
]
CALL_TEXT = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "<é>"}}\n</tool_call>'

# No generation blocks, in the manner of bracket formats: BOS once, EOS behind each answer.
BRACKETS = """\
{{ bos_token }}
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}
{{- ' ' + m['content'] | trim + eos_token + '\n' }}
{%- elif m['role'] == 'user' %}
{{- '[USER] ' + m['content'] + ' [/USER]' }}
{%- else %}
{{- raise_exception('no role ' + m['role']) }}
{%- endif %}
{%- endfor %}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def built_in(name):
    return ChatTemplate(BUILT_IN[name], name=name, special_texts=SPECIAL, is_built_in=True)


def learned(template, messages, first=0):
    text, spans = template.render_with_spans(messages, first=first)
    return text, [text[a:b] for a, b in spans]


def test_chatml():
    text, spans = learned(built_in("chatml"), DIALOGUE)
    assert text.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
    )
    assert text.endswith("<|im_start|>assistant\n \nYou are welcome\n<|im_end|>\n")
    assert spans == [
        f"Let me see. {CALL_TEXT}<|im_end|>",
        "4<|im_end|>",
        " \nYou are welcome\n<|im_end|>",
    ]
    assert built_in("chatml").closes_turns


def test_dialogue():
    text, spans = learned(built_in("dialogue"), DIALOGUE)
    assert text == (
        f"\n\nSystem: Be brief.\n\nHuman: 2+2?\n\nAssistant: Let me see. {CALL_TEXT}\n\nTool: "
        "4\n\nAssistant: 4\n\nHuman: Thanks\n\nAssistant:  \nYou are welcome\n"
    )
    assert spans == [f" Let me see. {CALL_TEXT}", " 4", "  \nYou are welcome\n"]
    assert not built_in("dialogue").closes_turns


@pytest.mark.parametrize("name", BUILT_IN)
def test_prompt_is_the_start_of_the_dialogue(name):
    template = built_in(name)
    for turn in (2, 4, 6):
        prompt = template.render(DIALOGUE[:turn], add_generation_prompt=True)
        text, spans = template.render_with_spans(DIALOGUE, first=turn)
        assert text.startswith(prompt)
        assert spans[0][0] == len(prompt)
        assert len(spans) == {2: 3, 4: 2, 6: 1}[turn]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), st.text()), min_size=1, max_size=5)
)
def test_hh_text_survives_parsing_and_rendering(turns):
    text = "".join(f"\n\n{speaker}: {said}" for speaker, said in turns)
    assert built_in("dialogue").render(parse_transcript(text)) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(), min_size=2, max_size=6), st.sampled_from(sorted(BUILT_IN)))
def test_mask_is_content_and_end_of_turn_whatever_the_text(contents, name):
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    _, spans = learned(built_in(name), messages)
    shape = "{}<|im_end|>" if name == "chatml" else " {}"
    assert spans == [shape.format(m["content"]) for m in messages[1::2]]


def test_mask_by_growing_prefixes():
    template = ChatTemplate(BRACKETS, name="brackets", special_texts=SPECIAL)
    messages = DIALOGUE[1:2] + DIALOGUE[4:]
    text, spans = learned(template, messages)
    assert text == "<s>[USER] 2+2? [/USER] 4</s>\n[USER] Thanks [/USER] You are welcome</s>\n"
    assert spans == [" 4</s>", " You are welcome</s>"]
    assert learned(template, messages, first=3)[1] == [" You are welcome</s>"]


def test_prefix_masks_equal_block_masks():
    for name in BUILT_IN:
        plain = BUILT_IN[name].replace("{%- generation %}", "{%- if true %}")
        plain = plain.replace("{% endgeneration +%}", "{% endif +%}")
        plain = plain.replace("{% endgeneration %}", "{% endif %}")
        assert "generation %}" not in plain
        without_blocks = ChatTemplate(plain, name="plain", special_texts=SPECIAL)
        assert learned(without_blocks, DIALOGUE) == learned(built_in(name), DIALOGUE)


@pytest.mark.parametrize(
    "turn",
    [
        "{% generation %}{{ m.content }}{% endgeneration %}<END>\n",
        "{% generation %}{{ m.content }}<END>{% endgeneration %}\n",
        "{% generation %}{{ m.content + '<END>\n\n' }}{% endgeneration %}",
    ],
)
def test_end_of_turn_carries_loss_wherever_the_block_ends(turn):
    text = "{% for m in messages %}<{{ m.role }}>" + turn + "{% endfor %}"
    only_answers = text.replace(
        "{% generation", "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation"
    )
    only_answers = only_answers.replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
    messages = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", ""))
    ]
    _, spans = learned(ChatTemplate(only_answers, name="t"), messages)
    assert spans == ["b<END>", "<END>"]


def test_a_template_whose_past_changes_is_refused_by_turn():
    forgetful = "{% for m in messages %}<{{ m.role }}>"
    forgetful += "{{ m.content if loop.last else m.content | upper }};{% endfor %}"
    forgetful += "{% if add_generation_prompt %}<assistant>{% endif %}"
    template = ChatTemplate(forgetful, name="forgetful")
    with pytest.raises(
        ValueError, match=r"forgetful renders turn 1 \(assistant\) differently.*generation"
    ):
        template.render_with_spans(
            [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
        )


def test_template_errors():
    with pytest.raises(ValueError, match="broken:2 does not compile"):
        ChatTemplate("\n{% for %}", name="broken")
    with pytest.raises(ValueError, match=r"nested does not compile .too many statically nested"):
        ChatTemplate("{% for a in b %}" * 30 + "{% endfor %}" * 30, name="nested")
    template = ChatTemplate(BRACKETS, name="brackets", special_texts=SPECIAL)
    with pytest.raises(
        ValueError, match=r"brackets:9 failed \(no role tool\) on turns: user, tool"
    ):
        template.render([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])
    for endless in ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'a' * 10**14 }}"):
        with pytest.raises(ValueError, match=r"t:1 failed .(maximum recursion depth|MemoryError)"):
            ChatTemplate(endless, name="t").render([])
    with pytest.raises(ValueError, match="overlap"):
        nested = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
        ChatTemplate(nested, name="nested").render([])


def test_what_is_undefined_may_be_tested_but_not_written():
    for text in ("{{ mesage }}", "{{ 'a' ~ mesage }}", "{{ [mesage] | join }}", "{{ eos_token }}"):
        with pytest.raises(ValueError, match=r"t:1 failed .*is undefined"):
            ChatTemplate(text, name="t").render([])
    asked = (
        "{% if x %}a{% endif %}{% for y in x %}b{% endfor %}{{ x is defined }}{{ x | default(1) }}"
    )
    assert ChatTemplate(asked, name="t").render([]) == "False1"
    assert ChatTemplate("{{ bos_token }}a", name="t").render([]) == "a"  # a tokenizer without BOS


def test_environment_as_tokenizers_templates_expect():
    text = (
        "{% for x in [1, 2, 3] %}\n    {% if x == 2 %}{% continue %}{% endif %}\n{{ x }}\n"
        "{% endfor %}\n"
        "{{ {'b': '<é>', 'a': 1} | tojson }} {{ strftime_now('%Y') | length }} {{ tools is none }}"
    )
    assert ChatTemplate(text, name="t").render([]) == '1\n3\n{"b": "<é>", "a": 1} 4 True'


def test_choosing(tmp_path):
    def choose(setting, tokenizer_template=None):
        return choose_template(
            setting, tokenizer_template=tokenizer_template, special_texts=SPECIAL
        )

    auto = choose("auto")
    assert (auto.template.name, auto.for_text) == ("dialogue", False)
    own = choose("auto", BRACKETS)
    assert (own.template.text, own.for_text, own.template.is_built_in) == (BRACKETS, False, False)
    assert choose("none", BRACKETS).template is None
    named = choose("chatml", BRACKETS)
    assert (named.template.name, named.for_text) == ("chatml", True)
    (tmp_path / "mine.jinja").write_text(BRACKETS)
    mine = choose(str(tmp_path / "mine.jinja"))
    assert (mine.template.text, mine.for_text) == (BRACKETS, True)
    with pytest.raises(
        ValueError, match=r"data\.template is 'chatlm'.*auto, none, chatml, dialogue"
    ):
        choose("chatlm")
