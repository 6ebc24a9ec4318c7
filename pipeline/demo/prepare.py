"""The ``prepare`` stage: problems, teacher and student of the demo recipes."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tropd.pipeline.config import Config, DemoConfig
from tropd.pipeline.context import Run, section_fields
from tropd.pipeline.demo.task import Problem, answer, draw_set
from tropd.pipeline.demo.tiny_models import train_student, train_teacher
from tropd.pipeline.demo.tokenizer import make_tokenizer
from tropd.storage.atomic import atomic_directory, write_text_atomic
from tropd.storage.errors import ConfigError
from tropd.storage.fingerprint import Fingerprint, Scalar
from tropd.storage.manifest import Manifest
from tropd.storage.seeds import derive_seed
from tropd.storage.stage import Stage, open_stage

STAGE = "models"
DATA_STAGE = "data"
# Part of the fingerprint: raise it when the task or the training changes what they produce.
TASK_VERSION = 1
PATHS = {"teacher.model": "models/teacher", "student.model": "models/student"}
DATA_PATHS = {"data.prompts": "data/train.jsonl", "data.evaluation": "data/eval.jsonl"}

# Fields that decide the problems, but not the models.
DATA_ONLY = {
    "enabled",
    "train_problems",
    "eval_problems",
    "train_max_operations",
    "eval_min_operations",
    "eval_max_operations",
}

Trainer = Callable[[DemoConfig, int, Callable[[float], None]], Any]


def prepare(run: Run, *, force: bool = False) -> Manifest:
    """Write the problems and train what is missing; returns the finished manifest of the models.

    Raises:
        ConfigError: the recipe is not a demo recipe, or its paths point elsewhere.
    """
    config = run.config
    _check(config)
    _write_problems(run, force)
    fields = section_fields("demo", config.demo, without=DATA_ONLY)
    fingerprint = Fingerprint({**fields, "run.seed": config.run.seed, "demo.version": TASK_VERSION})
    folder = run.workspace.stage(STAGE)
    with open_stage(folder, STAGE, fingerprint, force=force, timings=run.timings) as stage:
        if stage.complete:
            run.reporter.info("prepare: done before, nothing to do")
            return stage.manifest
        _train_missing(run, stage)
        stage.finish()
        return stage.manifest


def _check(config: Config) -> None:
    if not config.demo.enabled:
        raise ConfigError(
            "tropd prepare makes the tiny models of the demo recipes, and demo.enabled is false",
            hint="for your own models set teacher.model and student.model, and go on with generate-prefixes",
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
    ranges = {
        "train": (demo.min_operations, demo.train_max_operations or demo.max_operations),
        "eval": (
            demo.eval_min_operations or demo.min_operations,
            demo.eval_max_operations or demo.max_operations,
        ),
    }
    fields: dict[str, Scalar] = {
        "run.seed": run.config.run.seed,
        "demo.version": TASK_VERSION,
        "demo.train_problems": demo.train_problems,
        "demo.eval_problems": demo.eval_problems,
        "demo.train_operations": "{} to {}".format(*ranges["train"]),
        "demo.eval_operations": "{} to {}".format(*ranges["eval"]),
    }
    folder = run.workspace.stage(DATA_STAGE)
    with open_stage(folder, DATA_STAGE, Fingerprint(fields), force=force, timings=run.timings) as stage:
        for name, count in (("train", demo.train_problems), ("eval", demo.eval_problems)):
            file = f"{name}.jsonl"
            if not stage.has(file):
                seed = derive_seed(run.config.run.seed, "demo", name)
                problems = draw_set(seed, count, *ranges[name], held_out=name == "eval")
                write_text_atomic(folder / file, "".join(_line(name, i, p) for i, p in enumerate(problems)))
                stage.commit(file, rows=len(problems))
        if not stage.complete:
            stage.finish()


def _line(name: str, number: int, problem: Problem) -> str:
    record = {"id": f"{name}-{number:05d}", "prompt": problem.prompt, "answer": answer(problem)}
    return json.dumps(record) + "\n"


def _train_missing(run: Run, stage: Stage) -> None:
    """Train teacher and student; side by side on two cores, with the same result as one after the other."""
    demo, seed = run.config.demo, run.config.run.seed
    steps = {"teacher": demo.teacher_steps, "student": demo.student_steps + demo.spoil_steps}
    missing = [role for role in steps if not stage.has(role)]
    beside = "student" if len(missing) == 2 and (os.cpu_count() or 1) > 1 else None
    context = multiprocessing.get_context("spawn")
    with run.reporter.task("tiny models", sum(steps[r] for r in missing), unit="steps") as task:
        if beside is None:
            for role in missing:
                train_and_save(role, demo, seed, stage.folder / role, lambda loss: task.advance(1, loss=loss))
                stage.commit(role, rows=steps[role])
            return
        progress = context.Queue()
        with ProcessPoolExecutor(
            1, mp_context=context, initializer=_share_queue, initargs=(progress,)
        ) as pool:
            with _signals_held():
                student = pool.submit(_train_in_child, beside, demo, seed, stage.folder / beside, os.getpid())

            def on_step(loss: float) -> None:
                task.advance(1 + _drain(progress), loss=loss)

            try:
                train_and_save("teacher", demo, seed, stage.folder / "teacher", on_step)
                stage.commit("teacher", rows=steps["teacher"])
                while not student.done():
                    wait([student], timeout=0.2)
                    task.advance(_drain(progress))  # the child cannot end before its progress is read
                student.result()
            except BaseException:
                # Ctrl-C must not wait for the child to finish its work.
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
            stage.commit(beside, rows=steps[beside])
        if rest := _drain(progress):
            task.advance(rest)


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process started meanwhile never sees Ctrl-C, which a terminal sends to the whole group: its parent ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_progress: Any = None


def _share_queue(progress: Any) -> None:
    global _progress
    _progress = progress


def _train_in_child(role: str, demo: DemoConfig, seed: int, folder: Path, parent: int) -> None:
    def on_step(loss: float) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed: nobody waits for this model
        _progress.put(1)

    train_and_save(role, demo, seed, folder, on_step)


def _drain(progress: Any) -> int:
    count = 0
    try:
        while True:
            count += progress.get_nowait()
    except queue.Empty:
        return count


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
