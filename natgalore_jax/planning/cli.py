"""python -m natgalore_jax plan: bytes of training, and the ranks that fit a budget.

    python -m natgalore_jax plan --model 7b --budget 24GiB
    python -m natgalore_jax plan --shapes shapes.json --rank 128 --bits 32

Exit status: 0 if it fits, 1 if it does not, 2 if an argument is invalid.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax.numpy as jnp

from ..optimizers import galore, natural_galore
from ..selection.select import SIDES
from .model_shapes import LLAMA, llama, read_shapes
from .plan import plan


RECIPES = {"galore": galore, "natural_galore": natural_galore}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    """The parser of the command line."""
    top = Parser(
        prog="python -m natgalore_jax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "plan",
        help="count bytes and choose ranks that fit a budget",
        description="Prints the bytes of weights, gradients and optimizer state at the largest "
        "ranks that fit a budget. Needs shapes only: nothing is allocated. Activations and other "
        "temporaries of a step are not counted; natgalore.plan(..., step=...) counts them.",
        epilog="Exit status: 0 if it fits, 1 if it does not, 2 if an argument is invalid.",
    )
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", choices=LLAMA, help="one of the paper's Llamas")
    model.add_argument(
        "--shapes",
        nargs="+",
        metavar="FILE",
        help='JSON files, {"layers/up/kernel": [24, 2048, 5461], ...}, where a shape may have a '
        'dtype, [[24, 2048, 5461], "bfloat16"]; or .safetensors files',
    )
    command.set_defaults(error=command.error)
    command.add_argument("--budget", metavar="BYTES", help="such as 24GiB, 24GB or 2.4e10")
    command.add_argument(
        "--rank",
        type=_rank,
        help="an int, or a fraction of the short side, to count instead of choosing a rank",
    )
    command.add_argument(
        "--reserve", default="0", metavar="BYTES", help="part of the budget to leave unused"
    )
    command.add_argument(
        "--dtype",
        type=_dtype,
        default="bfloat16",
        help="dtype of weights, unless a file specifies one (default: %(default)s)",
    )
    command.add_argument(
        "--bits",
        type=int,
        choices=(8, 32),
        default=8,
        help="bits per number of moments and bases (default: %(default)s)",
    )
    command.add_argument(
        "--whole-gradients",
        action="store_true",
        help="count full gradients (jax.value_and_grad) instead of cores "
        "(natgalore.value_and_grad)",
    )
    command.add_argument(
        "--recipe", choices=RECIPES, default="galore", help="optimizer (default: %(default)s)"
    )
    command.add_argument(
        "--side", choices=SIDES, default="short", help="projected side (default: %(default)s)"
    )
    command.add_argument(
        "--multiple",
        type=int,
        default=8,
        help="ranks are multiples of it, or the full short side (default: %(default)s)",
    )
    command.add_argument(
        "--tpu", action="store_true", help="count the padding of arrays in a TPU's memory"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments, by default those of the process.

    Returns:
      The exit status, 0 if it fits and 1 if it does not.

    Raises:
      SystemExit: with status 2 and one line of explanation, if an argument is invalid.
    """
    args = parser().parse_args(argv)
    if args.budget is None and args.rank is None:
        args.error("one of the arguments --budget --rank is required")
    try:
        if args.model:
            params = llama(args.model, args.dtype)
        else:
            params = read_shapes(args.shapes, args.dtype)
        planned = plan(
            params,
            args.budget,
            rank=args.rank,
            bits=args.bits,
            low_rank_gradients=not args.whole_gradients,
            reserve=args.reserve,
            multiple=args.multiple,
            tpu=args.tpu,
            recipe=RECIPES[args.recipe],
            side=args.side,
        )
    except (OSError, TypeError, ValueError) as error:
        args.error(" ".join(str(error).split()))
    print(planned)
    return 0 if planned.fits else 1


def _rank(text: str) -> int | float:
    """Parses `128` or `0.25`."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _dtype(text: str) -> str:
    """The name of a dtype known to JAX."""
    try:
        return jnp.dtype(text).name
    except TypeError:
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
