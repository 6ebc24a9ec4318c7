"""The command that makes a workspace."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import Annotated

import typer

from tropd.cli.options import SetOption, SkipBadOption, with_skip_bad
from tropd.cli.render import make_reporter, print_table, say


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("init")(init)


def init(
    workspace: Annotated[Path, typer.Argument(help="Directory to make.", metavar="DIR")],
    teacher: Annotated[str, typer.Option(help="Teacher model: a directory, or a name on the hub.")] = "",
    student: Annotated[str, typer.Option(help="Student model, with the same tokenizer.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: JSON lines, JSON, Parquet or CSV, one prompt a record.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Problems to evaluate on; if not given, some prompts are held out.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="Method (tropd objectives lists them).")] = None,
    prompt_field: Annotated[
        str | None, typer.Option(help="Field with the prompt; detected if not given.")
    ] = None,
    answer_field: Annotated[
        str | None, typer.Option(help="Field with the answer; detected if not given.")
    ] = None,
    settings: SetOption = None,
    skip_bad: SkipBadOption = False,
    measure: Annotated[
        bool, typer.Option(help="Load the models for seconds, to measure the time of answers and steps.")
    ] = True,
    recipe: Annotated[
        str | None,
        typer.Option(help="Packaged recipe to start from, instead of your own models.", show_default=False),
    ] = None,
) -> None:
    """Make a workspace for your own models (--teacher, --student, --prompts), or from a packaged recipe (--recipe)."""
    from tropd.storage.errors import ConfigError
    from tropd.storage.workspace import Workspace

    own = (teacher, student, prompts)
    if recipe is not None and not any((*own, evaluation, objective, prompt_field, answer_field, settings)):
        _init_recipe(workspace, recipe)
        return
    if recipe is not None or not all(own):
        folder = shlex.quote(str(workspace))
        raise ConfigError(
            "tropd init takes --teacher, --student and --prompts for your own models, or else --recipe alone",
            hint=f"tropd init {folder} --teacher /models/large --student /models/small --prompts prompts.jsonl\n"
            f"  → tropd init {folder} --recipe demo",
        )
    from tropd.pipeline.experiments.starting.draft import Request
    from tropd.pipeline.experiments.starting.start import start_run

    assert prompts is not None
    request = Request(
        workspace=Workspace(workspace),
        teacher=_model_name(teacher),
        student=_model_name(student),
        prompts=prompts.absolute(),
        evaluation=None if evaluation is None else evaluation.absolute(),
        objective=objective,
        prompt_field=prompt_field,
        answer_field=answer_field,
        assignments=tuple(with_skip_bad(settings, skip_bad)),
        measures=measure,
    )
    draft = start_run(request, make_reporter())
    rows = [(c.path, str(c.value), c.why) for c in draft.choices]
    print_table(("setting", "value", "why"), rows)
    for note in draft.notes:
        say(note)
    made = request.workspace
    say(f"made {made.config_path}; next: {made.command('run')}, then {made.command('report')}")


def _model_name(given: str) -> str:
    """A directory as an absolute path; a name on the hub as it is."""
    folder = Path(given).expanduser()
    return str(folder.absolute()) if folder.exists() else given


def _init_recipe(workspace: Path, recipe: str) -> None:
    from tropd.pipeline.config.recipe_files import dated_recipe, recipe_text
    from tropd.pipeline.config.resolve import parse_config
    from tropd.pipeline.experiments.starting.start import refuse_existing
    from tropd.storage.disk.atomic import write_text_atomic
    from tropd.storage.workspace import Workspace

    text = recipe_text(recipe)
    parse_config(text, where=f"recipe {recipe}")
    made = Workspace.create(workspace)
    refuse_existing(made)
    write_text_atomic(made.config_path, dated_recipe(text, datetime.date.today()))
    say(f"made {made.config_path} from recipe {recipe!r}")
