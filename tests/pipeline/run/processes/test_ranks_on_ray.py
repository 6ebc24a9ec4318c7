"""Ranks on a Ray cluster: their numbers and GPUs on several nodes, and on a real cluster of this machine's CPUs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import eventually

from tropd.pipeline.run.processes import ranks_on_ray
from tropd.pipeline.run.processes.ranks_on_ray import RankPlace, ranks_of, run_ranks_on_ray
from tropd.storage.errors import ConfigError, TropdError

SAYS = """
import json, os, pathlib, sys
names = ("LOCAL_RANK", "WORLD_SIZE", "TROPD_TEACHER_TOKEN")
print("rank", os.environ["RANK"], "is here")
said = json.dumps([os.environ[name] for name in names])
(pathlib.Path(sys.argv[1]) / (os.environ["RANK"] + ".json")).write_text(said)
"""
FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("no more memory")
time.sleep(600)
"""


def place(node: str, visible: str) -> RankPlace:
    return RankPlace(node, f"host-{node}", f"10.0.0.{node}", visible, shares=True)


def test_ranks_are_numbered_node_by_node_and_see_their_nodes_gpus() -> None:
    places = [place("2", "5"), place("1", "0"), place("2", "4"), place("2", "7")]
    ranks = ranks_of(places)
    assert [number for number, _ in ranks] == [2, 0, 3, 1]  # the fullest node first
    said = [
        tuple(variables[name] for name in ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"))
        for _, variables in ranks
    ]
    assert said == [("0", "0", "4,5,7"), ("1", "1", "4,5,7"), ("2", "2", "4,5,7"), ("3", "0", "0")]
    common = {(v["MASTER_ADDR"], v["WORLD_SIZE"], v["LOCAL_WORLD_SIZE"]) for _, v in ranks}
    assert common == {("10.0.0.2", "4", "3")}


def test_ray_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"tropd\[ray\]"):
        run_ranks_on_ray([sys.executable], 2, tmp_path, "train", "cpu")


@pytest.fixture(scope="module")
def ray_cluster() -> Any:
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slowest
def test_ranks_run_on_a_cluster(ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROPD_TEACHER_TOKEN", "secret")
    logs = tmp_path / "logs"
    run_ranks_on_ray([sys.executable, "-c", SAYS, str(tmp_path)], 2, logs, "train", "auto")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [str(rank), "2", "secret"]
        assert f"rank {rank} is here" in (logs / f"train-rank-{rank}.log").read_text()
    assert len(list(logs.iterdir())) == 2


@pytest.mark.slowest
def test_one_that_fails_ends_the_others_and_its_log_is_shown(ray_cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(TropdError, match=r"process 1 of 2 ended with exit code 1; (.|\n)*no more memory"):
        run_ranks_on_ray([sys.executable, "-c", FAILS], 2, tmp_path / "logs", "train", "cpu")
    eventually(
        lambda: ray_cluster.available_resources().get("CPU") == 2, 30, "the cluster has its CPUs again"
    )


@pytest.mark.slowest
def test_what_the_cluster_cannot_give_is_refused_with_numbers(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", ""]
    with pytest.raises(ConfigError, match="3 CPUs; the cluster has 2 CPUs and 0 GPUs"):
        run_ranks_on_ray(command, 3, tmp_path, "train", "auto")
    with pytest.raises(ConfigError, match="2 GPUs; the cluster has"):
        run_ranks_on_ray(command, 2, tmp_path, "train", "cuda")
    monkeypatch.setattr(ranks_on_ray, "PLACEMENT_SECONDS", 0.5)
    busy = ray_cluster.util.placement_group([{"CPU": 1}])
    assert busy.wait(30)
    try:
        with pytest.raises(ConfigError, match=r"no room for 2 processes .* 1 CPUs and 0 GPUs are free"):
            run_ranks_on_ray(command, 2, tmp_path, "train", "cpu")
    finally:
        ray_cluster.util.remove_placement_group(busy)


@pytest.mark.slowest
def test_a_node_that_does_not_see_the_workspace_is_named(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_on_ray, "write_text_atomic", lambda *_: None)
    with pytest.raises(ConfigError, match=r"is not there on (.|\n)*that all nodes share"):
        run_ranks_on_ray([sys.executable, "-c", ""], 2, tmp_path, "train", "cpu")
