"""Small, deterministic data that the storage tests share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from tropd.storage.cache.shard import TopK, prune, write_topk
from tropd.storage.formats.trajectories import Trajectory, write_trajectories
from tropd.storage.stage.fingerprint import Fingerprint
from tropd.storage.stage.stage import open_stage
from tropd.storage.workspace import Workspace

VOCAB_SIZE = 50


def trajectory(index: int, *, num_tokens: int = 5, prompt: str = "p") -> Trajectory:
    """Trajectory ``index``: its tokens and log-probs follow from the index alone."""
    rng = np.random.default_rng(index)
    tokens = rng.integers(0, VOCAB_SIZE, num_tokens).tolist()
    return Trajectory(
        prompt_id=f"{prompt}{index}",
        sample_index=0,
        prompt_tokens=[1, 2, 3],
        tokens=tokens,
        sampled_logprobs=(-rng.random(num_tokens)).tolist(),
        finish_reason="stop",
        text=f"text {index}",
        author="teacher",
        meta={"source": "test"},
    )


def distributions(rng: np.random.Generator, num_tokens: int, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Log-probs ``[num_tokens, vocab_size]`` float32 of distributions from flat to almost certain."""
    logits = rng.normal(size=(num_tokens, vocab_size)) * rng.uniform(0.1, 12.0, size=(num_tokens, 1))
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def topk_of(rows: list[Trajectory], *, k: int = 8, mass: float = 0.999, seed: int = 0) -> TopK:
    """Teacher scores for the tokens of ``rows`` under random distributions."""
    lengths = [len(row.tokens) for row in rows]
    full = distributions(np.random.default_rng(seed), sum(lengths))
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    tokens = (
        np.concatenate([np.asarray(row.tokens, dtype=np.int64) for row in rows]) if rows else np.zeros(0, int)
    )
    return prune(
        order.astype(np.int32),
        np.take_along_axis(full, order, axis=1),
        full[np.arange(len(full)), tokens],
        lengths,
        mass=mass,
    )


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder except lock files, by relative name; empty folders end in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            if not any(path.iterdir()):
                found[f"{name}/"] = ""
        elif not path.name.endswith(".lock"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def build_workspace(root: Path, *, parts: int, rows: int, scored: int | None = None) -> Workspace:
    """A workspace with ``parts`` trajectory shards of ``rows`` rows, the first ``scored`` of them scored."""
    workspace = Workspace.create(root)
    prefixes = Fingerprint({"seed": 1})
    shards = [[trajectory(100 * part + i) for i in range(rows)] for part in range(parts)]
    with open_stage(workspace.stage("prefixes"), "prefixes", prefixes) as stage:
        for part, listed in enumerate(shards):
            name = f"part-{part:05d}.parquet"
            stage.commit(name, write_trajectories(stage.folder / name, listed))
        stage.finish(rows=parts * rows)
    fingerprint = Fingerprint({"upstream.prefixes": prefixes.digest, "teacher.vocab_size": VOCAB_SIZE})
    with open_stage(workspace.stage("scores"), "scores", fingerprint) as stage:
        for part, listed in enumerate(shards[:scored]):
            name = f"part-{part:05d}.zarr"
            write_topk(stage.folder / name, topk_of(listed, seed=part))
            stage.commit(name, rows=len(listed))
        if scored is None:
            stage.finish()
    return workspace
