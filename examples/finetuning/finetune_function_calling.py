"""Fine-tune a chat model to plan function calls with Natural GaLore.

    python examples/finetuning/fetch_calls.py --out runs/calls      a pretrained model and records
    python examples/finetuning/finetune_function_calling.py --model runs/calls/model \\
        --data runs/calls/records --max-length 1024
    python examples/finetuning/finetune_function_calling.py … --compare natural_galore,adamw,lora
    python examples/finetuning/finetune_function_calling.py --out runs/mine --resume

--model is a folder with a Llama in Hugging Face's format (config.json, model.safetensors,
tokenizer.json) whose tokenizer has the special tokens of ChatML or of TinyLlama's chat model.
--data is a folder with train.jsonl and test.jsonl, or with training_data.json and testing_data.json
of TinyAgent (arXiv 2409.00608), the paper's records. A line of the first has

    {"messages": [{"role": "user", "content": "..."}], "plan": "1. f(x=1)\\n2. join()<END_OF_PLAN>",
     "accepted": [{"x": [1, 2]}]}

where `accepted`, which may be left out, has the accepted values of each argument of each call. The
error about a missing file has the command that downloads it. examples/finetuning/tiny_assets.py
makes a small model and records without a download.

The model learns to generate the plan after the instructions; the loss covers the tokens of the plan
only. A generated plan is a success if its graph of calls equals the expected one with accepted
arguments; TinyAgent's own metric, without arguments, is shown too (plans.py). Batches of 32,
learning rate 7e-5 and 3 epochs are the paper's settings.

The output folder has the log (log.jsonl), a checkpoint, and the tuned weights in Hugging Face's
format (model/), which examples/pretraining/generate.py reads. Ctrl-C saves a checkpoint and stops;
--resume continues to the same bits.
"""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from examples.common import (
    chat_format,
    command_line,
    hugging_face,
    llama,
    pretrained,
    run_display,
    training_loop,
)
from examples.common.command_line import shown_as, unset
from examples.finetuning import plans, records, settings, tinyagent, training
from examples.pretraining import generate


OPTIMIZERS = settings.optimizers(natural_galore=7e-5, galore=7e-5, adamw=7e-5, lora=7e-5, muon=7e-5)


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of a run."""

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
        return "examples/finetuning/fetch_calls.py fetches one into runs/calls/model"

    def get_data(self) -> str:
        return "examples/finetuning/fetch_calls.py fetches them into runs/calls/records"


class Split(NamedTuple):
    """Tokens of a set of records.

    Attributes:
        tokens: instructions, plan and end token, padded with the end token.
        of_plan: mask of the tokens of the plan, including its end token.
        prompts: tokens of the instructions.
        examples: the records.
    """

    tokens: Int[np.ndarray, "records length"]
    of_plan: Bool[np.ndarray, "records length"]
    prompts: list[list[int]]
    examples: list[plans.Example]

    @property
    def longest_plan(self) -> int:
        """Maximum tokens of an expected plan, with its end token."""
        return int(self.of_plan.sum(axis=1).max())


class Inputs(NamedTuple):
    """All inputs of a run."""

    shape: llama.LlamaConfig
    weights: pretrained.Params
    tokenizer: Tokenizer
    end: int
    train: Split
    test: Split
    summary: dict[str, Any]


def chat_of(tokenizer: Tokenizer) -> chat_format.ChatFormat:
    """The chat format of the tokenizer's model.

    Raises:
        ValueError: the tokenizer has the special tokens of no known format.
    """
    if chat := chat_format.of(tokenizer):
        return chat
    raise ValueError("the tokenizer has neither <|im_end|> nor <s> and </s>: no known chat format")


def tokenized(
    tokenizer: Tokenizer,
    chat: chat_format.ChatFormat,
    examples: Sequence[plans.Example],
    longest: int,
) -> Split:
    """Tokens of the examples that have at most `longest` tokens.

    Raises:
        ValueError: all examples are longer.
    """
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    begin = [tokenizer.token_to_id(chat.begin)] if chat.begin else []
    end = tokenizer.token_to_id(chat.end)
    before = lambda example: [*begin, *encode(chat.prompt(example.messages))]
    pairs = [(before(example), [*encode(example.plan), end], example) for example in examples]
    kept = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= longest]
    if not kept:
        raise ValueError(f"all records are longer than --max-length {longest}")
    length = -(-max(len(before) + len(plan) for before, plan, _ in kept) // 8) * 8
    tokens = training.padded([before + plan for before, plan, _ in kept], end, length)
    of_plan = np.zeros(tokens.shape, bool)
    for row, (before, plan, _) in zip(of_plan, kept, strict=True):
        row[len(before) : len(before) + len(plan)] = True
    return Split(tokens, of_plan, [before for before, _, _ in kept], [e for *_, e in kept])


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
    chat = chat_of(tokenizer)
    sets = read_records(config.data, skip=config.skip_malformed)
    split = {
        name: tokenized(tokenizer, chat, s.records, config.max_length) for name, s in sets.items()
    }
    for name, s in sets.items():
        if s.skipped:
            run_display.say(f"skipped {len(s.skipped)} records, first: {s.skipped[0]}")
        if long := len(s.records) - len(split[name].examples):
            run_display.say(f"dropped {long} {name} records longer than {config.max_length} tokens")
    digests = "".join(s.sha256 for s in sets.values())
    summary = {
        "records": {name: len(s.examples) for name, s in split.items()},
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }
    end = tokenizer.token_to_id(chat.end)
    return Inputs(shape, weights, tokenizer, end, split["training"], split["testing"], summary)


def read_records(folder: Path, *, skip: bool = False) -> dict[str, records.Records[plans.Example]]:
    """Reads the `training` and `testing` records of a folder, in our format or TinyAgent's.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or a record is malformed and `skip` is false.
    """
    if (folder / "train.jsonl").is_file():
        files = {"training": folder / "train.jsonl", "testing": folder / "test.jsonl"}
        return {k: records.read(file, plans.example, skip=skip) for k, file in files.items()}
    names = ("training", "testing")
    return {k: tinyagent.read(folder / f"{k}_data.json", skip=skip) for k in names}


def success(
    inputs: Inputs, params: pretrained.Params, split: Split, rows: Iterable[int], batch_size: int
) -> dict[str, float]:
    """Mean success of the plans that the model generates for these records.

    The most likely token is taken at each step. A generated plan ends after as many tokens as the
    longest expected plan of the split has.
    """
    rows = list(rows)
    found = generate.generate_batches(
        inputs.shape,
        params,
        [split.prompts[i] for i in rows],
        count=split.longest_plan,
        end=inputs.end,
        batch_size=min(batch_size, len(rows)),
    )
    texts = [inputs.tokenizer.decode(tokens) for tokens in found]
    scores = [plans.judge(text, split.examples[i]) for text, i in zip(texts, rows, strict=True)]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


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

    def validate(params) -> dict[str, Any]:
        params = plain(params)
        test, judged = inputs.test, range(min(config.judged, len(inputs.test.examples)))
        rows = np.resize(
            np.arange(len(judged)), (-(-len(judged) // config.batch_size), config.batch_size)
        )
        losses = [float(test_loss(params, test.tokens[row], test.of_plan[row])) for row in rows]
        metrics = success(inputs, params, test, judged, config.batch_size)
        return {"validation_loss": float(np.mean(losses)), "metrics": metrics}

    return training.make_job(
        config,
        functions,
        inputs.train[:2],
        validate=validate,
        data=inputs.summary,
        about=f"{len(inputs.train.examples):,} plans for a Llama",
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
