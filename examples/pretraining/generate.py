"""Let a Llama write on, from what these examples or Hugging Face saved.

    python examples/pretraining/generate.py runs/tiny-natural_galore --prompt "def "  of pretrain.py
    python examples/pretraining/generate.py TinyLlama-1.1B --prompt "Once upon" --temperature 0
    python examples/pretraining/generate.py --help

A folder of pretrain.py or sharded.py is read by its log and checkpoint, and writes bytes, or after
C4 by the tokenizer that the run was given; one with config.json, model.safetensors and
tokenizer.json, as Hugging Face has them and fine-tuning leaves them in `model`, writes by its own.
Each token is computed alone, from the keys and values of those before it (`kv_cache.py`), and given
all of them: prompt and answer fill no window that slides.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from examples.common import (
    checkpoint,
    command_line,
    data,
    hugging_face,
    kv_cache,
    llama,
    run_log,
    sample,
    training_loop,
)
from examples.pretraining import c4, pretrain, settings, seven_billion, sharded


@dataclass(frozen=True)
class Config:
    """Let a Llama write on."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run of pretrain.py, or a checkpoint of Hugging Face's."""
    prompt: str = "def "
    """What it goes on from."""
    tokens: int = 200
    """Tokens to write at most."""
    temperature: float = 0.8
    """How freely it draws; 0 for the likeliest token each time."""
    seed: int = 0
    """Seed of what is drawn."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls."""

    def check(self) -> None:
        """Raises a ValueError that names the first argument that makes no sense."""
        if not self.prompt:
            raise ValueError("--prompt must not be empty")
        if not 1 <= self.tokens < 2**20:
            raise ValueError(f"--tokens must be at least 1 and below 2**20, got {self.tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must not be negative, got {self.temperature}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be at least 0 and below 2**31, got {self.seed}")


class Writer(NamedTuple):
    """A model and how its tokens are text.

    Attributes:
        config: shape of the model.
        params: its weights.
        encode: text -> tokens.
        decode: tokens -> text, with nothing in it that steers a terminal.
        end: the token after which nothing is to come, or None.
    """

    config: llama.LlamaConfig
    params: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int | None = None


def of_a_run(folder: Path) -> Writer:
    """The model of a run of pretrain.py, sharded.py or seven_billion.py.

    Raises:
        ValueError, OSError: it holds no checkpoint, or a damaged one, or its tokenizer is gone.
    """
    header = run_log.read_header(folder / "log.jsonl")
    own = {"mesh": sharded.Config, "limit": seven_billion.Config}  # settings that others lack
    began_with = header.get("config", {})
    kind = next((k for name, k in own.items() if name in began_with), settings.Config)
    config = command_line.begun_with(folder, kind)
    if config.compare:
        raise ValueError(f"{folder} is a comparison: name one of {config.compare} in it")
    if not checkpoint.holds_checkpoint(folder):
        raise ValueError(f"{folder} holds no checkpoint")
    coding, end = data.BYTES, None
    if config.dataset == "c4":
        tokenizer = c4.read_tokenizer(config.tokenizer, header["data"]["tokenizer"])
        coding, end = c4.coding(tokenizer), tokenizer.token_to_id(c4.END)
    like = jax.eval_shape(pretrain.make_functions(config).init, jax.random.key(0))
    with checkpoint.Checkpoints(config, header["data"]["sha256"]) as checkpoints:
        state, _ = checkpoints.restore(like)
    decode = lambda tokens: sample.printable(coding.decode(tokens))
    return Writer(config.model, state.params, coding.encode, decode, end)


def with_tokenizer(folder: Path) -> Writer:
    """The model in a folder as Hugging Face has them.

    Raises:
        ValueError, OSError: a file is not there, not whole, or of another model.
    """
    config, params = hugging_face.read_llama(folder)
    tokenizer = hugging_face.read_tokenizer(folder, config.vocabulary)
    tokenizer.no_truncation()
    return Writer(
        config,
        params,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda tokens: sample.printable(tokenizer.decode(tokens).encode()),
        tokenizer.token_to_id("</s>"),
    )


def read(folder: Path) -> Writer:
    """The model in a folder, whichever kind of folder it is.

    Raises:
        ValueError, OSError: there is none, or it cannot be read.
    """
    if (folder / "config.json").is_file():
        return with_tokenizer(folder)
    if (folder / "model").is_dir():
        return with_tokenizer(folder / "model")
    if (folder / "log.jsonl").is_file():
        return of_a_run(folder)
    raise FileNotFoundError(f"{folder} holds neither a run nor a checkpoint (config.json)")


@partial(jax.jit, static_argnames="config", donate_argnames="past")
def extend(
    config: llama.LlamaConfig,
    params: Any,
    tokens: Int[Array, "1 new"],
    past: kv_cache.Past,
    start: Int[Array, ""],
) -> tuple[Float[Array, "1 new vocabulary"], kv_cache.Past]:
    return kv_cache.extend(nnx.merge(llama.structure(config), params), tokens, past, start)


@jax.jit
def draw(
    logits: Float[Array, " vocabulary"], temperature: Float[Array, ""], key: Key[Array, ""]
) -> Int[Array, ""]:
    """A token from softmax(logits / temperature), the likeliest one at 0."""
    cold = temperature == 0
    logits = logits.astype(jnp.float32)
    drawn = jax.random.categorical(key, logits / jnp.where(cold, 1.0, temperature))
    return jnp.where(cold, logits.argmax(), drawn)


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

    The room for keys and values is a power of two, so that prompts of different lengths compile
    once; the prompt is filled up to one as well, and what stands behind it is overwritten unseen.
    """
    ceiling = lambda n: 1 << (n - 1).bit_length()
    filled = np.zeros((1, ceiling(len(prompt))), np.int32)
    filled[0, : len(prompt)] = prompt
    past = kv_cache.empty(config, 1, ceiling(max(filled.shape[1], len(prompt) + count)))
    logits, past = extend(config, params, filled, past, np.int32(0))
    logits = logits[0, len(prompt) - 1]
    for i, key in enumerate(jax.random.split(jax.random.key(seed), count)):
        token = draw(logits, np.float32(temperature), key)
        if int(token) == end:
            return
        yield int(token)
        if i + 1 < count:
            start = np.int32(len(prompt) + i)
            logits, past = extend(config, params, token[None, None], past, start)
            logits = logits[0, 0]


def main() -> None:
    with training_loop.one_line_errors():
        config = command_line.parse(Config)
        config.check()
        writer = read(config.folder)
        prompt = writer.encode(config.prompt)
        if not prompt:
            raise ValueError("--prompt has no token")
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
    for text in as_it_grows(writer, prompt, drawn):
        print(text, end="", flush=True)
    print()


def as_it_grows(writer: Writer, prompt: list[int], drawn: Iterator[int]) -> Iterator[str]:
    """Yields the text piece by piece: what the next tokens, within a letter, cannot change."""
    tokens, shown = list(prompt), 0
    for token in drawn:
        tokens.append(token)
        pairs = zip(writer.decode(tokens[:-3]), writer.decode(tokens), strict=False)
        sure = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        yield sure[shown:]
        shown = max(shown, len(sure))
    yield writer.decode(tokens)[shown:]


if __name__ == "__main__":
    main()
