"""Manifests: what a stage has produced so far, under which fingerprint, with row counts and checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tropd.storage.atomic import content_digest, content_size, write_text_atomic
from tropd.storage.errors import DamagedShardError, WorkspaceVersionError
from tropd.storage.fingerprint import Fingerprint, Scalar

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"


class Shard(BaseModel):
    """One finished output of a stage: a file or folder next to the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int
    size: int
    sha256: str


class Manifest(BaseModel):
    """The state of a stage on disk. It holds no clock, so that equal runs give equal manifests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    stage: str
    fingerprint: str
    fields: dict[str, Scalar]
    shards: dict[str, Shard] = {}
    complete: bool = False
    summary: dict[str, Any] = {}
    """Small results that other stages or people want: row counts, rates, accuracies."""

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
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
        if version == SCHEMA_VERSION:
            return Manifest.model_validate(data)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DamagedShardError(
            f"{path} is not a readable manifest: {error}",
            hint="restore it from a copy, or rerun the stage with --force",
        ) from error
    raise WorkspaceVersionError(
        f"{path} has schema version {version}; this tropd reads version {SCHEMA_VERSION}",
        hint="use the tropd version that wrote it, or rerun the stage with --force",
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically."""
    write_text_atomic(folder / FILE_NAME, manifest.model_dump_json(indent=1) + "\n")


def describe_shard(folder: Path, name: str, rows: int) -> Shard:
    """Size and checksum of a finished shard."""
    path = folder / name
    return Shard(name=name, rows=rows, size=content_size(path), sha256=content_digest(path))


def check_shard(folder: Path, shard: Shard) -> None:
    """Read a shard completely and compare it with its manifest entry.

    Raises:
        DamagedShardError: it is missing, has another size, or another content.
    """
    path = folder / shard.name
    hint = "tropd verify -w WORKSPACE --repair sets damaged shards aside; rerun the stage to make them again"
    if not path.exists():
        raise DamagedShardError(f"{path} is missing, but its manifest lists it", hint=hint)
    if (size := content_size(path)) != shard.size:
        raise DamagedShardError(f"{path} has {size} bytes, its manifest says {shard.size}", hint=hint)
    if (digest := content_digest(path)) != shard.sha256:
        raise DamagedShardError(
            f"{path} has sha256 {digest[:12]}…, its manifest says {shard.sha256[:12]}…", hint=hint
        )
