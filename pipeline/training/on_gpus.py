"""Training with a process per GPU, from a process that itself only starts and watches them."""

from __future__ import annotations

from tropd.pipeline.run.processes.gpus import run_ranks
from tropd.pipeline.run.processes.ranks_on_ray import run_ranks_on_ray
from tropd.pipeline.run.processes.together import tropd_command
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.upstream import finished
from tropd.pipeline.training.loop import train
from tropd.pipeline.training.setup import check_processes
from tropd.pipeline.training.train_stage import STAGE
from tropd.storage.stage.manifest import Manifest


def train_on(run: Run, gpus: int, *, force: bool = False) -> Manifest:
    """``train`` here where one GPU is given, else in a process per GPU, whose output is in the logs of the workspace.

    Raises:
        ConfigError: see ``check_processes``.
        InterruptedStageError, TropdError: see ``train`` and ``run_together``.
    """
    if gpus == 1:
        return train(run, force=force)
    check_processes(run.config, gpus)
    command = tropd_command(STAGE, run.workspace.root, run.assignments, *(["--force"] if force else []))
    logs = run.workspace.logs
    with run.reporter.waiting(f"training in {gpus} processes; {logs / 'train-rank-0.log'} has the progress"):
        run_ranks(command, gpus, logs, STAGE, shown=False)
    return finished(run, STAGE)


def train_with_ray(run: Run, processes: int, *, force: bool = False) -> Manifest:
    """The same in processes on a Ray cluster, one per GPU.

    Raises:
        ConfigError: see ``check_processes`` and ``run_ranks_on_ray``.
        InterruptedStageError, TropdError: see ``train`` and ``run_together``.
    """
    check_processes(run.config, processes)
    options = ["--force"] if force else []
    command = tropd_command(STAGE, run.workspace.root.absolute(), run.assignments, *options)
    logs = run.workspace.logs.absolute()
    with run.reporter.waiting(
        f"training in {processes} processes on Ray; {logs}/train-rank-0.log has the progress"
    ):
        run_ranks_on_ray(command, processes, logs, STAGE, run.config.runtime.device)
    return finished(run, STAGE)


def show_training_on(run: Run, gpus: int, *, force: bool = False, as_json: bool = False) -> int:
    """The same for the command line, with the first process at the terminal; returns its exit code.

    Raises:
        ConfigError: see ``check_processes``.
        TropdError: another process has failed.
    """
    check_processes(run.config, gpus)
    options = [*(["--force"] if force else []), *(["--json"] if as_json else [])]
    command = tropd_command(STAGE, run.workspace.root, run.assignments, *options)
    return run_ranks(command, gpus, run.workspace.logs, STAGE, shown=True)
