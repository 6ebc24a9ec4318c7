"""The character tokenizer of the embedded task, as an ordinary Hugging Face tokenizer."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*=;#"
PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1
# Unused ids, as real vocabularies have them.
RESERVED = 6


def vocabulary() -> dict[str, int]:
    """Token to id: padding, end, the characters, and a few unused ones."""
    tokens = [PAD, EOS, *CHARACTERS, *(f"<unused{i}>" for i in range(RESERVED))]
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer() -> Any:
    """One token per character; nothing is added on encoding."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def encode_text(text: str) -> list[int]:
    """Ids of the characters, without the overhead of the tokenizer."""
    return [CHARACTERS.index(c) + 2 for c in text]
