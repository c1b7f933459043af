"""Reads the imports of both packages and holds them to the layering of CONTRIBUTING.md, and sizes to its limits."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"nova_sys": ROOT / "nova_sys", "nova_kernels": ROOT / "kernels" / "nova_kernels"}

MAX_FUNCTION_LINES = 60
MAX_DEVICE_FUNCTION_LINES = 150
MAX_FILE_LINES = 400

STDLIB = frozenset(sys.stdlib_module_names)
OURS = frozenset(PACKAGES)
MEGATRON_USERS = (
    "nova_sys.model",
    "nova_sys.parallel",
    "nova_sys.step",
    "nova_sys.checkpoint",
    "nova_sys.shards",
    "nova_sys.optimizer",
    "nova_sys.trainer",
    "nova_sys.cpu_mode",
)


@dataclass(frozen=True)
class Import:
    name: str  # dotted; `from a import b` gives a.b
    line: int


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base]).rstrip(".")
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)


def import_problem(module: str, name: str) -> str | None:
    """Why `module` may not import `name`, or None."""
    root = name.split(".")[0]

    def outside(*allowed: str) -> bool:
        return root in OURS and not any(within(name, other) for other in allowed)

    if root in ("launch", "benchmarks", "tests", "kernels"):
        return f"nothing imports {root}"
    if root == "megatron" and not within(name, "megatron.core"):
        return "only megatron.core is ever imported"
    if root == "megatron" and not any(within(module, user) for user in MEGATRON_USERS):
        return "only the modules of MEGATRON_USERS import megatron.core"
    if "parallel_state" in name and module != "nova_sys.parallel":
        return "only nova_sys.parallel touches parallel_state"
    if within(module, "nova_kernels") and root not in STDLIB | {
        "nova_kernels",
        "torch",
        "triton",
        "numpy",
    }:
        return "nova_kernels imports torch, triton, numpy and itself"
    if module == "nova_sys.config" and root not in STDLIB:
        return "nova_sys.config imports the standard library only"
    if within(module, "nova_sys.data") and outside(
        "nova_sys.config", "nova_sys.data", "nova_kernels"
    ):
        return "data imports config, nova_kernels and itself"
    algo_may_use = ("nova_sys.config", "nova_sys.algo", "nova_sys.data.batch", "nova_kernels")
    if within(module, "nova_sys.algo") and outside(*algo_may_use):
        return "algo imports config, data.batch, nova_kernels and itself"
    return None


def _is_torch_cuda(node: ast.AST | None) -> bool:
    """Whether an expression is torch.cuda or something inside it."""
    while isinstance(node, ast.Attribute):
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return True
        node = node.value
    return False


def cuda_patches(source: str) -> list[int]:
    """Lines that assign into torch.cuda, give it another name to do so, or hand it to setattr or a mock."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            alias = (
                isinstance(node.value, ast.Attribute) and ast.unparse(node.value) == "torch.cuda"
            )
            if alias or any(_is_torch_cuda(target) for target in targets):
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and node.args:
            first, called = node.args[0], ast.unparse(node.func)
            patched = isinstance(first, ast.Constant) and str(first.value).startswith("torch.cuda")
            if (called.endswith("setattr") and _is_torch_cuda(first)) or (
                "patch" in called and (patched or _is_torch_cuda(first))
            ):
                lines.append(node.lineno)
    return lines


def modules() -> Iterator[tuple[str, Path]]:
    for name, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([name, *(part for part in parts if part != "__init__")]), path


def sized_files() -> list[Path]:
    folders = ["nova_sys", "kernels", "benchmarks", "tests", "csrc"]
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [ROOT / "setup.py", *sorted(path for path in found if path.suffix in suffixes)]


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body. Signature and docstring are the function's manual, and do not count against its code."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def oversized(path: str, source: str) -> list[str]:
    problems = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        problems.append(f"{path}: {num_lines} lines, the limit is {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)) if path.endswith(".py") else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = code_lines(node)
            on_device = any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)
            limit = MAX_DEVICE_FUNCTION_LINES if on_device else MAX_FUNCTION_LINES
            if length > limit:
                problems.append(
                    f"{path}:{node.lineno}: {node.name} has {length} lines, the limit is {limit}"
                )
    return problems


def test_imports_follow_the_layers() -> None:
    problems = []
    for module, path in modules():
        is_package = path.name == "__init__.py"
        for found in imports_of(path.read_text(), module, is_package=is_package):
            problem = import_problem(module, found.name)
            if problem is not None:
                where = f"{path.relative_to(ROOT)}:{found.line}"
                problems.append(f"{where} imports {found.name}: {problem}")
    assert not problems, "\n" + "\n".join(problems)


def test_only_cpu_mode_patches_torch_cuda() -> None:
    patching = {module for module, path in modules() if cuda_patches(path.read_text())}
    assert patching <= {"nova_sys.cpu_mode"}


def test_native_code_needs_no_libtorch() -> None:
    include = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)
    offenders = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*.*")
        if include.search(path.read_text())
    ]
    assert not offenders


def test_sizes() -> None:
    problems = [
        problem
        for path in sized_files()
        for problem in oversized(str(path.relative_to(ROOT)), path.read_text())
    ]
    print("\n".join(problems))
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("nova_kernels.checks", "import megatron.core"),
        ("nova_kernels.checks", "from nova_sys.config import RunConfig"),
        ("nova_kernels.checks", "import scipy"),
        ("nova_sys.config", "import numpy"),
        ("nova_sys.config", "from . import log"),
        ("nova_sys.data.loader", "from nova_sys.parallel import Parallel"),
        ("nova_sys.data.loader", "from ..algo import dpo"),
        ("nova_sys.data.loader", "from megatron.core import parallel_state"),
        ("nova_sys.algo.dpo", "from nova_sys.data.loader import PackLoader"),
        ("nova_sys.algo.dpo", "import nova_sys.model.build"),
        ("nova_sys.algo.dpo", "import nova_sys.parallel"),
        ("nova_sys.step", "from megatron.core import parallel_state as mpu"),
        ("nova_sys.trainer", "from megatron.training import get_args"),
        ("nova_sys.cli", "import megatron.core"),
        ("nova_sys.cli", "from benchmarks import run"),
        ("nova_sys.cli", "import kernels.nova_kernels"),
    ],
)
def test_a_forbidden_import_is_found(module: str, statement: str) -> None:
    found = list(imports_of(statement, module, is_package=False))
    assert found
    assert any(import_problem(module, name.name) for name in found)


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("nova_kernels.checks", "import torch, triton.language, numpy, math"),
        ("nova_kernels.checks", "from nova_kernels import _C"),
        ("nova_sys.data.packing", "from nova_kernels import _C"),
        ("nova_sys.algo.dpo", "from nova_sys.data.batch import DevicePack"),
        ("nova_sys.parallel", "from megatron.core import parallel_state"),
        ("nova_sys.model.build", "from megatron.core.models.gpt import GPTModel"),
        ("nova_sys.trainer", "from . import step"),
    ],
)
def test_an_allowed_import_passes(module: str, statement: str) -> None:
    found = list(imports_of(statement, module, is_package=False))
    assert found
    assert not any(import_problem(module, name.name) for name in found)


@pytest.mark.parametrize(
    "statement",
    [
        "torch.cuda.current_device = lambda: 0",
        "torch.cuda.nccl.version = None",
        "cuda = torch.cuda",
        "setattr(torch.cuda, 'synchronize', None)",
        "mock.patch('torch.cuda.is_available', lambda: True)",
        "mock.patch.object(torch.cuda, 'is_available')",
    ],
)
def test_a_patch_of_torch_cuda_is_found(statement: str) -> None:
    assert cuda_patches(statement) == [1]
    assert cuda_patches("if torch.cuda.is_available():\n    n = torch.cuda.device_count()") == []


def test_long_files_and_functions_are_found() -> None:
    body = "    x = 1\n"
    manual = 'def f(\n    a,\n    b,\n):\n    """One.\n\n    Two.\n    """\n'
    assert oversized("a.py", manual + body * 60) == []
    assert oversized("a.py", "def f():\n" + body * 61) == [
        "a.py:1: f has 61 lines, the limit is 60"
    ]
    kernel = "@triton.jit\ndef f():\n"
    assert oversized("a.py", kernel + body * 150) == []
    assert oversized("a.py", kernel + body * 151) == ["a.py:2: f has 151 lines, the limit is 150"]
    assert oversized("a.cpp", "//\n" * 400) == []
    assert oversized("a.cpp", "//\n" * 401) == ["a.cpp: 401 lines, the limit is 400"]
