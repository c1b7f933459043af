"""The parts of gpu_check.py, in order of importance, with the seconds that each should take on an H100 and the limit at which it is ended.

CORE fits 8 minutes when the extension has been built before (gpu_build.py); MORE needs `--minutes 25` in all.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
IN = "tests/kernels"
OPS = ("kv_shift_rope", "packed_attention", "linear_dpo")
FORMS_TEST = f"{IN}/test_emulator.py"
TESTS = {
    "triton": (
        f"{IN}/test_kv_shift_rope_triton.py",
        f"{IN}/test_kv_shift_rope_norms.py",
        f"{IN}/test_packed_attention.py",
        f"{IN}/test_packed_attention_window.py",
        f"{IN}/test_linear_logprob_gpu.py",
    ),
    "cuda": (
        f"{IN}/test_kv_shift_rope_cuda.py",
        f"{IN}/test_packed_attention_cuda_gpu.py",
        f"{IN}/test_linear_logprob_gpu.py",
    ),
}
STEP_OPS = {"kv_shift_rope": "kv_shift_rope", "packed_attention": "packed_attention"}
STEP_OPS |= {"linear_logprob": "linear_dpo"}
"""Op of a training step -> the op whose tests must be green."""
CASES = {"kv_shift_rope": "2", "packed_attention": "3", "linear_dpo": "1"}
"""How many of an op's cases the core times; the first ones matter most."""


@dataclass(frozen=True)
class Part:
    """`{out}` in the command becomes the JSON file that the part writes, if it writes one; `{folder}` where results are kept, `{work}` a folder for
    what one part leaves to another, `{backends:OP}` those kernels of an op whose tests were green."""

    name: str
    limit_s: float
    """It is ended after so many seconds, or when the whole command's time is over."""
    command: list[str | Path]
    needs: tuple[str, ...] = ()
    """Parts that must have ended well."""
    tool: str = ""
    """A program that must be there."""
    expected_s: float = field(default=0.0, kw_only=True)


def script(name: str, *arguments: str) -> list[str | Path]:
    return [sys.executable, HERE / name, *arguments, "--out", "{out}"]


def tests(kind: str, seconds: int) -> list[str | Path]:
    arguments = (*TESTS[kind], "--seconds", str(seconds))
    return ["env", f"NOVA_GPU_BACKENDS={kind}", *script("gpu_tests.py", *arguments)]


def timing(op: str, *arguments: str) -> list[str | Path]:
    kinds = ["--backends", f"reference{{backends:{op}}}"]
    return script("run.py", "--no-test", "--op", op, *kinds, *arguments)


def step(data: str, precision: str, *arguments: str) -> list[str | Path]:
    chosen = ["--data", data, "--precision", precision, "--base", "{base}"]
    for option, op in STEP_OPS.items():
        chosen += [f"--{option}", f"reference{{backends:{op}}}"]
    return script("gpu_step.py", *chosen, *arguments)


def trl(*arguments: str) -> list[str | Path]:
    """In the environment of constraints/peer-trl.txt where NOVA_PEER_PYTHON names it; else in this one."""
    _, *command = script("gpu_trl.py", "--given", "{work}/given", "--ours", "{work}/step.json")
    return [os.environ.get("NOVA_PEER_PYTHON", sys.executable), *command, *arguments]


def sanitized(tool: str) -> list[Part]:
    command = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--tool", tool]
    if tool == "memcheck":  # torch asks what may be refused, and checks every launch itself
        command += ["--report-api-errors", "no"]
    return [
        Part(
            f"{tool} {op}",
            90,
            [*command, *script("gpu_small.py", "--op", op)],
            ("device",),
            "compute-sanitizer",
            expected_s=15,
        )
        for op in OPS
    ]


def core() -> list[Part]:
    built, there = ("build",), ("device",)  # Triton's kernels run without the CUDA ones
    return [
        Part("device", 150, script("gpu_device.py"), expected_s=12),
        Part("build", 200, script("gpu_build.py"), ("device",), expected_s=3),
        Part(
            "test instruction forms",
            90,
            script("gpu_tests.py", FORMS_TEST, "--processes", "1", "--seconds", "80"),
            there,
            "nvcc",
            expected_s=20,
        ),
        Part("test in triton", 180, tests("triton", 165), there, expected_s=70),
        Part("test in cuda", 120, tests("cuda", 105), built, expected_s=35),
        Part("Transformer Engine", 120, script("gpu_te.py"), ("device",), expected_s=30),
        *sanitized("memcheck"),
        *(
            Part(
                f"time {op}",
                90,
                timing(op, "--seconds", "1.5", "--first", CASES[op]),
                there,
                expected_s=seconds,
            )
            for op, seconds in zip(OPS, (18, 35, 25), strict=True)
        ),
        Part(
            "step bf16",
            200,
            step(
                *("hh", "bf16", "--seconds", "2", "--trace", "{folder}/step_bf16.trace.json.gz"),
                *("--hand-over", "{work}/given", "--copy", "{work}/step.json"),
            ),
            there,
            expected_s=70,
        ),
        Part(
            "step fp8 tensorwise",
            120,
            step("hh", "fp8", "--recipe", "tensorwise", "--variants", "one"),
            there,
            expected_s=30,
        ),
        Part("step TRL with Liger", 150, trl(), there, expected_s=50),
        Part(
            "step bf16, long documents",
            100,
            step("long", "bf16", "--variants", "few"),
            there,
            expected_s=35,
        ),
    ]


def more() -> list[Part]:
    there = ("device",)
    return [
        *(
            Part(f"time {op}, all cases", 240, timing(op, "--seconds", "2"), there, expected_s=s)
            for op, s in zip(OPS, (40, 180, 110), strict=True)
        ),
        *(
            Part(
                f"step fp8 {recipe}",
                120,
                step("hh", "fp8", "--recipe", recipe, "--variants", "one"),
                there,
                expected_s=30,
            )
            for recipe in ("delayed", "blockwise")
        ),
        Part(
            "step fp8 tensorwise, long documents",
            120,
            step("long", "fp8", "--recipe", "tensorwise", "--variants", "one"),
            there,
            expected_s=30,
        ),
        Part(
            "tune linear_dpo",
            120,
            script("run.py", "--no-test", "--tune", "--op", "linear_dpo", "--first", "1"),
            there,
            expected_s=80,
        ),
        *sanitized("racecheck"),
        *sanitized("synccheck"),
        Part(
            "FP8 accuracy gate",
            420,
            script("fp8_gate.py", "--plot", "{folder}/fp8_gate.png"),
            there,
            expected_s=300,
        ),
    ]


def simulated() -> list[Part]:
    """The same chain where there is no GPU: no build, tiny shapes, a test of a CPU."""
    tiny = ("--tiny", "--seconds", "0")
    tiny_step = (*tiny, "--base", "reference", "--variants", "few")
    left = ("--hand-over", "{work}/given", "--copy", "{work}/step.json")
    cpu_test = (f"{IN}/test_segments.py", "--mark", "not gpu", "--processes", "1")
    commands: dict[str, list[str | Path]] = {
        "device": script("gpu_device.py", "--simulate"),
        "test": script("gpu_tests.py", *cpu_test),
        "Transformer Engine": script("gpu_te.py", "--simulate"),
        "small kv_shift_rope": script("gpu_small.py", "--op", "kv_shift_rope"),
        **{f"time {op}": timing(op, *tiny) for op in OPS},
        "step bf16": step("hh", "bf16", *tiny_step, *left),
        "step TRL with Liger": trl("--batches", "4", "--steps", "2"),
        "step bf16, long documents": step("long", "bf16", *tiny_step),
    }
    return [Part(name, 900, command) for name, command in commands.items()]  # busy or not
