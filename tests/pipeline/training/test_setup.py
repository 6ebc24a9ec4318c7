"""What this machine cannot do is refused before anything is read, started or loaded."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tropd.pipeline.config.resolve import parse_config
from tropd.pipeline.training import on_gpus, setup
from tropd.pipeline.training.on_gpus import show_training_on, train_on
from tropd.pipeline.training.setup import open_session
from tropd.pipeline.training.update import lora
from tropd.pipeline.training.world import World
from tropd.storage.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        (
            "student.engine = 'vllm'\nvllm.tensor_parallel_size = 2",
            2,
            "vllm.tensor_parallel_size = 2, but with several",
        ),
        ("student.engine = 'vllm'", 2, 'student.engine = "vllm" needs vLLM'),
        ("student.engine = 'vllm'", 1, 'student.engine = "vllm" needs vLLM'),
        ("train.region_gradients = true", 2, "train.region_gradients needs a single process"),
        ("student.lora = { rank = 2 }", 1, "student.lora needs peft"),
        (
            "train.attention = 'flash_attention_2'\nstudent.dtype = 'bfloat16'",
            1,
            "train.attention = 'flash_attention_2' needs a CUDA GPU",
        ),
    ],
)
def test_settings_that_need_another_machine_are_refused_first(
    settings: str, processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lora, setup):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    # A run without a workspace: whatever reads a file or opens a model would fail otherwise.
    run = cast(Any, SimpleNamespace(config=parse_config(settings).config))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    nothing = cast(Any, None)
    with ExitStack() as stack, pytest.raises(ConfigError) as caught:
        open_session(run, stack, World(size=processes), nothing, nothing, nothing)
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("start", [train_on, show_training_on])
def test_several_processes_are_refused_before_any_starts(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpus, "run_ranks", lambda *_, **__: pytest.fail("started"))
    run = cast(Any, SimpleNamespace(config=parse_config("train.region_gradients = true").config))
    with pytest.raises(
        ConfigError, match=r"train\.region_gradients needs a single process, and this run would"
    ):
        start(run, 2)
