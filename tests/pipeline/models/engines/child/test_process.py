"""An engine in a process of its own: weights, questions, errors, deadlines, and its end in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stand_in_engine
import torch
from waiting import eventually

from tropd.pipeline.models.engines.base import Sampling
from tropd.pipeline.models.engines.child.process import Deadline, Deadlines, EngineProcess
from tropd.storage.errors import ConfigError, TropdError

STATE = {"first": torch.full((2, 3), 5.0), "second": torch.arange(4)}
ASKED: dict[str, Any] = {"seeds": [7, 2**63 + 1], "max_tokens": [3, 4]}
SUPPORT = str(Path(stand_in_engine.__file__).parent)
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": SUPPORT, "OMP_NUM_THREADS": "1"}


def start(
    folder: Path, build: Any = stand_in_engine.build, update: float = 60.0, answer: float = 60.0
) -> EngineProcess:
    return EngineProcess(
        build,
        STATE,
        torch.bfloat16,
        environment=ENVIRONMENT,
        log=folder / "logs" / "engine.log",
        deadlines=Deadlines(
            Deadline(120.0, "vllm.start_seconds"),
            Deadline(update, "vllm.update_seconds"),
            Deadline(answer, "vllm.answer_seconds"),
        ),
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    process = start(tmp_path_factory.mktemp("engine"))
    yield process
    process.close()


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_it_answers_with_the_weights_it_has(engine: EngineProcess) -> None:
    assert engine.max_length == 77
    for weight in (5.0, 6.0):
        engine.set_weights({"first": torch.full((2, 3), weight), "second": torch.arange(4)})
        one, other = engine.generate([[1, 2], [3]], Sampling(), **ASKED)
        assert (one.tokens[:2], other.tokens[:2]) == ([2, weight], [1, weight])
        assert one.logprobs == [-0.1, -1.0, -3.0]
        assert (one.finish_reason, one.drawn_logprobs) == ("stop", None)
        assert engine.generate([[1]], Sampling(0.5), seeds=[0], max_tokens=[1])[0].drawn_logprobs == [
            -1,
            -2,
            -3,
        ]
        scores = engine.token_logprobs([[1, 2, 3], [4, 5]], [1, 1])
        assert [row.tolist() for row in scores] == [[6 * weight + 6] * 2, [6 * weight + 6]]
        ids = engine.choose([[1, 2, 3], [4, 5], [6]], [1, 1, 1], 2, 50)
        assert [table.tolist() for table in ids] == [[[2, 3], [3, 4]], [[5, 6]], []]
        assert ids[2].shape == (0, 2)
    assert engine.generate([], Sampling(), seeds=[], max_tokens=[]) == []


def test_it_tells_of_continuations_before_it_has_written_all(engine: EngineProcess) -> None:
    engine.set_weights(STATE)
    told: list[Any] = []
    asked: dict[str, Any] = {**ASKED, "finished": lambda number, one: told.append((number, one))}
    for sampling in (Sampling(), Sampling(0.5)):
        told.clear()
        written = engine.generate([[1, 2], [3]], sampling, **asked)
        assert told == [(1, written[1]), (0, written[0])]
        assert engine.generate([[1, 2], [3]], sampling, **ASKED) == written


def test_what_it_has_told_is_there_when_the_rest_is_late(tmp_path: Path) -> None:
    engine = start(tmp_path, answer=1.0)
    engine.set_weights(STATE)
    told: list[int] = []
    asked: dict[str, Any] = {**ASKED, "finished": lambda number, one: told.append(number)}
    with pytest.raises(TropdError, match="had not answered 2 prompts after 1 s"):
        engine.generate([[stand_in_engine.WAITS], [3]], Sampling(), **asked)
    assert told == [1, 0]
    engine.close()


def test_it_rests_until_weights_are_set(engine: EngineProcess) -> None:
    engine.set_weights(STATE)
    before = engine.generate([[1]], Sampling(), seeds=[0], max_tokens=[1])[0].tokens[2]
    engine.rest()
    with pytest.raises(TropdError, match="AssertionError: asleep"):
        engine.generate([[1]], Sampling(), seeds=[0], max_tokens=[1])
    engine.set_weights(STATE)
    assert engine.generate([[1]], Sampling(), seeds=[0], max_tokens=[1])[0].tokens[2] == before + 1


def test_its_errors_are_ours_and_it_goes_on(engine: EngineProcess) -> None:
    engine.set_weights(STATE)
    with pytest.raises(ConfigError, match="this is not possible") as refused:
        engine.generate([[stand_in_engine.REFUSES]], Sampling(), seeds=[0], max_tokens=[1])
    assert refused.value.hint == "ask for something else"
    with pytest.raises(TropdError, match="this went wrong") as failed:
        engine.generate([[stand_in_engine.FAILS]], Sampling(), seeds=[0], max_tokens=[1])
    assert (failed.value.exit_code, failed.value.hint) == (1, "try again")
    assert engine.generate([[1]], Sampling(), seeds=[0], max_tokens=[1])[0].tokens[:2] == [1, 5]


def test_its_environment_is_the_given_one(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    (answer,) = engine.generate([[stand_in_engine.TELLS_ENVIRONMENT]], Sampling(), seeds=[0], max_tokens=[1])
    assert answer.tokens == [0]


def test_an_update_that_hangs_is_ended_in_time_with_numbers_and_the_setting(tmp_path: Path) -> None:
    engine = start(tmp_path, update=1.0)
    began = time.monotonic()
    with pytest.raises(TropdError) as late:
        engine.set_weights(STATE | {"first": torch.full((2, 3), float(stand_in_engine.HANGS))})
    assert time.monotonic() - began < 10
    assert "had not taken the student's new weights after 1 s" in late.value.message
    assert "waiting for nothing" in late.value.message
    assert "raise vllm.update_seconds (now 1)" in str(late.value.hint)
    assert not is_alive(engine.pid)
    engine.close()


def test_a_process_that_ends_is_an_error_that_says_how(tmp_path: Path) -> None:
    engine = start(tmp_path)
    with pytest.raises(TropdError, match="ended with exit code 7 before it had answered 1 prompts"):
        engine.generate([[stand_in_engine.ENDS]], Sampling(), seeds=[0], max_tokens=[1])
    with pytest.raises(TropdError, match="before it had taken"):
        engine.set_weights(STATE)
    engine.close()


def test_a_process_that_is_killed_is_an_error_that_names_the_signal(tmp_path: Path) -> None:
    engine = start(tmp_path, stand_in_engine.build)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(TropdError, match="was ended by SIGKILL before it had") as ended:
        engine.set_weights(STATE)
    assert "the same command resumes" in str(ended.value.hint)
    engine.close()


def test_an_engine_that_cannot_be_built_is_refused_with_its_reason(tmp_path: Path) -> None:
    error = ConfigError("vLLM is not installed")
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        start(tmp_path, partial(stand_in_engine.fail, error))
    assert "Traceback" in (tmp_path / "logs" / "engine.log").read_text()


def test_it_ends_with_its_trainer_however_that_ends(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path[:0] = [{SUPPORT!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_process import STATE, start
engine = start(Path({str(tmp_path)!r}))
print(engine.pid, flush=True)
import threading, torch, stand_in_engine
threading.Thread(target=lambda: engine.set_weights({{**STATE, "first": torch.full((2, 3), 90.0)}})).start()
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    log = tmp_path / "logs" / "engine.log"
    eventually(lambda: "waiting for nothing" in log.read_text(), 60, "it is at work")
    trainer.kill()
    trainer.wait()
    eventually(lambda: not is_alive(pid), 20, "the process of the engine has ended")
