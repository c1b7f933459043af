"""What an installation contains: two packages, whole, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"nova_sys": ROOT / "nova_sys", "nova_kernels": ROOT / "kernels" / "nova_kernels"}
NEEDED = ["setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"]
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.so", ".*_cache")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names in a wheel built from a copy of the sources."""
    copy = tmp_path_factory.mktemp("wheel") / "copy"
    for folder in ("csrc", "nova_sys", "kernels", "tests", "benchmarks", "launch"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=NOT_SHIPPED)
    for name in NEEDED:
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "-w", "dist"], cwd=copy, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_has_exactly_the_two_packages(wheel_names: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert len([name for name in top if name.endswith(".dist-info")]) == 1
    assert {name for name in top if not name.endswith(".dist-info")} == set(SOURCES)


def test_wheel_has_every_module_of_the_packages(wheel_names: set[str]) -> None:
    skipped = {"__pycache__", ".ruff_cache"}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".pyi") and not skipped & set(path.parts)
    }
    packaged = {name for name in wheel_names if name.split("/")[0] in SOURCES}
    extensions = {
        name
        for name in packaged
        if name.startswith(("nova_kernels/_C.", "nova_kernels/_C_cuda."))
        and not name.endswith(".pyi")
    }
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    assert len(extensions) == 1 + bool(nvcc)
    assert packaged - extensions == expected


def test_wheel_carries_the_license(wheel_names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


@pytest.mark.parametrize("folder", ["kernels", "launch", "benchmarks", "tests"])
def test_folders_that_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_kernels_is_left_to_other_projects() -> None:
    """`import kernels` belongs to another project: from the repository root it finds no code of ours."""
    code = (
        "from importlib.util import find_spec; spec = find_spec('kernels');"
        "assert spec is None or (spec.origin is None and spec.submodule_search_locations), spec"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
