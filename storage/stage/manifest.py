"""Manifests: a stage's output so far, with its fingerprint, row counts and checksums.

The file ends with a SHA-256 of itself (taken with the digest's place left empty), so that damage to the
manifest is found like damage to a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from tropd.storage.disk.atomic import TEMPORARY_PREFIX, content_digest, content_size, write_text_atomic
from tropd.storage.errors import DamagedShardError, WorkspaceVersionError
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.workspace import Workspace

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
CHECKPOINTS = "checkpoints"
"""Folder of the shards that a stage resumes from, and cannot make again without a whole one of them."""


class Shard(BaseModel):
    """One finished output of a stage: a file or folder next to the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int
    size: int
    sha256: str

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        """A manifest may come from elsewhere; its names must not lead out of the stage folder."""
        parts = PurePosixPath(name).parts
        if (
            not parts
            or str(PurePosixPath(name)) != name
            or parts[0] == "/"
            or ".." in parts
            or name == FILE_NAME
            or any(part.startswith(TEMPORARY_PREFIX) for part in parts)
        ):
            raise ValueError(f"{name!r} cannot be the name of a shard")
        return name


class Manifest(BaseModel):
    """The state of a stage on disk. It holds no clock, so that equal runs give equal manifests."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    stage: str
    fingerprint: str
    fields: dict[str, Scalar]
    shards: dict[str, Shard] = {}
    complete: bool = False
    summary: dict[str, Any] = {}
    """Small results that other stages or people want: row counts, rates, accuracies."""
    checksum: str = ""
    """SHA-256 of the file with this value empty; filled in on writing."""

    @model_validator(mode="after")
    def _keys_are_names(self) -> Manifest:
        for key, shard in self.shards.items():
            if key != shard.name:
                raise ValueError(f"shard {shard.name!r} is listed as {key!r}")
        return self

    @classmethod
    def start(cls, stage: str, fingerprint: Fingerprint) -> Manifest:
        return cls(stage=stage, fingerprint=fingerprint.digest, fields=dict(fingerprint.fields))

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards.values())

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards.values())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in ``folder``, or None if the stage was never started.

    Raises:
        DamagedShardError: the file is not a manifest.
        WorkspaceVersionError: it was written with another schema version.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        version = data["schema_version"]
        if version == SCHEMA_VERSION:
            manifest = Manifest.model_validate(data)
            if _render(manifest) != text:
                raise ValueError(
                    "its content does not match its own checksum; it was changed after it was written"
                )
            return manifest
    except (ValueError, KeyError, TypeError, ValidationError, OSError) as error:
        raise DamagedShardError(
            f"{path} is not a readable manifest: {error}",
            hint="restore it from a copy, or rerun the stage with --force",
        ) from error
    raise WorkspaceVersionError(
        f"{path} has schema version {version}; this tropd reads version {SCHEMA_VERSION}",
        hint="use the tropd version that wrote it, or rerun the stage with --force",
    )


def holds_output(folder: Path) -> bool:
    """True if a stage folder holds more than a manifest and a killed writer's leftovers."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name != FILE_NAME and not name.startswith(TEMPORARY_PREFIX) for name in names)


def trained_steps(manifest: Manifest) -> int:
    """Steps that the newest checkpoint of a training stage has done: they are on record."""
    return max((shard.rows for shard in manifest.shards.values()), default=0)


def can_go_on(manifest: Manifest, damaged: Collection[str]) -> bool:
    """True if a stage can resume without its damaged shards: it has no checkpoints, or a whole one."""
    checkpoints = [name for name in manifest.shards if name.startswith(f"{CHECKPOINTS}/")]
    return not checkpoints or any(name not in damaged for name in checkpoints)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically."""
    write_text_atomic(folder / FILE_NAME, _render(manifest))


def _render(manifest: Manifest) -> str:
    plain = manifest.model_copy(update={"checksum": ""}).model_dump_json(indent=1) + "\n"
    checksum = hashlib.sha256(plain.encode()).hexdigest()
    return manifest.model_copy(update={"checksum": checksum}).model_dump_json(indent=1) + "\n"


def describe_shard(folder: Path, name: str, rows: int) -> Shard:
    """Size and checksum of a finished shard."""
    path = folder / name
    return Shard(name=name, rows=rows, size=content_size(path), sha256=content_digest(path))


def broken_shards(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Shards that are missing or have another size, with the problem in words. Their content is not read."""
    broken = {}
    for shard in manifest.shards.values():
        path = folder / shard.name
        if not path.exists():
            broken[shard.name] = f"{shard.name} is missing"
        elif (size := content_size(path)) != shard.size:
            broken[shard.name] = f"{shard.name} has {size} bytes instead of {shard.size}"
    return broken


def check_shard(folder: Path, shard: Shard) -> None:
    """Read a shard completely and compare it with its manifest entry.

    Raises:
        DamagedShardError: it is missing, has another size, or another content.
    """
    path = folder / shard.name
    command = Workspace(folder.parent).command("verify")
    hint = f"{command} --repair sets damaged shards aside; rerun the stage to make them again"
    if not path.exists():
        raise DamagedShardError(f"{path} is missing, but its manifest lists it", hint=hint)
    try:
        size = content_size(path)
        digest = content_digest(path) if size == shard.size else None
    except OSError as error:
        raise DamagedShardError(f"{path} cannot be read: {error}", hint=hint) from error
    if digest is None:
        raise DamagedShardError(f"{path} has {size} bytes, its manifest says {shard.size}", hint=hint)
    if digest != shard.sha256:
        raise DamagedShardError(
            f"{path} has sha256 {digest[:12]}…, its manifest says {shard.sha256[:12]}…", hint=hint
        )
