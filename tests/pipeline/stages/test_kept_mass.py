"""A cache that keeps little of the teacher's probability says so, and how many alternatives would keep more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tropd.pipeline.run.opening import load_role
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.stages.kept_mass import low_mass_warning, needed_alternatives
from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.storage.formats.trajectories import read_trajectories


def test_the_needed_k_is_that_of_the_whole_distribution(tiny_run: Run) -> None:
    generate_prefixes(tiny_run)
    rows = list(read_trajectories(tiny_run.workspace.stage("prefixes") / "part-00000.parquet"))
    loaded = load_role(tiny_run, "teacher")
    engine = loaded.engine(batch_size=4)
    masses = []
    for row in rows:
        tokens = torch.tensor([[*row.prompt_tokens, *row.tokens]])
        with torch.no_grad():
            logits = loaded.model(tokens).logits[0, len(row.prompt_tokens) - 1 : -1].double()
        probabilities = logits[:, : engine.vocab_size].softmax(-1).sort(descending=True).values
        chosen = np.linspace(0, len(row.tokens) - 1, min(32 // len(rows), len(row.tokens))).astype(int)
        masses.append(probabilities[chosen].cumsum(-1).numpy())
    mean = np.concatenate(masses).mean(axis=0)
    for wanted in (0.5, 0.9, 0.99):
        k = needed_alternatives(engine, rows, wanted)
        assert mean[k - 1] >= wanted - 1e-6
        assert k == 1 or mean[k - 2] < wanted + 1e-6


def test_scoring_warns_once_and_names_k(tiny_run: Run) -> None:
    warnings: list[str] = []

    class Told(type(SILENT)):  # type: ignore[misc]
        def warning(self, message: str) -> None:
            warnings.append(message)

    generate_prefixes(tiny_run)
    settings: dict[str, Any] = {"k": 2}
    config = tiny_run.config.model_copy(update={"scores": tiny_run.config.scores.model_copy(update=settings)})
    run = replace(tiny_run, resolved=replace(tiny_run.resolved, config=config), reporter=Told())
    found = score_teacher(run)
    assert len(found.shards) > 2
    assert found.summary["kept_mass"] < 0.95
    (warning,) = [w for w in warnings if "scores.k = 2 keeps" in w]
    assert "99% would take scores.k = " in warning
    warnings.clear()
    everything = config.model_copy(update={"scores": config.scores.model_copy(update={"k": 40})})
    score_teacher(replace(run, resolved=replace(run.resolved, config=everything)), force=True)
    assert not warnings


def test_more_than_the_cache_takes_is_no_setting() -> None:
    assert "99% would take 20,000 (" in low_mass_warning(0.9, 64, 20_000, 1024)
