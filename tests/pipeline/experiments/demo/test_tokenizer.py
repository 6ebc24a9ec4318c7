"""The character tokenizer survives a Hugging Face directory, and the shortcut agrees with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tropd.pipeline.experiments.demo.tokenizer import (
    CHARACTERS,
    EOS_ID,
    PAD_ID,
    encode_text,
    make_tokenizer,
    vocabulary,
)
from tropd.pipeline.models.loading import load_tokenizer
from tropd.pipeline.models.tokenizers import tokenizer_identity


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    assert tokenizer_identity(load_tokenizer(folder)) == tokenizer_identity(make_tokenizer())
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(CHARACTERS, min_size=1, max_size=60))
def test_text_to_ids_and_back(reloaded: Any, text: str) -> None:
    ids = reloaded(text)["input_ids"]
    assert ids == encode_text(text) == make_tokenizer()(text)["input_ids"]
    assert reloaded.decode(ids) == text
    assert reloaded.decode([*ids, EOS_ID, PAD_ID], skip_special_tokens=True) == text


def test_special_tokens_and_size(reloaded: Any) -> None:
    assert (reloaded.pad_token_id, reloaded.eos_token_id) == (PAD_ID, EOS_ID)
    assert len(reloaded) == len(vocabulary()) == 24
    assert reloaded.get_vocab() == vocabulary()
