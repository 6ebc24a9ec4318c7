"""Commands on prompts: fetch them, and compare them with the evaluation problems."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from tropd.cli.options import JsonOption, SetOption, WorkspaceOption, open_workspace
from tropd.cli.render import print_json, print_table, say

EXAMPLES = 5


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("fetch")(fetch)
    app.command("contamination")(contamination)


def fetch(
    workspace: WorkspaceOption,
    settings: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Rewrite files that already exist.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the prompt files from data.sources (Hugging Face datasets or local files), and lighteval's questions."""
    from tropd.pipeline.stages.evaluation.harness.judging import fetch_questions, judged
    from tropd.pipeline.stages.fetch import fetch_sources
    from tropd.storage.errors import ConfigError

    run = open_workspace(workspace, settings)
    if not run.config.data.sources and not judged(run.config):
        raise ConfigError("data.sources is empty", hint="docs/data.md lists the possible sources")
    made = fetch_sources(run, run.config.data.sources, force=force)
    made |= {file: {"judge": "lighteval"} for file in fetch_questions(run, force=force)}
    if as_json:
        print_json(made)
        return
    rows = [
        (file, part["domain"], part["dataset"], part["found"], part["prompts"])
        for file, record in made.items()
        for part in record.get("parts", ())
    ]
    print_table(("file", "domain", "dataset", "found", "used"), rows)


def contamination(
    workspace: WorkspaceOption,
    words: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of consecutive words that count (default: data.decontaminate, or 13)."
        ),
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List training prompts that share a stretch of words with an evaluation problem; changes nothing."""
    from tropd.pipeline.problems.decontaminate import USUAL_WORDS, find_overlaps

    run = open_workspace(workspace, settings)
    n = words or run.config.data.decontaminate or USUAL_WORDS
    found, compared = find_overlaps(run.workspace, run.config, n)
    if as_json:
        print_json({"words": n, "compared": compared, "overlaps": [vars(o) for o in found]})
        return
    say(f"{len(found)} of {compared} training prompts share {n} words with an evaluation problem")
    if not found:
        return
    counts = Counter(overlap.benchmark for overlap in found)
    print_table(("evaluation set", "prompts"), counts.most_common())
    rows = [(o.prompt, o.line, o.benchmark, o.problem, o.words) for o in found[:EXAMPLES]]
    print_table(("prompt", "line", "evaluation set", "problem", "shared words"), rows)
    if run.config.data.decontaminate is None:
        say(f"data.decontaminate = {n} leaves them out")
