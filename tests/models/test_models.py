"""The table of docs/models.md says what tropd does, for a dozen of its architectures; and it holds no mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from architectures import architectures
from checks import check
from table import line, read

pytest.importorskip("peft", reason="the extra 'lora' is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TRIED = [
    "bart",
    "bloom",
    "deepseek_v3",
    "gemma2",
    "gpt2",
    "gpt_oss",
    "granite",
    "jamba",
    "llama",
    "mamba2",
    "opt",
    "qwen3_moe",
    "qwen3_next",
    "rwkv",
]


@pytest.fixture(scope="module")
def page() -> dict[str, str]:
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip(f"docs/models.md is not of transformers {transformers.__version__}: make models")
    return read(text)


def test_every_architecture_has_a_line_and_none_is_wrong(page: dict[str, str]) -> None:
    assert set(page) == set(architectures())
    assert not [row for row in page.values() if "WRONG" in row]


@pytest.mark.parametrize("model_type", TRIED)
def test_the_table_says_what_happens(page: dict[str, str], model_type: str) -> None:
    name, types = next((name, types) for name, types in architectures().items() if model_type in types)
    answers = check(types[0])
    cells = [answers.samples, answers.scores, answers.gradient, answers.lora]
    assert page[name].split(" | ")[2:6] == cells, line(name, types, answers)
