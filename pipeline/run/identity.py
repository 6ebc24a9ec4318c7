"""Fingerprint fields of a stage's inputs beyond settings and weights: prompts as a model sees them, and its stops.

Fields have names that a refusal can show. Some came with later versions: earlier output has no value for them, and
is neither refused nor trusted without a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from tropd.pipeline.config.schema import to_plain
from tropd.pipeline.config.sections.model_settings import ModelConfig
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.loading import (
    check_model,
    load_tokenizer,
    weights_digest,
)
from tropd.pipeline.models.model_files import GENERATION_CONFIG
from tropd.pipeline.models.stops import stop_ids
from tropd.pipeline.models.tokenizers import CHAT_TEMPLATE, tokenizer_identity
from tropd.pipeline.objectives.spec import Spec, field_marks
from tropd.pipeline.problems.encoding import Encoded, token_digest
from tropd.pipeline.run.opening import template_file
from tropd.pipeline.run.run import Run
from tropd.storage.disk.atomic import content_digest
from tropd.storage.stage.fingerprint import Fingerprint, Scalar, flatten
from tropd.storage.stage.manifest import FILE_NAME as MANIFEST
from tropd.storage.stage.stage import Stage

AS_TOKENS = " as token ids"
IMPORTANCE_CLIP = "train.importance_clip"
RECENT = (
    AS_TOKENS,
    "data.template_date",
    "data.domain_field",
    "evaluation.grading_rules",
    "evaluation.distance_prompts",
    "evaluation.distance_teacher",
    ".stop_ids",
    ".generation_config",
    ".chat_template",
    IMPORTANCE_CLIP,
)
"""Ends of names of fields that fingerprints have not always had."""
LATER: Mapping[str, Scalar] = {
    "topk_fkl.entry_clip": None,
    "topk_rkl.support": "tail",
    "topk_rkl.stop_gradient": False,
    "topk_rkl.sample_corrected": False,
    "objective.schedule.unit": "tokens",
    "objective.alternatives": "teacher",
}
"""Settings (of an estimator, under its name) that came with later versions, recorded only where they are not this: what
earlier versions did."""
OF_MODEL = (".weights", ".tokenizer", ".stop_ids", ".generation_config", ".chat_template")
"""Ends of names of fields that a model's folder decides."""


def token_fields(encoded: Encoded, name: str) -> dict[str, Scalar]:
    """Fingerprint fields of prompts as a model reads them.

    Args:
        name: of the setting that they come from, such as ``data.prompts``.
    """
    fields: dict[str, Scalar] = {f"{name}{AS_TOKENS}": token_digest(encoded.prompts)}
    if encoded.date is not None:
        fields["data.template_date"] = encoded.date.isoformat()
    return fields


def template_fields(run: Run, role: str) -> dict[str, Scalar]:
    """Fingerprint fields of a role's chat template: none where it is its tokenizer's own, without arguments."""
    settings: ModelConfig = getattr(run.config, role)
    fields: dict[str, Scalar] = {}
    if settings.chat_template_args:
        fields[f"{role}.chat_template_args"] = json.dumps(settings.chat_template_args, sort_keys=True)
    if (path := template_file(run, role)) is not None:
        fields[f"{role}.chat_template_file"] = content_digest(path)
    return fields


def stop_fields(run: Run, role: str, folder: Path | None = None) -> dict[str, Scalar]:
    """Fingerprint fields of where a role's responses end (see ``stop_ids``)."""
    return {f"{role}.stop_ids": json.dumps(sorted(stop_ids(run.workspace, run.config, role, folder)))}


def harness_model_fields(run: Run, role: str, folder: Path | None = None) -> dict[str, Scalar]:
    """Fingerprint fields of the parts of a model that lm-eval reads besides its weights."""
    settings: ModelConfig = getattr(run.config, role)
    folder = folder or model_directory(run.workspace, settings, role)
    generation = folder / GENERATION_CONFIG
    fields: dict[str, Scalar] = {
        f"{role}.generation_config": content_digest(generation) if generation.is_file() else None
    }
    if run.config.data.chat:
        tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
        fields[f"{role}.chat_template"] = tokenizer_identity(tokenizer).parts[CHAT_TEMPLATE]
    return fields


def fingerprint_of(run: Run, fields: Mapping[str, Scalar]) -> Fingerprint:
    """A fingerprint that also fits the output of older versions, which recorded less."""
    return Fingerprint(
        fields,
        recent=[name for name in fields if name.endswith(RECENT)],
        sources={name: _source(run, name) for name in fields},
    )


def _source(run: Run, name: str) -> str:
    """The file or folder that decides a field, or where its setting comes from; empty where that is not one place."""
    parts = name.removesuffix(AS_TOKENS).split(".")
    if parts[0] == "upstream":
        return f"{parts[-1]}/{MANIFEST}"
    if parts[-1] == "stop_ids" and run.config.rollout.stop_ids is not None:
        return run.resolved.origins.of(("rollout", "stop_ids"))
    if parts[-2:] == ["student", "stop_ids"]:
        models = [run.config.student, run.config.teacher, *run.config.teacher.by_domain]
        return " or ".join(dict.fromkeys(str(own.model) for own in models))
    if name.endswith(OF_MODEL):
        if parts[0] == "after":
            return "train/final"
        role = next((part for part in reversed(parts) if part in ("student", "teacher")), None)
        if role is None or (role == "teacher" and run.config.teacher.by_domain):
            return ""
        return str(getattr(run.config, role).model)
    files = run.config.problem_files.get(parts[1] if parts[0] == "benchmark" else "")
    if files is not None and parts[-2:] in (["data", "prompts"], ["data", "evaluation"]):
        return str(getattr(files, parts[-1]))
    return run.resolved.origins.of(tuple(parts))


def tell_unrecorded(run: Run, stage: Stage) -> None:
    """Warn where a stage was begun by a version that recorded less of its inputs."""
    if stage.unrecorded:
        run.reporter.warning(
            f"{stage.folder} was begun by an older version of tropd, which did not record {', '.join(stage.unrecorded)}: "
            "its contents are assumed to match the values of today; --force makes it anew"
        )


def engine_fields(run: Run, role: str) -> dict[str, Scalar]:
    """Fingerprint fields of the engine that runs a role: its numerics differ in the last digits."""
    settings: ModelConfig = getattr(run.config, role)
    if settings.engine == "transformers":
        return {}
    quantization = run.config.vllm.quantization
    return {f"{role}.engine": settings.engine} | (
        {"vllm.quantization": quantization} if quantization is not None else {}
    )


def model_fields(run: Run, role: str, folder: Path | None = None) -> dict[str, Scalar]:
    """Fingerprint fields of a model: weights, tokenizer, precision. A model that is not whole has none.

    Raises:
        ConfigError, DataError: see ``check_model``.
    """
    settings: ModelConfig = getattr(run.config, role)
    folder = folder or model_directory(run.workspace, settings, role)
    tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    check_model(folder, tokenizer, trust_remote_code=settings.trust_remote_code)
    with run.reporter.waiting(f"reading the weights of the {role} in {folder}"):
        digest = weights_digest(folder)
    return {
        f"{role}.weights": digest,
        f"{role}.tokenizer": tokenizer_identity(tokenizer).digest,
        f"{role}.dtype": settings.settled_dtype,
    }


def section_fields(section: str, spec: Spec, *, also: Collection[str] = ()) -> dict[str, Scalar]:
    """Fingerprint fields of a configuration section: those without a mark (see ``FieldMark``), and ``also`` these."""
    marked = field_marks(type(spec))
    fields = flatten(section, {k: v for k, v in to_plain(spec).items() if k in also or k not in marked})
    return {name: value for name, value in fields.items() if not _as_before(name, fields)}


def _as_before(name: str, fields: Mapping[str, Scalar]) -> bool:
    table, _, field = name.rpartition(".")
    estimator = fields.get(f"{table}.estimator")
    setting = name if estimator is None else f"{estimator}.{field}"
    return setting in LATER and fields[name] == LATER[setting]
