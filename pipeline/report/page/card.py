"""The model card of a trained student: its origins, its training, and its distance to the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from tropd.pipeline.config.schema import Config, to_plain
from tropd.pipeline.report.data.facts import Accuracy, Report
from tropd.storage.errors import DataError
from tropd.storage.stage.fingerprint import flatten
from tropd.storage.stage.manifest import Manifest
from tropd.storage.workspace import LAYOUT_VERSION, STAGES, Who

TEMPLATE = "card.md.j2"
README = "README.md"
TAGS = ["distillation", "on-policy-distillation", "trust-region", "tropd"]
DECIDED = ("train.", "rollout.", "objective.", "run.seed")
"""Settings that are given here with the values that training ran with, whatever config.toml says now."""
NOT_SHOWN = ("runtime.", "service.", "vllm.", "demo.", "run.recipe", "teacher.model", "student.model")
ROWS: tuple[tuple[Who, str], ...] = (
    ("before", "student before"),
    ("after", "this model"),
    ("teacher", "teacher"),
)


@dataclass(frozen=True)
class BaseModel:
    """A model that the run started from, with the facts of its own card."""

    role: str
    name: str
    """Name in the configuration."""
    license: str | None
    bases: tuple[str, ...]
    """Names on the Hugging Face hub: of itself, or of what its card calls its base."""
    weights: str | None

    @property
    def shown(self) -> str:
        """A link where the hub has it; otherwise a name without the folders that it was in."""
        links = [f"[{base}](https://huggingface.co/{base})" for base in self.bases]
        own = f"`{Path(self.name).name}`"
        if not links:
            return own
        return links[0] if self.name in self.bases else f"{own}, made from {', '.join(links)}"


def describe_base(
    role: str, name: str, folder: Path | None, *, on_hub: bool, weights: str | None
) -> BaseModel:
    """A model, with the facts of the card in its folder.

    Args:
        folder: None if the model is on another machine.
        on_hub: true if ``name`` is one on the Hugging Face hub.
        weights: their SHA-256.

    Raises:
        DataError: its card has metadata that cannot be read.
    """
    from huggingface_hub import ModelCard  # takes a second to load

    path = None if folder is None else folder / README
    try:
        says = ModelCard.load(path, ignore_metadata_errors=True).data if path and path.is_file() else None
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a model card: {error}", hint="mend or remove it"
        ) from error
    base = says.get("base_model") if says else None
    bases = [base] if isinstance(base, str) else list(base or [])
    return BaseModel(
        role=role,
        name=name,
        license=says.get("license") if says else None,
        bases=(name,) if on_hub else tuple(map(str, bases)),
        weights=weights,
    )


def render_card(
    report: Report,
    config: Config,
    text: str,
    manifest: Manifest,
    student: BaseModel,
    teachers: Sequence[BaseModel],
) -> str:
    """The card, Markdown below YAML metadata.

    Args:
        report: of the run.
        config: its configuration, and ``text`` the file that it is in.
        manifest: of its training.
    """
    environment = Environment(
        loader=FunctionLoader(_resource), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found = report.stages["eval"].summary.get("distance", {}) if "eval" in report.stages else {}
    card = environment.get_template(TEMPLATE).render(
        metadata=_metadata(config, student, teachers),
        title=f"{Path(student.name).name} after {Path(teachers[0].name).name}",
        report=report,
        student=student,
        teacher=teachers[0],
        teachers=list(teachers),
        data=_data(report, config),
        objective=config.objective,
        distance=[_distance(shown, found[who]) for who, shown in ROWS if who in found],
        distance_prompts=found.get("after", {}).get("prompts"),
        accuracy=_accuracy(report),
        settings=_settings(report, manifest),
        layout=LAYOUT_VERSION,
        config=text,
        commands=[
            kind.command for kind in STAGES if kind.name in report.stages and _is_done(report, kind.name)
        ],
        overrides=_overrides(config, manifest),
    )
    return card.rstrip() + "\n"


def _is_done(report: Report, name: str) -> bool:
    return report.stages[name].state == "complete"


def _metadata(config: Config, student: BaseModel, teachers: Sequence[BaseModel]) -> str:
    from huggingface_hub import ModelCardData

    bases = list(dict.fromkeys(base for model in (student, *teachers) for base in model.bases))
    data = ModelCardData(
        base_model=bases or None,
        license=student.license if all(t.license == student.license for t in teachers) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=_hub_datasets(config) or None,
    )
    return str(data.to_yaml())


def _hub_datasets(config: Config) -> list[str]:
    names = (source.dataset for source in config.data.sources)
    return list(dict.fromkeys(name for name in names if name.count("/") == 1 and not Path(name).suffix))


def _data(report: Report, config: Config) -> list[str]:
    lines = []
    for what, field, stage in (("Prompts", "prompts", "train"), ("Held out", "evaluation", "eval")):
        file = Path(getattr(config.data, field)).name
        digest = report.provenance.inputs.get(f"{stage}: data.{field}")
        lines.append(f"{what}: `{file}`" + (f", SHA-256 `{digest}`" if digest else ""))
    hub = _hub_datasets(config)
    own = dict.fromkeys(Path(s.dataset).name for s in config.data.sources if s.dataset not in hub)
    if own:
        lines.append(f"From {', '.join(f'`{name}`' for name in own)}")
    if hub:
        lines.append(f"From {', '.join(f'[{s}](https://huggingface.co/datasets/{s})' for s in hub)}")
    if report.cache.trajectories:
        lines.append(f"{report.cache.trajectories:,} trajectories of the teacher")
    if report.training is not None:
        tokens = report.training.tokens_on_policy or 0
        lines.append(f"{tokens:,} tokens that the student sampled in {report.training.steps:,} steps")
    return lines


def _distance(shown: str, found: Mapping[str, Any]) -> list[str]:
    digits = {"reverse_kl": 3, "forward_kl": 3, "acceptance": 3, "length": 1}
    return [shown, *(_interval(found.get(name), number) for name, number in digits.items())]


def _interval(found: Mapping[str, float | None] | None, digits: int) -> str:
    if not found or found.get("mean") is None:
        return ""
    mean, low, high = (found.get(name) for name in ("mean", "low", "high"))
    around = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{mean:.{digits}f}{around}"


def _accuracy(report: Report) -> list[list[str]]:
    rows = []
    for who, shown in ROWS:
        found = [report.evaluation.accuracy(who, mode) for mode in ("greedy", "sampled")]
        if any(found):
            problems = next(accuracy.problems for accuracy in found if accuracy)
            rows.append([shown, *map(_percent, found), str(problems)])
    return rows


def _percent(found: Accuracy | None) -> str:
    return f"{100 * found.accuracy:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]" if found else ""


def _settings(report: Report, manifest: Manifest) -> list[tuple[str, str]]:
    """Settings that are not left at their default, as training ran with them."""
    values = flatten("", report.config) if report.config else {}
    ran = {name: value for name, value in manifest.fields.items() if name.startswith(DECIDED)}
    names = [
        name
        for name, source in report.config_sources.items()
        if name in values and not name.startswith(NOT_SHOWN) and not source.startswith("objective ")
    ]
    return [(name, f"`{json.dumps(ran.get(name, values[name]), ensure_ascii=False)}`") for name in names]


def _overrides(config: Config, manifest: Manifest) -> str:
    """``--set`` for settings that training ran with and the configuration lacks."""
    says = flatten("", to_plain(config))
    differs = {
        name: value
        for name, value in manifest.fields.items()
        if name.startswith(DECIDED) and name in says and says[name] != value and value is not None
    }
    return "".join(
        f" --set '{name}={value if isinstance(value, str) else json.dumps(value)}'"
        for name, value in differs.items()
    )


def _resource(name: str) -> str:
    return (resources.files("tropd.pipeline.report.page") / name).read_text(encoding="utf-8")
