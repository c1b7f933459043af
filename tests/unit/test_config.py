"""Recipes: what is read back equal, what is refused, and whether a refusal names the remedy."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_sys.config import RunConfig
from nova_sys.config_io import (
    SECTIONS,
    TYPES,
    check,
    check_profile,
    describe_fields,
    load_recipe,
    to_toml,
)
from nova_sys.config_rules import NOT_NEGATIVE, POSITIVE

RUNNABLE = ["data.train=pairs.jsonl", "model.vocab_size=4096"]


def load(tmp_path, text="", *overrides):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text, encoding="utf-8")
    return load_recipe(recipe, overrides)


def refusal(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert type(caught.value) is ValueError  # ours, not pydantic's or tomllib's
    return str(caught.value)


def test_an_empty_recipe_is_the_default_run(tmp_path):
    assert load(tmp_path) == RunConfig()


def test_recipe_and_overrides(tmp_path):
    text = "[optimizer]\nlr = 1\nbetas = [0.8, 0.9]\n[train]\nsteps = 5\n"
    config = load(
        tmp_path,
        text,
        "train.steps=6",
        "train.steps=7",  # the last one wins
        "run.dir=runs/a b",  # no TOML: text
        'model.init_from=""',
        "data.train=['a.jsonl', 'b.jsonl.gz']",
        "parallel.sequence=true",
        "log.profile_steps=[2, 3]",
        "data.tokenizer=",
    )
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.8, 0.9)
    assert (config.train.steps, config.run.dir, config.data.tokenizer) == (7, "runs/a b", "")
    assert config.data.train == ["a.jsonl", "b.jsonl.gz"]
    assert config.parallel.sequence is True and config.log.profile_steps == (2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 8  # pyright: ignore[reportAttributeAccessIssue]


def values_of(hint):
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple and Ellipsis in typing.get_args(hint):
        return st.lists(values_of(typing.get_args(hint)[0]), max_size=3).map(tuple)
    if typing.get_origin(hint) is tuple:
        return st.tuples(*(values_of(member) for member in typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        return st.lists(values_of(str), max_size=3)
    if members := typing.get_args(hint):
        return st.one_of(*(values_of(member) for member in members))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    floats = st.floats(allow_nan=False)
    integers = st.integers(-(2**63), 2**63 - 1)
    return {
        str: text,
        float: floats,
        bool: st.booleans(),
        int: integers,
        type(None): st.none(),
    }[hint]


def sections():
    return {
        name: st.builds(
            cls,
            **{f.name: values_of(TYPES[f"{name}.{f.name}"]) for f in dataclasses.fields(cls)},
        )
        for name, cls in SECTIONS.items()
    }


@settings(max_examples=30, deadline=None)
@given(config=st.builds(RunConfig, **sections()))
def test_to_toml_is_read_back_equal(config, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("toml") / "config.toml"
    recipe.write_bytes(to_toml(config).encode())
    assert load_recipe(recipe, []) == config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.trian", "data.train"),
        ("trian.steps", "train.steps"),
        ("dta.train", "data.train"),
        ("model.layers", "model.num_layers"),
        ("optimiser.lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("logs.every_steps", "log.every_steps"),
        ("algo.bta", "algo.beta"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, nearest):
    section, name = key.split(".")
    for message in (
        refusal(load, tmp_path, "", f"{key}=1"),
        refusal(load, tmp_path, f"[{section}]\n{name} = 1\n"),
    ):
        assert f"{key} = 1: unknown key" in message
        assert f"did you mean {nearest}?" in message


def test_a_key_like_no_other_lists_what_there_is(tmp_path):
    message = refusal(load, tmp_path, "[algo]\nzzzz = 1\n")
    assert "the keys of [algo] are name, loss, beta, reference" in message
    assert "the sections are run, model, data" in refusal(load, tmp_path, "[zz]\nqqqqq = 1\n")
    assert "did you mean optimizer.lr?" in refusal(load, tmp_path, "lr = 1\n")
    assert "train = 3: must be a section" in refusal(load, tmp_path, "train = 3\n")


def test_all_problems_are_listed_at_once(tmp_path):
    text = '[train]\nsteps = "8"\nseed = 1.5\n[data]\ntrian = "x"\n'
    message = refusal(load, tmp_path, text, "algo.name=dp", "steps", "algo.beta=0.2")
    assert message.startswith("5 problems in recipe")
    for key in ("train.steps", "train.seed", "data.trian", "algo.name", "--set steps"):
        assert f"\n  {key}" in message
    assert "algo.beta" not in message


@pytest.mark.parametrize(
    ("override", "rule", "remedy"),
    [
        ('train.steps="8"', "a whole number", "without quotes: train.steps = 8"),
        ("train.steps=1.5", "a whole number", "for example train.steps = 0"),
        ("train.steps=8.0", "a whole number", "for example train.steps = 0"),
        ("train.steps=true", "a whole number", "for example train.steps = 0"),
        ("optimizer.lr=fast", "a number", "for example optimizer.lr = 0.0001"),
        ("optimizer.lr=true", "a number", "for example optimizer.lr = 0.0001"),
        ("parallel.sequence=1", "true or false", "for example parallel.sequence = false"),
        ('parallel.sequence="true"', "true or false", "quotes: parallel.sequence = true"),
        ("run.dir=2024", "text", 'put it in quotes: run.dir = "2024"'),
        ("algo.name=dpp", '"sft" or "dpo"', 'did you mean "dpo"?'),
        ("train.precision=8", '"auto" or "fp32" or "bf16"', 'the default is "auto"'),
        ("optimizer.betas=0.9", "a pair of numbers", "optimizer.betas = [0.9, 0.95]"),
        ("optimizer.betas=[0.9]", "a pair of numbers", "optimizer.betas = [0.9, 0.95]"),
        ("log.profile_steps=[1.5, 2]", "a pair of whole numbers", "log.profile_steps = [10, 12]"),
        ("data.train=[1]", "text or a list of text", 'data.train = "data/*.jsonl.gz"'),
    ],
)
def test_a_wrong_type_is_refused(tmp_path, override, rule, remedy):
    message = refusal(load, tmp_path, "", override)
    assert message.startswith(override.partition("=")[0] + " = ")
    assert f"must be {rule}" in message and remedy in message
    assert message.count("must be") == 1  # a union must not be reported once per member


@pytest.mark.parametrize("override", ["train.steps", "=3", "train=3", "a.b.c=1", ".steps=1"])
def test_a_malformed_override_says_how_to_write_it(tmp_path, override):
    assert f"--set {override}: must read section.key=value" in refusal(load, tmp_path, "", override)


def test_unreadable_recipes(tmp_path):
    assert "there is no such file" in refusal(load_recipe, tmp_path / "absent.toml", [])
    assert "this is a folder" in refusal(load_recipe, tmp_path, [])
    assert "recipe.toml:1: not valid TOML" in refusal(load, tmp_path, "[train\n")
    assert "recursion" in refusal(load, tmp_path, "a = " + "[" * 100_000)
    assert "9000 digits" in refusal(load, tmp_path, "a = " + "9" * 9000)
    (tmp_path / "latin.toml").write_bytes(b'[run]\ndir = "\xe9"\n')
    assert "byte 0xe9 in line 2" in refusal(load_recipe, tmp_path / "latin.toml", [])


def test_problems_name_their_line(tmp_path):
    text = "# steps = 1\n[train]\nsteps = 'x'\nseed = 1\n[data]\n  steps=3\n[ nowhere ]\nx = 1\n"
    message = refusal(load, tmp_path, text, "train.seed=x", "data.trian=y")
    for key, place in (
        ("train.steps", f"{tmp_path}/recipe.toml:3"),
        ("data.steps", f"{tmp_path}/recipe.toml:6"),
        ("nowhere.x", f"{tmp_path}/recipe.toml:8"),
        ("train.seed", "in --set"),
        ("data.trian", "in --set"),
    ):
        assert any(
            line.strip().startswith(key) and line.endswith(f"({place})")
            for line in message.splitlines()
        ), (key, message)
    assert refusal(load, tmp_path, "lr = 1").endswith("recipe.toml:1)")
    assert refusal(load, tmp_path, "data = 1").endswith("recipe.toml:1)")


@pytest.mark.parametrize("number", ["0x" + "f" * 17, "0x" + "f" * 9000, "-" + "9" * 100])
@pytest.mark.parametrize("key", ["train.steps", "optimizer.lr", "nowhere.x", "data.train"])
def test_numbers_beyond_64_bits(tmp_path, key, number):
    section, name = key.split(".")
    value = f"[{number}]" if key == "data.train" else number
    for message in (
        refusal(load, tmp_path, f"[{section}]\n{name} = {value}\n"),
        refusal(load, tmp_path, "", f"{key}={value}"),
    ):
        assert f"{key} is set to a larger number than can be read" in message


def test_overrides_that_only_look_like_toml(tmp_path):
    assert load(tmp_path, "", "data.train=[ab]*.jsonl").data.train == "[ab]*.jsonl"
    for value in ("[a, b]", "['a'", "['a', b]", "'a'b'", '"a\\q"'):
        message = refusal(load, tmp_path, "", f"data.train={value}")
        assert f"--set data.train={value}: must be valid TOML inside brackets and quotes" in message
    assert "must be UTF-8 text" in refusal(load, tmp_path, "", "data.train=caf\udce9")


def test_the_profile_ends_with_the_run(tmp_path):
    config = load(tmp_path, "", *RUNNABLE, "log.profile_steps=[3, 9]")
    check(config, 1)
    check_profile(config, 9)
    assert "last step, which is 8" in refusal(check_profile, config, 8)


def test_check_accepts_a_runnable_config(tmp_path):
    check(load(tmp_path, "", *RUNNABLE), 1)
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]
    sft = ["algo.name=sft", "train.epochs=0", "train.steps=3", "log.profile_steps=[3, 3]"]
    check(load(tmp_path, "", *RUNNABLE, *layout, *sft, "parallel.sequence=true"), 8)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ("model.num_kv_heads=3", 1, ["model.num_kv_heads = 3", "num_heads = 8", "1, 2, 4, 8"]),
        ("parallel.tensor=8", 8, ["parallel.tensor = 8", "num_kv_heads = 4", "1, 2, 4"]),
        ("parallel.tensor=16", 16, ["num_heads = 8", "num_kv_heads = 4"]),
        (
            "parallel.tensor=3 model.num_heads=6 model.num_kv_heads=3 model.ffn_hidden_size=300 "
            "model.head_dim=32",
            3,
            ["must divide the vocabulary's padding = 128"],
        ),
        ("parallel.tensor=2 model.ffn_hidden_size=333", 2, ["model.ffn_hidden_size = 333"]),
        ("parallel.pipeline=3", 3, ["model.num_layers = 4", "3 * 1 = 3"]),
        ("parallel.pipeline=2 parallel.virtual_pipeline=4", 2, ["num_layers = 4", "2 * 4 = 8"]),
        ("parallel.tensor=2 parallel.pipeline=2", 6, ["2 * 2 = 4", "processes, 6", "--nproc 4"]),
        ("train.global_batch_packs=6", 4, ["global_batch_packs = 6", "/ 1 = 4", "example 8"]),
        ("parallel.virtual_pipeline=2", 1, ["virtual_pipeline = 2", "set parallel.pipeline to 2"]),
        (
            "parallel.virtual_pipeline=2 parallel.pipeline=2 train.global_batch_packs=6",
            4,
            ["each of 2 data-parallel ranks 3 micro-batches", "pipeline = 2", "example 8"],
        ),
        ("parallel.sequence=true", 1, ["parallel.sequence = true", "parallel.tensor is 1"]),
        (
            "parallel.sequence=true parallel.tensor=4 data.pack_length=1023",
            4,
            ["data.pack_length = 1023", "parallel.tensor = 4", "example 1024"],
        ),
        ("model.hidden_size=100", 1, ["model.hidden_size = 100", "num_heads = 8", "head_dim"]),
        ("model.head_dim=15", 1, ["model.head_dim = 15", "even", "16"]),
        ("model.hidden_size=8", 1, ["model.head_dim = 1", "even"]),
        ("train.steps=5 optimizer.warmup_steps=6", 1, ["warmup_steps = 6", "train.steps = 5"]),
        ("optimizer.min_lr=1", 1, ["optimizer.min_lr = 1.0", "optimizer.lr = 0.0001"]),
        ("log.profile_steps=[5,4]", 1, ["[5, 4]", "first <= last"]),
        ("log.profile_steps=[0,4]", 1, ["[0, 4]", "1 <= first"]),
        ("log.profile_steps=[3,9] train.steps=8", 1, ["[3, 9]", "last step, which is 8"]),
        ("train.epochs=0", 1, ["train.epochs = 0", "nothing to train"]),
        ('data.train=""', 1, ['data.train = ""', "--set data.train=PATH"]),
        ("data.train=[]", 1, ["data.train = []", "--set data.train=PATH"]),
        ("data.max_length=4096", 1, ["max_length = 4096", "pack_length = 2048"]),
        ("model.vocab_size=0", 1, ["model.vocab_size = 0", "data.tokenizer", "model.init_from"]),
        (
            "algo.name=sft algo.reference=online",
            1,
            ["algo.reference", "which knows no pairs"],
        ),
        (
            "train.recompute=full train.recompute_layers=3",
            1,
            ["train.recompute_layers = 3", "must divide the 4 layers", "choose one of 1, 2, 4"],
        ),
        (
            "algo.loss=simpo algo.reference=host",
            1,
            ['algo.reference = "host"', "reads no reference"],
        ),
        ("model.kv_shift_init=random", 1, ["model.kv_shift_init", "model.kv_shift is false"]),
        (
            "model.window_layers=[1] model.window_heads=2",
            1,
            ["window_layers = [1]", "window_heads = 2", "sliding_window is 0"],
        ),
        (
            "model.sliding_window=8 model.window_kv_heads=2",
            1,
            ["window_kv_heads = 2", "without model.window_layers"],
        ),
        (
            "model.sliding_window=8 model.window_layers=[2,1,4]",
            1,
            ["window_layers = [2, 1, 4]", "from 0 to 3", "in order"],
        ),
        (
            "model.sliding_window=8 model.window_layers=[1] model.window_kv_heads=3",
            1,
            ["window_kv_heads = 3", "divide the 8 heads"],
        ),
        (
            "model.sliding_window=8 model.window_layers=[1] model.window_heads=12",
            1,
            ["window_heads = 12", "hidden_size = 256"],
        ),
        (
            "model.sliding_window=8 model.window_layers=[1] model.window_heads=4 model.head_dim=32",
            1,
            ["model.head_dim = 32", "left out", "model.window_heads"],
        ),
        (
            "model.sliding_window=8 train.kernels=cuda data.pack_length=64",
            1,
            ['train.kernels = "cuda"', "no window", "model.sliding_window = 8"],
        ),
        (
            "model.sliding_window=8 model.window_layers=[1] model.window_kv_heads=1 parallel.tensor=2",
            2,
            ["parallel.tensor = 2", "model.window_kv_heads = 1"],
        ),
        ("train.recompute_layers=2", 1, ["recompute_layers = 2", 'recompute = "none"']),
        ("optimizer.betas=[0.9,1.0]", 1, ["optimizer.betas = [0.9, 1.0]", "below 1"]),
        ("optimizer.lr=nan", 1, ["optimizer.lr = nan", "finite and above 0", "0.0001"]),
        ("algo.beta=inf", 1, ["algo.beta = inf", "finite and above 0"]),
        ("data.max_skipped=1.01", 1, ["data.max_skipped = 1.01", "0 or more, at most 1"]),
        ("data.max_skipped=-0.1", 1, ["data.max_skipped = -0.1", "finite and 0 or more"]),
        ("data.workers=5000", 1, ["data.workers = 5000", "at most 4096"]),
        ("model.num_layers=2147483648", 1, ["num_layers = 2147483648", "at most 2147483647"]),
        (
            "train.precision=fp8 model.num_layers=2",
            1,
            ["last_layers_bf16 = 1 + 1", "num_layers = 2"],
        ),
        ("parallel.tensor=0 train.steps=-1", 1, ["tensor = 0", "above 0", "steps = -1", "or more"]),
    ],
)
def test_rules_between_fields(tmp_path, overrides, world_size, expected):
    config = load(tmp_path, "", *RUNNABLE, *overrides.split())
    message = refusal(check, config, world_size)
    for fragment in expected:
        assert fragment in message


def test_check_lists_all_broken_rules(tmp_path):
    config = load(tmp_path, "", "model.num_kv_heads=3", "parallel.pipeline=3")
    message = refusal(check, config, 4)
    assert message.startswith("5 problems in this config for 4 processes:")


def test_every_number_has_a_range():
    """A new numeric field must be put into one of the two tables."""
    numeric = {key for key, hint in TYPES.items() if hint in (int, float)}
    assert numeric == {*POSITIVE, *NOT_NEGATIVE}
    assert not set(POSITIVE) & set(NOT_NEGATIVE)
    for key in numeric:  # the defaults keep their own rules
        section, name = key.split(".")
        default = getattr(getattr(RunConfig(), section), name)
        assert math.isfinite(default) and (default > 0 or (default == 0 and key in NOT_NEGATIVE))


def test_describe_fields_reads_the_docstrings():
    fields = {field.key: field for field in describe_fields()}
    assert list(fields) == list(TYPES)
    assert fields["algo.beta"].doc == "Strength of the pull towards the reference, 1/nats."
    assert fields["algo.beta"].default == "0.1" and fields["algo.beta"].type == "a number"
    assert fields["data.train"].type == "text or a list of text"
    assert fields["log.profile_steps"].type == "a pair of whole numbers"
    assert fields["model.num_layers"].doc == ""  # not the docstring of a neighbour
    assert "\n" not in fields["data.tokenizer"].doc and "kept in" in fields["data.tokenizer"].doc
