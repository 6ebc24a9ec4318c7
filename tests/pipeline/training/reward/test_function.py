"""The user's reward function in processes of its own: what it may return, and every way in which it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import eventually

from tropd.pipeline.training.reward.function import Broken, FunctionPool, Missing, module_file
from tropd.storage.errors import ConfigError

HERE = Path(__file__).parent
ROWS = [{"id": name, "response": "x" * n, "token_ids": [1, 2, 3]} for n, name in enumerate("abc", 1)]
Open = Callable[..., FunctionPool]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    pools: list[FunctionPool] = []

    def open_pool(name: str, seconds: float = 30.0) -> FunctionPool:
        function, log = f"own_rewards:{name}", tmp_path / "reward.log"
        pools.append(FunctionPool(function, [HERE], log, workers=1, seconds=seconds))
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length", [0.1, 0.2, 0.3]),
        ("as_array", [0.0, 1.0, 2.0]),
        ("per_token", [[None, 1.0, 1.0]] * 3),
        ("raises", r"KeyError: 'verdict' \(.*own_rewards.py line \d+\)"),
        ("quits", "SystemExit: enough"),
        ("leaves", "its process has ended"),
        ("too_few", "it returned 2 rewards for 3 rows"),
        ("one_number", "it returned a float, not a list of rewards"),
        ("too_large", r"OverflowError: .*too large"),
        ("words", r"it returned a str \('good'\), where a number or None is due"),
    ],
)
def test_answers_of_functions(opened: Open, name: str, expected: object) -> None:
    (answer,) = opened(name).call([ROWS])
    if isinstance(expected, str):
        assert isinstance(answer, Broken)
        assert re.search(expected, answer.reason), answer.reason
    else:
        assert answer == expected


@pytest.mark.parametrize(("rank", "gpus"), [(True, 7.0), (False, 5.7)])
def test_in_a_rank_it_is_none_and_sees_the_ranks_gpu(
    opened: Open, rank: bool, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "TORCHELASTIC_RUN_ID": "1",
    }
    for name, value in {**(variables if rank else {}), "CUDA_VISIBLE_DEVICES": "5,7"}.items():
        monkeypatch.setenv(name, value)
    assert opened("environment").call([ROWS[:1]]) == [[gpus]]


def test_a_call_that_hangs_costs_its_own_rows_only(opened: Open) -> None:
    began = time.monotonic()
    good, hung, later = opened("hangs", seconds=1.5).call([ROWS[:1], ROWS[1:2], ROWS[2:]])
    assert (good, later) == ([1.0], [1.0])
    assert hung == Missing("a call took longer than reward.seconds = 1.5")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("own_rewards:missing", "has no attribute 'missing'"),
        ("own_rewards:NOT_A_FUNCTION", "is a int, not a function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(tmp_path: Path, function: str, message: str) -> None:
    pool = FunctionPool(function, [HERE], tmp_path / "reward.log", workers=1, seconds=5.0)
    try:
        with pytest.raises(ConfigError, match=message):
            pool.check()
    finally:
        pool.close()


def test_what_it_prints_goes_to_the_log(opened: Open, tmp_path: Path) -> None:
    pool = opened("length")
    pool.check()
    pool.call([ROWS])
    pool.close()
    assert "imported" in (tmp_path / "reward.log").read_text()


def test_the_module_is_found_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("raise RuntimeError('was run')")
    (tmp_path / "pack" / "inner.py").write_text("raise RuntimeError('was run')")
    assert module_file("pack.inner:f", [tmp_path]) == tmp_path / "pack" / "inner.py"
    assert module_file("json:loads", [tmp_path]).name == "__init__.py"
    with pytest.raises(ConfigError, match=r"no module 'absent'.*"):
        module_file("absent:f", [tmp_path])


def test_the_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from tropd.pipeline.training.reward.function import FunctionPool\n"
        "if __name__ == '__main__':\n"
        f"    pool = FunctionPool('own_rewards:hangs', [Path({str(HERE)!r})], Path('log'), workers=1, seconds=600)\n"
        "    pool.check(); print('ready', flush=True)\n"
        "    pool.call([[{'id': 'b'}]])\n"
    )
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TROPD_TEST_MARK": str(tmp_path)},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    eventually(lambda: not _marked(str(tmp_path)), 60, "the worker has ended")


def _marked(mark: str) -> list[str]:
    """Living processes that were started with the mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TROPD_TEST_MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found
