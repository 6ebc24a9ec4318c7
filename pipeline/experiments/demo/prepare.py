"""The ``prepare`` stage: problems, teacher and student of the demo recipes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.evaluation_settings import DemoConfig
from tropd.pipeline.experiments.demo import smollm2
from tropd.pipeline.experiments.demo.questions import VERSION as QUESTIONS_VERSION
from tropd.pipeline.experiments.demo.questions import Conversation, conversation, draw_questions
from tropd.pipeline.experiments.demo.second_process import SecondProcess
from tropd.pipeline.experiments.demo.task import answer, draw_set
from tropd.pipeline.experiments.demo.tiny_models import train_student, train_teacher
from tropd.pipeline.experiments.demo.tokenizer import make_tokenizer
from tropd.pipeline.run.identity import section_fields
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import atomic_directory, write_text_atomic
from tropd.storage.errors import ConfigError
from tropd.storage.seeds import derive_seed
from tropd.storage.stage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage.manifest import Manifest
from tropd.storage.stage.stage import Stage, open_stage

STAGE = "models"
DATA_STAGE = "data"
# Part of the fingerprint: raise it when the task or the training changes its output.
TASK_VERSION = 1
PATHS = {"teacher.model": "models/teacher", "student.model": "models/student"}
DATA_PATHS = {"data.prompts": "data/train.jsonl", "data.evaluation": "data/eval.jsonl"}

Trainer = Callable[[DemoConfig, int, Callable[[float], None]], Any]


def prepare(run: Run, *, force: bool = False) -> Manifest:
    """Write the problems and train the missing models; returns the finished manifest of the models.

    Raises:
        ConfigError: the recipe is not a demo recipe, or its paths point elsewhere.
    """
    config = run.config
    _check(config)
    _write_problems(run, force)
    folder = run.workspace.stage(STAGE)
    with open_stage(folder, STAGE, fingerprint(run), force=force, timings=run.timings) as stage:
        if stage.complete:
            run.reporter.info("prepare: done before, nothing to do")
            return stage.manifest
        if config.demo.models == "smollm2":
            smollm2.make_models(stage, run.reporter)
        else:
            _train_missing(run, stage)
        stage.finish()
        return stage.manifest


def fingerprint(run: Run) -> Fingerprint:
    """Everything that decides the models."""
    demo = run.config.demo
    if demo.models == "smollm2":
        return Fingerprint(smollm2.fields())
    fields = section_fields("demo", demo)
    return Fingerprint({**fields, "run.seed": run.config.run.seed, "demo.version": TASK_VERSION})


def _check(config: Config) -> None:
    if not config.demo.enabled:
        raise ConfigError(
            "tropd prepare makes the models of the demo recipes, and demo.enabled is false",
            hint="for your own models set teacher.model and student.model, and continue with generate-prefixes",
        )
    given = {
        "teacher.model": config.teacher.model,
        "student.model": config.student.model,
        "data.prompts": config.data.prompts,
        "data.evaluation": config.data.evaluation,
    }
    for field, path in {**PATHS, **DATA_PATHS}.items():
        if given[field] != path:
            raise ConfigError(
                f"{field} = {given[field]!r}, but tropd prepare writes {path!r}", hint=f"leave {field} out"
            )


def _write_problems(run: Run, force: bool) -> None:
    demo = run.config.demo
    counts = {"train": demo.train_problems, "eval": demo.eval_problems}
    fields: dict[str, Scalar] = {
        "run.seed": run.config.run.seed,
        "demo.train_problems": demo.train_problems,
        "demo.eval_problems": demo.eval_problems,
    }
    if demo.models == "smollm2":
        fields |= {"demo.models": demo.models, "demo.version": QUESTIONS_VERSION}
    else:
        ranges = _operations(demo)
        fields |= {"demo.version": TASK_VERSION}
        fields |= {f"demo.{name}_operations": "{} to {}".format(*ranges[name]) for name in counts}
    folder = run.workspace.stage(DATA_STAGE)
    with open_stage(folder, DATA_STAGE, Fingerprint(fields), force=force, timings=run.timings) as stage:
        for name, count in counts.items():
            file = f"{name}.jsonl"
            if not stage.has(file):
                problems = _draw(run, name, count)
                lines = [_line(name, number, *problem) for number, problem in enumerate(problems)]
                write_text_atomic(folder / file, "".join(lines))
                stage.commit(file, rows=len(problems))
        if not stage.complete:
            stage.finish()


def _operations(demo: DemoConfig) -> dict[str, tuple[int, int]]:
    """Fewest and most operations of the arithmetic problems in each file."""
    return {
        "train": (demo.min_operations, demo.train_max_operations or demo.max_operations),
        "eval": (
            demo.eval_min_operations or demo.min_operations,
            demo.eval_max_operations or demo.max_operations,
        ),
    }


def _draw(run: Run, name: str, count: int) -> list[tuple[str | Conversation, str | None]]:
    """The prompts and answers of a file."""
    seed, held_out = derive_seed(run.config.run.seed, "demo", name), name == "eval"
    if run.config.demo.models == "smollm2":
        return [(conversation(q), q.answer) for q in draw_questions(seed, count, held_out=held_out)]
    ranges = _operations(run.config.demo)
    return [(p.prompt, answer(p)) for p in draw_set(seed, count, *ranges[name], held_out=held_out)]


def _line(name: str, number: int, prompt: str | Conversation, expected: str | None) -> str:
    record: dict[str, Any] = {"id": f"{name}-{number:05d}", "prompt": prompt}
    if expected is not None:
        record["answer"] = expected
    return json.dumps(record) + "\n"


def _train_missing(run: Run, stage: Stage) -> None:
    """Train teacher and student; side by side on two cores, with the same result as one after the other."""
    demo, seed = run.config.demo, run.config.run.seed
    steps = {"teacher": demo.teacher_steps, "student": demo.student_steps + demo.spoil_steps}
    missing = [role for role in steps if not stage.has(role)]
    with run.reporter.task("tiny models", sum(steps[r] for r in missing), unit="steps") as task:
        if len(missing) < 2 or (os.cpu_count() or 1) < 2:
            for role in missing:
                train_and_save(role, demo, seed, stage.folder / role, lambda loss: task.advance(1, loss=loss))
                stage.commit(role, rows=steps[role])
            return
        with SecondProcess(
            "student", train_and_save, "student", demo, seed, stage.folder / "student"
        ) as student:

            def keep_if_done() -> None:
                # At once, and not when the teacher is done too: a kill then costs one model less.
                if student.done and not stage.has("student"):
                    stage.commit("student", rows=steps["student"])

            def on_step(loss: float) -> None:
                task.advance(1 + student.take_steps(), loss=loss)
                keep_if_done()

            train_and_save("teacher", demo, seed, stage.folder / "teacher", on_step)
            stage.commit("teacher", rows=steps["teacher"])
            while not stage.has("student"):
                task.advance(student.take_steps(wait=0.2))
                keep_if_done()


def train_and_save(
    role: str, demo: DemoConfig, seed: int, folder: Path, on_step: Callable[[float], None]
) -> None:
    """Train one model and write it as a Hugging Face directory. One thread: the result must not depend on cores."""
    trainers: dict[str, Trainer] = {"teacher": train_teacher, "student": train_student}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = trainers[role](demo, derive_seed(seed, "demo", role), on_step)
    finally:
        torch.set_num_threads(threads)
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        make_tokenizer().save_pretrained(temporary)
