"""`python -m natgalore_jax plan`."""

from .planning.cli import main


if __name__ == "__main__":
    main()
