"""Training step and batches of fine-tuning, for any model and task.

    natural_galore, galore   trains all weights; layer matrices have their optimizer in a subspace
    adamw                    trains all weights
    muon                     trains all weights; layer matrices by orthogonalised momentum
    lora                     trains low-rank adapters of the layer matrices (arXiv 2106.09685) and
                             the head

With `freeze_embeddings`, the first four train all weights but the embeddings.

The optimizer sees the `trained` weights only. The `frozen` weights are part of the state, so a
checkpoint contains the complete model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx, traverse_util
from jaxtyping import Array, Int

from examples.common import pretrained
from examples.common.training_loop import TrainState
from examples.finetuning import lora, settings


def joined(*parts: pretrained.Params) -> pretrained.Params:
    """Merges nested dicts with disjoint leaves."""
    flat = [traverse_util.flatten_dict(part) for part in parts]
    return traverse_util.unflatten_dict({k: v for part in flat for k, v in part.items()})


class Functions(NamedTuple):
    """Functions of a run.

    Attributes:
        init: key -> TrainState with params {"trained": ..., "frozen": ...}.
        train_step: (TrainState, batch) -> (TrainState, loss); the first entry of a batch is its
            step.
        model: params -> model, for use inside a jitted function.
    """

    init: Callable[..., TrainState]
    train_step: Callable[..., tuple[TrainState, Array]]
    model: Callable[[Any], Any]


def make_functions(
    config: settings.Config,
    make_model: Callable[[nnx.Rngs], nnx.Module],
    weights: pretrained.Params,
    loss_fn: Callable[..., Array],
    head: str,
) -> Functions:
    """The functions of a run.

    Args:
        config: settings of the run.
        make_model: rngs -> randomly initialised model.
        weights: initial weights; ShapeDtypeStructs are initialised randomly.
        loss_fn: (model, *batch without its step, rngs) -> mean loss.
        head: name of the module that LoRA trains without adapters.
    """
    tx = config.make_optimizer()
    use_lora = config.optimizer == "lora"

    if use_lora:
        learning = nnx.Any(nnx.LoRAParam, nnx.PathContains(head))
    elif config.freeze_embeddings:
        learning = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("embedding")))
    else:
        learning = nnx.Param

    def extended(model: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
        return lora.with_adapters(model, config.rank, rngs) if use_lora else model

    given = nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]
    structure = nnx.split(nnx.eval_shape(lambda: extended(make_model(nnx.Rngs(0)), nnx.Rngs(0))))[0]

    @jax.jit
    def begun(weights, missing, key) -> TrainState:
        model = extended(nnx.merge(given, joined(weights, missing)), nnx.Rngs(key))
        trained, frozen = map(nnx.to_pure_dict, nnx.state(model, learning, ...))
        return TrainState({"trained": trained, "frozen": frozen}, tx.init(trained))

    def init(key) -> TrainState:
        known, missing = completed(weights, make_model, key)
        return begun(known, missing, key)

    def model(params):
        return nnx.merge(structure, joined(params["trained"], params["frozen"]))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, batch):
        step, *batch = batch
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        frozen = state.params["frozen"]

        def loss(trained):
            rngs = nnx.Rngs(dropout=key)
            return loss_fn(model({"trained": trained, "frozen": frozen}), *batch, rngs)

        trained = state.params["trained"]
        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        params = {"trained": optax.apply_updates(trained, updates), "frozen": frozen}
        return TrainState(params, opt_state), value

    return Functions(init, train_step, model)


def completed(
    weights: pretrained.Params, make_model: Callable[[nnx.Rngs], nnx.Module], key: Array
) -> tuple[pretrained.Params, pretrained.Params]:
    """The given weights, and random ones for leaves that are ShapeDtypeStructs."""
    flat = traverse_util.flatten_dict(weights)
    lost = {path for path, leaf in flat.items() if isinstance(leaf, jax.ShapeDtypeStruct)}

    @jax.jit
    def new(key):
        model = nnx.to_pure_dict(nnx.state(make_model(nnx.Rngs(key)), nnx.Param))
        return {
            path: leaf for path, leaf in traverse_util.flatten_dict(model).items() if path in lost
        }

    known = {path: leaf for path, leaf in flat.items() if path not in lost}
    return tuple(map(traverse_util.unflatten_dict, (known, new(key) if lost else {})))


def plain_params(params: dict[str, Any]) -> pretrained.Params:
    """All weights of a TrainState's params, with adapters merged."""
    return lora.without_adapters(joined(params["trained"], params["frozen"]))


def epoch_rows(records: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, " batch"]:
    """Indices of the records in the batch of a step, counted from 1.

    Each epoch is a permutation of the records; its incomplete last batch is dropped.
    """
    epoch, place = divmod(step - 1, records // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(records)
    return order[place * batch_size :][:batch_size]


def steps_of(config: settings.Config, records: int) -> int:
    """Total number of steps.

    Raises:
        ValueError: there are fewer records than a batch has.
    """
    if records < config.batch_size:
        raise ValueError(f"{records} records are fewer than --batch-size {config.batch_size}")
    return config.steps or config.epochs * (records // config.batch_size)


def padded(rows: list[list[int]], padding: int, length: int) -> Int[np.ndarray, "records length"]:
    """Rows of tokens as one array, padded to `length`."""
    tokens = np.full((len(rows), length), padding, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens
