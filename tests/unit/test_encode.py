"""Tokens and loss flags of many chunks at once: the same as one by one, and the same by spelling as by offsets."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_sys.data import encode
from nova_sys.data.chat import ChatTemplate, choose_template
from nova_sys.data.encode import Chunk, tokenise
from nova_sys.data.tokenizer_training import train_sentencepiece

CORPUS = [
    "the quick brown fox",
    "é 你好 0123456789",
    "jumps over the lazy dog",
    "<|im_start|>user\nhi",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "t.model"
    return train_sentencepiece(CORPUS * 3, 400, path, ("<|im_start|>", "<|im_end|>"))


TEXTS = st.text(st.sampled_from("the quick é你好🙂\n▁0<|im_start|></s>"), max_size=30)


@st.composite
def chunks(draw):
    text = draw(TEXTS)
    edges = sorted(draw(st.sets(st.integers(0, len(text)), max_size=4)))
    spans = tuple(zip(edges[::2], edges[1::2], strict=False))
    return Chunk(text, spans, *(draw(st.booleans()) for _ in range(4)))


@given(st.lists(st.lists(chunks(), max_size=3).map(tuple), max_size=6))
def test_together_as_one_by_one_and_by_spelling_as_by_offsets(tokenizer, parts):
    together = tokenise(parts, tokenizer)
    by_offsets = pickle.loads(pickle.dumps(tokenizer))
    by_offsets.spelling = None
    for tokens in (tokenise(parts, by_offsets), together):
        assert len(tokens.offsets) == len(parts) + 1
        assert np.array_equal(tokens.tokens, together.tokens)
        assert np.array_equal(tokens.loss, together.loss)
        assert (tokens.tokens.dtype, tokens.loss.dtype) == (np.int32, np.uint8)
    for i, part in enumerate(parts):
        alone = [tokenise([(chunk,)], tokenizer) for chunk in part]
        expected = [t for tokens in alone for t in tokens.tokens.tolist()]
        assert together[i].tokens.tolist() == expected
        assert together[i].loss.tolist() == [f for tokens in alone for f in tokens.loss.tolist()]


def test_spelling_saves_the_offsets(tokenizer, monkeypatch):
    chunk = Chunk("the quick é你", ((4, 9),))
    expected = tokenise([(chunk,)], tokenizer)
    monkeypatch.setattr(encode, "_flags", None)  # of offsets
    assert np.array_equal(tokenise([(chunk,)], tokenizer).loss, expected.loss)
    flagged = expected.tokens[expected.loss == 1].tolist()
    assert tokenizer.decode(flagged).strip() == "quick"


def test_what_processes_get_is_the_same(tokenizer):
    template = choose_template("chatml", tokenizer_template=None, special_texts={}).template
    assert isinstance(template, ChatTemplate)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    again = pickle.loads(pickle.dumps(template))
    assert again.render_with_spans(turns) == template.render_with_spans(turns)
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.fingerprint == tokenizer.fingerprint
    assert other.encode_with_offsets("the fox") == tokenizer.encode_with_offsets("the fox")
