"""The named objectives, for listing."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.pipeline.config.recipe_files import load_objective, recipe_names
from tropd.pipeline.objectives.needs import teacher_needs
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
    """Its needs of the teacher, and of rewards, in words."""
    needs = teacher_needs(objective)
    parts = []
    if needs.token_logprobs:
        parts.append("log-prob of each student token")
    if needs.topk != "none":
        where = "outliers" if needs.topk == "outliers" else "every student token"
        parts.append(f"top-{needs.k} on {where}")
    if needs.chosen:
        parts.append(f"log-probs of the student's top {needs.chosen} on every student token, and their tail")
    if needs.overlap:
        parts.append("their overlap with its own")
    if needs.entropy:
        parts.append("entropy")
    if needs.cached_topk:
        parts.append("cached top-k on prefixes")
    if needs_rewards(objective):
        parts = [*(parts or ["nothing"]), "and a reward of each response"]
    if objective.extrapolation is not None:
        answers = objective.extrapolation.score == "accuracy"
        parts.append(f"and held-out problems{' with answers' if answers else ''}")
    return "; ".join(parts) or "none while training"
