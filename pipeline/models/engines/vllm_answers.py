"""vLLM's outputs, and its flat lists of log-probs as checked arrays; values that are not log-probs are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tropd.pipeline.models.engines.base import Finished, Generation, SequenceScores
from tropd.storage.bounds import are_logprobs
from tropd.storage.errors import TropdError
from tropd.storage.formats.trajectories import FinishReason


class PromptLogprobs:
    """The flat log-probs of a prompt: per token its own, then ``width`` alternatives, likeliest first."""

    def __init__(self, flat: Any, width: int) -> None:
        # The first token has none.
        shape = (len(flat.start_indices) - 1, width + 1)
        self._logprobs = np.asarray(flat.logprobs, dtype=np.float32).reshape(shape)
        self.ids = np.asarray(flat.token_ids, dtype=np.int32).reshape(shape)[:, 1:]
        self.topk = self._logprobs[:, 1:]
        self.token_logprobs: npt.NDArray[np.float32] = np.concatenate([[0.0], self._logprobs[:, 0]]).astype(
            np.float32
        )
        """``[T]``; that of the first token has no meaning."""


def answer_scores(
    answer: PromptLogprobs,
    start: int,
    positions: npt.NDArray[np.int64],
    k: int,
    limit: int,
    own: npt.NDArray[np.float32] | None = None,
) -> SequenceScores:
    """Alternatives below ``limit`` at the given positions, counted from ``start``."""
    rows = positions + start - 1
    ids, logprobs = answer.ids[rows], answer.topk[rows]
    order = np.argsort(ids >= limit, axis=1, kind="stable")[:, :k]  # tokens first, in their order
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    if (ids >= limit).any():
        raise TropdError(
            f"fewer than {k} of the teacher's likeliest {answer.ids.shape[1]} ids are tokens",
            hint="its output layer prefers rows that are no tokens; is this the right model?",
        )
    token_logprobs = answer.token_logprobs[start:] if own is None else own
    return SequenceScores(checked_logprobs(token_logprobs), None, positions, ids, checked_logprobs(logprobs))


def checked_logprobs(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Refuse values that are not log-probs: vLLM has been seen to return garbage for cached positions."""
    if not are_logprobs(logprobs):
        raise TropdError(
            f"vLLM returned {float(np.nanmax(logprobs)):.3g} as a log-prob",
            hint="for a student in training, its weights are out of bounds: lower train.learning_rate; otherwise "
            "try another version of vLLM. Nothing was written for this batch",
        )
    return np.minimum(logprobs, np.float32(0.0))


def outputs_of(
    llm: Any, inputs: Sequence[Any], parameters: Sequence[Any], finished: Finished | None
) -> list[Any]:
    """``LLM.generate``; with ``finished`` its two parts, ``enqueue`` (where vLLM has it) and steps until all is done.

    Raises:
        TropdError: as ``written``.
    """
    if finished is None or not hasattr(llm, "enqueue"):
        return list(llm.generate(inputs, parameters, use_tqdm=False))
    names = llm.enqueue(inputs, parameters, use_tqdm=False)
    # A name is a number, to which vLLM may have appended random characters; outputs have the number.
    places = {name.split("-")[0]: place for place, name in enumerate(names)}
    outputs: list[Any] = [None] * len(names)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                place = places[output.request_id]
                outputs[place] = output
                finished(place, written(output))
    return outputs


def written(output: Any) -> Generation:
    """The continuation in a finished output.

    Raises:
        TropdError: as ``checked_logprobs``.
    """
    answer = output.outputs[0]
    # Each position lists the sampled token first.
    logprobs = np.asarray(answer.logprobs.logprobs, dtype=np.float32)[answer.logprobs.start_indices]
    reason: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
    return Generation(list(answer.token_ids), checked_logprobs(logprobs).tolist(), reason)
