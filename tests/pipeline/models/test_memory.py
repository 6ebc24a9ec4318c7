"""Memory that ends is named, with what would have fitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tropd.pipeline.models.engines.transformers import TransformersEngine
from tropd.pipeline.models.memory import within_memory
from tropd.pipeline.run import opening
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.storage.errors import MemoryFullError, TropdError


def _raise(error: Exception) -> None:
    raise error


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")


@pytest.mark.parametrize(
    ("work", "place"),
    [
        (lambda: torch.empty(2**55), "main memory"),
        (lambda: bytearray(2**62), "main memory"),
        (lambda: _raise(CUDA), "the GPU's memory"),
        (lambda: _raise(OSError(12, "Cannot allocate memory")), "main memory"),
        (lambda: _raise(RuntimeError("can't start new thread")), "no more threads"),
    ],
)
def test_the_innermost_block_says_what_did_not_fit(work: Any, place: str) -> None:
    with (
        pytest.raises(MemoryFullError, match=rf"the weights.*{place}") as caught,
        within_memory("the run", "lower all"),
        within_memory("the weights", "lower this"),
    ):
        work()
    assert "lower this" in str(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("other"), TropdError("out of memory"), OSError(2, "No such file")]
)
def test_other_errors_are_what_they_were(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, within_memory("x", "y"):
        raise error
    assert caught.value is error


@contextmanager
def too_small(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *_args, **_settings: torch.empty(2**55))
        yield


def test_stages_name_their_settings(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        too_small(monkeypatch, opening, "load_model"),
        pytest.raises(MemoryFullError, match=r"teacher\.dtype"),
    ):
        generate_prefixes(tiny_run)
    small = too_small(monkeypatch, TransformersEngine, "generate")
    with small, pytest.raises(MemoryFullError, match=r"prefixes\.batch_size"):
        generate_prefixes(tiny_run)
    generate_prefixes(tiny_run)
    small = too_small(monkeypatch, TransformersEngine, "score")
    with small, pytest.raises(MemoryFullError, match=r"scores\.batch_tokens"):
        score_teacher(tiny_run)
