"""Chat formats of instruction-tuned models, found by the special tokens of their tokenizers."""

from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Tokenizer


class ChatFormat(NamedTuple):
    """Format of a conversation.

    Attributes:
        message: a message with its {role} and {content}.
        reply: text before the model's reply.
        begin: token before the first message; None: there is none.
        end: token after the reply.
    """

    message: str
    reply: str
    begin: str | None
    end: str

    def prompt(self, messages: Iterable[tuple[str, str]]) -> str:
        """The text after which the model replies to the messages, given as (role, content).

        Example:
            >>> CHATML.prompt([("user", "Hi")])
            '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
        """
        texts = [self.message.format(role=role, content=text) for role, text in messages]
        return "".join(texts) + self.reply


# OpenAI's ChatML: SmolLM2, Qwen.
CHATML = ChatFormat(
    message="<|im_start|>{role}\n{content}<|im_end|>\n",
    reply="<|im_start|>assistant\n",
    begin=None,
    end="<|im_end|>",
)
# TinyLlama.
ZEPHYR = ChatFormat(
    message="<|{role}|>\n{content}</s>\n", reply="<|assistant|>\n", begin="<s>", end="</s>"
)


def of(tokenizer: Tokenizer) -> ChatFormat | None:
    """The format whose special tokens the tokenizer has; None if there is none."""
    has = lambda token: token is None or tokenizer.token_to_id(token) is not None
    return next((f for f in (CHATML, ZEPHYR) if has(f.begin) and has(f.end)), None)
