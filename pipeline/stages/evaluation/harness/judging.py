"""Questions of benchmarks that lighteval judges, fetched into files, and its marks of the responses to them.

``data/x.jsonl`` has the questions, ``data/x.records.jsonl`` their solutions or tests. Once both are there, neither the
hub nor its cache is asked again. Responses are written and kept like those to any other benchmark; all of a model's
are judged at once, as they are joined into one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from tropd.pipeline.config.schema import Config
from tropd.pipeline.config.sections.evaluation_settings import Benchmark
from tropd.pipeline.problems.grading.math_answers import without_thinking
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.evaluation.harness.environment import (
    FETCHING_SECONDS,
    call_driver,
    require_environment,
)
from tropd.pipeline.stages.evaluation.lm_eval import ISOLATED, can_isolate
from tropd.pipeline.stages.evaluation.responses import SCHEMA
from tropd.storage.disk.atomic import content_digest
from tropd.storage.errors import ConfigError, DataError
from tropd.storage.stage.fingerprint import Scalar

RECORD = "record"
"""Field of a question: the digest of its record."""


def records_file(problems: Path) -> Path:
    """The file of solutions or tests beside that of the questions."""
    return problems.with_suffix(".records.jsonl")


def judged(config: Config) -> dict[str, Benchmark]:
    """The benchmarks to be measured that lighteval judges, by name."""
    return {one.name: one for one in config.benchmarks if one.lighteval is not None}


def judged_fields(run: Run) -> dict[str, Scalar]:
    """Fingerprint fields of judging; lighteval's version is in the questions' file, which is one too."""
    fields: dict[str, Scalar] = {}
    for name, one in judged(run.config).items():
        assert one.lighteval is not None
        file = run.workspace.resolve(one.lighteval.module)
        module = content_digest(file) if file.is_file() else one.lighteval.module
        fields[f"benchmark.{name}.lighteval.module"] = module
        fields[f"benchmark.{name}.lighteval.task"] = one.lighteval.task
        fields[f"benchmark.{name}.lighteval.metric"] = one.lighteval.metric
    return fields


def fetch_questions(run: Run, *, force: bool = False) -> list[str]:
    """Write the files of benchmarks that lack them; returns the questions' files that were written.

    Raises:
        ConfigError: no environment, a gated dataset, no network, or no such task.
        TropdError: lighteval failed.
    """
    made = []
    for name, one in judged(run.config).items():
        target = run.workspace.resolve(one.problems)
        if target.exists() and records_file(target).exists() and not force:
            run.reporter.info(f"fetch: {one.problems} exists")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent) as scratch:
            asked, kept = Path(scratch, "questions"), Path(scratch, "records")
            with run.reporter.waiting(f"fetch: {one.problems}, from lighteval's dataset"):
                call_driver(
                    name,
                    ["questions", _wanted(run, one), str(asked), str(kept)],
                    seconds=FETCHING_SECONDS,
                    log=_log(run, name, "questions"),
                )
            os.replace(kept, records_file(target))
            os.replace(asked, target)
        made.append(one.problems)
    return made


def check_judges(run: Run) -> None:
    """Refuse benchmarks that could not be judged, before any model is loaded, and tell of those left out.

    Raises:
        ConfigError: no environment, or code cannot be isolated here.
        DataError: the records of the questions are missing.
    """
    for one in run.config.evaluation.benchmarks:
        if one not in run.config.benchmarks:
            run.reporter.warning(
                f"{one.name} is left out: it runs code that the model wrote; evaluation.allow_code = true measures it"
            )
    for name, one in judged(run.config).items():
        require_environment(name)
        path = records_file(run.workspace.resolve(one.problems))
        if not path.is_file():
            raise DataError(
                f"benchmark {name!r}: {path} does not exist",
                hint="tropd fetch makes it and the questions; copy both where there is no network",
            )
        if one.runs_code and not can_isolate():
            raise ConfigError(
                f"{name} runs code that the model wrote, which needs a process without network; "
                f"`{' '.join(ISOLATED)} true` does not work here",
                hint="allow user namespaces on this machine, evaluate in a container without network, or set "
                "evaluation.allow_code = false",
            )


def judge(run: Run, name: str, who: str, responses: pa.Table) -> pa.Table:
    """The responses with lighteval's marks; those to other benchmarks as they are.

    Args:
        responses: to a set of problems, in the columns of ``SCHEMA``.

    Raises:
        TropdError: lighteval failed, or did not end in ``evaluation.judging_seconds``; the responses are kept.
    """
    one = judged(run.config).get(name)
    if one is None or not len(responses):
        return responses
    target = run.workspace.resolve(one.problems)
    digests = _digests(target)
    with TemporaryDirectory() as scratch:
        given, marks = Path(scratch, "responses"), Path(scratch, "verdicts")
        given.write_text("".join(_asked(responses, digests)), encoding="utf-8")
        with run.reporter.waiting(f"evaluate {who}: lighteval judges {name}"):
            call_driver(
                name,
                ["judge", _wanted(run, one), str(records_file(target)), str(given), str(marks)],
                seconds=run.config.evaluation.judging_seconds,
                log=_log(run, name, who),
                isolated=one.runs_code,
                variables={"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        correct = [line == "1" for line in marks.read_text(encoding="utf-8").split()]
    if len(correct) != len(responses):
        raise DataError(f"lighteval judged {len(correct)} of {len(responses)} responses to {name}")
    columns = {"correct": correct, "answer": [None] * len(correct)}
    for field, values in columns.items():
        place = SCHEMA.get_field_index(field)
        column = pa.array(values, SCHEMA.field(place).type)
        responses = responses.set_column(place, SCHEMA.field(place), column)
    return responses


def _digests(questions: Path) -> Mapping[str, str]:
    with questions.open(
        encoding="utf-8", newline="\n"
    ) as lines:  # not by str.splitlines, which knows other ends
        rows = [json.loads(line) for line in lines]
    return {row["id"]: row[RECORD] for row in rows}


def _asked(responses: pa.Table, digests: Mapping[str, str]) -> Iterator[str]:
    columns = responses.select(["prompt_id", "response"]).to_pydict()
    for prompt, text in zip(columns["prompt_id"], columns["response"], strict=True):
        # A template may open the thinking itself: lighteval takes out only what is opened in the response.
        yield json.dumps({RECORD: digests[prompt], "response": without_thinking(text)}) + "\n"


def _wanted(run: Run, benchmark: Benchmark) -> str:
    task = benchmark.lighteval
    assert task is not None
    file = run.workspace.resolve(task.module)
    module = str(file.resolve()) if file.is_file() else task.module
    return json.dumps({"task": task.task, "module": module, "metric": task.metric})


def _log(run: Run, name: str, what: str) -> Path:
    return run.workspace.logs / "lighteval" / f"{name}-{what}.log"
