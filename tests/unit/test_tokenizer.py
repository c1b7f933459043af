"""Both kinds of tokenizer: exact round trips, offsets in characters, special tokens, files."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from nova_sys.data.tokenizer import load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece

CORPUS = [
    "\n\nHuman: what is 12 + 30?\n\nAssistant: it is 42, of course",
    "the quick brown fox\tjumps over  the lazy dog",
    "é über naïve 你好 世界 привет",
] * 5
MARKERS = ("\n\nHuman:", "\n\nAssistant:", "<|im_end|>")
HARD = [
    "", " ", "  a  ", "\n\n\n", "a\r\n\tb\x00\x01", "▁a ▁▁", "<s>x</s><unk>", "<0x41>", "⁇",
    "e\u0301🙂👩‍👩‍👧",
    "\ufeff\u2028\u3000\xa0", "\ue000", "12345", "<|im_end|>\n\nHuman: x\n\nAssistant:",
]  # fmt: skip


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return train_sentencepiece(CORPUS, 400, tmp_path_factory.mktemp("spm") / "t.model", MARKERS)


def write_hf(folder, config, **files):
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_hf(folder, {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"})
    return load_tokenizer(folder)


@pytest.fixture(params=["spm", "hf"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", HARD)
def test_round_trip_of_hard_texts(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert set().union(*(range(a, b) for a, b in offsets)) == set(range(len(text)))


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet=" \n\t▁a1é🙂<s>/", max_size=30))
def test_round_trip_of_any_text(spm, hf, text):
    for tokenizer in (spm, hf):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert offsets == sorted(offsets)
        assert all(a < b for a, b in offsets)
        assert set().union(*(range(a, b) for a, b in offsets)) == set(range(len(text)))


def test_offsets_name_the_very_text_of_each_token(spm):
    text = "hé 你好🙂 Human"
    ids, offsets = spm.encode_with_offsets(text)
    for i, (token, (a, b)) in enumerate(zip(ids, offsets, strict=True)):
        piece = spm.decode([token])
        if offsets.count((a, b)) == 1:
            assert piece == text[a:b]
        else:  # the bytes of one character
            group = [t for t, o in zip(ids, offsets, strict=True) if o == (a, b)]
            assert spm.decode(group) == text[a:b], i


def test_batches_equal_single_texts(tokenizer):
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(t) for t in HARD]
    assert tokenizer.encode_batch_with_offsets(HARD) == [
        tokenizer.encode_with_offsets(t) for t in HARD
    ]


def test_training(spm, tmp_path):
    assert spm.vocab_size <= 400
    assert (spm.bos_id, spm.eos_id) == (1, 2)
    for marker in ("\n", *MARKERS):
        assert len(spm.encode(marker)) == 1
    assert (
        len(spm.encode("a\n\nHuman: b")) == 4
    )  # a, marker, space, b: markers are found inside a text
    assert len(spm.encode("12345")) == 5
    again = train_sentencepiece(iter(CORPUS), 400, tmp_path / "again.model", MARKERS)
    assert again.fingerprint == spm.fingerprint
    other = train_sentencepiece([*CORPUS, "more"], 400, tmp_path / "other.model", MARKERS)
    assert other.fingerprint != spm.fingerprint


def test_training_on_very_little_and_on_long_lines(tmp_path):
    assert train_sentencepiece(["a"], 5000, tmp_path / "a.model").vocab_size < 300
    one_line = " ".join(CORPUS).replace("\n", " ") * 100  # longer than the trainer accepts uncut
    long = train_sentencepiece([one_line], 400, tmp_path / "b.model")
    assert len(long.encode("the quick brown fox")) < len("the quick brown fox")
    with pytest.raises(ValueError, match=r"cannot train a tokenizer of 4096 pieces"):
        train_sentencepiece([], 4096, tmp_path / "c.model")
    with pytest.raises(ValueError, match=r"Raise model\.vocab_size"):
        train_sentencepiece(CORPUS, 100, tmp_path / "c.model")
    assert not (tmp_path / "c.model").exists()


def test_control_texts(spm, hf):
    text = "a<s>b</s>"
    ids, offsets = spm.encode_with_offsets(text, control=True)
    assert ids == [*spm.encode("a"), 1, *spm.encode("b"), 2] == spm.encode(text, control=True)
    assert offsets == [(0, 1), (1, 4), (4, 5), (5, 9)]
    assert not {1, 2} & set(spm.encode(text))
    text = "<|begin|>a<|end|>"
    ids, offsets = hf.encode_with_offsets(text, control=True)
    assert ids == [hf.bos_id, *hf.encode("a"), hf.eos_id] == hf.encode(text, control=True)
    assert offsets == [(0, 9), (9, 10), (10, 17)]
    for ids in (hf.encode(text), hf.encode_with_offsets(text)[0]):
        assert not {hf.bos_id, hf.eos_id} & set(ids) and hf.decode(ids) == text


def sentencepiece_with_leading_space():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=400, hard_vocab_limit=False,
        byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def hugging_face_with_leading_space(folder):
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    model.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    model.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["spm", "hf"])
def test_a_continuation_gets_no_leading_space(kind, tmp_path):
    """Llama-2-like tokenizers put a space before any text; an answer behind a prompt must not get
    one."""
    if kind == "spm":
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_with_leading_space())
    else:
        hugging_face_with_leading_space(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for prompt, answer in (("the", " quick fox"), ("over the lazy", " dog"), ("what", " is 12")):
        apart = tokenizer.encode(prompt) + tokenizer.encode(answer, continues=True)
        assert apart == tokenizer.encode(prompt + answer)
        ids, offsets = tokenizer.encode_with_offsets(answer, continues=True)
        assert ids == tokenizer.encode(answer, continues=True)
        assert offsets[0][0] == 0 and offsets[-1][1] == len(answer)
    assert tokenizer.encode("fox", continues=True) != tokenizer.encode("fox")
    ids, offsets = tokenizer.encode_with_offsets("\u0d9e\u0d9e the", continues=True)
    behind = tokenizer.encode(" the", continues=True)
    assert ids[-len(behind) :] == behind
    assert offsets[0][0] == 0 and len(ids) > len(behind)  # unknown characters stay, fused or not


def test_tokenizers_without_leading_space_ignore_continues(tokenizer):
    assert tokenizer.encode("fox jumps", continues=True) == tokenizer.encode("fox jumps")


@pytest.mark.parametrize("kind", ["spm", "hf"])
def test_save_and_load(request, kind, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the fox") == tokenizer.encode("the fox")
    assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_hugging_face_configuration(tmp_path):
    write_hf(tmp_path, {"eos_token": "<|end|>", "bos_token": None, "chat_template": "plain"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    assert tokenizer.chat_template == "plain"
    assert tokenizer.special_texts == {"eos_token": "<|end|>"}
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    write_hf(tmp_path, {"bos_token": "<|begin|>", "add_bos_token": False, "chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "d"
    assert load_tokenizer(tmp_path).bos_id is None
    write_hf(tmp_path, {"chat_template": "old"}, chat_template__jinja="from the file")
    changed = load_tokenizer(tmp_path)
    assert changed.chat_template == "from the file"
    assert changed.fingerprint != tokenizer.fingerprint


def test_bad_tokenizers(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ValueError, match=r"~nobody-of-that-name/x\.model does not exist"):
        load_tokenizer("~nobody-of-that-name/x.model")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"x\.model cannot be read"):
        load_tokenizer(tmp_path / "x.model")
    write_hf(tmp_path, {"eos_token": "<eos>"})
    with pytest.raises(ValueError, match=r"eos_token is '<eos>'.*no such token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
    for template in (5, [5], [{"name": "default", "template": 5}]):
        write_hf(tmp_path, {"chat_template": template})
        with pytest.raises(ValueError, match="cannot be read"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_json_may_be_named_itself(hf, tmp_path):
    hf.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == hf.fingerprint


def test_ids_end_somewhere(tmp_path):
    write_hf(tmp_path, {})
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["model"]["vocab"]["a"] = 1 << 22
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"its largest id is 4,194,304.* below 4,194,304"):
        load_tokenizer(tmp_path)


def test_conflicts_between_vocabularies(spm, hf, tmp_path):
    assert spm.conflict_with(spm) is None
    assert "id 0 is '<unk>' in the one and '<|begin|>' in the other" in spm.conflict_with(hf)
    value = json.loads(hf._files["tokenizer.json"])
    value["added_tokens"].append({**value["added_tokens"][0], "id": 5000, "content": "<more>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    larger = load_tokenizer(tmp_path)
    assert larger.vocab_size > hf.vocab_size  # added tokens are no conflict
    assert larger.conflict_with(hf) is None and hf.conflict_with(larger) is None


def test_a_text_without_pieces_is_refused(tmp_path):
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(ValueError, match=r"the tokenizer fails on the text \(.*UNK"):
            encode("b")


def test_a_panic_of_the_tokenizers_library_is_an_error(tmp_path):
    """A merge shorter than the prefix of continuing pieces: the library does not raise, it panics."""
    model = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="##"))
    value = json.loads(model.to_str())
    value["model"] |= {"vocab": {"a": 0, "": 1, "ab": 2}, "merges": [["a", ""]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(
        ValueError, match=f"the tokenizer {tmp_path} cannot be read .*stopped at it"
    ):
        load_tokenizer(tmp_path)
