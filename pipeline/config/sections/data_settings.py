"""Settings of prompts, teacher prefixes and the teacher's scores."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field

from tropd.pipeline.config.sections.value_types import (
    MOST,
    MOST_ALTERNATIVES,
    MOST_ROWS,
    MOST_TOKENS,
    Template,
)
from tropd.pipeline.objectives.spec import Apart, Inert, Spec
from tropd.storage.cache.topk_encoding import Precision


class Source(Spec):
    """A source of prompts for `tropd fetch`, which writes them into files of the workspace."""

    dataset: str = Field(min_length=1)
    """A name on the Hugging Face hub, a directory (a dataset's files, or one saved by the `datasets` library), or a
    file (JSON lines, a JSON array, Parquet or .csv); a relative path is inside the workspace."""
    file: str | None = None
    """File of the workspace that it is written to; data.prompts if not set."""
    domain: str = ""
    """Domain of its prompts, such as `math`: written with each of them."""
    subset: str | None = None
    """Name of the dataset's configuration, where it has several."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str = "train"
    """Split of the dataset."""
    prompt: str = "prompt"
    """Column with the prompt: a text, or with data.chat = true a list of messages. Dots lead into lists and objects, here
    and in the other columns: `conversations.0.value`."""
    answer: str | None = None
    """Column with the answer, if there is one; each record then needs it."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Further fields of the file, each with its column: `{ solution = "solution" }`. Each record needs them; a teacher's
    context may name them."""
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Only records whose column has one of these values: `{ domain = ["math"] }`."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Use only the first this many."""
    weight: float | None = Field(default=None, gt=0.0, le=MOST)
    """Share of the file, relative to the weights of its other sources: as many prompts are used as keep the shares. If no
    source has a weight, all prompts are."""


class DataConfig(Spec):
    """Prompts to train on and problems to evaluate on: files of records (JSON lines, a JSON array, Parquet or CSV)."""

    prompts: Apart[str] = "data/train.jsonl"
    """Training prompts. A relative path is inside the workspace."""
    evaluation: Apart[str] = "data/eval.jsonl"
    """Evaluation problems; graded ones need an answer."""
    id_field: str = "id"
    """Field with a unique name of the prompt; where absent or null, the line number is used."""
    prompt_field: str = "prompt"
    """Field with the prompt: a text, or with chat = true a list of messages. As with the other fields, dots lead into
    lists and objects: `messages.1.content`. Records without a field `prompt` may have `messages`."""
    answer_field: str = "answer"
    """Field with the expected answer; empty: no answers, and nothing is graded."""
    domain_field: Apart[str] = "domain"
    """Field with the domain of the prompt, where there are several."""
    sources: Apart[tuple[Source, ...]] = ()
    """Sources from which `tropd fetch` makes the files."""
    decontaminate: Apart[int | None] = Field(default=None, ge=1, le=10_000)
    """Leave out training prompts that share this many consecutive words with an evaluation problem (13 is usual); they
    are listed in rejects/. `tropd contamination` shows what it would do."""
    template: Template = "{prompt}"
    """Text around each prompt, with {prompt} in its place, such as an instruction to box the answer."""
    chat: bool = False
    """Wrap prompts as a user turn in the tokenizer's chat template, which lists of messages need; otherwise the text is
    used as it is."""
    system: Apart[str | None] = Field(default=None, min_length=1)
    """With chat = true, the system message of prompts that have none of their own."""
    template_date: Apart[datetime.date | None] = None
    """The date for chat templates that write today's into prompts, as YYYY-MM-DD. `tropd init` sets it; if not
    set, the day on which such a template is first used is kept in workspace.json."""
    limit: Apart[int | None] = Field(default=None, ge=1, le=MOST)
    """Use only the first this many training prompts."""
    skip_bad: Inert[bool] = False
    """Leave out lines that cannot be used (malformed, without text, a repeated id, too long) and list them in
    rejects/; otherwise they stop the stage before any model is loaded."""


class PrefixesConfig(Spec):
    """Stage 1: trajectories of the teacher, from whose beginnings the student continues."""

    samples_per_prompt: int = Field(default=1, ge=1, le=MOST_ROWS)
    """Trajectories per prompt."""
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: keep the most likely tokens whose total probability reaches this."""
    limit: int | None = Field(default=None, ge=1, le=MOST)
    """Only the first this many training prompts get trajectories; on the others the student starts from the prompt."""
    keep: Literal["all", "correct"] = "all"
    """Keep all trajectories, or only those whose answer is right. The others are kept in rejects/, so that another choice
    here, or another grader, filters again and samples nothing."""
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Longest trajectory; rollout.max_tokens if not set."""
    batch_size: Inert[int] = Field(default=64, ge=1, le=MOST_ROWS)
    """Sequences decoded together; on a GPU up to a quarter more, rather than few in a last batch."""
    shard_prompts: int = Field(default=512, ge=1, le=MOST_ROWS)
    """Prompts per shard: the most that a crash can cost."""


class ScoresConfig(Spec):
    """Stage 2: the teacher's top-k log-probs of its trajectories, cached on disk."""

    k: int = Field(default=64, ge=1, le=MOST_ALTERNATIVES)
    """At most this many alternatives per token. `tropd score-teacher` warns where they hold little of the probability."""
    mass: float = Field(default=0.999, gt=0.0, le=1.0)
    """Keep alternatives until they hold this much probability."""
    precision: Precision = "float16"
    """Storage of log-probs: `float16` (exact to 11 bits), or `q8` (about two thirds of the bytes, log-probs
    exact to about 2 %; docs/cache.md has the bounds)."""
    batch_tokens: Inert[int] = Field(default=16384, ge=1, le=MOST_TOKENS)
    """Tokens, padding included, per forward pass."""
