"""Shared by all tests: one thread per process, a tiny random model in Hugging Face format, and a run without skips."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import difflib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("hypothesis"):  # not in the environment of vLLM's tests
    from hypothesis import settings

    # The same examples each time; make test-thorough draws others.
    settings.register_profile("tropd", derandomize="TROPD_THOROUGH" not in os.environ, deadline=None)
    settings.load_profile("tropd")

# Helpers of all tests. Not this folder itself: its vllm/ would be found as the library of that name.
sys.path.insert(0, str(Path(__file__).parent / "support"))

# What no installation can mend: problem files that may not be copied, what the machine does not permit, no network.
NOT_OURS_TO_MEND = (
    "beside the project",
    "not permitted here",
    "hands out huge pages",
    "the package registry cannot be reached",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="fail where a test is skipped for want of a library or a program",
    )
    parser.addoption(
        "--renew", action="store_true", help="put on record what is now, where tests compare with a record"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``thorough`` belong to ``make test-thorough`` alone; those marked ``first`` begin."""
    if "TROPD_THOROUGH" not in os.environ:
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With ``--no-skips``, a test that was left out is a failure."""
    if session.exitstatus == pytest.ExitCode.OK and _wrongly_skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if missed := _wrongly_skipped(config):
        terminalreporter.write_line(
            f"--no-skips: {len(missed)} skipped, see above; make test-all installs it all"
        )


def _wrongly_skipped(config: pytest.Config) -> list[Any]:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or not config.getoption("--no-skips"):
        return []
    return [report for report in terminal.stats.get("skipped", []) if _can_be_mended(report)]


def _can_be_mended(report: Any) -> bool:
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return not any(words in reason for words in NOT_OURS_TO_MEND)


@pytest.fixture
def on_record(request: pytest.FixtureRequest) -> Callable[[Path, list[str]], None]:
    """Compares lines with those of a file beside the test; with ``--renew``, writes them there."""

    def compare(record: Path, lines: list[str]) -> None:
        if request.config.getoption("--renew"):
            record.write_text("\n".join(lines) + "\n")
        before = record.read_text().splitlines() if record.exists() else []
        changes = difflib.unified_diff(before, lines, "on record", "now", lineterm="", n=0)
        test = request.path.relative_to(request.config.rootpath)
        assert lines == before, "\n".join(
            [
                *changes,
                f"Where this is meant: python -m pytest {test} --renew, and commit {record.name} with the change.",
            ]
        )

    return compare


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """A random Qwen3 of 2 layers, hidden size 32, 24 tokens, context 64; float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()
