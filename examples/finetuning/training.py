"""Training step, batches and main program of fine-tuning, for any model and task.

    natural_galore, galore   trains all weights; layer matrices have their optimizer in a subspace
    adamw                    trains all weights
    muon                     trains all weights; layer matrices by orthogonalised momentum
    lora                     trains low-rank adapters of the layer matrices (arXiv 2106.09685) and
                             the head

With `freeze_embeddings`, the first four train all weights but the embeddings.

An example describes itself as an `Example`, which `main` runs. The optimizer sees the `trained`
weights only. The `frozen` weights are part of the state, so a checkpoint contains the complete
model.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx, traverse_util
from jaxtyping import Array, Int

from examples.common import pretrained, run_display, run_log, training_loop
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


def make_job(
    config: settings.Config,
    functions: Functions,
    columns: Sequence[np.ndarray],
    *,
    validate: Callable[[Any], dict[str, Any]],
    data: dict[str, Any],
    about: str,
) -> training_loop.Job:
    """The job of one optimizer.

    Args:
        config: settings of the run.
        functions: its functions.
        columns: arrays with one row per training record; the first has tokens.
        validate: params -> record of the log.
        data: description of the data for the log.
        about: the data in words.
    """
    records, length = columns[0].shape

    def batch(step: int):
        rows = epoch_rows(records, config.batch_size, config.seed, step)
        return np.int32(step), *(column[rows] for column in columns)

    return training_loop.Job(
        steps=config.steps,
        tokens_per_step=config.batch_size * length,
        init=functions.init,
        train_step=functions.train_step,
        batch=batch,
        abstract_batch=jax.eval_shape(lambda: batch(1)),
        validate=validate,
        data=data,
        export=plain_params,
        about=lambda header: (
            f"{about}, {header['parameters']:,} parameters, {config.optimizer} at learning rate "
            f"{config.lr}, rank {config.rank}"
        ),
    )


class Example(NamedTuple):
    """A fine-tuning example as functions.

    Attributes:
        read: config -> inputs, which have `train`, a tuple of arrays with one row per record,
            `weights` and `summary`. Raises OSError or ValueError.
        name: config -> name of the default output folder, before the optimizers.
        make_job: (config, inputs) -> the job of one optimizer.
        finish: (config, inputs, TrainState) -> None: writes the model and other results.
        outputs: names of the files that `finish` writes.
    """

    read: Callable[[Any], Any]
    name: Callable[[Any], str]
    make_job: Callable[[Any, Any], training_loop.Job]
    finish: Callable[[Any, Any, TrainState], None]
    outputs: tuple[str, ...] = ("model",)


def main(read_config: Callable[[], settings.Config], example: Example) -> None:
    """The main program of a fine-tuning example."""

    def prepare():
        config = read_config()
        inputs = example.read(config)
        config = replace(config, steps=steps_of(config, len(inputs.train[0])))
        name = f"{example.name(config)}-{'-'.join(config.optimizers)}"
        config = training_loop.claim(config, name, inputs.summary)
        if lost := pretrained.missing(inputs.weights):
            run_display.say(f"randomly initialised, not in {config.model}: {', '.join(lost)}")

        def train_one(one: settings.Config, interrupts: training_loop.Interrupts) -> None:
            state = training_loop.train(one, example.make_job(one, inputs), interrupts)
            example.finish(one, inputs, state)

        return config, train_one

    def conclude(config: settings.Config, results: Sequence[run_log.Run]) -> None:
        run_display.show_table(results)
        print(f"output folder: {config.out} ({training_loop.contents(config, *example.outputs)})")

    training_loop.run(prepare, conclude)


def exported(params: dict[str, Any]) -> pretrained.Params:
    """All weights as NumPy arrays, with adapters merged."""
    return jax.tree.map(np.asarray, plain_params(params))
