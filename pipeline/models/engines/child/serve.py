"""The process of an engine: ``python -m …child.serve FD``, where FD is its end of the pipe to the trainer.

Its standard input is a pipe that closes when the trainer ends, however it ends: then this process ends at once, whatever
it is doing.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection

import numpy as np
from torch import Tensor

from tropd.pipeline.models.engines.base import Finished, choose_with
from tropd.pipeline.models.engines.child.messages import (
    Answer,
    Done,
    Failed,
    FindLikeliest,
    Generate,
    Likeliest,
    OneWritten,
    Question,
    Ragged,
    Rest,
    Score,
    Scored,
    SetWeights,
    Start,
    Started,
    StudentEngine,
    Written,
)
from tropd.pipeline.models.engines.child.weights import views
from tropd.pipeline.models.memory import memory_error
from tropd.storage.errors import ConfigError, TropdError


def main(descriptor: int) -> None:
    """Answer questions until the trainer ends."""
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    connection = Connection(descriptor)
    serving = _Serving()
    while True:
        try:
            question: Question = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(
            _answer(serving, question, lambda number, one: connection.send(OneWritten(number, one)))
        )


class _Serving:
    """The engine, once it is built, and the memory that its weights come through."""

    def __init__(self) -> None:
        self._engine: StudentEngine | None = None
        self._weights: dict[str, Tensor] = {}

    def answer(self, question: Question, finished: Finished) -> Answer:
        if isinstance(question, Start):
            if question.memory is not None:
                self._weights = views(question.memory, question.layout)
            self._engine = question.build()
            self._engine.rest()
            return Started(self._engine.max_length, self._engine.sleeps)
        engine = self._engine
        assert engine is not None
        match question:
            case SetWeights():
                if question.handles is None:
                    engine.set_weights(self._weights.items())
                else:
                    engine.take_update(question.handles)
                return Done()
            case Rest():
                engine.rest()
                return Done()
            case Generate(prompts, sampling, seeds, max_tokens, tells):
                rows = [row.tolist() for row in prompts.rows()]
                told = finished if tells else None
                return Written.of(
                    engine.generate(rows, sampling, seeds=seeds, max_tokens=max_tokens, finished=told)
                )
            case Score(sequences, starts):
                scores = engine.score([row.tolist() for row in sequences.rows()], starts)
                return Scored(Ragged.of([one.token_logprobs for one in scores], np.float32))
            case FindLikeliest(sequences, starts, k, limit):
                rows = [row.tolist() for row in sequences.rows()]
                return Likeliest.of(choose_with(engine)(rows, starts, k, limit), k)


def _answer(serving: _Serving, question: Question, finished: Finished) -> Answer:
    try:
        return serving.answer(question, finished)
    except Exception as error:
        traceback.print_exc()  # into the log
        known: TropdError | None = error if isinstance(error, TropdError) else None
        known = known or memory_error(error, "the student's engine", "lower vllm.gpu_memory_utilization")
        if known is None:
            return Failed(f"the student's engine failed with {type(error).__name__}: {error}", None, False)
        return Failed(known.message, known.hint, isinstance(known, ConfigError))


def _end_with_trainer() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
