"""What a stage's output is a function of, beyond settings and weights: prompts as a model sees them, and where it stops.

Fields have names that a refusal can show. Some came with later versions: what was made before has no value for them, and
is neither refused nor trusted without a word.
"""

from __future__ import annotations

from collections.abc import Mapping

from tropd.pipeline.context import Run
from tropd.pipeline.problems.encoding import Encoded, token_digest
from tropd.storage.fingerprint import Fingerprint, Scalar
from tropd.storage.stage import Stage

AS_TOKENS = " as token ids"
RECENT = (AS_TOKENS, "data.template_date", ".stop_ids", ".generation_config", ".chat_template")
"""Ends of names of fields that fingerprints have not always had."""


def token_fields(encoded: Encoded, name: str) -> dict[str, Scalar]:
    """Fingerprint fields of prompts as a model reads them.

    Args:
        name: of the setting that they come from, such as ``data.prompts``.
    """
    fields: dict[str, Scalar] = {f"{name}{AS_TOKENS}": token_digest(encoded.prompts, encoded.tokens)}
    if encoded.date is not None:
        fields["data.template_date"] = encoded.date.isoformat()
    return fields


def fingerprint_of(fields: Mapping[str, Scalar]) -> Fingerprint:
    """A fingerprint that also fits what older versions made, which recorded less."""
    return Fingerprint(fields, recent=[name for name in fields if name.endswith(RECENT)])


def tell_unrecorded(run: Run, stage: Stage) -> None:
    """Warn where a stage was begun by a version that recorded less of its inputs."""
    if stage.unrecorded:
        run.reporter.warning(
            f"{stage.folder} was begun by an older version of tropd, which did not record {', '.join(stage.unrecorded)}: "
            "what it holds is taken on trust to be made with what these are now; --force makes it anew"
        )
