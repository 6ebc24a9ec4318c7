"""The teacher service on Ray Serve: one address, two replicas, the same answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from waiting import eventually

from tropd.storage.disk.atomic import content_digest


@pytest.mark.slowest
def test_training_with_a_service_on_ray_gives_the_same_weights(
    tropd: Any, prepared: Path, finished: Path, copy: Any
) -> None:
    pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install "tropd[ray-serve]"')
    workspace, served = copy(prepared), copy(prepared, name="served")
    command = [sys.executable, "-m", "tropd.cli.main", "serve-teacher", "-w", str(served), "--json"]
    service = subprocess.Popen(
        [*command, "--executor", "ray", "--workers", "2"], stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    try:
        url = json.loads(service.stdout.readline())["url"]
        for path in ("/healthz", "/readyz", "/v1/info"):
            assert httpx.get(url + path).status_code == 200
        # One request at a time, whichever replica gets it: the same batches, so the same bits.
        tropd.ok("train", "-w", workspace, "--set", f"teacher.url={url}")
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    assert content_digest(workspace / "train" / "final") == content_digest(finished / "train" / "final")
    (log,) = (served / "logs").glob("teacher-access.*.jsonl")
    statuses = [json.loads(line)["status"] for line in log.read_text().splitlines()]
    assert statuses.count(200) > 8
    eventually(lambda: not answers(f"{url}/healthz"), 30, "the service has ended")


def answers(url: str) -> bool:
    """Whether something speaks HTTP there."""
    try:
        httpx.get(url, timeout=1)
    except httpx.TransportError:
        return False
    return True
