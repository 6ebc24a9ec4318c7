"""Kill the real stages at their durable operations: prefixes, scores by two parts, and their gathering.

As a script (``python stage_faults.py ROOT STRIDE``); see ``tests/storage/faults.py``, whose faults it uses. Prints the
number of operations, then one JSON object per kill.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

import storage_samples as samples
import torch
from faults import in_child
from tiny_runs import make_models, make_run

from tropd.pipeline.stages.prefixes import generate_prefixes
from tropd.pipeline.stages.scores import score_teacher
from tropd.pipeline.stages.shards import Execution, Part
from tropd.storage.verify.verify import verify_workspace


def main(root: Path, stride: int) -> None:
    torch.set_num_threads(1)
    models = make_models(root / "models")

    def work(folder: Path) -> None:
        run = make_run(folder, models, prompts=8, extra="[run]\nseed = 3\n")
        generate_prefixes(run)
        for index in (1, 2):
            score_teacher(run, execution=Execution(Part(index, 2)))

    def outputs(folder: Path) -> dict[str, str]:
        kept = {k: v for k, v in samples.tree(folder).items() if not k.startswith(("logs", "data"))}
        return {k: v for k, v in kept.items() if "/" in k}

    outcome, total = in_child(root / "undisturbed", 0, "kill", work)
    assert outcome == "done", outcome
    expected = outputs(root / "undisturbed")
    assert len(expected) > 4, expected
    print(json.dumps({"operations": total}))
    for at in range(1, total + 1, stride):
        folder = root / "killed"
        first, _ = in_child(folder, at, "kill", work)
        rerun, _ = in_child(folder, 0, "kill", work)
        findings = [str(f) for f in verify_workspace(make_run(folder, models, prompts=8).workspace)]
        same = outputs(folder) == expected
        print(json.dumps({"at": at, "first": first, "rerun": rerun, "same": same, "findings": findings}))
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
