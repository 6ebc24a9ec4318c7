"""The named objectives, for listing."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.pipeline.config.recipe_files import load_objective, recipe_names
from tropd.pipeline.objectives.needs import needed_data, teacher_needs
from tropd.pipeline.objectives.objective import Objective, needs_rewards


@dataclass(frozen=True)
class ObjectiveEntry:
    """One line of ``tropd objectives``."""

    name: str
    title: str
    needs: str
    source: str
    confidence: str


def list_objectives() -> list[ObjectiveEntry]:
    """All packaged objectives by name."""
    entries = []
    for name in recipe_names("objectives"):
        objective = load_objective(name)
        needs = describe_needs(objective)
        entries.append(ObjectiveEntry(name, objective.title, needs, objective.source, objective.confidence))
    return entries


def describe_needs(objective: Objective) -> str:
    """Its needs in words: of the teacher, and of rewards, contexts and held-out problems."""
    needs = teacher_needs(objective)
    parts = []
    if "rollouts" in needed_data(objective):
        parts.append("stored responses of the student")
    if needs.token_logprobs:
        parts.append("the teacher's log-prob of each student token")
    if needs.topk != "none":
        where = "outliers" if needs.topk == "outliers" else "every student token"
        parts.append(f"its top {needs.k} at {where}")
    if needs.chosen:
        parts.append(f"its log-probs of the student's top {needs.chosen} at every student token")
    if needs.overlap:
        parts.append("how many of these are in its own")
    if needs.entropy:
        parts.append("its entropy at every student token")
    if "prefixes" in needed_data(objective):
        parts.append("its responses, written before" if parts else "the teacher's responses, written before")
    if needs.cached_topk:
        parts.append("its top k there")
    if not needs.token_logprobs:
        parts.append("no teacher while training")
    if objective.own_context:
        parts.append("a context for it (teacher.context)")
    if needs_rewards(objective):
        parts.append("a reward of each response")
    if objective.extrapolation is not None:
        answers = objective.extrapolation.score == "accuracy"
        parts.append(f"held-out problems{' with answers' if answers else ''}")
    return "; ".join(parts)
