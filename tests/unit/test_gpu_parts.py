"""benchmarks/gpu_*.py without running them: the parts fit their time, what they name exists, and kernels are counted to the right op."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch.autograd import DeviceType

from nova_sys.config_io import check

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_the_parts_fit_their_time() -> None:
    parts = module("gpu_parts")
    core, more = parts.core(), parts.more()
    assert all(0 < part.expected_s < part.limit_s for part in core + more)
    assert sum(part.expected_s for part in core) <= 8 * 60
    assert sum(part.expected_s for part in core + more) <= 25 * 60
    names = [part.name for part in core + more]
    assert len(set(names)) == len(names)
    for i, part in enumerate(core + more):
        assert set(part.needs) <= set(names[:i]), part


def test_what_the_parts_run_exists() -> None:
    parts = module("gpu_parts")
    for part in parts.core() + parts.more() + parts.simulated():
        for word in map(str, part.command):
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), f"{part.name}: {word}"


def test_every_kernel_is_counted_to_its_op() -> None:
    category = module("gpu_profile").category_of_kernel
    expected = {
        "packed_attention": "attention",
        "linear_logprob": "output layer and loss",
        "kv_shift_rope": "rotary positions and KV shift",
    }
    num_seen = 0
    for op, wanted in expected.items():
        cuda = [path.read_text() for path in (ROOT / "csrc" / "cuda" / op).glob("*.cuh")]
        triton = [p.read_text() for p in (ROOT / "kernels/nova_kernels" / op).glob("_triton*.py")]
        found = [n for t in cuda for n in re.findall(r"__global__[^;{]*?\b(\w+)\(const ", t)]
        found += [n for t in triton for n in re.findall(r"^def (\w+_kernel)\($", t, re.MULTILINE)]
        if op == "kv_shift_rope":  # Triton's two have common names: the range around them decides
            found = [name for name in found if name not in ("fwd_kernel", "bwd_kernel")]
        num_seen += len(found)
        assert found and {category(name) for name in found} == {wanted}, (op, found)
    assert num_seen >= 19


def test_a_kernel_is_counted_to_the_range_that_launched_it() -> None:
    profile = module("gpu_profile")

    def event(name: str, parent: object = None, *kernels: tuple[str, float]) -> SimpleNamespace:
        launched = [SimpleNamespace(name=n, duration=us) for n, us in kernels]
        kind = {"device_type": DeviceType.CPU, "is_user_annotation": False}
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=launched, **kind)

    def on_gpu(name: str, us: float, is_range: bool = False) -> SimpleNamespace:
        took = SimpleNamespace(elapsed_us=lambda: us)
        kind = {"device_type": DeviceType.CUDA, "is_user_annotation": is_range}
        return SimpleNamespace(name=name, time_range=took, kernels=[], **kind)

    step = event("nova.forward and backward")
    rope = event("nova_kernels.kv_shift_rope.backward", step)
    head = event("nova_kernels.linear_logprob", step)
    events = [
        event("cuLaunchKernelEx", rope, ("bwd_kernel", 2e6)),
        event("aten::mm", head, ("nvjet_tst_128x256", 3e6)),
        event("aten::mm", step, ("nvjet_tst_128x256", 4e6), ("void cutlass_80", 1e6)),
        event("aten::add", event("nova.optimizer"), ("vectorized_elementwise_kernel", 1e6)),
        event("aten::copy_", step, ("Memcpy DtoD (Device -> Device)", 5e5)),
        event("aten::nothing", step),
        event("nova_kernels.linear_logprob", step, ("nova_kernels.linear_logprob", 9e6)),
    ]
    ran = [on_gpu(kernel.name, kernel.duration) for e in events[:-1] for kernel in e.kernels]
    events.append(event("cudaLaunchKernel", step, ("bwd_kernel", 2e6)))  # told twice, ran once
    events += [*ran, on_gpu("nova_kernels.linear_logprob", 9e6, is_range=True)]
    events.append(on_gpu("void multi_tensor_apply_kernel", 5e5))  # launched by no op
    kernels = profile.kernels_of(events)
    assert profile.kernel_seconds(kernels) == {
        "linear layers": 5.0,
        "output layer and loss": 3.0,
        "rotary positions and KV shift": 2.0,
        "optimizer": 1.5,
        "copies and fills": 0.5,
    }
    assert profile.slowest_kernels(kernels, 1) == [
        {"name": "nvjet_tst_128x256", "category": "linear layers", "launches": 1, "seconds": 4.0}
    ]


def test_what_there_is_no_time_for_is_not_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests_of = module("gpu_tests")
    files = {"test_linear_x.py": 4, "test_kv_shift_x.py": 1, "test_packed_attention_x.py": 2}
    tests = [f"{file}::test_{i}" for file, count in files.items() for i in range(count)]
    order = tests_of.spread(tests)
    assert sorted(order) == sorted(tests)
    assert {test.partition("::")[0] for test in order[:3]} == set(files)
    notes = tmp_path / "notes"

    def passes_two_then_hangs(*_: object, timeout: float, **__: object) -> None:
        assert timeout == 1.0
        said = [(order[0], "started"), (order[0], "passed"), (order[1], "started")]
        said += [(order[1], "failed"), (order[2], "started")]
        notes.write_text("".join(json.dumps({"test": t, "outcome": o}) + "\n" for t, o in said))
        raise subprocess.TimeoutExpired("pytest", timeout)

    monkeypatch.setattr(tests_of.subprocess, "run", passes_two_then_hangs)
    told = tests_of.summary(tests_of.run_share(order, notes, 60.0, 0.0))
    assert told["counts"] == {"passed": 1, "failed": 1, "no time left": 5}
    assert list(told["not_good"]) == [order[1]]
    assert told["green"] == {
        "linear_dpo": True,
        "kv_shift_rope": False,  # failed
        "packed_attention": False,  # none ran
    }


def test_as_many_layers_as_fit() -> None:
    workload = module("gpu_workload")
    settings = workload.LLAMA_8B_LAYERS
    fixed, per_layer = workload.memory_of(settings)
    assert fixed == 18 * 2 * 128256 * 4096
    weights = 18 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336 + 2 * 4096)
    assert 0 < per_layer - weights < weights  # activations of one pack
    for free_gib in (40, 79, 139, 1000):
        layers = workload.layers_that_fit(free_gib << 30, settings)["layers"]
        used = workload.RESERVED_BYTES + fixed + layers * per_layer
        assert layers == 4 or used <= free_gib << 30
        assert layers == 32 or used + per_layer > free_gib << 30


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_the_recipes_of_fp8_are_ours(recipe: str, tmp_path: Path) -> None:
    workload, te = module("gpu_workload"), module("gpu_te")
    more = {"model.num_layers": 9, "train.precision": "fp8", "fp8.recipe": recipe}
    config = workload.recipe(tmp_path, {**workload.LLAMA_8B_LAYERS, **more, "model.kv_shift": True})
    check(config, 1)
    assert recipe in te.RECIPES and config.fp8.recipe == recipe


def test_lengths_are_exact(tmp_path: Path) -> None:
    workload = module("gpu_workload")
    lengths = workload.Lengths(5.0, 0.5, 60, 300, 12)
    workload.write_pairs(tmp_path, lengths, 1000)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    words = [sum(len(text.split()) for text in pair.values()) for pair in pairs]
    assert words == (lengths.draw() - 2).tolist()  # and an end of text for each answer


def test_a_build_is_of_these_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = module("gpu_build")
    extensions = [build.PACKAGE / f"_C{build.SUFFIX}"]
    assert build.load_problem(extensions) == ""
    assert "not there" in build.load_problem([*extensions, tmp_path / "_C_cuda.so"])
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"\x7fELF and nothing else")
    assert "ImportError" in build.load_problem([broken])
    before = build.sources_hash()
    (tmp_path / "csrc").mkdir()
    for name in ("CMakeLists.txt", "setup.py", "csrc/a.cu"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    hashes = [before, build.sources_hash()]
    (tmp_path / "csrc" / "a.cu").write_text("2")
    hashes.append(build.sources_hash())
    assert len(set(hashes)) == 3


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    step = module("gpu_step")
    kinds = {op: ["triton", "cuda", "reference"] for op in step.OPS}
    kinds["packed_attention"] = ["triton", "reference"]  # its CUDA kernels were red
    base, *others = step.variants("triton", "all", kinds)
    assert set(base.backends.values()) == {"triton"} and base.share_prefix and not base.kv_shift
    one_op = [v for v in others if " in " in v.name and not v.name.startswith("all")]
    assert [v.name for v in one_op] == [
        "packed_attention in reference",
        "linear_logprob in cuda",
        "linear_logprob in reference",
        "kv_shift_rope in cuda",
        "kv_shift_rope in reference",
    ]
    for variant in one_op:
        op, _, kind = variant.name.partition(" in ")
        assert variant.backends == {**base.backends, op: kind} and variant.share_prefix
    rest = {v.name: v for v in others if v not in one_op}
    assert set(rest) == {"nothing shared", "keys and values shifted", "all in reference"}
    assert not rest["nothing shared"].share_prefix and rest["keys and values shifted"].kv_shift
    assert [v.name for v in step.variants("triton", "one", kinds)] == ["all in triton"]
    few = [v.name for v in step.variants("triton", "few", kinds)]
    assert few == ["all in triton", "nothing shared", "keys and values shifted"]
