"""The problems of the paper's tables: their places on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from tropd.pipeline.config.sections.data_settings import Source

# Names and columns as of the datasets' pages on the hub; a missing column is reported with the existing ones.
EVALUATIONS = (
    Source(file="data/aime24.jsonl", dataset="HuggingFaceH4/aime_2024", prompt="problem", answer="answer"),
    Source(
        file="data/aime25.jsonl", dataset="math-ai/aime25", split="test", prompt="problem", answer="answer"
    ),
    Source(
        file="data/amc23.jsonl", dataset="math-ai/amc23", split="test", prompt="question", answer="answer"
    ),
)


def training_source(domains: Sequence[str], limit: int | None) -> Source:
    """OpenThoughts3's prompts of some domains; there are several answers to each, so prompts repeat."""
    return Source(
        dataset="open-thoughts/OpenThoughts3-1.2M",
        prompt="conversations.0.value",
        where={"domain": tuple(domains)},
        limit=limit,
    )
