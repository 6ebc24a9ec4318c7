"""Tokenizers are told apart by what they contain, and every difference is shown."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from tropd.pipeline.models.tokenizers import (
    CHAT_TEMPLATE,
    chat_template,
    check_tokenizers,
    differing_parts,
    tokenizer_identity,
)
from tropd.storage.errors import ConfigError

VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "<end>": 5, "<stop>": 6}


def made(
    *,
    vocab: dict[str, int] | None = None,
    merges: tuple[tuple[str, str], ...] = (("a", "b"), ("b", "c")),
    normalizer: Any = None,
    special: tuple[str, ...] = ("<end>",),
    eos: str = "<end>",
    template: str | None = None,
) -> Any:
    """A tiny byte-pair tokenizer."""
    inside = Tokenizer(models.BPE(vocab=vocab or VOCAB, merges=list(merges)))
    if normalizer is not None:
        inside.normalizer = normalizer
    tokens = [AddedToken(text, special=True, normalized=False) for text in special]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, additional_special_tokens=tokens)
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def test_equal_content_is_accepted_however_it_was_made() -> None:
    check_tokenizers(made(), made())
    assert tokenizer_identity(made()) == tokenizer_identity(made())


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"vocab": VOCAB | {"b": 2, "c": 1}}, ["vocabulary: 2 differ", "'b': student 1, teacher 2"]),
        ({"vocab": VOCAB | {"d": 7}}, ["'d': student None, teacher 7"]),
        ({"merges": (("b", "c"), ("a", "b"))}, ["merges: 2 differ", "merge 0: student 'a b', teacher 'b c'"]),
        ({"merges": (("a", "b"),)}, ["merges: 1 differ", "merge 1: student 'b c', teacher None"]),
        (
            {"normalizer": normalizers.Lowercase()},
            ["rules: 1 differ", "normalizer: student None", "Lowercase"],
        ),
        (
            {"special": ("<end>", "<stop>")},
            ["special tokens: 1 differ", "id 6: student None, teacher '<stop>'"],
        ),
    ],
    ids=["swapped", "more", "merge order", "fewer merges", "normalizer", "special"],
)
def test_every_kind_of_difference_is_refused_and_shown(teacher: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError, match="have different tokenizers") as caught:
        check_tokenizers(made(), made(**teacher))
    for word in words:
        assert word in str(caught.value)
    assert tokenizer_identity(made()).digest != tokenizer_identity(made(**teacher)).digest


def test_only_the_first_differences_are_shown_and_long_ones_are_cut() -> None:
    long = {f"{i:03d}" + "x" * 300: 7 + i for i in range(40)}
    with pytest.raises(ConfigError, match=r"vocabulary: 40 differ") as caught:
        check_tokenizers(made(), made(vocab=VOCAB | long))
    lines = str(caught.value).splitlines()
    assert sum("student None, teacher" in line for line in lines) == 5
    assert "'000x" in str(caught.value)


def test_the_chat_template_counts_where_prompts_are_written_with_it() -> None:
    student, teacher = made(template="one\nuser: {{ x }}"), made(template="one\nhuman: {{ x }}")
    check_tokenizers(student, teacher)
    ours, theirs = tokenizer_identity(student), tokenizer_identity(teacher)
    assert ours.digest == theirs.digest
    assert differing_parts(ours.parts, theirs.parts, chat=True) == [CHAT_TEMPLATE]
    assert differing_parts(ours.parts, theirs.parts, chat=False) == []
    assert differing_parts(ours.parts, {}, chat=True) == []  # a side that does not say


def test_the_token_that_ends_a_sequence_may_be_another() -> None:
    both = ("<end>", "<stop>")
    student, teacher = made(special=both), made(special=both, eos="<stop>")
    check_tokenizers(student, teacher)
    ours, theirs = tokenizer_identity(student), tokenizer_identity(teacher)
    assert differing_parts(ours.parts, theirs.parts, chat=True) == []


def test_of_several_named_templates_the_default_one_counts() -> None:
    two = made()
    two.chat_template = {"tool_use": "tool: {{ x }}", "default": "user: {{ x }}"}
    assert chat_template(two) == "user: {{ x }}"
    two.chat_template = {"tool_use": "user: {{ x }}", "rag": "user: {{ x }}"}
    with pytest.raises(ConfigError, match=r"several chat templates \(rag, tool_use\).* 'default'") as caught:
        chat_template(two)
    assert "chat_template.jinja" in str(caught.value.hint)
