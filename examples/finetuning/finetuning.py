"""Fine-tuning, whatever the model and the task: which weights learn, by which optimizer, how fast.

    natural_galore, galore   all weights; the optimizer of the layers' matrices lives in a subspace
    adamw                    all weights
    lora                     a low-rank sum beside each of these matrices (arXiv 2106.09685), and
                             the model's head; the other weights are as they were

All are compared at one rank. A model's `trained` weights are what the optimizer sees; `frozen` ones
are carried along, so that a checkpoint holds the whole model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx, traverse_util
from jaxtyping import Array, Int

import natgalore_jax as natgalore
from examples.common import command_line, pretrained
from examples.common.command_line import flag
from examples.common.loop import TrainState


@dataclass(frozen=True)
class Config(command_line.Run):
    """Fine-tune a model."""

    CHANGEABLE: ClassVar = (*command_line.Run.CHANGEABLE, "model", "data")
    PATHS: ClassVar = ("model", "data")
    COUNTS: ClassVar = (*command_line.Run.COUNTS, "epochs", "steps", "max_length")

    model: Path | None = None
    """Folder with config.json, model.safetensors and tokenizer.json."""
    data: Path | None = None
    """Folder with the records."""
    skip_malformed: bool = False
    """Leave out records that cannot be read, instead of refusing them."""
    rank: int | None = 4
    """Rank of the projected gradients, and of LoRA."""
    scale: float = 4.0
    """Of the projected weights' updates."""
    fisher: Literal["core", "window", "none"] = "core"
    """Natural GaLore's Fisher: core, or window as in the paper."""
    epochs: int = 30
    """Times that each record is seen."""
    steps: int | None = None
    """Training steps, in place of --epochs."""
    max_length: int = 512
    """Tokens of a record at most; what is longer is cut off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls; the weights are float32."""

    def check(self) -> None:
        super().check()
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"--scale must be above 0 and finite, got {self.scale}")
        for name in ("model", "data"):
            path = getattr(self, name)
            if path is None and not self.resume:  # which knows it
                raise ValueError(f"{flag(name)} is needed: {getattr(self, f'get_{name}')()}")

    def make_optimizer(self) -> optax.GradientTransformation:
        return self.OPTIMIZERS[self.optimizer].make(self.schedule(), self)

    def schedule(self) -> optax.Schedule:
        """Up within 6 % of the steps, as for RoBERTa, and down to zero, both in a line."""
        steps = self.steps or 100
        warmup = max(1, steps * 6 // 100)
        up = optax.linear_schedule(0.0, self.lr, warmup)
        return optax.join_schedules(
            [up, optax.linear_schedule(self.lr, 0.0, steps - warmup)], [warmup]
        )


class Recipe(NamedTuple):
    """An optimizer as a function of its schedule and the config, and its usual learning rate."""

    learning_rate: float
    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]


def low_rank(schedule: optax.Schedule, config: Config, **settings: Any):
    return natgalore.natural_galore(
        schedule,
        rank=config.rank,
        scale=config.scale,
        refresh_every=config.refresh_every,
        weight_decay=config.weight_decay,
        residual=None,
        seed=config.seed,
        **settings,
    )


def natural(schedule: optax.Schedule, config: Config) -> optax.GradientTransformation:
    fisher = None if config.fisher == "none" else config.fisher
    return low_rank(schedule, config, fisher=fisher)


def adamw(schedule: optax.Schedule, config: Config) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=config.weight_decay)


def optimizers(**learning_rates: float) -> dict[str, Recipe]:
    """The four, at these learning rates."""
    makers = {
        "natural_galore": natural,
        "galore": partial(low_rank, fisher=None),
        "adamw": adamw,
        "lora": adamw,
    }
    return {name: Recipe(learning_rates[name], make) for name, make in makers.items()}


def with_adapters(model: nnx.Module, rank: int, rngs: nnx.Rngs) -> nnx.Module:
    """The model with a LoRA beside each linear of its layers: x W + (x A) B, B zero at first."""
    for _, module in list(nnx.iter_modules(model.layers)):
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Linear):
                m, n = child.in_features, child.out_features
                lora = nnx.LoRA(m, rank, n, base_module=child, dtype=child.dtype, rngs=rngs)
                setattr(module, name, lora)
    return model


def without_adapters(params: Any) -> Any:
    """Plain weights: each sum of a kernel and its LoRA is one kernel."""
    if not isinstance(params, Mapping):
        return params
    if "base_module" in params:
        base = dict(params["base_module"])
        return base | {"kernel": base["kernel"] + params["lora_a"] @ params["lora_b"]}
    return {name: without_adapters(part) for name, part in params.items()}


def joined(*parts: pretrained.Params) -> pretrained.Params:
    """Nested dicts that share no leaf, as one."""
    flat = [traverse_util.flatten_dict(part) for part in parts]
    return traverse_util.unflatten_dict({k: v for part in flat for k, v in part.items()})


class Functions(NamedTuple):
    """What a run computes.

    Attributes:
        init: key -> TrainState, whose params are {"trained", "frozen"}.
        train_step: (TrainState, batch) -> TrainState and loss; a batch begins with its step.
        model: params -> the model, to be called within a jitted function.
    """

    init: Callable[..., TrainState]
    train_step: Callable[..., tuple[TrainState, Array]]
    model: Callable[[Any], Any]


def make_functions(
    config: Config,
    make_model: Callable[[nnx.Rngs], nnx.Module],
    weights: pretrained.Params,
    loss_fn: Callable[..., Array],
    head: str,
) -> Functions:
    """The functions of a run.

    Args:
        config: of the run.
        make_model: from scratch.
        weights: to begin with; those that are shapes alone begin at random.
        loss_fn: (model, *batch without its step, rngs) -> mean loss.
        head: the module that LoRA trains whole.
    """
    tx = config.make_optimizer()
    lora = config.optimizer == "lora"

    learning = nnx.Any(nnx.LoRAParam, nnx.PathContains(head)) if lora else nnx.Param

    def extended(model: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
        return with_adapters(model, config.rank, rngs) if lora else model

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
    """The weights that are known, and for those that are shapes alone such as a new model has."""
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
    """Of a TrainState's params: all weights, adapters summed up, as the model had them."""
    return without_adapters(joined(params["trained"], params["frozen"]))


def epoch_rows(records: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, " batch"]:
    """Which records are in the batch of a step, counted from 1: each once in an epoch, at most.

    What is left over of an epoch when no whole batch is, is left out; it is another rest each time.
    """
    epoch, place = divmod(step - 1, records // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(records)
    return order[place * batch_size :][:batch_size]


def steps_of(config: Config, records: int) -> int:
    """Steps in all.

    Raises:
        ValueError: there is no whole batch.
    """
    if records < config.batch_size:
        raise ValueError(f"{records} records are fewer than --batch-size {config.batch_size}")
    return config.steps or config.epochs * (records // config.batch_size)


def padded(rows: list[list[int]], padding: int, length: int) -> Int[np.ndarray, "records length"]:
    """Rows of tokens as one array."""
    tokens = np.full((len(rows), length), padding, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens
