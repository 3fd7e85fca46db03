"""Generate text with a Llama: from a run of these examples or from a Hugging Face checkpoint.

    python examples/pretraining/generate.py runs/tiny-natural_galore --prompt "def "
    python examples/pretraining/generate.py TinyLlama-1.1B --prompt "Once upon" --temperature 0

The folder is the output of pretrain.py, sharded.py or seven_billion.py (read from its log and
checkpoint; tokens are bytes, or for C4 those of the run's tokenizer), or the output of
finetune_function_calling.py, or a checkpoint in Hugging Face's format (config.json,
model.safetensors, tokenizer.json). Each token costs one forward pass of one token, with a key-value
cache (kv_cache.py). The context is never truncated.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from examples.common import (
    chat_format,
    checkpoint,
    command_line,
    data,
    hugging_face,
    kv_cache,
    llama,
    run_log,
    sample,
)
from examples.pretraining import c4, pretrain, settings, seven_billion, sharded


@dataclass(frozen=True)
class Config:
    """Settings of this script."""

    folder: Annotated[Path, command_line.POSITIONAL]
    """Output folder of a run, or a folder with a Hugging Face checkpoint."""
    prompt: str = "def "
    """Text to continue."""
    tokens: int = 200
    """Maximum number of generated tokens."""
    temperature: float = 0.8
    """Sampling temperature; 0: always the most likely token."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls."""

    def check(self) -> None:
        """Raises a ValueError that names the first invalid argument."""
        if not self.prompt:
            raise ValueError("--prompt must not be empty")
        if not 1 <= self.tokens < 2**20:
            raise ValueError(f"--tokens must be at least 1 and below 2**20, got {self.tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must not be negative, got {self.temperature}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be at least 0 and below 2**31, got {self.seed}")


class Writer(NamedTuple):
    """A model with its tokenizer.

    Attributes:
        config: shape of the model.
        params: weights of the model.
        encode: text -> tokens.
        decode: tokens -> text, with control characters escaped.
        end: end token, or None.
    """

    config: llama.LlamaConfig
    params: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int | None = None


def read_run(folder: Path) -> Writer:
    """Reads the model of a run of pretrain.py, sharded.py or seven_billion.py.

    Raises:
        OSError: the tokenizer of the run is missing.
        ValueError: the folder has no checkpoint, or a damaged one.
    """
    header = run_log.read_header(folder / "log.jsonl")
    kinds = {"mesh": sharded.Config, "limit": seven_billion.Config}  # by a setting of their own
    recorded = header.get("config", {})
    kind = next((k for name, k in kinds.items() if name in recorded), settings.Config)
    config = command_line.begun_with(folder, kind)
    if config.compare:
        raise ValueError(f"{folder} is a comparison: choose one of its folders {config.compare}")
    if not checkpoint.holds_checkpoint(folder):
        raise ValueError(f"{folder} has no checkpoint")
    coding, end = data.BYTES, None
    if config.dataset == "c4":
        tokenizer = c4.read_tokenizer(config.tokenizer, header["data"]["tokenizer"])
        coding, end = c4.coding(tokenizer), tokenizer.token_to_id(c4.END)
    target = jax.eval_shape(pretrain.make_functions(config).init, jax.random.key(0))
    with checkpoint.Checkpoints(config, header["data"]["sha256"]) as checkpoints:
        state, _ = checkpoints.restore(target)
    decode = lambda tokens: sample.printable(coding.decode(tokens))
    return Writer(config.model, state.params, coding.encode, decode, end)


def read_hugging_face(folder: Path) -> Writer:
    """Reads a Llama and its tokenizer in Hugging Face's format.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged or of another model.
    """
    config, params = hugging_face.read_llama(folder)
    tokenizer = hugging_face.read_tokenizer(folder, config.vocabulary)
    tokenizer.no_truncation()
    chat = chat_format.of(tokenizer)
    return Writer(
        config,
        params,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda tokens: sample.printable(tokenizer.decode(tokens).encode()),
        chat and tokenizer.token_to_id(chat.end),
    )


def read(folder: Path) -> Writer:
    """Reads the model in a folder of any supported kind.

    Raises:
        OSError: there is no model, or a file is missing.
        ValueError: a file is damaged.
    """
    if (folder / "config.json").is_file():
        return read_hugging_face(folder)
    if (folder / "model").is_dir():
        return read_hugging_face(folder / "model")
    if (folder / "log.jsonl").is_file():
        return read_run(folder)
    raise FileNotFoundError(f"{folder} has neither a run (log.jsonl) nor a model (config.json)")


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def extend(
    config: llama.LlamaConfig,
    params: Any,
    tokens: Int[Array, "1 new"],
    cache: kv_cache.KVCache,
    start: Int[Array, ""],
) -> tuple[Float[Array, "1 new vocabulary"], kv_cache.KVCache]:
    return kv_cache.extend(nnx.merge(llama.structure(config), params), tokens, cache, start)


@jax.jit
def draw(
    logits: Float[Array, " vocabulary"], temperature: Float[Array, ""], key: Key[Array, ""]
) -> Int[Array, ""]:
    """Draws a token from softmax(logits / temperature); at 0 takes the most likely one."""
    greedy = temperature == 0
    logits = logits.astype(jnp.float32)
    drawn = jax.random.categorical(key, logits / jnp.where(greedy, 1.0, temperature))
    return jnp.where(greedy, logits.argmax(), drawn)


def ceiling(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def generate(
    config: llama.LlamaConfig,
    params: Any,
    prompt: list[int],
    *,
    count: int,
    temperature: float,
    seed: int,
    end: int | None = None,
) -> Iterator[int]:
    """Yields up to `count` tokens after the prompt, each as soon as it is drawn.

    The lengths of the cache and of the padded prompt are powers of two, so that prompts of
    different lengths share one compilation. The cache entries of the padding are masked until they
    are overwritten.
    """
    filled = np.zeros((1, ceiling(len(prompt))), np.int32)
    filled[0, : len(prompt)] = prompt
    cache = kv_cache.empty(config, 1, ceiling(max(filled.shape[1], len(prompt) + count)))
    logits, cache = extend(config, params, filled, cache, np.int32(0))
    logits = logits[0, len(prompt) - 1]
    for i, key in enumerate(jax.random.split(jax.random.key(seed), count)):
        token = draw(logits, np.float32(temperature), key)
        if int(token) == end:
            return
        yield int(token)
        if i + 1 < count:
            start = np.int32(len(prompt) + i)
            logits, cache = extend(config, params, token[None, None], cache, start)
            logits = logits[0, 0]


@partial(jax.jit, static_argnames=("config", "count"))
def continued(
    config: llama.LlamaConfig,
    params: Any,
    prompts: Int[Array, "batch width"],
    lengths: Int[Array, " batch"],
    count: int,
    end: Int[Array, ""],
) -> Int[Array, "batch count"]:
    """The `count` most likely tokens after each prompt, filled up with `end` after the first `end`.

    The rows have positions of their own: each is a batch of one under `vmap`.
    """
    # Cast once, not at each step.
    params = jax.tree.map(lambda w: w.astype(config.dtype), params)
    model = nnx.merge(llama.structure(config), params)
    extend = jax.vmap(partial(kv_cache.extend, model), in_axes=(0, 1, 0), out_axes=(0, 1))
    batch, width = prompts.shape
    cache = kv_cache.empty(config, batch, width + count)
    cache = jax.tree.map(lambda x: x[:, :, None], cache)
    _, cache = extend(prompts[:, None], cache, jnp.zeros_like(lengths))
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]

    def goes_on(carry):
        i, _, ended, *_ = carry
        return (i < count) & ~ended.all()

    def step(carry):
        i, token, ended, drawn, cache = carry
        logits, cache = extend(token[:, None, None], cache, lengths - 1 + i)
        token = jnp.where(ended, end, logits[:, 0, 0].argmax(axis=-1))
        return i + 1, token, token == end, drawn.at[:, i].set(token), cache

    filled = jnp.full((batch, count), end)
    first = (jnp.int32(0), last, jnp.zeros(batch, bool), filled, cache)
    return jax.lax.while_loop(goes_on, step, first)[3]


def generate_batches(
    config: llama.LlamaConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    end: int,
    batch_size: int,
) -> list[list[int]]:
    """Up to `count` most likely tokens after each prompt, without the `end` token.

    Prompts of similar length share a batch. The lengths of padded prompts are powers of two, so
    that batches share compilations.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        width = ceiling(len(prompts[rows[-1]]))
        batch = [prompts[i] for i in np.resize(rows, batch_size)]  # the last one is filled up
        lengths = np.array([len(prompt) for prompt in batch], np.int32)
        given = np.zeros((batch_size, width), np.int32)
        for row, prompt in zip(given, batch, strict=True):
            row[: len(prompt)] = prompt
        drawn = np.asarray(continued(config, params, given, lengths, count, np.int32(end)))
        for i, tokens in zip(rows, drawn.tolist(), strict=False):
            found[i] = tokens[: tokens.index(end)] if end in tokens else tokens
    return found


def main() -> None:
    with command_line.one_line_errors():
        config = command_line.parse(Config, description=__doc__)
        config.check()
        writer = read(config.folder)
        prompt = writer.encode(config.prompt)
        if not prompt:
            raise ValueError("--prompt has no tokens")
    shape = replace(writer.config, dtype=jnp.dtype(config.dtype))
    drawn = generate(
        shape,
        writer.params,
        prompt,
        count=config.tokens,
        temperature=config.temperature,
        seed=config.seed,
        end=writer.end,
    )
    for text in stream_text(writer, prompt, drawn):
        print(text, end="", flush=True)
    print()


def stream_text(writer: Writer, prompt: list[int], drawn: Iterator[int]) -> Iterator[str]:
    """Yields the text piece by piece; bytes of an incomplete character wait for the next tokens."""
    tokens, shown = list(prompt), 0
    for token in drawn:
        tokens.append(token)
        pairs = zip(writer.decode(tokens[:-3]), writer.decode(tokens), strict=False)
        fixed = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        yield fixed[shown:]
        shown = max(shown, len(fixed))
    yield writer.decode(tokens)[shown:]


if __name__ == "__main__":
    main()
