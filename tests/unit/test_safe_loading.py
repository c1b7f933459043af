"""Files from elsewhere are data: nothing in a template, a tokenizer, a token store or a cache runs. (Checkpoints: see tests/integration/test_run_folder.py.)"""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import numpy as np
import pytest

from nova_sys.data.chat import ChatTemplate
from nova_sys.data.token_store import TokenStore
from nova_sys.data.tokenizer import load_tokenizer
from nova_sys.reference import _read_logps

ROOT = Path(__file__).parents[2]
MAY_UNPICKLE = {
    "kernels/nova_kernels/testing.py",  # what ranks of a test tell each other
    "nova_sys/checkpoint_files.py",  # plain classes only, by a list
    "nova_sys/forked.py",  # what a process of our own answers
}


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "harmed"


# Ways out of a template, as published against sandboxes: to classes, to a function's globals, to modules, through formatting,
# filters, bound methods and the template's own machinery.
ESCAPES = [
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}'.format_map({'0': ''}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}",
    "{{ ['']|map(attribute='__class__')|first }}",
    "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% generation %}{{ caller.__globals__ }}{% endgeneration %}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ tojson.__globals__ }}",
    "{% import 'os' as os %}{{ os.mkdir('CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(text: str, canary: Path) -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="the chat template t:1 "):
        ChatTemplate(text.replace("CANARY", str(canary)), name="t").render(messages)
    assert not canary.exists()
    assert messages == [{"role": "user", "content": "a"}]


def test_pickled_arrays_are_not_unpickled(canary: Path, tmp_path: Path) -> None:
    harmful = np.array([Harm(canary)] * 3, dtype=object)
    store = tmp_path / "store"
    store.mkdir()
    np.save(store / "tokens.npy", harmful, allow_pickle=True)
    (store / "meta.json").write_bytes(pickle.dumps(Harm(canary)))
    with pytest.raises(ValueError, match="is not a complete token store"):
        TokenStore.open(store)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        np.load(store / "tokens.npy")  # what TokenStore does, once its meta.json is right
    cache = tmp_path / "reference-0.npz"
    np.savez(cache, name="reference-0", logp=harmful)
    assert _read_logps(cache, 3) is None
    cache.write_bytes(pickle.dumps(Harm(canary)))
    assert _read_logps(cache, 3) is None
    assert not canary.exists()
    pickle.loads(pickle.dumps(Harm(canary)))
    assert canary.exists()  # the bait was good


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_pickled_tokenizers_are_not_unpickled(name: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Harm(canary)))
    path = tmp_path / name if name == "tokenizer.model" else tmp_path
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(path)
    assert not canary.exists()


UNPICKLERS = ("pickle", "_pickle", "marshal", "shelve", "dill", "joblib", "yaml")


def unsafe_calls(source: str) -> list[str]:
    """Calls that can run what they read, and options that let others do so."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found += [f"from {node.module}"]  # its functions would have names of their own here
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {key.arg: ast.unparse(key.value) for key in node.keywords}
        if name.split(".")[0] in UNPICKLERS:
            found += [name] if name.split(".")[-1] in ("load", "loads", "Unpickler", "open") else []
        if name in ("eval", "exec", "compile", "__import__"):
            found.append(name)
        if options.get("allow_pickle", "False") != "False":
            found.append("allow_pickle")
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(name)
    return found


def test_unsafe_calls_are_found() -> None:
    for line in (
        "pickle.load(f)", "np.load(p, allow_pickle=True)", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(s)",
        "from pickle import load\nload(f)", "from yaml import safe_load as json\njson(f)",
    ):  # fmt: skip
        assert unsafe_calls(line), line
    assert not unsafe_calls("np.load(p); torch.load(p, weights_only=True); json.load(f); m.eval()")


def test_only_known_places_unpickle() -> None:
    files = [p for d in ("nova_sys", "kernels") for p in (ROOT / d).rglob("*.py")]
    unsafe = {str(p.relative_to(ROOT)): unsafe_calls(p.read_text()) for p in files}
    assert {path for path, calls in unsafe.items() if calls} <= MAY_UNPICKLE, unsafe
