"""Running a stage in shards: find the missing ones, make them here or elsewhere, complete the stage.

A shard depends on the run and on its own number only, so the outputs are the same bytes wherever they are made: in this
process, the jobs of an array (``--shards i/n``, see ``storage.stage.job_parts``), or workers of Ray (``shards_on_ray``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tropd.pipeline.run.identity import tell_unrecorded
from tropd.pipeline.run.processes.gpus import run_parts
from tropd.pipeline.run.processes.together import tropd_command
from tropd.pipeline.run.progress import Task
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.shard_work import ShardSpec, Work
from tropd.storage.errors import ConfigError, StageLockedError
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.job_parts import gather, made_shards, part_folder, remove_parts
from tropd.storage.stage.manifest import Manifest, read_manifest
from tropd.storage.stage.stage import Stage, open_stage, refuse_other_settings
from tropd.storage.workspace import stage_kind


@dataclass(frozen=True)
class Part:
    """Job ``index`` of ``count``, counted from 1: it makes every ``count``-th shard."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From ``i/n``.

        Raises:
            ConfigError: it is not of that form, or not 1 ≤ i ≤ n.
        """
        index, _, count = text.partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise ConfigError(f"--shards {text!r} is not i/n with 1 ≤ i ≤ n", hint="as in --shards 3/8")


@dataclass(frozen=True)
class Execution:
    """Maker and selection of the shards: by default this process makes all of them."""

    part: Part | None = None
    ray_workers: int | None = None
    gpus: int = 1
    """More than one: that many processes make parts at the same time, each on a GPU of its own."""


HERE = Execution()


def run_stage(
    run: Run,
    name: str,
    fingerprint: Fingerprint,
    plan: Callable[[], Work],
    finish: Callable[[Stage], None],
    *,
    execution: Execution = HERE,
    force: bool = False,
) -> Manifest:
    """Make a stage's missing shards. ``plan`` is asked only if something may be missing; ``finish`` completes the stage.

    Returns the stage's manifest; that of a part, incomplete, while other parts are missing.

    Raises:
        TropdError: the stage cannot be opened, or a shard cannot be made.
    """
    folder = run.workspace.stage(name)
    if execution.part is not None:
        if force:
            raise ConfigError(
                "--force and --shards cannot be combined",
                hint=f"move {folder} away first, then start all parts without --force",
            )
        return _run_part(run, name, fingerprint, plan, finish, execution.part)
    with open_stage(folder, name, fingerprint, force=force, timings=run.timings) as stage:
        tell_unrecorded(run, stage)
        if stage.complete:
            run.reporter.info(f"{name}: done before{_described(stage.manifest)}, nothing to do")
            remove_parts(folder)
            return stage.manifest
        work = plan()
        gather(stage, [spec.outputs for spec in work.shards])
        missing = [spec for spec in work.shards if not _has(stage, spec)]
        with _progress(run, work, work.shards, stage) as task:
            if missing and execution.ray_workers is not None:
                from tropd.pipeline.stages.shards_on_ray import make_with_ray

                stage.shared = True
                for spec, rows in make_with_ray(run, work, missing, stage.folder, execution.ray_workers):
                    _commit(stage, spec, rows)
                    task.advance(spec.size)
            else:
                if execution.gpus > 1:
                    _make_on_gpus(run, name, work, stage, missing, execution.gpus, task)
                    missing = [spec for spec in missing if not _has(stage, spec)]
                _make_here(run, work, stage, missing, task)
        finish(stage)
        remove_parts(folder)
        return stage.manifest


def _run_part(
    run: Run,
    name: str,
    fingerprint: Fingerprint,
    plan: Callable[[], Work],
    finish: Callable[[Stage], None],
    part: Part,
) -> Manifest:
    folder = run.workspace.stage(name)
    whole = read_manifest(folder)
    if whole is not None:
        refuse_other_settings(name, folder, whole, fingerprint)
        if whole.complete:
            return run_stage(run, name, fingerprint, plan, finish)
    work = plan()
    own = part_folder(folder, part.index, part.count)
    elsewhere = made_shards(folder, fingerprint.digest, but=own)
    # Of parts nothing is taken on trust: those of an older version would be counted as missing forever.
    with open_stage(own, name, Fingerprint(fingerprint.fields), timings=run.timings) as stage:
        mine = [
            spec
            for spec in work.shards[part.index - 1 :: part.count]
            if _has(stage, spec) or not elsewhere.issuperset(spec.outputs)
        ]
        with _progress(run, work, mine, stage) as task:
            _make_here(run, work, stage, [spec for spec in mine if not _has(stage, spec)], task)
        manifest = stage.manifest
    made = made_shards(folder, fingerprint.digest)
    missing = sum(not made.issuperset(spec.outputs) for spec in work.shards)
    if missing:
        run.reporter.info(
            f"{name}: part {part.index}/{part.count} is done, {missing} shards of other parts are missing"
        )
        return manifest
    try:
        return run_stage(run, name, fingerprint, lambda: work, finish)
    except StageLockedError:  # another part finished at the same moment, and completes the stage
        return manifest


def _make_on_gpus(
    run: Run, name: str, work: Work, stage: Stage, missing: Sequence[ShardSpec], gpus: int, task: Task
) -> None:
    """Make shards in parts, in a process per GPU (or per group of them that an engine needs), and gather them."""
    each = _devices_of(run, name)
    parts = min(gpus // each, len(missing))
    if parts < 2:
        return
    stage.shared = True
    known: set[str] = set()

    def tick() -> None:
        made = made_shards(stage.folder, stage.manifest.fingerprint)
        for spec in missing:
            if spec.outputs[0] not in known and made.issuperset(spec.outputs):
                known.add(spec.outputs[0])
                task.advance(spec.size)

    words = stage_kind(name).command.split()
    command = tropd_command(words[0], run.workspace.root, run.assignments, *words[1:])
    run.reporter.info(f"{name}: {parts} processes; their logs are in {run.workspace.logs}")
    run_parts(command, parts, run.workspace.logs, name, devices_each=each, tick=tick)
    gather(stage, [spec.outputs for spec in work.shards])
    tick()


def _devices_of(run: Run, name: str) -> int:
    """GPUs of one engine of a stage."""
    config = run.config
    scores = stage_kind(name).scores_of is not None
    engine = (
        config.teacher.scorer if scores else (config.student if name == "rollouts" else config.teacher).engine
    )
    return config.vllm.tensor_parallel_size if engine == "vllm" else 1


def _make_here(run: Run, work: Work, stage: Stage, missing: Sequence[ShardSpec], task: Task) -> None:
    if not missing:
        return
    maker = work.open_maker(run)
    for spec in missing:
        _commit(stage, spec, maker(spec.number, stage.folder, task.advance))


def _commit(stage: Stage, spec: ShardSpec, rows: dict[str, int]) -> None:
    for output in spec.outputs:
        stage.commit(output, rows[output])


def _has(stage: Stage, spec: ShardSpec) -> bool:
    return all(stage.has(output) for output in spec.outputs)


@contextmanager
def _progress(run: Run, work: Work, shards: Sequence[ShardSpec], stage: Stage) -> Iterator[Task]:
    done = sum(spec.size for spec in shards if _has(stage, spec))
    with run.reporter.task(work.title, sum(spec.size for spec in shards), done=done, unit=work.unit) as task:
        yield task


def _described(manifest: Manifest) -> str:
    known = [f"{manifest.summary[n]} {n}" for n in ("trajectories", "tokens") if n in manifest.summary]
    return f" ({', '.join(known)})" if known else ""
