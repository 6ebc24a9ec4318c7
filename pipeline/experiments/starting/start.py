"""Making the workspace of a run on one's own models."""

from __future__ import annotations

from tropd.pipeline.experiments.starting.draft import Draft, Request, draft_run
from tropd.pipeline.run.progress import Reporter
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError
from tropd.storage.workspace import Workspace


def refuse_existing(workspace: Workspace) -> None:
    """Stop if a configuration exists already.

    Raises:
        ConfigError: one exists.
    """
    if workspace.config_path.exists():
        raise ConfigError(
            f"{workspace.config_path} exists already", hint="edit it, or choose another directory"
        )


def start_run(request: Request, reporter: Reporter) -> Draft:
    """Write the workspace: prompts that are held out, and ``config.toml``; nothing before all is checked.

    Raises:
        ConfigError, DataError: see ``draft_run``; or the workspace has a configuration.
    """
    refuse_existing(request.workspace)
    draft = draft_run(request, reporter)
    for path in map(request.workspace.resolve, draft.files):
        if path.exists():
            raise ConfigError(f"{path} exists already", hint="move it away, or name it with --evaluation")
    made = Workspace.create(request.workspace.root)
    for name, text in draft.files.items():
        path = made.resolve(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    write_text_atomic(made.config_path, draft.text())
    return draft
