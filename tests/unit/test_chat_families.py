"""The chat formats of well-known models: our text, token ids and loss mask beside transformers' `apply_chat_template`.

Two sources of templates. FORMATS below are the formats in our own words, so that these tests need nothing but the development packages:
special tokens, headers and trimming are those of the models, the Jinja is not theirs. The models' own files are read from TRL's package
where `make peer-trl` has installed it (`make parity` runs these tests): there each is also compared with TRL's variant for training, whose
`{% generation %}` blocks say which tokens an assistant should learn.

The tokenizer has one id per byte and one per special token. So what is shown is that nothing but the text and its special tokens decides;
real vocabularies are read by the same library, and are not here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nova_sys.data.encode import tokenise
from nova_sys.data.formats import parse_record
from nova_sys.data.records import Message
from nova_sys.data.render import Renderer
from nova_sys.data.tokenizer import load_tokenizer

transformers: Any = pytest.importorskip("transformers")

OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"

CHATML = """\
{%- for m in messages %}
{%- if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nYou are a test.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}OPEN{{ m.content + '<|im_end|>' }}CLOSE{{ '\\n' }}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.role == 'assistant' %}OPEN{{ m.content | trim + '<|eot_id|>' }}CLOSE
{%- else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

INST = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' and loop.first %}{% set ns.system = m.content + '\\n\\n' %}
{%- elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + '[/INST]' }}{% set ns.system = '' %}
{%- elif m.role == 'assistant' %}OPEN{{ ' ' + m.content | trim + eos_token }}CLOSE
{%- else %}{{ raise_exception('a ' + m.role + ' turn has no place here') }}{% endif %}
{%- endfor %}"""

TURNS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant must take turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.role == 'assistant' %}OPEN{{ m.content | trim + '<end_of_turn>' }}CLOSE{{ '\\n' }}
{%- else %}{{ m.content | trim + '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

BARS = """\
{%- for m in messages %}
{{- '<|' + m.role + '|>\\n' }}
{%- if m.role == 'assistant' %}OPEN{{ m.content + '<|end|>' }}CLOSE{{ '\\n' }}
{%- else %}{{ m.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

ENDS = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}OPEN{{ m.content + eos_token }}CLOSE{{ '\\n' }}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""

BARS_IDS = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
FORMATS: dict[str, tuple[str, str | None, str, list[str]]] = {  # template, BOS, EOS, other special tokens
    "Qwen 2.5": (CHATML, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "Llama 3": (HEADERS, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "Mistral": (INST, "<s>", "</s>", ["[INST]", "[/INST]"]),
    "Gemma 2": (TURNS, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "Phi 3": (BARS, "<s>", "<|endoftext|>", BARS_IDS),
    "Zephyr": (ENDS, "<s>", "</s>", []),
}  # fmt: skip

TRL = Path(__file__).parents[2] / ".venv" / "peer-trl"
FOLDER = next(TRL.glob("lib/python3*/site-packages/trl/chat_templates"), None)
OF_MODELS = ["llama3", "qwen2_5", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "phi3_5", "cohere", "lfm2"]  # fmt: skip
REASONING = ["qwen3", "qwen3_6", "deepseekv3", "deepseek_r1_distill", "gptoss"]
"""They write an answer in one way at the end and in another before later turns: without blocks, every mask but the last is a guess."""

SYSTEM: list[Message] = [{"role": "system", "content": "Be brief. "}]
DIALOGUE: list[Message] = [
    {"role": "user", "content": "2+2?\n"},
    {"role": "assistant", "content": "  4, I think "},
    {"role": "user", "content": " Größe ☃? </s> <|im_end|> [INST] <|eot_id|>"},
    {"role": "assistant", "content": "1.80"},
    {"role": "user", "content": "m?"},
    {"role": "assistant", "content": "Yes.\n\nMetres\n"},
]


def folder_with(path: Path, template: str, bos: str | None, eos: str, others: list[str]) -> Path:
    """A tokenizer folder: a byte is an id, and so is each special token."""
    path.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": bos, "eos_token": eos} if bos else {"eos_token": eos}
    tokenizer.add_special_tokens(list(dict.fromkeys([*special.values(), *others])))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


class Both:
    """One tokenizer folder, read by transformers and by us."""

    def __init__(self, folder: Path) -> None:
        self.theirs = transformers.AutoTokenizer.from_pretrained(folder)
        self.ours = Renderer(load_tokenizer(folder), "auto", "sft")

    def apply(self, turns: list[Message], **options: Any) -> list[int]:
        return list(self.theirs.apply_chat_template(turns, **options)["input_ids"])

    def learned(self, turns: list[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a whole dialogue and which of them carry loss."""
        record = parse_record({"messages": turns}, None, "sft")  # type: ignore[arg-type]
        (_, part) = tokenise(self.ours.parts(record), self.ours.tokenizer)
        return part.tokens.tolist(), part.loss.tolist()

    def mask_of_blocks(self, turns: list[Message]) -> list[int]:
        """transformers' mask of the template's generation blocks, without white space behind an end of turn, which nothing is to learn."""
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        whole = self.theirs.apply_chat_template(turns, **options)
        ids, mask = list(whole["input_ids"]), list(whole["assistant_masks"])
        end = self.ours.tokenizer.encode(self.ours.choice.template.end_of_turn, control=True)  # type: ignore[union-attr]
        space = [self.theirs.decode([i]).isspace() for i in ids]
        for at in range(len(ids)):
            if ids[at] == end[-1]:
                behind = at + 1
                while behind < len(ids) and space[behind]:
                    mask[behind] = 0
                    behind += 1
        return mask

    def not_prompted(self, turns: list[Message], mask: list[int]) -> list[int]:
        """The mask without the ends of generation prompts, and without an EOS behind the end of the last turn."""
        mask, eos = list(mask), self.theirs.eos_token
        for at in (at for at, turn in enumerate(turns) if turn["role"] == "assistant"):
            place = len(self.apply(turns[:at], add_generation_prompt=True))
            while mask[place - 1]:
                place -= 1
                mask[place] = 0
        assert self.ours.choice.template is not None
        if (
            self.ours.choice.template.end_of_turn != eos
            and self.apply(turns)[-1] == self.theirs.eos_token_id
        ):
            mask[-1] = 0
        return mask

    def check_prompts(self, dialogue: list[Message]) -> None:
        """What stands in front of each answer: the ids that generation starts from."""
        for at in (at for at, turn in enumerate(dialogue) if turn["role"] == "assistant"):
            turns = dialogue[:at]
            assert self.ours.prompt_ids(turns) == self.apply(turns, add_generation_prompt=True)

    def check_mask(self, dialogue: list[Message], mask: list[int]) -> None:
        """The whole dialogue up to the last token with loss, behind which we cut, and the loss of each token."""
        ids, loss = self.learned(dialogue)
        whole = self.apply(dialogue)
        assert ids == whole[: len(ids)]
        assert loss == mask[: len(ids)] and not any(mask[len(ids) :]) and loss[-1]
        assert 0 < sum(loss) < len(ids)


def dialogues(name: str) -> list[list[Message]]:
    without_system = name in ("Gemma 2", "gemma")
    return [DIALOGUE[:2], DIALOGUE] + ([] if without_system else [SYSTEM + DIALOGUE])


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_well_known_models(tmp_path: Path, name: str) -> None:
    template, *tokens = FORMATS[name]
    with_blocks = template.replace("OPEN", OPEN).replace("CLOSE", CLOSE)
    without = template.replace("OPEN", "").replace("CLOSE", "")
    blocks, plain = (
        Both(folder_with(tmp_path / str(number), text, *tokens))
        for number, text in enumerate((with_blocks, without))
    )
    for dialogue in dialogues(name):
        mask = blocks.mask_of_blocks(dialogue)
        for both in (blocks, plain):  # without blocks the mask comes from rendering turn by turn
            both.check_prompts(dialogue)
            both.check_mask(dialogue, mask)
    said = plain.theirs.decode(
        [i for i, loss in zip(*plain.learned(DIALOGUE), strict=True) if loss]
    )
    assert all(words in said for words in ("4, I think", "1.80", "Metres"))
    assert not any(words in said for words in ("2+2", "Größe", "m?", "user"))
    ends = {"Gemma 2": "<end_of_turn>", "Phi 3": "<|end|>"}  # the others end a turn with EOS
    stops = {plain.theirs.eos_token, ends.get(name, plain.theirs.eos_token)}
    assert plain.ours.stop_ids() == set(plain.theirs.convert_tokens_to_ids(sorted(stops)))


@pytest.mark.parametrize(
    ("name", "dialogue", "says"),
    [
        ("Gemma 2", SYSTEM + DIALOGUE, "no system turn, please"),
        ("Gemma 2", DIALOGUE[:1] + DIALOGUE[:2], "user and assistant must take turns"),
        ("Mistral", [*DIALOGUE[:2], *SYSTEM, *DIALOGUE[2:]], "a system turn has no place here"),
    ],
)
def test_what_a_template_refuses_is_refused(
    tmp_path: Path, name: str, dialogue: list[Message], says: str
) -> None:
    template, *tokens = FORMATS[name]
    both = Both(folder_with(tmp_path / "t", template.replace("OPEN", "").replace("CLOSE", ""), *tokens))  # fmt: skip
    with pytest.raises(Exception, match=says):
        both.apply(dialogue)
    with pytest.raises(ValueError, match=f"failed \\({says}\\) on turns: "):
        both.learned(dialogue)


def test_a_template_that_drops_plain_text_is_told(tmp_path: Path) -> None:
    """Those of models that see images loop over parts; of a text there is none, and only ends of turns would be learned."""
    text = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}"
    )
    text = text.replace("part.text", "part.text if part is mapping else ''") + "<end>{% endfor %}"
    both = Both(folder_with(tmp_path / "t", text, None, "<end>", []))
    assert both.theirs.decode(both.apply(DIALOGUE[:2])) == "user:<end>assistant:<end>"
    with pytest.raises(ValueError, match="leaves out what the assistant says"):
        both.learned(DIALOGUE[:2])


def tokens_of(text: str) -> tuple[str | None, str, list[str]]:
    """BOS, EOS and what looks like a special token in a model's own template."""
    others = sorted(set(re.findall(r"<[|｜]?[\w/▁]+[|｜]?>|\[/?[A-Z_]+\]", text)))
    ends = {
        "<|im_end|>": (None, "<|im_end|>"),
        "<|eot_id|>": ("<|begin_of_text|>", "<|eot_id|>"),
        "<end_of_turn>": ("<bos>", "<eos>"),
        "<|end|>": ("<s>", "<|endoftext|>"),
    }
    bos, eos = next((pair for end, pair in ends.items() if end in text), ("<s>", "</s>"))
    return bos, eos, others


@pytest.mark.skipif(
    FOLDER is None, reason="`make peer-trl` installs TRL, which holds the templates"
)
@pytest.mark.parametrize("name", OF_MODELS + REASONING)
def test_own_templates_of_models(tmp_path: Path, name: str) -> None:
    """Text and ids are transformers'; the mask is that of TRL's blocks, less what the generation prompt holds and a last EOS (Phi)."""
    assert FOLDER is not None
    texts = [(FOLDER / f"{name}{kind}.jinja").read_text() for kind in ("_training", "")]
    blocks, plain = (
        Both(folder_with(tmp_path / str(number), text, *tokens_of(text)))
        for number, text in enumerate(texts)
    )
    for dialogue in dialogues(name):
        mask = blocks.mask_of_blocks(dialogue)
        blocks.check_prompts(dialogue)
        blocks.check_mask(dialogue, mask)
        plain.check_prompts(dialogue)
        if name not in REASONING:
            assert plain.apply(dialogue) == blocks.apply(dialogue)
            plain.check_mask(dialogue, plain.not_prompted(dialogue, mask))
        elif len(dialogue) > 2:
            with pytest.raises(ValueError, match="the loss mask would be a guess"):
                plain.learned(dialogue)
