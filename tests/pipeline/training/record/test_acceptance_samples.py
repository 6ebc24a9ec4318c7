"""What is kept of a step for people to look at: right texts, right numbers, exact across interruptions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tropd.pipeline.experiments.demo.tokenizer import encode_text, make_tokenizer
from tropd.pipeline.objectives.partition import Regions
from tropd.pipeline.problems.encoding import EncodedPrompt
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.training.record.acceptance_samples import (
    ALTERNATIVES,
    MAX_GUIDANCE,
    MAX_TOKENS,
    ROWS,
    take_sample,
    token_texts,
    write_sample,
)
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.signal.ask_teacher import TeacherData
from tropd.pipeline.training.update.gradients import StepInputs
from tropd.pipeline.training.update.micro_batches import RaggedTopk
from tropd.storage.formats.samples_file import read_samples, resume_samples
from tropd.storage.formats.step_log import SAMPLED_STEPS, sampled_steps
from tropd.storage.workspace import SAMPLES

PROMPTS = [EncodedPrompt(Prompt(id=f"p{i}", text=f"{i}+1=", answer="1"), []) for i in range(40)]
LOG = math.log


def byte_tokenizer() -> Any:
    """One token per byte: a character is up to four tokens."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


BYTES = byte_tokenizer()


def make_inputs(rows: list[Row], teacher: list[float], topk: RaggedTopk | None = None) -> StepInputs:
    outlier = np.isin(np.arange(len(teacher)), (0, 4)).astype(np.float32)
    data = TeacherData(np.array(teacher, dtype=np.float32), None, topk or RaggedTopk.empty())
    return StepInputs(rows, data, Regions(np.float32(1) - outlier, outlier), None, None, 0.0)


def make_row(index: int, prefix: str, tokens: str, logprob: float = -1.0) -> Row:
    plan = RowPlan(
        index, index, encode_text("1+1="), encode_text(prefix), 0 if prefix else None, not tokens, seed=index
    )
    return Row(plan, encode_text(tokens), [logprob] * len(tokens), truncated=index == 2)


@given(total=st.integers(0, 5000))
def test_sampled_steps_are_few_and_even(total: int) -> None:
    steps = sampled_steps(total)
    assert len(steps) == min(total, SAMPLED_STEPS)
    assert list(steps) == sorted(set(steps))
    if total > 1:
        assert (steps[0], steps[-1]) == (0, total - 1)
        gaps = np.diff(steps)
        assert gaps.max() - gaps.min() <= 1


@given(
    st.lists(st.sampled_from(["a", " ", "é", "∑", "😀", "\n", "</script>", "\x00", "\ufffd"]), max_size=12)
)
def test_token_texts_join_to_the_text(parts: list[str]) -> None:
    text = "".join(parts)
    tokens = BYTES(text)["input_ids"]
    texts = token_texts(BYTES, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == text


@given(st.lists(st.integers(0, 255), max_size=30))
def test_token_texts_join_even_where_the_bytes_are_no_text(tokens: list[int]) -> None:
    assert "".join(token_texts(BYTES, tokens)) == BYTES.decode(tokens)


def test_numbers_stand_at_their_tokens() -> None:
    rows = [make_row(0, "12", "345"), make_row(1, "67", ""), make_row(2, "", "89", logprob=LOG(0.5))]
    teacher = [-1.0, -3.0, -0.5, -math.inf, LOG(0.25)]
    # Token 1 (row 0) has three alternatives, given out of order; token 4 (row 2) has one.
    ids = np.array(encode_text("123") + encode_text("7"))
    topk = RaggedTopk(
        np.array([1, 4]),
        np.array([3, 1]),
        ids,
        np.log(np.array([0.1, 0.6, 0.3, 0.9], dtype=np.float32)),
        np.zeros(2, dtype=np.float32),
    )
    sample = take_sample(7, make_inputs(rows, teacher, topk), PROMPTS, make_tokenizer())
    first, last = sample.responses  # where the student has written nothing there is nothing to see
    assert (sample.step, first.prompt_id, last.prompt_id) == (7, "p0", "p2")
    assert (first.prompt, first.guidance, first.guidance_tokens) == ("0+1=", ["1", "2"], 2)
    assert "".join(t.text for t in first.tokens) == "345"
    assert (first.truncated, last.truncated) == (False, True)
    assert [t.p_trust for t in first.tokens] == [1.0, round(math.exp(-2), 5), 1.0]
    assert [t.p_trust for t in last.tokens] == [0.0, 0.5]
    assert [t.teacher_logprob for t in last.tokens] == [None, round(LOG(0.25), 5)]
    assert [(t.trust, t.outlier) for t in first.tokens] == [(0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    assert [(t.trust, t.outlier) for t in last.tokens] == [(1.0, 0.0), (0.0, 1.0)]
    assert [(a.text, a.probability) for a in first.tokens[1].alternatives] == [
        ("2", pytest.approx(0.6, abs=1e-5)),
        ("3", pytest.approx(0.3, abs=1e-5)),
        ("1", pytest.approx(0.1, abs=1e-5)),
    ]
    assert [len(t.alternatives) for t in last.tokens] == [0, 1]


def test_long_responses_are_cut_and_many_rows_thinned_out() -> None:
    prefix, text = "1" * (MAX_GUIDANCE - 1) + "23", "4" * MAX_TOKENS + "5"
    rows = [make_row(i, prefix, text) for i in range(33)]
    count = sum(len(row.tokens) for row in rows)
    wide = RaggedTopk(
        np.arange(count),
        np.full(count, 9),
        np.tile(np.array(encode_text("012345678")), count),
        np.tile(np.log(np.full(9, 0.1, dtype=np.float32)), count),
        np.zeros(count, dtype=np.float32),
    )
    sample = take_sample(0, make_inputs(rows, [-1.0] * count, wide), PROMPTS, make_tokenizer())
    assert [r.prompt_id for r in sample.responses] == ["p0", "p11", "p21", "p32"]
    assert len(sample.responses) == ROWS
    kept = sample.responses[-1]
    assert "".join(kept.guidance) == prefix[1:], "the end of the prefix, which the student goes on from"
    assert "".join(t.text for t in kept.tokens) == text[:-1]
    assert (kept.guidance_tokens, kept.student_tokens) == (MAX_GUIDANCE + 1, MAX_TOKENS + 1)
    assert {len(t.alternatives) for t in kept.tokens} == {ALTERNATIVES}


def test_steps_without_student_tokens_are_no_special_case() -> None:
    sample = take_sample(0, make_inputs([make_row(0, "12", "")], []), PROMPTS, make_tokenizer())
    assert [(r.guidance, r.tokens) for r in sample.responses] == [(["1", "2"], [])]
    assert take_sample(0, make_inputs([], []), PROMPTS, make_tokenizer()).responses == []


def test_an_interrupted_run_leaves_the_file_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    tokenizer = make_tokenizer()

    def go(folder: Path, first: int, end: int, mark: str) -> None:
        assert resume_samples(folder, first, 50) == ""
        for step in range(first, end):
            inputs = make_inputs([make_row(step % 40, "", f"{step}{mark}")], [-1.0] * (len(str(step)) + 1))
            write_sample(folder, step, 50, inputs, PROMPTS, tokenizer)

    go(whole, 0, 50, "#")
    steps = [sample.step for sample in read_samples(whole / SAMPLES)[0]]
    assert steps == list(sampled_steps(50))
    go(killed, 0, 30, ";")  # had got to step 30; the last checkpoint was of step 0
    assert len(read_samples(killed / SAMPLES)[0]) == 5
    assert resume_samples(killed, 0, 50) == ""
    assert read_samples(killed / SAMPLES) == ([], 0)
    go(killed, 0, 24, "#")
    go(killed, 20, 50, "#")
    assert (killed / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    path = tmp_path / SAMPLES
    assert read_samples(path) == ([], 0)
    inputs = make_inputs([make_row(0, "", "1")], [-1.0])
    write_sample(tmp_path, 0, 9, inputs, PROMPTS, make_tokenizer())
    path.write_bytes(path.read_bytes() + b'{"step": 3}\n\xff\xfe\n{"step": 8, "resp')
    samples, unreadable = read_samples(path)
    assert ([s.step for s in samples], unreadable) == ([0], 3)
