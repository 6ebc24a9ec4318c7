"""Graphs are tried for models that are known, whole on one GPU."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_runs import TINY

from tropd.pipeline.models.engines.graphs.known import graphs_for


def _make(kind: str, **options: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**(TINY | options))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def test_graphs_are_for_known_models_on_a_gpu() -> None:
    class OnGpu:
        """A model that says that it is on a GPU."""

        def __init__(self, model: Any, device: str = "cuda") -> None:
            self._model, self.device = model, torch.device(device)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

    def on_gpu(kind: str, **options: Any) -> Any:
        with torch.device("meta"):
            model = OnGpu(_make(kind, **options))
        moved = [type("T", (), {"device": model.device})() for _ in range(2)]
        model.parameters = lambda: moved  # type: ignore[attr-defined]
        model.buffers = list  # type: ignore[attr-defined]
        return model

    assert graphs_for(_make("Qwen3")) is None
    assert graphs_for(on_gpu("Qwen3")) is not None
    assert graphs_for(on_gpu("Mistral", sliding_window=8)) is None
    elsewhere = on_gpu("Qwen3")
    elsewhere.parameters()[0].device = torch.device("cpu")
    assert graphs_for(elsewhere) is None
    gemma = transformers.GemmaConfig(**(TINY | {"head_dim": 8}))
    assert graphs_for(OnGpu(transformers.GemmaForCausalLM(gemma))) is None
