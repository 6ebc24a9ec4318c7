"""The directory of a role's model: made by ``tropd prepare``, on this disk, or downloaded from the hub."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.model_files import check_files
from tropd.storage.errors import ConfigError, DamagedShardError, DataError
from tropd.storage.stage.manifest import FILE_NAME as MANIFEST
from tropd.storage.stage.manifest import check_shard, read_manifest
from tropd.storage.workspace import Workspace

MADE = "models"
"""The stage that makes models of its own."""
DESCRIPTION_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
HUB_PATTERNS = ["*.safetensors", *DESCRIPTION_PATTERNS]


def model_directory(workspace: Workspace, config: ModelConfig, role: str) -> Path:
    """The local folder of a model; a hub name is downloaded (safetensors and tokenizer files only).

    Raises:
        ConfigError, DataError: nothing there, no weights or weights only in a pickle format, or files that cannot be
            read (see ``check_files``).
        DamagedShardError: a model of ``tropd prepare`` that is not as it was made.
    """
    folder = workspace.resolve(config.model)
    if not folder.exists():
        if not is_hub_name(config.model):
            made = "tropd prepare makes the demo models"
            if Path(config.model).parts[:1] == ("sft",):
                made = f"tropd sft -w {workspace.root} --from MODEL makes it"
            raise ConfigError(
                f"{role}.model = {config.model!r}: {folder} does not exist",
                hint=f"{made}; otherwise give a model directory or a hub name",
            )
        folder = _download(config.model, role)
    if folder.parent == workspace.stage(MADE):
        _check_made(folder)
    try:
        check_files(folder)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{role}.model: {error.message}", hint=error.hint) from error
    return folder


@functools.cache
def _check_made(folder: Path) -> None:
    """Every file of a model that ``tropd prepare`` has made: fingerprints know those that decide tokens only.

    Raises:
        DamagedShardError: it differs from the manifest beside it, or that is not readable.
    """
    manifest = read_manifest(folder.parent)
    if manifest is None or folder.name not in manifest.shards:
        return
    try:
        check_shard(folder.parent, manifest.shards[folder.name])
    except DamagedShardError as error:
        raise DamagedShardError(
            error.message,
            hint=f"{error.hint}; if it is another model on purpose, remove {folder.parent / MANIFEST}",
        ) from error


def model_is_here(workspace: Workspace, config: ModelConfig) -> bool:
    """True if ``model_directory`` would find the model without downloading it."""
    return workspace.resolve(config.model).exists() or (
        is_hub_name(config.model) and _downloaded(config.model)
    )


def described_directory(workspace: Workspace, config: ModelConfig, role: str) -> Path:
    """Like ``model_directory``, but of a hub model that is not here, all but the weights is downloaded.

    Raises:
        ConfigError, DataError: as there.
    """
    if model_is_here(workspace, config) or not is_hub_name(config.model):
        return model_directory(workspace, config, role)
    return _download(config.model, role, DESCRIPTION_PATTERNS)


def is_hub_name(name: str) -> bool:
    """True if a model that is not a folder may be one of the Hugging Face hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "models/"))


def _downloaded(name: str) -> bool:
    from huggingface_hub import snapshot_download  # only where a hub model is used
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return False
    return any(folder.glob("*.safetensors"))


def _download(name: str, role: str, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    from huggingface_hub import snapshot_download  # only where a hub model is used

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        raise ConfigError(
            f"{role}.model = {name!r} cannot be fetched from the Hugging Face hub: {error}"
        ) from error
