"""Conversations in the chat templates of SmolLM2, Qwen3 and Llama 3: what is read, and what is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

from tropd.pipeline.problems.encoding import EncodedPrompt, encode_prompts
from tropd.pipeline.problems.prompts import Prompt
from tropd.pipeline.problems.same_prompts import check_same_prompts
from tropd.pipeline.training.rollout.rows import Row, RowPlan
from tropd.pipeline.training.update.micro_batches import Layout, micro_batches
from tropd.storage.errors import ConfigError

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": "It is 2."}
SECOND = {"role": "user", "content": "And 2+2?"}
TOOL = {"role": "tool", "content": "4"}
ANSWER = "Surely 4."


def made(name: str) -> Any:
    """Byte-level, with the special tokens of the model, and with Llama's begin token before every text."""
    llama = name == "llama3"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inside = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (LLAMA if llama else CHATML)]
    inside.add_special_tokens(special)
    if llama:
        begin = inside.token_to_id(LLAMA[0])
        inside.post_processor = processors.TemplateProcessing(
            single=f"{LLAMA[0]} $A", special_tokens=[(LLAMA[0], begin)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inside,
        bos_token=LLAMA[0] if llama else None,
        eos_token="<|eot_id|>" if llama else "<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
    return tokenizer


def encoded(tokenizer: Any, *turns: dict[str, str], **args: Any) -> EncodedPrompt:
    prompt = Prompt("p", "", None, messages=tuple(turns))
    found = encode_prompts([prompt], tokenizer, chat=True, template_args=args, max_length=9999)
    assert (found.rejects, found.notes) == ([], [])
    return found.prompts[0]


CONVERSATIONS = {
    "one turn": (FIRST,),
    "system": (SYSTEM, FIRST),
    "turns": (SYSTEM, FIRST, REPLY, SECOND),
    "tool": (FIRST, REPLY, TOOL),
}
CASES = [("smollm2", {}, ANSWER), ("llama3", {}, ANSWER), ("qwen3", {"enable_thinking": False}, ANSWER)]
CASES += [("qwen3", {}, f"<think>\nHm.\n</think>\n\n{ANSWER}")]


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(("name", "args", "answer"), CASES, ids=["smollm2", "llama3", "qwen3", "thinking"])
def test_prompt_and_response_are_the_conversation_and_only_the_response_is_supervised(
    name: str, args: dict[str, Any], answer: str, turns: tuple[dict[str, str], ...]
) -> None:
    tokenizer = made(name)
    prompt = encoded(tokenizer, *turns, **args)
    # The whole conversation by the template itself: the response stands where its text does.
    conversation = [*turns, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, **args)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = text.rindex(answer)
    end = text.index(tokenizer.eos_token, start) + len(tokenizer.eos_token)
    supervised = [i for i, (low, high) in enumerate(whole["offset_mapping"]) if start <= low and high <= end]
    response = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    row = Row(RowPlan(0, 0, prompt.tokens, (), None, False, 0), response, [0.0] * len(response), False)
    assert row.sequence == whole["input_ids"][: supervised[-1] + 1]
    (batch,) = micro_batches(Layout([row], guided=True), 9999, torch.device("cpu"))
    assert (batch.column_index + 1).tolist() == supervised
    assert batch.targets.tolist() == response == [whole["input_ids"][i] for i in supervised]
    assert batch.is_student.all()
    if tokenizer.bos_token_id is not None:
        assert row.sequence.count(tokenizer.bos_token_id) == 1


def test_templates_are_compared_by_what_they_write() -> None:
    student, teacher = made("qwen3"), made("qwen3")
    teacher.chat_template += "{# the same #}"
    prompt = encoded(student, SYSTEM, FIRST)
    check_same_prompts([prompt], student, teacher)
    check_same_prompts([prompt], student, teacher, teacher_args={"enable_thinking": True})
    with pytest.raises(ConfigError, match="student and teacher read prompt 'p' differently") as caught:
        check_same_prompts([prompt], student, teacher, teacher_args={"enable_thinking": False})
    think, place = teacher.convert_tokens_to_ids("<think>"), len(prompt.tokens)
    words = (
        f"token {place} is the end for the student and {think} '<think>' for the teacher, after 'sistant\\n'"
    )
    assert words in str(caught.value)
    assert "chat_template_args" in str(caught.value.hint)
    other = made("smollm2")
    check_same_prompts([prompt], student, other)  # with a system message they write the same
    with pytest.raises(ConfigError, match=r"token 1 is \d+ 'u' for the student and \d+ 's' for the teacher"):
        check_same_prompts([encoded(student, FIRST)], student, other)
    other.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(
        ConfigError, match=r"of the teacher: prompt 'p' is refused by the chat template.*never"
    ):
        check_same_prompts([prompt], student, other)


def test_a_template_that_leaves_out_earlier_answers_is_refused() -> None:
    tokenizer = made("smollm2")
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    encoded(tokenizer, FIRST)
    with pytest.raises(ConfigError, match="it has no place for a response"):
        encoded(tokenizer, FIRST, REPLY, SECOND)
