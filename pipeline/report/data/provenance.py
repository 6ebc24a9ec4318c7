"""Origins of a run: versions, machine, source commit, fingerprints and hashes of inputs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from tropd.pipeline.report.data.facts import Provenance
from tropd.storage.stage.manifest import Manifest

_PACKAGES = ("tropd", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "zarr")
_DIGEST = re.compile(r"[0-9a-f]{40,}")
_GIT_SECONDS = 10


def describe_provenance(manifests: Mapping[str, Manifest]) -> Provenance:
    """Versions are asked of the installed packages, without importing them (PyTorch takes seconds)."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Provenance(
        versions=versions,
        platform=platform.platform(),
        cpu_count=os.cpu_count(),
        commit=source_commit(Path(__file__)),
        fingerprints={name: manifest.fingerprint for name, manifest in manifests.items()},
        inputs={
            f"{name}: {field}": value
            for name, manifest in manifests.items()
            for field, value in sorted(manifest.fields.items())
            if isinstance(value, str) and _DIGEST.fullmatch(value) and not field.startswith("upstream")
        },
    )


def source_commit(file: Path) -> str | None:
    """The git commit that ``file`` belongs to; None outside a checkout.

    An installed package may lie below somebody else's repository: a file that git does not track has none.
    """
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        commit = _git(file, "rev-parse", "HEAD").strip()
        changed = _git(file, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(file: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments],
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
    ).stdout
