"""Training prompts that share words with evaluation problems are found, listed and left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import make_models, make_run

from tropd.pipeline.problems.decontaminate import overlaps, stretches
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.run.opening import role_tokenizer
from tropd.pipeline.run.progress import SILENT
from tropd.pipeline.run.run import Run
from tropd.pipeline.run.selection import data_fields, training_prompts

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"
LONG = "a farmer has twelve cows and sells three of them to his neighbour for nine coins each"


def prompt(text: str, name: str = "p") -> Prompt:
    return Prompt(name, text, None)


def test_case_punctuation_and_unicode_form_do_not_matter() -> None:
    assert stretches("Ａ Farmer, has: TWELVE cows!", 3) == [
        "a farmer has",
        "farmer has twelve",
        "has twelve cows",
    ]


def test_short_texts_match_as_a_whole_only() -> None:
    assert stretches("1 + 1 = ?", 13) == ["1 1"]
    assert stretches("…", 13) == []
    problems = [("math", prompt("1 + 1 =", "e"))]
    assert len(overlaps([prompt("1+1=")], problems, 13)) == 1
    assert overlaps([prompt("what is 1+1= then")], problems, 13) == []


def test_a_shared_stretch_is_found_wherever_it_is() -> None:
    training = [prompt(f"Solve this. {LONG} How much?", "x"), prompt("something else altogether", "y")]
    (found,) = overlaps(training, [("aime", prompt(f"Once, {LONG}.", "e7"))], 13)
    assert (found.prompt, found.benchmark, found.problem) == ("x", "aime", "e7")
    assert found.words == " ".join(LONG.split()[:13])


def test_twelve_shared_words_are_not_thirteen() -> None:
    twelve = " ".join(LONG.split()[:12])
    problems = [("aime", prompt(f"{twelve} and then something different happens to everyone there"))]
    training = [prompt(f"Yesterday {twelve} while nothing of the other kind could be seen")]
    assert overlaps(training, problems, 13) == []
    assert len(overlaps(training, problems, 12)) == 1


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=0, max_size=30)


@given(training=words, problem=words, n=st.integers(1, 6))
def test_it_agrees_with_comparing_every_pair_of_stretches(
    training: list[str], problem: list[str], n: int
) -> None:
    def runs(text: list[str]) -> set[tuple[str, ...]]:
        if len(text) <= n:
            return {tuple(text)} if text else set()
        return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}

    found = overlaps([prompt(" ".join(training))], [("e", prompt(" ".join(problem)))], n)
    assert bool(found) == bool(runs(training) & runs(problem))


def test_contaminated_prompts_are_left_out_and_listed(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    extra = '[[evaluation.benchmarks]]\nname = "other"\nproblems = "data/other.jsonl"\n'
    plain = make_run(tmp_path / "run", models, extra=extra)
    data = plain.workspace.root / "data"
    (data / "eval.jsonl").write_text('{"prompt": "3+3=", "answer": "6"}\n')
    (data / "other.jsonl").write_text('{"id": "o", "prompt": "5+5=", "answer": "10"}\n')
    told: list[str] = []
    clean = replace(plain, resolved=with_data(plain, decontaminate=13), reporter=Listener(told))
    tokenizer = role_tokenizer(plain, "student")
    everything = [p.id for p in training_prompts(plain, tokenizer, 40).prompts]
    left = [p.id for p in training_prompts(clean, tokenizer, 40).prompts]
    assert len(everything) == 10
    assert left == [name for name in everything if name not in ("p3", "p5")]
    listed = (plain.workspace.root / "rejects" / "contaminated.jsonl").read_text().splitlines()
    assert [(json.loads(x)["prompt"], json.loads(x)["benchmark"]) for x in listed] == [
        ("p3", "evaluation"),
        ("p5", "other"),
    ]
    assert "2 of 10 training prompts share 13 words" in told[0]

    fields = data_fields(clean, "prompts")
    assert fields != data_fields(plain, "prompts")
    (data / "other.jsonl").write_text('{"id": "o", "prompt": "9+9=", "answer": "18"}\n')
    assert data_fields(clean, "prompts") != fields, "other problems leave out other prompts"
    assert data_fields(clean, "evaluation") == data_fields(plain, "evaluation")


def with_data(run: Run, **changes: Any) -> Any:
    config = run.config
    data = config.data.model_copy(update=changes)
    return replace(run.resolved, config=config.model_copy(update={"data": data}))


class Listener:
    """A reporter that keeps its warnings."""

    def __init__(self, told: list[str]) -> None:
        self.task, self.training, self.info, self.warning = (
            SILENT.task,
            SILENT.training,
            SILENT.info,
            told.append,
        )


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no folder of public problem sets beside the project")
def test_a_set_of_real_problems_is_found_in_itself_and_hardly_in_another() -> None:
    def texts(path: Path) -> list[Prompt]:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            prompt(str(r.get("question") or r.get("problem") or r.get("prompt")), str(n))
            for n, r in enumerate(records)
        ]

    files = sorted(SHARED_DATA.rglob("*.jsonl"))
    sets = {path.stem: texts(path)[:500] for path in files}
    assert sets
    for name, problems in sets.items():
        assert len(overlaps(problems, [(name, p) for p in problems], 13)) == len(problems)
