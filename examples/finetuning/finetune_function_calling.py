"""Fine-tune TinyLlama to plan function calls with Natural GaLore (TinyAgent, arXiv 2409.00608).

    python examples/finetuning/finetune_function_calling.py --model TinyLlama --data TinyAgent
    python examples/finetuning/finetune_function_calling.py … --compare natural_galore,adamw,lora
    python examples/finetuning/finetune_function_calling.py --out runs/mine --resume

--model is a folder with a Llama in Hugging Face's format (config.json, model.safetensors,
tokenizer.json), --data a folder with TinyAgent's training_data.json and testing_data.json. If a
file is missing, the error gives the command that downloads it. examples/finetuning/tiny_assets.py
makes a small model and records without a download.

The model learns to generate the plan after the instructions; the loss covers the tokens of the plan
only. A generated plan is a success if its graph of calls equals the expected one, arguments
included; TinyAgent's own metric, without arguments, is shown too. Batches of 32, learning rate 7e-5
and 3 epochs are the paper's settings.

The output folder has the log (log.jsonl), a checkpoint, and the tuned weights in Hugging Face's
format (model/), which examples/pretraining/generate.py reads. Ctrl-C saves a checkpoint and stops;
--resume continues to the same bits.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from examples.common import (
    command_line,
    hugging_face,
    llama,
    pretrained,
    run_display,
    training_loop,
)
from examples.common.command_line import shown_as, unset
from examples.finetuning import settings, tinyagent, training
from examples.finetuning.records import Records
from examples.pretraining import generate


OPTIMIZERS = settings.optimizers(natural_galore=7e-5, galore=7e-5, adamw=7e-5, lora=7e-5, muon=7e-5)


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of a run on TinyAgent."""

    OPTIMIZERS: ClassVar = OPTIMIZERS
    COUNTS: ClassVar = (*settings.Config.COUNTS, "judged")

    optimizer: Annotated[str | None, unset(OPTIMIZERS)] = None
    """Optimizer. Default: natural_galore."""
    lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate, after linear warm-up (6 % of the steps), before linear decay to 0.
    Default: 7e-5."""
    rank: Annotated[int | None, shown_as("INT")] = 32
    """Rank of the projection, and of LoRA."""
    scale: float = 1.0
    """Factor on the updates of projected weights."""
    refresh_every: int = 200
    """Steps between two refreshes of a basis."""
    batch_size: int = 32
    """Plans per batch."""
    epochs: int = 3
    """Passes over the training records."""
    max_length: int = 2048
    """Maximum tokens of instructions and plan; longer records are dropped."""
    judged: int = 100
    """Number of plans that are generated and compared at each validation."""
    remat: bool = False
    """Recompute activations in the backward pass, to save memory."""
    validate_every: int = 500
    """Steps between two validations."""
    save_every: int = 500
    """Steps between two checkpoints; one more is saved at the end and on Ctrl-C. 0: save none."""

    def get_model(self) -> str:
        return "hf download TinyLlama/TinyLlama-1.1B-Chat-v1.0 --local-dir TinyLlama"

    def get_data(self) -> str:
        return (
            "hf download --repo-type dataset squeeze-ai-lab/TinyAgent-dataset "
            "--local-dir TinyAgent-dataset"
        )


class Split(NamedTuple):
    """Tokens of a set of records.

    Attributes:
        tokens: instructions, plan and end token, padded with the end token.
        of_plan: mask of the tokens of the plan, including its end token.
        prompts: tokens of the instructions.
        plans: expected plans as text.
    """

    tokens: Int[np.ndarray, "records length"]
    of_plan: Bool[np.ndarray, "records length"]
    prompts: list[list[int]]
    plans: list[str]


class Inputs(NamedTuple):
    """All inputs of a run."""

    shape: llama.LlamaConfig
    weights: pretrained.Params
    tokenizer: Tokenizer
    train: Split
    test: Split
    summary: dict[str, Any]


def prompt(example: tinyagent.Example) -> str:
    """The instructions in the format of TinyLlama's chat model."""
    return (
        "".join(f"<|{role}|>\n{text}</s>\n" for role, text in example.messages) + "<|assistant|>\n"
    )


def tokenized(tokenizer: Tokenizer, examples: Sequence[tinyagent.Example], longest: int) -> Split:
    """Tokens of the examples that have at most `longest` tokens.

    Raises:
        ValueError: all examples are longer.
    """
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    pairs = [([begin, *encode(prompt(e))], [*encode(e.plan), end], e.plan) for e in examples]
    kept = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= longest]
    if not kept:
        raise ValueError(f"all records are longer than --max-length {longest}")
    length = -(-max(len(before) + len(plan) for before, plan, _ in kept) // 8) * 8
    tokens = training.padded([before + plan for before, plan, _ in kept], end, length)
    of_plan = np.zeros(tokens.shape, bool)
    for row, (before, plan, _) in zip(of_plan, kept, strict=True):
        row[len(before) : len(before) + len(plan)] = True
    return Split(tokens, of_plan, [before for before, _, _ in kept], [text for *_, text in kept])


def plan_loss(
    model: llama.Llama, tokens: Int[Array, "batch length"], of_plan: Bool[Array, "batch length"]
) -> Float[Array, ""]:
    """Mean cross-entropy of the plan tokens, each given all previous tokens."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * of_plan[:, 1:]) / jnp.sum(of_plan[:, 1:])


def read(config: Config) -> Inputs:
    """Reads and checks the model, its tokenizer and the records.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or a record is malformed.
    """
    shape, weights = hugging_face.read_llama(config.model)
    weights = hugging_face.stacked(weights)
    shape = replace(shape, scan=True, dtype=jnp.dtype(config.dtype), remat=config.remat)
    tokenizer = hugging_face.read_tokenizer(config.model, shape.vocabulary)
    tokenizer.no_truncation()
    sets: dict[str, Records[tinyagent.Example]] = {
        name: tinyagent.read(config.data / f"{name}_data.json", skip=config.skip_malformed)
        for name in ("training", "testing")
    }
    split = {name: tokenized(tokenizer, s.records, config.max_length) for name, s in sets.items()}
    for name, s in sets.items():
        if s.skipped:
            run_display.say(f"skipped {len(s.skipped)} records, first: {s.skipped[0]}")
        if long := len(s.records) - len(split[name].plans):
            run_display.say(f"dropped {long} {name} records longer than {config.max_length} tokens")
    digests = "".join(s.sha256 for s in sets.values())
    summary = {
        "records": {name: len(s.plans) for name, s in split.items()},
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }
    return Inputs(shape, weights, tokenizer, split["training"], split["testing"], summary)


def make_job(config: Config, inputs: Inputs) -> training_loop.Job:
    """The job of one optimizer."""
    functions = training.make_functions(
        config,
        partial(llama.Llama, inputs.shape),
        inputs.weights,
        lambda model, tokens, of_plan, rngs: plan_loss(model, tokens, of_plan),
        head="head",
    )
    structure = llama.structure(inputs.shape)
    plain = jax.jit(training.plain_params)
    test_loss = jax.jit(lambda params, *batch: plan_loss(nnx.merge(structure, params), *batch))
    end = inputs.tokenizer.token_to_id("</s>")

    def written(params, i: int) -> str:
        """The greedily generated plan for a test record."""
        before = inputs.test.prompts[i]
        room = inputs.test.tokens.shape[1] - len(before)
        tokens = generate.generate(
            inputs.shape, params, before, count=room, temperature=0.0, seed=0, end=end
        )
        return inputs.tokenizer.decode(list(tokens))

    def validate(params) -> dict[str, Any]:
        params = plain(params)
        test, judged = inputs.test, range(min(config.judged, len(inputs.test.plans)))
        rows = np.resize(
            np.arange(len(judged)), (-(-len(judged) // config.batch_size), config.batch_size)
        )
        losses = [float(test_loss(params, test.tokens[row], test.of_plan[row])) for row in rows]
        scores = [tinyagent.judge(written(params, i), test.plans[i]) for i in judged]
        metrics = {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}
        return {"validation_loss": float(np.mean(losses)), "metrics": metrics}

    return training.make_job(
        config,
        functions,
        inputs.train[:2],
        validate=validate,
        data=inputs.summary,
        about=f"{len(inputs.train.plans):,} plans for a Llama",
    )


def finish(config: Config, inputs: Inputs, state: training_loop.TrainState) -> None:
    """Writes the model and its tokenizer."""
    folder = config.out / "model"
    hugging_face.save_llama(folder, inputs.shape, training.exported(state.params))
    shutil.copy(config.model / "tokenizer.json", folder)


EXAMPLE = training.Example(read, lambda config: "plans", make_job, finish)


def main() -> None:
    training.main(lambda: command_line.from_command_line(Config, __doc__), EXAMPLE)


if __name__ == "__main__":
    main()
