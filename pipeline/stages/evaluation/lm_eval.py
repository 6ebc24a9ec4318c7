"""Benchmarks of EleutherAI's lm-eval harness (GPQA, MMLU-Redux, IFEval, code, …), run on the models of a run.

The harness runs in its own process on the student's or teacher's directory, with its own engine. A task that runs
the model's own code (HumanEval, MBPP, …) does so in that process, cut off from every network; where that
cannot be done it is refused.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tropd.pipeline.config.sections.evaluation_settings import HarnessTask
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.runtime import pick_device
from tropd.pipeline.run.identity import section_fields
from tropd.pipeline.run.processes.child_environment import child_environment
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import content_digest, write_text_atomic
from tropd.storage.errors import ConfigError, TropdError
from tropd.storage.stage.fingerprint import Scalar

ISOLATED = ("unshare", "--user", "--map-root-user", "--net", "--")
LOG_LINES = 15


@dataclass(frozen=True)
class Metric:
    """One number of a task, as the harness names it."""

    name: str
    value: float
    stderr: float | None


def harness_fields(run: Run) -> dict[str, Scalar]:
    """Fingerprint fields of the tasks: which, how, and the harness's version.

    Raises:
        ConfigError: the library is missing.
    """
    tasks = run.config.evaluation.harness
    if not tasks:
        return {}
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluation.harness ({tasks[0].task}) needs lm-eval, which is not installed",
            hint='pip install "tropd[bench]"',
        )
    fields: dict[str, Scalar] = {"harness.version": version("lm_eval"), "harness.chat": run.config.data.chat}
    for task in tasks:
        fields |= section_fields(f"harness.{task.name}", task)
        if task.folder is not None:
            fields[f"harness.{task.name}.folder"] = content_digest(run.workspace.resolve(task.folder))
    return fields


def check_harness(run: Run) -> None:
    """Refuse tasks that cannot be run, before any model is loaded.

    Raises:
        ConfigError: no such task exists, or code cannot be isolated here.
    """
    for task in run.config.evaluation.harness:
        if task.runs_code and not can_isolate():
            raise ConfigError(
                f"{task.task} runs code that the model wrote, which needs a process without network; "
                f"`{' '.join(ISOLATED)} true` does not work here",
                hint="allow user namespaces on this machine, or evaluate this task in a container without network",
            )
        done = _call(["validate", "--tasks", task.task, *_own_tasks(run, task)])
        if done.returncode:
            raise ConfigError(
                f"evaluation.harness: lm-eval has no task {task.task!r}, or cannot read it:\n{_tail(done)}",
                hint="lm-eval ls tasks lists the tasks that exist; evaluation.harness.folder names a folder of your own",
            )


def run_task(run: Run, task: HarnessTask, role: str, folder: Path, target: Path, log: Path) -> list[Metric]:
    """Run one task on the model in ``folder``; writes the metrics to ``target`` and the output to ``log``.

    Raises:
        TropdError: the harness failed; the end of its log is in the message.
    """
    with TemporaryDirectory() as scratch:
        command = [
            "run",
            *_model_arguments(run, role, folder),
            *_task_arguments(run, task, role),
            "--output_path",
            scratch,
        ]
        done = _call(command, isolated=task.runs_code)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        found = sorted(Path(scratch).rglob("results*.json"))
        if done.returncode or not found:
            offline = (
                "; it has no network, so its dataset has to be in the cache already: lm-eval run --model dummy "
                f"--tasks {task.task} --limit 1"
                if task.runs_code
                else ""
            )
            raise TropdError(
                f"lm-eval failed on {task.task} ({role}):\n{_tail(done)}",
                hint=f"the full output is in {log}{offline}",
            )
        metrics = task_metrics(json.loads(found[-1].read_text(encoding="utf-8")), task.task)
    write_text_atomic(target, json.dumps([vars(metric) for metric in metrics], indent=1) + "\n")
    return metrics


def task_metrics(results: dict[str, Any], task: str) -> list[Metric]:
    """The task's own metrics (of a group, the group's) from a results file of lm-eval.

    Raises:
        TropdError: it has none.
    """
    own = results.get("groups", {}).get(task) or results.get("results", {}).get(task) or {}
    metrics = []
    for key, value in sorted(own.items()):
        name, comma, variant = key.partition(",")
        if (
            not comma
            or name.endswith("_stderr")
            or isinstance(value, bool)
            or not isinstance(value, int | float)
        ):
            continue
        error = own.get(f"{name}_stderr,{variant}")
        label = name if variant == "none" else f"{name} ({variant})"
        metrics.append(Metric(label, float(value), float(error) if isinstance(error, int | float) else None))
    if not metrics:
        raise TropdError(
            f"lm-eval reports no metric for {task!r}", hint=f"it has: {', '.join(own) or 'nothing'}"
        )
    return metrics


def can_isolate() -> bool:
    """True where a process can be started that has no network."""
    if shutil.which(ISOLATED[0]) is None:
        return False
    return subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode == 0


def _model_arguments(run: Run, role: str, folder: Path) -> list[str]:
    settings: ModelConfig = getattr(run.config, role)
    arguments: dict[str, Any] = {"pretrained": folder, "dtype": settings.settled_dtype}
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = True
    if settings.engine == "vllm":
        vllm = run.config.vllm
        arguments |= {
            "tensor_parallel_size": vllm.tensor_parallel_size,
            "gpu_memory_utilization": vllm.gpu_memory_utilization,
        }
        arguments |= {} if vllm.max_model_len is None else {"max_model_len": vllm.max_model_len}
        engine = ["--model", "vllm", "--batch_size", "auto"]
    else:
        device = pick_device(run.config.runtime.device).type
        engine = ["--model", "hf", "--device", device]
    return [*engine, "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]


def _task_arguments(run: Run, task: HarnessTask, role: str) -> list[str]:
    arguments = ["--tasks", task.task, *_own_tasks(run, task), "--seed", str(run.config.run.seed)]
    if getattr(run.config, role).engine != "vllm":
        arguments += ["--batch_size", str(task.batch_size)]
    if task.fewshot is not None:
        arguments += ["--num_fewshot", str(task.fewshot)]
    if task.limit is not None:
        arguments += ["--limit", str(task.limit)]
    if task.generation:
        arguments += ["--gen_kwargs", ",".join(f"{name}={value}" for name, value in task.generation.items())]
    if run.config.data.chat:
        arguments += ["--apply_chat_template"]
    if task.runs_code:
        arguments += ["--confirm_run_unsafe_code"]
    return arguments


def _own_tasks(run: Run, task: HarnessTask) -> list[str]:
    return [] if task.folder is None else ["--include_path", str(run.workspace.resolve(task.folder))]


def _call(arguments: Sequence[str], *, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    command = [*(ISOLATED if isolated else ()), sys.executable, "-m", "lm_eval", *arguments]
    environment = {
        **child_environment(one_device=False),
        **({"HF_ALLOW_CODE_EVAL": "1", "HF_HUB_OFFLINE": "1"} if isolated else {}),
    }
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, errors="replace"
    )


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).splitlines()[-LOG_LINES:]
    return "\n".join(f"    {line}" for line in lines)
