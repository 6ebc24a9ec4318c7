"""Tables as data: settings (a student, a teacher, data) and rows (a method each), with the paper's numbers."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources

from pydantic import Field, ValidationError

from tropd.pipeline.config.recipe_files import recipe_names, recipe_text
from tropd.pipeline.objectives.spec import Spec
from tropd.storage.errors import ConfigError, unknown_name

REHEARSAL = "rehearsal"
TINY = {"parameters": 200_000, "layers": 3, "hidden": 64, "intermediate": 192, "vocab": 64}


@dataclass(frozen=True)
class Elsewhere:
    """A benchmark of the paper whose questions and judgment are lighteval's."""

    task: str
    module: str
    dataset: str
    """Its place on the hub."""
    problems: int
    samples: int
    """Responses to each: all numbers of the paper's column are multiples of one over ``problems`` times this."""
    metric: str | None = None
    gated: bool = False
    """The dataset is given only to an account that has accepted its terms."""
    runs_code: bool = False

    def settings(self, name: str) -> str:
        """The benchmark as a part of a ``config.toml``."""
        metric = f', metric = "{self.metric}"' if self.metric else ""
        code = "    # runs code that the model wrote: only with evaluation.allow_code = true" * self.runs_code
        return (
            f'\n[[evaluation.benchmarks]]\nname = "{name}"{code}\nproblems = "data/{name.lower()}.jsonl"\n'
            f'samples = {self.samples}\nlighteval = {{ task = "{self.task}", '
            f'module = "lighteval.tasks.tasks.{self.module}"{metric} }}\n'
        )


ELSEWHERE = {
    "GPQA-Diamond": Elsewhere("gpqa:diamond", "gpqa", "Idavidrein/gpqa", 198, 4, gated=True),
    "MMLU-Redux": Elsewhere("mmlu_redux_2", "mmlu_redux", "edinburgh-dawg/mmlu-redux-2.0", 5700, 1),
    "IFBench": Elsewhere(
        "ifbench_test", "ifbench.main", "allenai/IFBench_test", 294, 1, metric="prompt_level_loose_acc"
    ),
    "LiveCodeBench-v6": Elsewhere(
        "lcb:codegeneration_v6", "lcb.main", "lighteval/code_generation_lite", 175, 1, runs_code=True
    ),
}
"""Benchmarks of the paper that tropd does not have itself. They are measured where ``evaluation.benchmarks``, or
``evaluation.harness``, has one of that name."""
AVERAGE = "average"
"""The paper's mean over the benchmarks of a table."""


class TableRow(Spec):
    """One method."""

    label: str
    """The paper's name for it."""
    objective: str
    """A packaged objective, or a variant of one (see ``compare``)."""
    paper: dict[str, float] = Field(default_factory=dict)
    """The paper's accuracies in percent by benchmark, where known."""


class Sizes(Spec):
    """Sizes of a model, as its config.json has them."""

    parameters: int = Field(gt=0)
    """Of layers, embeddings and output layer."""
    layers: int = Field(gt=0)
    """Decoder layers."""
    hidden: int = Field(gt=0)
    """Hidden size."""
    intermediate: int = Field(gt=0)
    """Width of the MLP."""
    heads: int = Field(gt=0)
    """Attention heads."""
    kv_heads: int = Field(gt=0)
    """Heads of keys and values."""
    head_dim: int = Field(gt=0)
    """Size of a head."""
    vocab: int = Field(gt=0)
    """Rows of the output layer."""
    tied: bool = False
    """Whether these are the embeddings'."""


class Setting(Spec):
    """One block of a table: methods that share student, teacher, data and prefixes."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    """Its folder."""
    title: str
    """Student and teacher."""
    recipe: str
    """The packaged run recipe."""
    domains: tuple[str, ...]
    """Domains of OpenThoughts3 that the prompts are from."""
    student_sizes: Sizes
    """Of the student, for a dry run that cannot read its configuration."""
    teacher_sizes: Sizes
    """Of the teacher."""
    sft_from: str | None = None
    """The model from which SFT on the teacher's trajectories makes the student, if it is made here."""
    rows: tuple[TableRow, ...]
    """The methods."""
    paper_before: dict[str, float] = Field(default_factory=dict)
    """The paper's accuracies of the student before training, where known."""
    paper_teacher: dict[str, float] = Field(default_factory=dict)
    """Those of the teacher."""

    @property
    def columns(self) -> list[str]:
        """Benchmarks of the paper beyond those of the recipe, in its order, and its average."""
        given = {name for row in (self.paper_before, *(row.paper for row in self.rows)) for name in row}
        return [name for name in (*ELSEWHERE, AVERAGE) if name in given]


class PaperTable(Spec):
    """A table of the paper."""

    title: str
    """The subject of its comparison."""
    settings: tuple[Setting, ...]
    """Its blocks."""


def table_names() -> list[str]:
    """Names of the packaged tables."""
    folder = resources.files("tropd.pipeline.config.recipes") / "tables"
    return sorted(e.name.removesuffix(".toml") for e in folder.iterdir() if e.name.endswith(".toml"))


def load_table(name: str, *, rehearse: bool) -> PaperTable:
    """A packaged table; for a rehearsal, with the tiny models' recipe in every setting.

    Raises:
        ConfigError: no table has that name, or it refers to something that does not exist.
    """
    if name not in table_names():
        raise unknown_name("table", name, table_names())
    text = (resources.files("tropd.pipeline.config.recipes") / "tables" / f"{name}.toml").read_text(
        encoding="utf-8"
    )
    try:
        table = PaperTable.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise ConfigError(f"table {name}: {error}") from error
    for setting in table.settings:
        recipe_text(setting.recipe)
        for row in setting.rows:
            if row.objective.partition(":")[0] not in recipe_names("objectives"):
                raise ConfigError(f"table {name}, row {row.label!r}: no objective {row.objective!r}")
    if not rehearse:
        return table
    settings = [
        setting.model_copy(
            update={
                "recipe": REHEARSAL,
                "student_sizes": setting.student_sizes.model_copy(update=TINY),
                "teacher_sizes": setting.teacher_sizes.model_copy(update=TINY),
                "sft_from": "models/student" if setting.sft_from else None,
                "rows": tuple(row.model_copy(update={"paper": {}}) for row in setting.rows),
                "paper_before": {},
                "paper_teacher": {},
            }
        )
        for setting in table.settings
    ]
    return table.model_copy(update={"settings": tuple(settings)})
