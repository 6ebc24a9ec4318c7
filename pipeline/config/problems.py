"""Problems of given settings, in words: refusals of the schema, each with the source of its value, and warnings about
values that are possible but hardly meant.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tropd.pipeline.config.paths import Location, fields_at
from tropd.pipeline.config.schema import Config
from tropd.storage.errors import ConfigError, closest
from tropd.storage.formats.toml_text import Plain, line_of

Checked = TypeVar("Checked", bound=BaseModel)

_HIGH_RATE = (
    "updates of AdamW are about as large as the learning rate; 1e-6 to 1e-4 are usual, 1e-3 for tiny models"
)
_HIGH_TEMPERATURE = "above 2 nearly every token is noise"

UNUSUAL: Sequence[tuple[str, Callable[[Any], bool], str]] = (
    ("train.learning_rate", lambda rate: rate >= 1e-2, _HIGH_RATE),
    ("sft.learning_rate", lambda rate: rate >= 1e-2, _HIGH_RATE),
    (
        "train.betas",
        lambda betas: min(betas) < 0.5,
        "below 0.5 a moment is little more than the last gradient",
    ),
    ("train.weight_decay", lambda decay: decay > 1, "0 to 0.1 is usual"),
    ("sft.weight_decay", lambda decay: decay > 1, "0 to 0.1 is usual"),
    ("train.max_grad_norm", lambda norm: norm < 1e-3, "nearly every step is scaled down"),
    (
        "train.importance_clip",
        lambda clip: clip < 1,
        "below 1 it lowers the weight of tokens that need no correction",
    ),
    ("prefixes.temperature", lambda temperature: temperature > 2, _HIGH_TEMPERATURE),
    ("rollout.temperature", lambda temperature: temperature > 2, _HIGH_TEMPERATURE),
    ("evaluation.temperature", lambda temperature: temperature > 2, _HIGH_TEMPERATURE),
    ("prefixes.top_p", lambda mass: mass < 0.1, "sampling is then all but greedy"),
    ("rollout.top_p", lambda mass: mass < 0.1, "sampling is then all but greedy"),
    ("evaluation.top_p", lambda mass: mass < 0.1, "sampling is then all but greedy"),
    ("scores.mass", lambda mass: mass < 0.5, "most of the teacher's probability is then not cached"),
    ("objective.trust.weight", lambda weight: weight > 100, "0 to 1 is usual"),
    ("objective.outlier.weight", lambda weight: weight > 100, "0 to 1 is usual"),
    ("objective.guidance.weight", lambda weight: weight > 100, "0 to 1 is usual"),
    (
        "evaluation.grading_seconds",
        lambda seconds: seconds > 600,
        "one answer may block everything for that long",
    ),
    ("teacher.timeout_seconds", lambda seconds: seconds < 1, "a service under load takes longer to answer"),
)
"""Fields, when a value is unusual, and why."""


@dataclass(frozen=True)
class Origins:
    """Sources of values."""

    where: str
    """Name of the text: a file, or its stand-in."""
    text: str
    """Its text."""
    sources: Mapping[str, str]
    """Dotted path of each leaf that is given → ``where``, the override, or the recipe that it comes from."""

    def given(self, path: Location) -> str | None:
        """Source of the value at a path, or of the table around it; None if neither is given."""
        for length in range(len(path), 0, -1):
            source = self.sources.get(_dotted(path[:length]))
            if source is not None:
                return self._with_line(path) if source == self.where else source
        return None

    def of(self, path: Location) -> str:
        """Source as by ``given``; else the one source of everything in the table, or else ``where``."""
        below = {source for leaf, source in self.sources.items() if leaf.startswith(f"{_dotted(path)}.")}
        alone = below.pop() if len(below) == 1 else self.where
        return self.given(path) or (self._with_line(path) if alone == self.where else alone)

    def _with_line(self, path: Location) -> str:
        for length in range(len(path), 0, -1):
            line = line_of(self.text, path[:length])
            if line is not None:
                return f"{self.where} line {line}"
        return self.where


RENAMED: Mapping[str, str] = {
    "objective.trust.loss.k": "objective.k",
    "objective.outlier.loss.k": "objective.k",
    "objective.guidance.loss.k": "objective.k",
    "objective.token_weights.k": "objective.k",
}
"""Fields that had another name or place in earlier versions, with their present one; without numbers of elements."""


def renamed(path: Location) -> str | None:
    """Present name of a field of an earlier version; None if no such field existed."""
    return RENAMED.get(_dotted(tuple(part for part in path if isinstance(part, str))))


def unusual(config: Config, origins: Origins) -> list[str]:
    """A sentence for each value that is possible, but hardly meant."""
    found = []
    for path, is_unusual, reason in UNUSUAL:
        value = attrgetter(path)(config)
        if is_unusual(value):
            shown = list(value) if isinstance(value, tuple) else value
            found.append(f"{path} = {shown} is unusual: {reason} ({origins.of(tuple(path.split('.')))})")
    if config.rollout.samples_per_prompt == 1 and _compares_rows(config):
        found.append(
            f"rollout.samples_per_prompt = 1 leaves {config.objective.name} nothing to compare a response with, so "
            f"objective.reward adds nothing: set it to 2 or more ({origins.of(('rollout', 'samples_per_prompt'))})"
        )
    left_out = [one.name for one in config.evaluation.benchmarks if one not in config.benchmarks]
    if config.data.decontaminate is not None and left_out:
        found.append(
            f"data.decontaminate compares training prompts with benchmarks that are measured, so not with "
            f"{', '.join(left_out)}: set evaluation.allow_code = true before the first stage if they are to be "
            "(later it is another choice of prompts, with which finished stages are refused), or delete their "
            f"evaluation.benchmarks ({origins.of(('data', 'decontaminate'))})"
        )
    train = config.train
    if train.warmup < train.warmup_steps:
        found.append(
            f"train.warmup_steps = {train.warmup_steps} is no less than train.steps = {train.steps}: the learning rate "
            f"rises over the first {train.warmup} ({origins.of(('train', 'warmup_steps'))})"
        )
    return found


def _compares_rows(config: Config) -> bool:
    """True if objective.reward is of whole rows over others to the prompt: tokens' own are compared within a row too."""
    term = config.objective.reward
    if term is None:
        return False
    return term.kind == "margin" or (term.weight > 0 and config.reward.per == "row")


def checked(model: type[Checked], data: Plain, origins: Origins, prefix: Location = ()) -> Checked:
    """Data of TOML as a specification. Types are taken at their word: 1 is no boolean, true no number, "1" neither.

    Raises:
        ConfigError: a line for every problem: the value's source, the field, and its valid values.
    """
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _sentences(model, problem, origins, prefix)]
        raise ConfigError(
            "\n  ".join(dict.fromkeys(lines)), hint="tropd config explain FIELD shows the values of a field"
        ) from error


def _sentences(model: type[BaseModel], problem: Any, origins: Origins, prefix: Location) -> Iterator[str]:
    path = (*prefix, *fields_at(model, problem["loc"])[0])
    message = _explained(model, problem, path)
    named = f"{_dotted(path)}: " if path else ""
    if problem["type"] != "value_error" or not isinstance(problem.get("input"), dict):
        yield f"{origins.of(path)}: {named}{message}"
        return
    for line in message.splitlines():  # fields that exclude each other; each line names them
        words = dict.fromkeys(re.findall(r"\w+(?:\.\w+)*", line))
        places = {word: origins.given((*path, *word.split("."))) for word in words}
        given = [f"{word}: {place}" for word, place in places.items() if place is not None]
        yield f"{named}{line} ({'; '.join(given)})" if given else f"{origins.of(path)}: {named}{line}"


def _dotted(path: Location) -> str:
    return ".".join(str(part) for part in path)


def _explained(model: type[BaseModel], problem: Any, path: Location) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        if (now := renamed(path)) is not None:
            return f"this field of earlier versions is {now} now"
        name = str(problem["loc"][-1])
        _, valid = fields_at(model, problem["loc"][:-1])
        return f"unknown field; {closest(name, valid)}valid: {', '.join(valid)}" if valid else "unknown field"
    if kind == "missing":
        return "required, but not given"
    message = str(problem["msg"]).removeprefix("Value error, ")
    shown = problem.get("input")
    return message if isinstance(shown, dict | list) else f"{message} (got {_SHORT.repr(shown)})"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlong = 50
