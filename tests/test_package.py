"""What pyproject.toml packs is what the tree holds; a module or template left out would be missing in wheels only."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = ("cli", "pipeline", "storage")


def folder_of(package: str) -> Path:
    return ROOT.joinpath(*package.removeprefix("tropd.").split("."))


def test_the_packages_are_the_folders_with_modules() -> None:
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    in_the_tree = {".".join(("tropd", *path.parent.relative_to(ROOT).parts)) for path in modules}
    assert sorted(SETUPTOOLS["packages"]) == sorted(in_the_tree), (
        "[tool.setuptools] packages in pyproject.toml"
    )
    assert SETUPTOOLS["package-dir"] == {f"tropd.{folder}": folder for folder in FOLDERS}
    without = [package for package in in_the_tree if not (folder_of(package) / "__init__.py").is_file()]
    assert not without, "packages without an __init__.py"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_other_file_is_package_data(folder: str) -> None:
    packed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    files = {p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    left_out = sorted(str(path.relative_to(ROOT)) for path in files - packed)
    assert not left_out, "[tool.setuptools.package-data] in pyproject.toml has no pattern for these"


def test_every_pattern_of_package_data_finds_a_file() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert any(folder_of(package).glob(pattern)), (
                f"package-data of {package}: nothing is like {pattern}"
            )
