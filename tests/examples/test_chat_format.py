"""chat_format.py: the format follows from the tokenizer's special tokens."""

import pytest
from tokenizers import Tokenizer, models

from examples.common import chat_format


MESSAGES = [("system", "Plan."), ("user", "Hi {role}")]


def tokenizer(*special: str) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.add_special_tokens(list(special))
    return found


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (("<s>", "</s>"), chat_format.ZEPHYR),
        (("<|im_start|>", "<|im_end|>"), chat_format.CHATML),
        (("<s>", "</s>", "<|im_start|>", "<|im_end|>"), chat_format.CHATML),
        (("</s>",), None),
        (("<|endoftext|>",), None),
    ],
)
def test_format_of_a_tokenizer(special, expected):
    assert chat_format.of(tokenizer(*special)) is expected


def test_prompts():
    assert chat_format.ZEPHYR.prompt(MESSAGES) == (
        "<|system|>\nPlan.</s>\n<|user|>\nHi {role}</s>\n<|assistant|>\n"
    )
    # The chat template of SmolLM2-135M-Instruct, rendered by hand.
    assert chat_format.CHATML.prompt(MESSAGES) == (
        "<|im_start|>system\nPlan.<|im_end|>\n<|im_start|>user\nHi {role}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
