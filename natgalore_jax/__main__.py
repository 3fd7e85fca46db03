"""`python -m natgalore_jax plan`."""

import sys

from .planning.cli import main


if __name__ == "__main__":
    sys.exit(main())
