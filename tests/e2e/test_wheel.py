"""A wheel, built and installed where no source tree is: commands, recipes and templates are in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of a fresh environment that has the wheel, and sees only the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files beside the sources
    for name in ("cli", "pipeline", "storage"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(folder)!r}))"
    name = _run(sys.executable, "-c", build, cwd=source).split()[-1]
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Folders that are named in a .pth are searched last, and their own .pth files, one of which leads to the source
    # tree, are not read.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    _run(*pip, "--force-reinstall", folder / name, cwd=folder)
    shutil.rmtree(source)
    return lambda program, *argv: _run(environment / "bin" / program, *argv, cwd=folder)


def _run(*argv: Any, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in argv], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slowest
def test_an_installed_wheel_has_commands_recipes_and_templates(
    installed: Run, finished: Path, copy: Any, tmp_path: Path
) -> None:
    where = installed("python", "-c", "import tropd.cli, sys; print(tropd.cli.__file__)")
    assert str(ROOT) not in where
    assert "/environment/lib/" in where
    assert "--recipe" in installed("tropd", "demo", "--help")
    objectives = json.loads(installed("tropd", "objectives", "--json"))
    assert len(objectives) == len(list((ROOT / "pipeline").rglob("recipes/objectives/*.toml")))
    installed("tropd", "init", tmp_path / "new", "--recipe", "demo")
    assert (tmp_path / "new" / "config.toml").is_file()
    workspace = copy(finished, "report")
    installed("tropd", "report", "-w", workspace)
    page = (workspace / "report" / "index.html").read_text()
    assert "<style>" in page
    assert "<svg" in page or "data:image" in page
