"""``compare``: several objectives, several seeds, one start. Every run is a workspace of its own, resumed by itself.

    W/compare/<objective>/seed-<n>/      a workspace whose models, data, prefixes and scores are W's own (links)
    W/compare/reference/                 the student before, and the teacher
    W/compare/comparison.json            the numbers           W/compare/index.html   the page

All runs of a seed share the student's start, the order of prompts, the cached prefixes and the held-out problems,
so differences between methods are paired.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tropd.pipeline.config.recipe_files import load_objective
from tropd.pipeline.config.resolve import dump_config, load_config, parse_config
from tropd.pipeline.config.schema import Config
from tropd.pipeline.experiments.row_checks import check_engines
from tropd.pipeline.objectives.needs import needed_data, teacher_needs
from tropd.pipeline.run.cells import FOLDER, REFERENCE, Cell
from tropd.pipeline.run.processes.child_environment import become_child, child_environment, device_variables
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import with_template_date
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.stages.evaluation.evaluate import evaluate
from tropd.pipeline.stages.prefixes import generate_rollouts
from tropd.pipeline.stages.scores import score_teacher
from tropd.pipeline.stages.shards import Execution
from tropd.pipeline.teacher.connect import serves_on_one_device
from tropd.pipeline.teacher.local_service import LocalTeacher, serve_command
from tropd.pipeline.training.on_gpus import train_on
from tropd.pipeline.training.preflight.checks import refuse_plan
from tropd.pipeline.training.preflight.preflight import require_room
from tropd.storage.disk.atomic import write_text_atomic
from tropd.storage.errors import ConfigError
from tropd.storage.workspace import CACHE_STAGES, STAGES, Who, Workspace

SHARED = (*(stage.name for stage in STAGES if stage.brought), *CACHE_STAGES, "sft")
"""The shared part of a comparison's runs: everything that is made before training."""


def compare(
    run: Run, objectives: Sequence[str], seeds: int, *, workers: int = 1, gpus: int = 1
) -> list[Cell]:
    """Train and evaluate every objective with every seed; finished cells are kept.

    The base workspace must have the prefixes and scores that an objective needs, complete. Returns the cells, objectives
    in the order given.

    Args:
        workers: runs at the same time, each on one GPU.
        gpus: GPUs to use: all of them for one run after the other, or with several workers spread over these.

    Raises:
        ConfigError: unknown objective, or a base workspace that lacks what one needs.
    """
    if seeds < 1 or workers < 1:
        raise ConfigError("compare needs at least one seed and one worker")
    run = with_template_date(run)
    chosen = list(dict.fromkeys(objectives))
    cells = [Cell(name, run.config.run.seed + s) for name in chosen for s in range(seeds)]
    configs = {cell.objective: cell_config(run, cell) for cell in cells}
    specs = [config.objective for config in configs.values()]
    needed = {folder for spec in specs for folder in needed_data(spec)}
    for folder in ("prefixes", "scores"):
        if folder in needed:
            finished(run, folder)
    whole = gpus if workers == 1 else 1
    refuse_plan(check_engines(run, configs), "this comparison")
    require_room(run, whole, 0)
    for config in configs.values():  # one that needs more would be refused after days, at its turn
        require_room(replace(run, resolved=replace(run.resolved, config=config), reporter=SILENT), whole, 0)
    if any(spec.rollouts == "stored" for spec in specs):
        generate_rollouts(run, execution=Execution(gpus=gpus))
        score_teacher(run, source_stage="rollouts", execution=Execution(gpus=gpus))
    _evaluate_reference(run, gpus)
    with ExitStack() as stack:
        url = None  # of the service that is started here; another is in the cells' configurations
        # Several processes of one run start their own.
        if (
            whole == 1
            and not run.config.teacher.urls
            and any(teacher_needs(s).token_logprobs and s.rollouts == "student" for s in specs)
        ):
            engine = (
                ('teacher.scoring_engine="transformers"',)
                if any(teacher_needs(s).beyond_vllm for s in specs)
                else ()
            )
            command = serve_command(run.workspace.root, (*run.assignments, *engine))
            log = run.workspace.logs / "teacher-service.log"
            url = stack.enter_context(LocalTeacher(command, log, one_device=serves_on_one_device(run))).wait()
        jobs = [(_cell_workspace(run, cell).root, url, whole) for cell in cells]
        with run.reporter.task("compare", len(jobs), unit="runs") as task:
            for done in _each(jobs, workers, gpus):
                task.advance(1, last=str(done.relative_to(run.workspace.root / FOLDER)))
    return cells


def _each(jobs: Sequence[tuple[Path, str | None, int]], workers: int, gpus: int) -> Iterator[Path]:
    """Run the jobs, yielding each as it is done; with one worker in this process, so that Ctrl-C saves its state.

    Several workers have a GPU each, in turn.
    """
    if workers == 1:
        yield from (_run_cell(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    size = min(workers, len(jobs))
    devices = context.SimpleQueue()
    for number in range(size):
        devices.put(number % gpus)
    with ProcessPoolExecutor(size, context, use_one_gpu, (devices,)) as pool:
        futures = [pool.submit(_run_cell, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def use_one_gpu(devices: Any) -> None:
    """In a worker that starts: the next GPU is its only one."""
    become_child(child_environment(one_device=False) | device_variables(devices.get()))


def cell_config(run: Run, cell: Cell) -> Config:
    """The base configuration with this cell's objective and seed; overrides of the base objective are dropped,
    but for ``k``, which is a budget and not a method.

    A teacher in vLLM does not give all that an objective may need: for one that needs more it scores outside of vLLM.
    """
    objective = load_objective(cell.name, {"k": run.config.objective.k})
    teacher = run.config.teacher
    if teacher_needs(objective).beyond_vllm and not teacher.urls:
        teacher = teacher.model_copy(update={"scoring_engine": "transformers"})
    plain = run.config.model_copy(
        update={
            "objective": objective,
            "run": run.config.run.model_copy(update={"seed": cell.seed}),
            "teacher": teacher,
        }
    )
    return parse_config(dump_config(plain), cell.assignments, where=f"compare/{cell.objective}").config


def _cell_workspace(run: Run, cell: Cell) -> Workspace:
    """Make or open a cell's workspace. Its configuration is written anew: a changed one is refused by the stage."""
    workspace = Workspace.create(cell.folder(run.workspace.root))
    link_shared(run.workspace, workspace)
    write_text_atomic(workspace.config_path, dump_config(cell_config(run, cell)))
    return workspace


def link_shared(base: Workspace, workspace: Workspace) -> None:
    """Give a workspace the inputs of another, as links."""
    for name in SHARED:
        target, link = base.stage(name), workspace.stage(name)
        if target != workspace.root and target.exists() and not link.is_symlink():
            link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def _run_cell(root: Path, url: str | None, gpus: int) -> Path:
    """Train and evaluate one cell (in a worker process where there are several), on so many GPUs."""
    workspace = Workspace.open(root)
    overrides = (f'teacher.url="{url}"',) if url else ()
    resolved = load_config(workspace.config_path, overrides)
    cell = Run(workspace, resolved, SILENT, overrides)
    train_on(cell, gpus)
    evaluate(cell, whom=("after",), execution=Execution(gpus=gpus))
    return root


def _evaluate_reference(run: Run, gpus: int) -> None:
    workspace = Workspace.create(run.workspace.root / FOLDER / REFERENCE)
    link_shared(run.workspace, workspace)
    write_text_atomic(workspace.config_path, dump_config(run.config))
    whom: tuple[Who, ...] = ("before", "teacher")
    reference = replace(run, workspace=workspace)
    evaluate(reference, whom=whom, execution=Execution(gpus=gpus))
