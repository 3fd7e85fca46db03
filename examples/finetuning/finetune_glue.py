"""Fine-tune RoBERTa on a GLUE task with Natural GaLore, and compare it with AdamW and LoRA.

    python examples/finetuning/finetune_glue.py --task mrpc --model roberta-base --data MRPC
    python examples/finetuning/finetune_glue.py … --compare natural_galore,galore,adamw,lora
    python examples/finetuning/finetune_glue.py --out runs/mine --resume    continue a stopped run

--model is a folder with a Hugging Face checkpoint (config.json, model.safetensors, tokenizer.json),
--data a folder with the records of the task (train and dev, .tsv or .jsonl). If a file is missing,
the error gives the command that downloads it. examples/finetuning/tiny_assets.py makes a small
model and records without a download. The defaults are GaLore's published settings: rank 4 (or 8),
scale 4, 30 epochs of batches of 16 at learning rate 3e-5, bases kept for 500 steps.

The output folder has the log (log.jsonl), a checkpoint, the weights with the best validation score
in Hugging Face's format (model/), and a picture of the losses (loss.png). Ctrl-C saves a checkpoint
and stops; --resume continues to the same bits.

To tune another model, load its weights with a table of names (examples/common/hugging_face.py) and
pass the model and its loss to make_functions (examples/finetuning/training.py).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from examples.common import command_line
from examples.common.command_line import HIDDEN, one_of, shown_as, unset
from examples.finetuning import finetune_text, glue, settings, training


OPTIMIZERS = settings.optimizers(natural_galore=3e-5, galore=3e-5, adamw=2e-5, lora=4e-4, muon=2e-5)


@dataclass(frozen=True)
class Config(finetune_text.Config):
    """Settings of a run on GLUE."""

    OPTIMIZERS: ClassVar = OPTIMIZERS

    task: Annotated[str, one_of(glue.TASKS)] = "mrpc"
    """GLUE task."""
    optimizer: Annotated[str | None, unset(OPTIMIZERS)] = None
    """Optimizer. Default: natural_galore."""
    lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate, after linear warm-up (6 % of the steps), before linear decay to 0.
    Default: 3e-5 for natural_galore and galore, 2e-5 for adamw, 4e-4 for lora."""
    head_lr: Annotated[float | None, unset("FLOAT")] = None
    """Peak learning rate of the classifier, then trained by AdamW. Default: --optimizer trains it,
    at --lr, as in the paper."""
    text: Annotated[str, HIDDEN] = ""
    label: Annotated[str, HIDDEN] = ""
    rank: Annotated[int | None, shown_as("INT")] = 4
    """Rank of the projection, and of LoRA."""
    scale: Annotated[float | None, shown_as("FLOAT")] = 4.0
    """Factor on the updates of projected weights."""
    fisher: Literal["core", "window", "none"] = "core"
    """Fisher stage of natural_galore; window is the paper's form."""
    residual: Literal["none", "whitened"] = "none"
    """Residual of natural_galore; whitened orthogonalises the rest of each gradient."""
    batch_size: int = 16
    """Records per batch."""
    epochs: int = 30
    """Passes over the training records."""
    max_length: int = 512
    """Maximum tokens per record; longer records are truncated."""
    refresh_every: int = 500
    """Steps between two refreshes of a basis."""
    validate_every: int = 500
    """Steps between two validations."""
    save_every: int = 500
    """Steps between two checkpoints; one more is saved at the end and on Ctrl-C. 0: save none."""

    def check(self) -> None:
        if self.task not in glue.TASKS:
            raise ValueError(f"--task must be one of {', '.join(glue.TASKS)}, got {self.task!r}")
        super().check()

    def get_model(self) -> str:
        return "hf download FacebookAI/roberta-base --local-dir roberta-base"

    def get_data(self) -> str:
        return f"the folder with train and dev of {glue.TASKS[self.task].name}, .tsv or .jsonl"

    def load(self) -> finetune_text.Loaded:
        sets = glue.load(self.task, self.data, skip=self.skip_malformed)
        return glue.TASKS[self.task], sets


EXAMPLE = finetune_text.EXAMPLE._replace(
    name=lambda config: config.task, outputs=("model", "loss.png")
)


def main() -> None:
    training.main(lambda: command_line.from_command_line(Config, __doc__), EXAMPLE)


if __name__ == "__main__":
    main()
