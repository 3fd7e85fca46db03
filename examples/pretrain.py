"""Pre-train a Llama on text, byte by byte, with Natural GaLore in place of AdamW.

    python examples/pretrain.py                        the default: about three minutes on a laptop
    python examples/pretrain.py --optimizer adamw      the same with another optimizer
    python examples/pretrain.py --help                 everything else

It leaves a log (`log.jsonl`) and a figure (`loss.png`) in a folder of `runs/`. Bad input ends it
with one line and exit status 2, before anything is written.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO

import data
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import report
import tyro
from flax import nnx

import natgalore_jax as natgalore


LOG_EVERY = 10  # steps
VALIDATION_BATCHES = 16


class Recipe(NamedTuple):
    """An optimizer as a function of its schedule and the config, and its usual learning rate."""

    learning_rate: float
    make: Callable[[optax.Schedule, "Config"], optax.GradientTransformation]


def low_rank(recipe: Callable[..., optax.GradientTransformation]):
    """One of natgalore's recipes, with the settings of the config."""
    return lambda schedule, config: recipe(
        schedule,
        rank=config.projection_rank,
        refresh_every=config.refresh_every,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )


def contrib_galore(schedule: optax.Schedule, config: "Config") -> optax.GradientTransformation:
    """Optax's own GaLore, on the matrices that natgalore projects: those of the layers."""
    matrix = optax.contrib.GaLoreDimensionNumbers()

    def matrices(params):
        return jax.tree.map_with_path(
            lambda path, w: matrix if path[0].key == "layers" and w.ndim == 2 else None, params
        )

    return optax.contrib.galore(
        schedule,
        rank=config.projection_rank,
        update_proj_gap=config.refresh_every,
        weight_decay=config.weight_decay,
        weight_dimension_numbers=matrices,
    )


OPTIMIZERS = {
    "natural_galore": Recipe(5e-3, low_rank(natgalore.natural_galore)),
    "galore": Recipe(2.5e-3, low_rank(natgalore.galore)),
    "adamw": Recipe(2e-3, lambda schedule, c: optax.adamw(schedule, weight_decay=c.weight_decay)),
    "contrib_galore": Recipe(5e-3, contrib_galore),
}


def one_of(names) -> Any:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


@dataclass(frozen=True)
class Config:
    """Pre-train a Llama on text, byte by byte."""

    size: Annotated[str, one_of(llama.CONFIGS)] = "tiny"
    """Size of the model."""
    optimizer: Annotated[str, one_of(OPTIMIZERS)] = "natural_galore"
    """Which optimizer; contrib_galore is Optax's own GaLore."""
    lr: float | None = None
    """Peak learning rate, after a linear warm-up and before a cosine decay to a tenth of it.
    Default: one that suits the optimizer."""
    rank: int | None = None
    """Rank of the projected gradients. Default: a quarter of the model's width."""
    refresh_every: int = 50
    """Steps between two refreshes of the projections."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    steps: int = 700
    """Number of training steps."""
    batch_size: int = 16
    """Sequences in a batch."""
    seq_len: int = 128
    """Bytes in a sequence."""
    seed: int = 0
    """Seed of the initial weights, of the batches and of the first projections."""
    text: Path | None = None
    """A text file or a folder of them. Default: the sources of the Python standard library."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matmuls; the weights are float32."""
    scan: bool = False
    """Stack the layers and scan over them: compiles faster when the model is deep."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    out: Path | None = None
    """Folder for log and figure. Default: a new folder in runs/."""
    overwrite: bool = False
    """Replace the run that is in the folder already."""
    validate_every: int = 50
    """Steps between two validations."""

    def check(self) -> None:
        """Raises a ValueError that names the first argument that makes no sense."""
        for name, names in (("size", llama.CONFIGS), ("optimizer", OPTIMIZERS)):
            if (value := getattr(self, name)) not in names:
                raise ValueError(f"--{name} must be one of {', '.join(names)}, got {value!r}")
        counts = ("refresh_every", "steps", "batch_size", "seq_len", "validate_every")
        for name, least in (*((name, 1) for name in counts), ("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be at least {least} and below 2**31, got {value}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"--weight-decay must not be negative, got {self.weight_decay}")
        if self.scan and self.optimizer == "contrib_galore":
            raise ValueError("--optimizer contrib_galore cannot project stacked layers (--scan)")

    @property
    def model(self) -> llama.LlamaConfig:
        return replace(
            llama.CONFIGS[self.size],
            vocabulary=data.VOCABULARY,
            scan=self.scan,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
        )

    @property
    def projection_rank(self) -> int:
        return self.model.hidden // 4 if self.rank is None else self.rank

    @property
    def learning_rate(self) -> float:
        return OPTIMIZERS[self.optimizer].learning_rate if self.lr is None else self.lr

    def make_optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=self.steps // 10,
            decay_steps=self.steps,
            end_value=self.learning_rate / 10,
        )
        return OPTIMIZERS[self.optimizer].make(schedule, self)


class TrainState(NamedTuple):
    """All that changes from step to step."""

    params: Any
    opt_state: Any


def make_functions(config: Config, tx: optax.GradientTransformation):
    """The three compiled functions of a run: init, train_step and validation_loss."""
    structure = nnx.split(nnx.eval_shape(lambda: llama.Llama(config.model, nnx.Rngs(0))))[0]

    def loss_fn(params, tokens):
        return llama.next_token_loss(nnx.merge(structure, params), tokens)

    @jax.jit
    def init(key):
        model = llama.Llama(config.model, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(params, tx.init(params))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    return init, train_step, jax.jit(loss_fn)


def header(config: Config, corpus: data.Corpus, state: TrainState) -> dict[str, Any]:
    """The first line of the log: what is run, where, on which data, and how large it is."""
    settings = asdict(config) | {"lr": config.learning_rate, "rank": config.projection_rank}
    return {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "environment": report.environment(),
        "data": corpus.summary(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": report.nbytes(state.opt_state),
        "adamw_state_bytes": report.nbytes(jax.eval_shape(optax.adamw(1e-3).init, state.params)),
    }


def train(
    config: Config, tx: optax.GradientTransformation, corpus: data.Corpus, log: TextIO
) -> None:
    """Trains, shows how it goes, and writes the log.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    init, train_step, validation_loss = make_functions(config, tx)
    key = jax.random.key(config.seed)
    first = header(config, corpus, jax.eval_shape(init, key))
    log.write(json.dumps(first) + "\n")
    print(
        f"Llama {config.size} with {first['parameters']:,} parameters, {config.optimizer} "
        f"at learning rate {config.learning_rate}, {corpus.files} files of text"
    )
    state = init(key)
    tokens_per_step = config.batch_size * config.seq_len
    length = config.seq_len + 1  # each token but the first is predicted
    started = time.perf_counter()

    def validate() -> float:
        batches = data.validation_batches(
            corpus.validation, config.batch_size, length, VALIDATION_BATCHES
        )
        return float(np.mean([validation_loss(state.params, batch) for batch in batches]))

    def record(step: int, **measured: float) -> None:
        line = {"step": step, "tokens": step * tokens_per_step}
        line |= measured | {"seconds": round(time.perf_counter() - started, 3)}
        log.write(json.dumps(line) + "\n")
        display.show(line)

    with report.Display(config.steps, first["state_bytes"]) as display:
        record(0, validation_loss=validate())
        losses, mark = [], time.perf_counter()
        for step in range(1, config.steps + 1):
            batch = data.training_batch(
                corpus.train, config.batch_size, length, seed=config.seed, step=step
            )
            state, loss = train_step(state, batch)
            losses.append(loss)
            display.advance(step)
            last = step == config.steps
            validating = last or step % config.validate_every == 0
            if not (validating or step == 1 or step % LOG_EVERY == 0):
                continue

            measured = {"train_loss": float(np.mean(jax.device_get(losses)))}
            if not np.isfinite(measured["train_loss"]):
                raise FloatingPointError(f"the loss is not finite at step {step}: try a lower --lr")
            seconds = time.perf_counter() - mark
            measured["tokens_per_second"] = round(len(losses) * tokens_per_step / seconds, 1)
            if validating:
                measured["validation_loss"] = validate()
            record(step, **measured)
            losses, mark = [], time.perf_counter()


def main() -> None:
    config = tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        config.check()
        tx = config.make_optimizer()
        corpus = data.load(config.text)
        data.check_length(corpus, config.batch_size, config.seq_len + 1)
        name = f"{config.size}-{config.optimizer}"
        log = report.open_log(name, config.out, overwrite=config.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    folder = Path(log.name).parent
    with log:
        try:
            train(config, tx, corpus, log)
        except (FloatingPointError, KeyboardInterrupt) as error:
            sys.exit(f"stopped: {str(error) or 'interrupted'}; the log so far is in {folder}")
    run = report.read(folder / "log.jsonl")
    report.plot([run], folder / "loss.png")
    report.show_table([run])
    print(f"log and figure are in {folder}")


if __name__ == "__main__":
    main()
