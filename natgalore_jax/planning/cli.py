"""python -m natgalore_jax plan: where the bytes of training go, and which ranks fit a budget.

    python -m natgalore_jax plan --model 7b --budget 24GiB
    python -m natgalore_jax plan --shapes shapes.json --rank 128 --bits 32

Exits with status 0 if it fits, 1 if it does not, and 2 if what was asked makes no sense.
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
    """Whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    top = Parser(
        prog="python -m natgalore_jax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    asked = commands.add_parser(
        "plan",
        help="where bytes go, and which ranks fit a budget",
        description="Prints where the bytes of weights, gradients and state go, at the largest "
        "ranks that fit a budget. From shapes alone: nothing is allocated. Activations and other "
        "temporaries of a step are not counted; natgalore.plan(..., step=...) counts them.",
        epilog="Exits with status 0 if it fits, 1 if it does not, 2 if what was asked makes no "
        "sense.",
    )
    of = asked.add_mutually_exclusive_group(required=True)
    of.add_argument("--model", choices=LLAMA, help="one of the paper's Llamas")
    of.add_argument(
        "--shapes",
        nargs="+",
        metavar="FILE",
        help='files of JSON, {"layers/up/kernel": [24, 2048, 5461], ...}, where a shape may come '
        'with its dtype, [[24, 2048, 5461], "bfloat16"]; or .safetensors files',
    )
    asked.set_defaults(error=asked.error)
    asked.add_argument("--budget", metavar="BYTES", help="such as 24GiB, 24GB or 2.4e10")
    asked.add_argument(
        "--rank", type=_rank, help="an int, or a fraction of the short side: counts this one"
    )
    asked.add_argument("--reserve", default="0", metavar="BYTES", help="of the budget, left alone")
    asked.add_argument(
        "--dtype",
        type=_dtype,
        default="bfloat16",
        help="of weights, where a file does not say (default: %(default)s)",
    )
    asked.add_argument(
        "--bits",
        type=int,
        choices=(8, 32),
        default=8,
        help="of moments and bases (default: %(default)s)",
    )
    asked.add_argument(
        "--whole-gradients",
        action="store_true",
        help="by jax.value_and_grad, and not cores by natgalore.value_and_grad",
    )
    asked.add_argument("--recipe", choices=RECIPES, default="galore", help="(default: %(default)s)")
    asked.add_argument(
        "--side", choices=SIDES, default="short", help="that is projected (default: %(default)s)"
    )
    asked.add_argument(
        "--multiple",
        type=int,
        default=8,
        help="of which ranks are, where the short side is larger (default: %(default)s)",
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: its words; by default those of the process.

    Returns:
      The exit status, 0 if it fits and 1 if it does not.

    Raises:
      SystemExit: with status 2 and a line that says why, if what was asked makes no sense.
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
            recipe=RECIPES[args.recipe],
            side=args.side,
        )
    except (OSError, TypeError, ValueError) as error:
        args.error(" ".join(str(error).split()))
    print(planned)
    return 0 if planned.fits else 1


def _rank(text: str) -> int | float:
    """`128`, or `0.25`."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _dtype(text: str) -> str:
    """The name of a dtype that JAX knows."""
    try:
        return jnp.dtype(text).name
    except TypeError:
        raise argparse.ArgumentTypeError(f"no dtype is called {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
