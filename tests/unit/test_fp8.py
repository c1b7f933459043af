"""FP8 without a GPU: names and shapes, gradients of the fused norm, checkpoints between precisions, step 0, resuming, refusals."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer import transformer_block

from nova_sys.config import Fp8Config, ModelConfig, ParallelConfig, RunConfig
from nova_sys.config_io import check, load_recipe
from nova_sys.data.batch import Pack
from nova_sys.model import te
from nova_sys.model.build import build_model, shards_of, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.reference import OnlineReference
from nova_sys.saved_config import EVALUATE, GENERATE, config_for
from nova_sys.step import response_logps
from nova_sys.trainer import Trainer

spec = importlib.util.spec_from_file_location(
    "fp8_layers", Path(__file__).with_name("fp8_layers.py")
)
assert spec is not None and spec.loader is not None
fp8_layers: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fp8_layers)
Engine, LINEAR = fp8_layers.Engine, (fp8_layers.LayerNormColumn, fp8_layers.Row)

MODEL = ModelConfig(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=300
)
RICH = {"qk_norm": True, "qkv_bias": True, "kv_shift": True, "tied_embeddings": True}
RECIPES = ("blockwise", "tensorwise", "delayed")


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        yield joined


@pytest.fixture(autouse=True)
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8_layers.use(monkeypatch)


def model_of(
    parallel: Parallel, fp8: Fp8Config | None, dtype: torch.dtype = torch.float32, **fields: Any
) -> PackedGPT:
    model = ModelConfig(**{**MODEL.__dict__, **fields})
    config = transformer_config(model, parallel, dtype=dtype, fp8=fp8)
    (gpt,) = build_model(model, config, parallel, vocab_size=300, max_positions=160, seed=5)
    return gpt


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as out:
        for _ in range(24):
            words = ["".join(" " + rng.choice("abcdef") for _ in range(n)) for n in (5, 6, 9)]
            out.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), words, strict=True))) + "\n")  # fmt: skip
    return path


def config_of(pairs: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    settings = {
        "run.dir": str(run_dir),
        **{f"model.{key}": getattr(MODEL, key) for key in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")},
        "data.train": str(pairs),
        "data.pack_length": 128,
        "data.workers": 1,
        "data.cache_dir": str(pairs.parent / "cache"),  # what is tokenised once
        "train.precision": "fp8",
        "train.steps": 3,
        "train.global_batch_packs": 3,
        "optimizer.lr": 1e-2,
        "log.tensorboard": False,
        "log.progress": False,
        "checkpoint.asynchronous": False,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }  # fmt: skip
    recipe = pairs.parent / "empty.toml"
    recipe.write_text("")
    config = load_recipe(recipe, [f"{k}={json.dumps(v)}" for k, v in settings.items()])
    check(config, 1)
    return config


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train(parallel: Parallel, config: RunConfig) -> Trainer:
    trainer = Trainer(config, parallel)
    trainer.train()
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    shards = (shard for chunk in trainer.chunks for shard in shards_of(chunk))
    return {f"{s.key}{s.global_offset}": s.data.clone() for s in shards if s.data is not None}


@pytest.mark.parametrize("fields", [{}, RICH], ids=["plain", "rich"])
def test_both_specs_have_the_same_names_shapes_and_first_weights(
    parallel: Parallel, fields: dict[str, Any]
) -> None:
    def shards(fp8: Fp8Config | None) -> dict[Any, torch.Tensor | None]:
        found = shards_of(model_of(parallel, fp8, **fields))
        return {(s.key, s.global_shape, s.global_offset, s.axis_fragmentations): s.data for s in found}  # fmt: skip

    plain, fused = shards(None), shards(Fp8Config())
    assert plain.keys() == fused.keys()
    assert any("pre_mlp_layernorm" in key[0] for key in fused)
    for key, weight in plain.items():
        assert weight is not None and torch.equal(weight, fused[key]), key  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def packs(parallel: Parallel, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Pack]:
    """Those of the first step."""
    folder = tmp_path_factory.mktemp("packs")
    return Trainer(config_of(pairs, folder, train__precision="fp32"), parallel).loader.micro_batches(0)  # fmt: skip


def gradients(
    gpt: PackedGPT, packs: list[Pack], parallel: Parallel
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs, and gradients by the plain spec's names of parameters."""
    logp_R = torch.cat([gpt(pack.to(parallel.device)) for pack in packs])
    (logp_R * torch.linspace(-1, 1, len(logp_R))).sum().backward()
    fused = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}  # fmt: skip
    found = {}
    for name, parameter in gpt.named_parameters():
        for theirs, ours in fused.items():
            name = name.replace(theirs, ours)
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return logp_R.detach(), found


def test_the_fused_norm_has_the_same_gradients(parallel: Parallel, packs: list[Pack]) -> None:
    """In layers that stay unrounded, in fp32."""
    fields: dict[str, Any] = {**RICH, "tied_embeddings": False}
    plain, fused = model_of(parallel, None, **fields), model_of(parallel, Fp8Config(first_layers_bf16=3), **fields)  # fmt: skip
    for gpt in (plain, fused):
        for weight in (s.data for s in shards_of(gpt) if "norm" in s.key):
            assert weight is not None
            weight.detach().copy_(torch.linspace(0.5, 1.5, len(weight)))
    logp, grads = gradients(plain, packs, parallel)
    fused_logp, fused_grads = gradients(fused, packs, parallel)
    assert torch.equal(logp, fused_logp)
    assert grads.keys() == fused_grads.keys() and len(grads) > 20
    for key, grad in grads.items():
        assert torch.allclose(grad, fused_grads[key], rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_layers_between_run_in_fp8(
    recipe: str, parallel: Parallel, packs: list[Pack]
) -> None:
    gpt = model_of(parallel, Fp8Config(recipe=recipe), torch.bfloat16)  # pyright: ignore[reportArgumentType]
    response_logps([gpt], packs, parallel)
    linear = [m for m in gpt.modules() if isinstance(m, LINEAR)]
    assert len(linear) == 12
    in_fp8 = [layer.cached is not None for layer in linear]
    assert in_fp8 == [recipe == "delayed"] * 4 + [True] * 4 + [recipe == "delayed"] * 4
    assert gpt.training  # as before the pass


@pytest.mark.parametrize("reference", ["cache", "online"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_step_0_is_ln_2(
    recipe: str, reference: str, parallel: Parallel, pairs: Path, tmp_path: Path
) -> None:
    """Three micro-batches; policy and reference round alike, so the margin is 0 to the last bit. A second run finds the cache."""
    for name in ("one", "two") if reference == "cache" else ("one",):
        config = config_of(pairs, tmp_path / name, fp8__recipe=recipe, algo__reference=reference, data__cache_dir=str(tmp_path / "cache"))  # fmt: skip
        train(parallel, config)
        first, *others = metrics(tmp_path / name)
        assert first["drift"] == 0 and abs(first["loss"] - 0.6931472) < 1e-7
        assert all(step["drift"] > 0 for step in others)


@pytest.mark.parametrize(
    ("recipe", "spoilt"),
    [("delayed", "settle_scales"), ("blockwise", "in bf16"), ("tensorwise", "in bf16")],
)
def test_step_0_is_not_ln_2_when_the_reference_rounds_otherwise(
    recipe: str, spoilt: str, parallel: Parallel, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if spoilt == "settle_scales":
        monkeypatch.setattr("nova_sys.trainer.settle_scales", lambda *_: None)
    config = config_of(pairs, tmp_path, fp8__recipe=recipe, train__check_first_loss=False)
    trainer = Trainer(config, parallel)
    if spoilt == "in bf16":
        monkeypatch.setattr(transformer_block, "get_fp8_context", lambda *_: nullcontext())
    trainer.train()
    assert metrics(tmp_path)[0]["drift"] > 1e-3


def test_weights_are_rounded_once_a_step(parallel: Parallel, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Once for all micro-batches, and anew in the next step: the losses are those of rounding them every time."""
    calls: list[int] = []
    rounded = fp8_layers.rounded
    monkeypatch.setattr(fp8_layers, "rounded", lambda x, scale: (calls.append(x.dim()), rounded(x, scale))[1])  # fmt: skip
    curves = []
    for always in (False, True):
        if always:
            for kind in LINEAR:
                flag = property(lambda _: True, lambda *_: None)
                monkeypatch.setattr(kind, "is_first_microbatch", flag, raising=False)
        trainer = Trainer(config_of(pairs, tmp_path / str(always)), parallel)
        calls.clear()
        trainer.train()
        assert calls.count(2) == (4 * 3 * 3 if always else 4 * 3)  # layers, steps, micro-batches
        assert calls.count(3) == 4 * 3 * 3
        curves.append([step["loss"] for step in metrics(tmp_path / str(always))])
    assert curves[0] == curves[1] and len(set(curves[0])) == 3


def test_recomputation_rounds_alike(parallel: Parallel, pairs: Path, tmp_path: Path) -> None:
    """It runs after the forward pass has kept the rounded weights. A recipe without history."""
    curves = []
    for recompute in ("none", "full", "selective"):
        train(parallel, config_of(pairs, tmp_path / recompute, train__recompute=recompute))
        curves.append([(step["loss"], step["grad_norm"]) for step in metrics(tmp_path / recompute)])
    assert curves[0] == curves[1] == curves[2] and len(set(curves[0])) == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_is_the_same(
    recipe: str, parallel: Parallel, pairs: Path, tmp_path: Path
) -> None:
    """Bit for bit. The scales of delayed scaling are part of the checkpoint, and the reference's are found again."""
    options = {"fp8__recipe": recipe, "algo__reference": "online", "optimizer__min_lr": 1e-2}
    whole = train(parallel, config_of(pairs, tmp_path / "whole", **options))
    scales = te.read_scales(whole.chunks)  # now: what trains later adjusts those of all models
    assert bool(scales) == (recipe == "delayed")
    train(parallel, config_of(pairs, tmp_path / "parts", **options, train__steps=2))
    parts = train(parallel, config_of(pairs, tmp_path / "parts", **options))
    steps, again = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert len(steps) == len(again) == 3
    assert [s["loss"] for s in steps] == [s["loss"] for s in again]
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(parts)[name]), name
    for place, kept in te.read_scales(parts.chunks).items():
        assert all(torch.equal(a, b) for key in kept for a, b in zip(kept[key], scales[place][key], strict=True))  # fmt: skip


def test_scales_that_were_not_saved_would_change_the_run(parallel: Parallel, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    options = {"fp8__recipe": "delayed", "optimizer__min_lr": 1e-2}
    train(parallel, config_of(pairs, tmp_path / "flat", **options))
    train(parallel, config_of(pairs, tmp_path / "parts", **options, train__steps=2))
    monkeypatch.setattr("nova_sys.checkpoint.load_scales", lambda *_: None)
    train(parallel, config_of(pairs, tmp_path / "parts", **options))
    assert metrics(tmp_path / "flat")[2]["loss"] != metrics(tmp_path / "parts")[2]["loss"]


def test_checkpoints_pass_between_precisions(
    parallel: Parallel, pairs: Path, tmp_path: Path
) -> None:
    """SFT in bf16, DPO in FP8 from it, DPO in bf16 from that: each starts with the weights of the one before."""
    before, folder = None, ""
    for name, settings in [
        ("sft", {"train__precision": "bf16", "algo__name": "sft"}),
        ("fp8", {"fp8__recipe": "delayed"}),
        ("bf16", {"train__precision": "bf16"}),
    ]:
        config = config_of(pairs, tmp_path / name, **settings, model__init_from=folder)
        trainer = Trainer(config, parallel)
        ours = weights_of(trainer)
        if before is not None:
            assert ours.keys() == before.keys()
            assert all(torch.equal(weight, ours[key]) for key, weight in before.items())
        trainer.train()
        assert metrics(tmp_path / name)[0].get("drift", 0) == 0
        before, folder = weights_of(trainer), config.run.dir
        assert any(not torch.equal(weight, ours[key]) for key, weight in before.items())


def test_another_precision_is_another_run(parallel: Parallel, pairs: Path, tmp_path: Path) -> None:
    train(parallel, config_of(pairs, tmp_path))
    for settings in ({"train__precision": "bf16"}, {"fp8__recipe": "tensorwise"}, {"fp8__last_layers_bf16": 0}):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"train\.precision: fp8 blockwise, the first 1 and last"
        ):
            Trainer(config_of(pairs, tmp_path, **settings, train__steps=4), parallel)


def test_evaluation_does_not_run_in_fp8(parallel: Parallel, pairs: Path, tmp_path: Path) -> None:
    train(parallel, config_of(pairs, tmp_path, fp8__recipe="tensorwise", train__steps=1))
    for command in (EVALUATE, GENERATE):
        for overrides, precision in (([], "auto"), (["train.precision=bf16"], "bf16")):
            _, config = config_for(command, tmp_path, overrides, 1)
            assert (config.train.precision, config.fp8) == (precision, Fp8Config())
        with pytest.raises(ValueError, match="does not run in FP8"):
            config_for(command, tmp_path, ["train.precision=fp8"], 1)


def test_a_reference_pass_leaves_no_trace_in_the_scales(
    parallel: Parallel, pairs: Path, tmp_path: Path
) -> None:
    config = config_of(pairs, tmp_path, fp8__recipe="delayed", data__cache_dir=str(tmp_path))
    trainer = Trainer(config, parallel)
    assert list(tmp_path.glob("reference-*.npz"))
    for kept in te.read_scales(trainer.chunks).values():
        history = kept["scaling_fwd"][1]
        assert bool((history[-1, :2] > 0).all()) and not history[:-1].any()


def test_an_online_reference_keeps_its_scales(parallel: Parallel, packs: list[Pack], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Training adjusts the scales of every model in the process, by what was seen in few passes here."""
    monkeypatch.setattr(te, "AMAX_HISTORY", 4)
    gpt = model_of(parallel, Fp8Config(recipe="delayed"), torch.bfloat16)
    te.settle_scales([gpt], lambda: response_logps([gpt], packs, parallel))
    reference = OnlineReference([gpt], parallel)
    scored = []
    for _ in range(2):
        scored.append(np.concatenate([pack.ref_logp_B for pack in reference.score(packs)]))
        for _ in range(5):
            gpt(packs[0].to(parallel.device))
            Engine.update_scales(forward=True)
    settled = reference.scales.values()
    assert not all(torch.equal(a["scaling_fwd"][0], b["scaling_fwd"][0]) for a, b in zip(settled, te.read_scales([gpt]).values(), strict=True))  # fmt: skip
    assert np.array_equal(*scored)


def test_settled_scales_hold(parallel: Parallel, packs: list[Pack]) -> None:
    """Powers of two, with room for what the packs showed, and unchanged by passes over them."""
    gpt = model_of(parallel, Fp8Config(recipe="delayed"), torch.bfloat16)
    assert all(bool((t == 1).all()) for kept in te.read_scales([gpt]).values() for t in (kept["scaling_fwd"][0],))  # fmt: skip
    te.settle_scales([gpt], lambda: response_logps([gpt], packs, parallel))
    settled = te.read_scales([gpt])
    assert len(settled) == 12
    for pack in packs:
        gpt(pack.to(parallel.device))  # with gradients: scales are updated
    for place, kept in te.read_scales([gpt]).items():
        (scale, history), (before, _) = kept["scaling_fwd"], settled[place]["scaling_fwd"]
        assert torch.equal(scale, before)
        amax = te.FP8_MAX / scale[:2]
        assert torch.equal(torch.exp2(torch.log2(amax).round()), amax)
        seen = history[-len(packs) :].amax(0)[:2]  # what is new went to the end
        assert seen[0] > 0 and bool((seen * 1.1 < amax).all())
        assert scale[2] == 1  # nothing was seen of the output, which is not rounded


def test_weight_gradients_are_added_by_what_there_is(parallel: Parallel, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    plain, fused = model_of(parallel, None), model_of(parallel, Fp8Config())
    assert te.accumulate_in_place([plain]) == "torch, in a pass of its own"
    assert te.accumulate_in_place([fused]) == "Transformer Engine"
    assert all(m.fuse_wgrad_accumulation for m in fused.modules() if isinstance(m, LINEAR))  # fmt: skip
    monkeypatch.setattr(te.mcore_layers, "fused_weight_gradient_mlp_cuda", object(), raising=False)
    assert te.accumulate_in_place([plain]) == "NVIDIA apex"
    fc1: Any = plain.get_submodule("decoder.layers.0.mlp.linear_fc1")
    assert fc1.gradient_accumulation_fusion


def test_weights_kept_in_fp8_are_set_exactly(
    parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fp8.param_gather`: rounded in the layers, and the optimizer starts from what was set, by a seed or by a checkpoint."""
    monkeypatch.setattr(te, "is_float8tensor", lambda w: isinstance(w, fp8_layers.KeptInFp8))
    plain = model_of(parallel, None, torch.bfloat16)
    gpt = model_of(parallel, Fp8Config(param_gather=True), torch.bfloat16)
    kept = [m for m in gpt.modules() if isinstance(m, LINEAR)]
    assert len(kept) == 12 and all(isinstance(m.weight, fp8_layers.KeptInFp8) for m in kept)  # pyright: ignore[reportAttributeAccessIssue]

    def exact(chunk: PackedGPT) -> dict[Any, torch.Tensor]:
        with te.plain_weights([chunk]):
            return {(s.key, s.global_offset): s.data.clone() for s in shards_of(chunk) if s.data is not None}  # fmt: skip

    first = exact(plain)
    assert all(torch.equal(weight, first[key]) for key, weight in exact(gpt).items())
    for module in kept:
        weight: Any = module.weight
        rounded = fp8_layers.rounded(weight.get_high_precision_init_val(), 1.0)
        assert torch.equal(weight.dequantize(), rounded)
        assert not torch.equal(rounded, weight.get_high_precision_init_val())
    with te.plain_weights([gpt]):
        for shard in shards_of(gpt):
            assert shard.data is not None
            shard.data.detach().mul_(2)
    assert all(torch.equal(weight, 2 * first[key]) for key, weight in exact(gpt).items())
    for module in kept:  # the optimizer has taken them
        module.weight._high_precision_init_val = None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    assert not all(torch.equal(weight, 2 * first[key]) for key, weight in exact(gpt).items())
