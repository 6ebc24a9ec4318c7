"""What a GPU does in training, scoring and decoding, on a device and on the CPU. ``test_gpu_shapes.py`` runs it.

    python tests/gpu_shapes/child.py OUT.json GUARD.so|cuda CASE…

With the library, the device is a pretended one (see ``pretend_cuda``); ``cuda`` is a real one, whose waits nobody counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(Path(__file__).parent)]


def main(out: str, device: str, *names: str) -> None:
    if device != "cuda":
        from pretend_cuda import library

        library.load(Path(device))
    import cases
    import torch

    torch.set_num_threads(1)
    Path(out).write_text(json.dumps(cases.run_all(names, pretended=device != "cuda")))


if __name__ == "__main__":
    main(*sys.argv[1:])
