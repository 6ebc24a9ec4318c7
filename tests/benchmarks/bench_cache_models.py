"""Bytes per cached token of real models: ``python tests/benchmarks/bench_cache_models.py WORKSPACE …``.

A teacher has scored its trajectories with many alternatives (``tropd score-teacher -w W --set scores.k=256``).
The same scores are cut to fewer here, and written in each precision. Prints the table of docs/cache.md.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from tropd.pipeline.config.resolve import load_config
from tropd.pipeline.models.directories import model_directory
from tropd.pipeline.models.loading import load_tokenizer
from tropd.pipeline.models.tokenizers import num_tokens
from tropd.storage.cache.shard import TopK, concatenate, read_topk, write_topk
from tropd.storage.cache.topk_encoding import Precision
from tropd.storage.disk.atomic import content_size
from tropd.storage.workspace import Workspace

KS = (16, 64, 256)
PRECISIONS: tuple[Precision, ...] = ("float16", "q8")


def cut(data: TopK, k: int) -> TopK:
    """The leading ``k`` alternatives of each token; the mass of the others goes to the tail."""
    first = np.concatenate([[0], np.cumsum(data.counts.astype(np.int64))[:-1]])
    place = np.arange(len(data.ids)) - np.repeat(first, data.counts)
    token = np.repeat(np.arange(len(data.counts)), data.counts)
    kept = place < k
    tail = np.exp(data.tail.astype(np.float64))
    np.add.at(tail, token[~kept], np.exp(data.logprobs[~kept].astype(np.float64)))
    with np.errstate(divide="ignore"):
        return replace(
            data,
            counts=np.minimum(data.counts, k).astype(data.counts.dtype),
            ids=data.ids[kept],
            logprobs=data.logprobs[kept],
            tail=np.log(tail).astype(data.tail.dtype),
        )


def main() -> None:
    print("| vocabulary | tokens | k | alternatives | kept mass | float16 bytes | q8 bytes |\n|" + "---|" * 7)
    for root in map(Path, sys.argv[1:]):
        workspace = Workspace.open(root)
        teacher = load_config(workspace.config_path, ()).config.teacher
        vocabulary = num_tokens(load_tokenizer(model_directory(workspace, teacher, "teacher")))
        data = concatenate(
            [read_topk(path) for path in sorted(workspace.stage("scores").glob("part-*.zarr"))]
        )
        tokens = len(data.counts)
        for k in KS:
            few = cut(data, k)
            sizes = []
            for precision in PRECISIONS:
                with tempfile.TemporaryDirectory() as folder:
                    write_topk(Path(folder) / "part.zarr", few, precision=precision)
                    sizes.append(content_size(Path(folder) / "part.zarr") / tokens)
            mass = 1.0 - float(np.exp(few.tail.astype(np.float64)).mean())
            print(
                f"| {vocabulary:,} | {tokens:,} | {k} | {few.counts.mean():.1f} | {mass:.3f} | "
                + " | ".join(f"{size:.0f}" for size in sizes)
                + " |"
            )


if __name__ == "__main__":
    main()
