"""One run: a Llama, an optimizer for the matrices of its layers, a learning rate, a seed.

Embedding, head and norms are under Adam at a rate of their own. Both rates warm up linearly for a
tenth of the steps and fall along a cosine to a tenth of their peak, or another part. Batches and
initial weights are functions of seed and step, the same for all optimizers. Each optimizer is
compiled once, with the learning rate as an argument.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from natgalore_jax.reporting.memory_report import nbytes

from .contenders import contender as contender_of, llama
from .corpus import Corpus


SIZES = {
    "toy": llama.LlamaConfig(64, 176, heads=4, layers=2),
    "6m": llama.LlamaConfig(192, 512, heads=3, layers=6),
    "11m": llama.LlamaConfig(256, 688, heads=4, layers=8),
    "33m": llama.CONFIGS["60m"],  # with a vocabulary of 8,192 instead of 32,000
    "60m": llama.CONFIGS["60m"],
    "130m": llama.CONFIGS["130m"],
}
CLIP = 1.0  # maximum global norm of the gradient
VALIDATIONS = 20  # per run
VALIDATION_BATCHES = 8


@dataclass(frozen=True)
class Setting:
    """The settings that all compared runs share.

    Attributes:
      size: of the model, one of SIZES.
      vocabulary: number of tokens.
      steps: steps of a run.
      batch: sequences per step.
      length: tokens per sequence.
      rank: rank of all low-rank methods.
      refresh_every: steps between refreshes, except for `natural_galore`.
      rest_rate: peak learning rate of embedding, head and norms.
      dtype: dtype of activations and products; weights are float32.
      attention: implementation, as in `llama.LlamaConfig`.
      last_rate: the last learning rate as a fraction of the peak.
      decay_tokens: tokens per step at which the decays of averages hold, such as b1; at other
        numbers of tokens they have the same half-lives in tokens. None: in steps.
    """

    size: str
    vocabulary: int
    steps: int
    batch: int
    length: int
    rank: int
    refresh_every: int
    rest_rate: float
    dtype: str
    attention: str
    last_rate: float = 0.1
    decay_tokens: int | None = None

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as results record them: fields added later only if they are not default."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    @property
    def exponent(self) -> float:
        """The power of decays of averages for equal half-lives in tokens."""
        return self.batch * self.length / self.decay_tokens if self.decay_tokens else 1.0

    @property
    def model(self) -> llama.LlamaConfig:
        return replace(
            SIZES[self.size],
            vocabulary=self.vocabulary,
            scan=True,
            dtype=jnp.dtype(self.dtype),
            attention=self.attention,
        )

    def schedule(self, step: int) -> float:
        """Fraction of the peak rate at a step, counted from 0."""
        rising = max(1, self.steps // 10)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.last_rate + (1 - self.last_rate) * (1 + math.cos(math.pi * done)) / 2


class Program(NamedTuple):
    """An optimizer's compiled functions, for one run or several, and the size of its state.

    Attributes:
      init: seeds, one of each run -> (weights, state) of the runs.
      step: ((weights, state), tokens, starts, rates, rest_rate) -> ((weights, state), losses).
        Starts and rates have a first axis for the runs, as have seeds and losses.
      loss: (weights, tokens, starts) -> the mean loss of each run, of the same sequences.
      state_bytes: bytes of the full state of a run.
      matrix_state_bytes: bytes of the state of the layers' matrices.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    loss: Callable[..., Any]
    state_bytes: int
    matrix_state_bytes: int


def is_matrix(path: tuple[Any, ...], w: Any) -> bool:
    """Whether a weight is a matrix of a layer, or a stack of them."""
    return path[0].key == "layers" and path[-1].key == "kernel"


def unstacked(params: dict[str, Any], layers: int) -> dict[str, Any]:
    """The params with a separate tree for each layer, as in a model without scan."""
    each = {i: jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(layers)}
    return params | {"layers": each}


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`unstacked`."""
    each = params["layers"].values()
    return params | {"layers": jax.tree.map(lambda *ws: jnp.stack(ws), *each)}


def compiled(name: str, setting: Setting, together: bool = False) -> Program:
    """The compiled functions of a contender.

    Args:
      name: of the contender.
      setting: of the runs.
      together: whether the functions are those of several runs in one program, by `vmap`, or of a
        single one. A small model alone does not fill a GPU. A peer that is refreshed under a
        condition computes both branches of the condition on every step under `vmap`.
    """
    config, contender = setting.model, contender_of(name)
    structure = llama.structure(config)
    to_contender = (lambda x: x) if contender.stacked else (lambda x: unstacked(x, config.layers))
    from_contender = (lambda x: x) if contender.stacked else stacked

    def optimizer(rate, rest_rate):
        exponent = setting.exponent
        matrices = contender.make(rate, setting.rank, setting.refresh_every, exponent)
        b1, b2 = 0.9**exponent, 0.999**exponent
        rest = optax.adamw(rest_rate, b1, b2, weight_decay=0.0)
        labels = lambda params: jax.tree.map_with_path(
            lambda path, w: "matrices" if is_matrix(path, w) else "rest", params
        )
        return optax.chain(
            optax.clip_by_global_norm(CLIP),
            optax.partition({"matrices": matrices, "rest": rest}, labels),
        )

    def init(seed):
        model = llama.Llama(config, nnx.Rngs(jax.random.key(seed)))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return params, optimizer(1.0, 1.0).init(to_contender(params))

    def loss(params, tokens, starts):
        batch = tokens[starts[:, None] + jnp.arange(setting.length + 1)[None]].astype(jnp.int32)
        return llama.next_token_loss(nnx.merge(structure, params), batch)

    def step(carry, tokens, starts, rate, rest_rate):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, tokens, starts)
        updates, state = optimizer(rate, rest_rate).update(
            to_contender(grads), state, to_contender(params)
        )
        return (optax.apply_updates(params, from_contender(updates)), state), value

    def several():
        return (
            jax.vmap(init),
            jax.vmap(step, in_axes=(0, None, 0, 0, None)),
            jax.vmap(loss, in_axes=(0, None, None)),
        )

    def single():
        def first(carry, tokens, starts, rates, rest_rate):
            carry, value = step(carry, tokens, starts[0], rates[0], rest_rate)
            return carry, value[None]

        return lambda seeds: init(seeds[0]), first, lambda *args: loss(*args)[None]

    _, state = jax.eval_shape(init, 0)
    size = lambda tree: sum(map(nbytes, jax.tree.leaves(tree)))
    init_runs, step_runs, loss_runs = several() if together else single()
    return Program(
        jax.jit(init_runs),
        jax.jit(step_runs, donate_argnums=0),
        jax.jit(loss_runs),
        size(state),
        size(state[1].inner_states["matrices"]),
    )


def starts_of(tokens: Any, setting: Setting, seed: int, step: int) -> np.ndarray:
    """Start positions of the sequences of a step."""
    random = np.random.default_rng((seed, step))
    return random.integers(len(tokens) - setting.length, size=setting.batch, dtype=np.int32)


class Start(NamedTuple):
    """What differs between the runs of a program: peak learning rate, and seed."""

    rate: float
    seed: int


def train(
    program: Program, setting: Setting, corpus: Corpus, runs: Sequence[Start]
) -> Iterator[list[dict[str, Any]]]:
    """Trains and yields the records of all runs at each validation.

    A record has step, tokens, seconds, and both losses. Seconds are those of the steps of all runs,
    without the first step, which compiles. The losses of a run that is not finite are None, and
    training ends if no run is finite.
    """
    tokens, held_out = jnp.asarray(corpus.train), jnp.asarray(corpus.validation)
    spread = np.linspace(
        0, len(corpus.validation) - setting.length - 1, VALIDATION_BATCHES * setting.batch
    )
    groups = np.split(spread.astype(np.int32), VALIDATION_BATCHES)
    rates = np.array([run.rate for run in runs])
    carry = program.init(np.array([run.seed for run in runs]))
    losses, seconds, mark = [], 0.0, time.perf_counter()
    every = max(1, setting.steps // VALIDATIONS)
    for step in range(setting.steps):
        part = setting.schedule(step)
        starts = np.stack([starts_of(corpus.train, setting, run.seed, step) for run in runs])
        carry, loss = program.step(carry, tokens, starts, rates * part, setting.rest_rate * part)
        losses.append(loss)
        if step == 0:
            jax.block_until_ready(carry)
            mark = time.perf_counter()
        if (step + 1) % every and step + 1 < setting.steps:
            continue
        train_losses = np.mean(jax.device_get(losses), axis=0)
        jax.block_until_ready(carry)
        seconds += time.perf_counter() - mark
        whole = [program.loss(carry[0], held_out, group) for group in groups]
        validation_losses = np.mean(jax.device_get(whole), axis=0)
        finite = np.isfinite(train_losses) & np.isfinite(validation_losses)
        yield [
            {
                "step": step + 1,
                "tokens": (step + 1) * setting.batch * setting.length,
                "seconds": round(seconds, 4),
                "train_loss": float(train_losses[i]) if is_finite else None,
                "validation_loss": float(validation_losses[i]) if is_finite else None,
            }
            for i, is_finite in enumerate(finite)
        ]
        if not finite.any():
            return
        losses, mark = [], time.perf_counter()
