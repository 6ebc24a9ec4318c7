"""Export of the trained student with a model card, to a folder or to the Hugging Face hub."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tropd.pipeline.config.resolve import config_text
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.directories import is_hub_name, model_directory, model_is_here
from tropd.pipeline.report.data.collect import build_report
from tropd.pipeline.report.page.card import README, BaseModel, describe_base, render_card
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.teacher.by_domain import teachers_in_use, with_only
from tropd.pipeline.training.record.final_model import FINAL
from tropd.storage.disk.atomic import atomic_directory, write_text_atomic
from tropd.storage.errors import ConfigError, TropdError
from tropd.storage.stage.manifest import Manifest, check_shard

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def export_to(run: Run, folder: Path) -> Path:
    """Write the trained student and its card to a folder that does not exist yet, or is empty.

    Raises:
        ConfigError: the folder is not empty.
        TropdError: training is not finished.
        DamagedShardError: the student is not as training left it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty", hint="name a folder that does not exist yet")
    source, card = _source(run), _card(run)
    with run.reporter.waiting(f"copying the student to {folder}"), atomic_directory(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        write_text_atomic(temporary / README, card)
    return folder


def push(run: Run, repository: str, *, public: bool = False) -> str:
    """Upload the trained student and its card to the Hugging Face hub; returns the page's address.

    The repository is made if it is missing, private unless ``public``; an existing one keeps its visibility.

    Raises:
        ConfigError: the name is invalid, or no token is set (``HF_TOKEN``, or that of ``hf auth login``).
        TropdError: training is not finished, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    if not HUB_NAME.fullmatch(repository):
        raise ConfigError(f"{repository!r} is not a name on the hub", hint="such as owner/name")
    token = get_token()
    if token is None:
        raise ConfigError(
            "pushing needs a token of the Hugging Face hub, and none is set",
            hint="set HF_TOKEN in the environment (https://huggingface.co/settings/tokens)",
        )
    source, card = _source(run), _card(run)
    hub = HfApi(token=token)
    with run.reporter.waiting(f"uploading the student to {repository}"):
        try:
            address = str(hub.create_repo(repository, private=not public, exist_ok=True))
            # The card last, so that its readers find the model that it describes.
            hub.upload_folder(
                repo_id=repository, folder_path=source, commit_message="tropd export: the student"
            )
            hub.upload_file(
                repo_id=repository,
                path_or_fileobj=card.encode(),
                path_in_repo=README,
                commit_message="tropd export: its card",
            )
        except Exception as error:  # of the hub's client, of HTTP, of the network
            raise TropdError(
                f"{repository} cannot be pushed: {error}", hint="run the same command again to resume"
            ) from error
    return address


def _source(run: Run) -> Path:
    manifest = finished(run, "train")
    folder = run.workspace.stage("train")
    check_shard(folder, manifest.shards[FINAL])
    return folder / FINAL


def _card(run: Run) -> str:
    manifest = finished(run, "train")
    path = run.workspace.config_path
    return render_card(
        build_report(run.workspace),
        run.config,
        config_text(path, str(path)),
        manifest,
        _base(run, "student", run.config.student, manifest),
        [
            _base(run, "teacher", with_only(run, name).config.teacher, manifest, name)
            for name in teachers_in_use(run)
        ],
    )


def _base(run: Run, role: str, settings: ModelConfig, manifest: Manifest, domain: str = "") -> BaseModel:
    """A model of the run; its own card is left out where it is on another machine."""
    here = model_is_here(run.workspace, settings)
    weights = manifest.fields.get(f"{role}.{domain}.weights" if domain else f"{role}.weights")
    return describe_base(
        f"{role} of {domain}" if domain else role,
        settings.model,
        model_directory(run.workspace, settings, role) if here else None,
        on_hub=is_hub_name(settings.model) and not run.workspace.resolve(settings.model).exists(),
        weights=str(weights) if weights else None,
    )
