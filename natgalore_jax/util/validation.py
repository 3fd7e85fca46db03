"""Arguments are refused where they are given, in words that say what is allowed."""

import math
import re
from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import Array, Float


INT32_MAX = 2**31 - 1
Scalar = int | float | Float[Array, ""]  # an array where `optax.inject_hyperparams` gives it


def check_int(name: str, value: Any, *, minimum: int) -> int:
    """`value`, if it is an integer of at least `minimum` that an int32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be an int known when the transformation is built, got {value!r}."
            f"{_if_injected(value)}"
        )
    if not minimum <= value <= INT32_MAX:
        raise ValueError(f"`{name}` must be in [{minimum}, {INT32_MAX}], got {value}.")
    return value


def check_number(
    name: str, value: Any, *, above: float, below: float = math.inf, inclusive: bool = False
) -> Any:
    """`value`, if it is a number in (above, below), or [above, below) if `inclusive`.

    A traced value passes: `optax.inject_hyperparams` may be the one who gives it.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number, got {value!r}.") from None
    if not ((above <= number if inclusive else above < number) and number < below):
        bounds = f"{'at least' if inclusive else 'above'} {above}"
        bounds += f" and below {below}" if below < math.inf else " and finite"
        raise ValueError(f"`{name}` must be {bounds}, got {value}.")
    return value


def check_decay(name: str, value: Any) -> Any:
    """`value`, if it is what a mean decays by: a number in [0, 1), not rounded to half precision.

    `optax.inject_hyperparams` gives numbers the dtype of the params: in bfloat16, 0.999 is 1.
    """
    if isinstance(value, jax.Array) and value.dtype.itemsize < 4:
        raise TypeError(
            f"`{name}` is given in {value.dtype}, in which 0.999 is 1: pass "
            "`hyperparam_dtype=jnp.float32` to optax.inject_hyperparams."
        )
    return check_number(name, value, above=0.0, below=1.0, inclusive=True)


def check_choice(name: str, value: Any, choices: Collection[Any], *others: str) -> Any:
    """`value`, if it is one of `choices`; `others` describes what else is allowed."""
    if isinstance(value, jax.Array) or value not in list(choices):
        allowed = ", ".join([*map(repr, choices), *others])
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.{_if_injected(value)}")
    return value


UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base ** (i + 1)
    for base, unit in ((1000, "b"), (1024, "ib"))
    for i, prefix in enumerate("kmgt")
}


def check_bytes(name: str, value: Any) -> int:
    """A number of bytes, whole or not, or a text such as `"22GiB"`, rounded down.

    Example:
      >>> check_bytes("budget", "1.5KiB"), check_bytes("budget", "24 GB"), check_bytes("budget", 7)
      (1536, 24000000000, 7)
    """
    text = re.fullmatch(r"\s*([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
    try:
        number, unit = text.groups() if text else ("", "")
        found = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        found = math.inf
    if isinstance(value, bool) or not found < math.inf:
        raise ValueError(
            f"`{name}` must be a number of bytes or a text such as '22GiB' or '24GB', got "
            f"{value!r}."
        )
    return int(found)


def _if_injected(value: Any) -> str:
    if not isinstance(value, jax.Array):
        return ""
    return (
        " What cannot change while training is listed for each function in "
        "`natgalore.STATIC_ARGS`: pass that as `static_args` to optax.inject_hyperparams."
    )
