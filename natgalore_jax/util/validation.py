"""Checks of arguments. Each raises a message that names the argument and the values it may have."""

import math
import numbers
import operator
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


INT32_MAX = 2**31 - 1
Scalar = int | float | Float[Array, ""]  # an array under `optax.inject_hyperparams`


def as_int(value: Any) -> int | None:
    """`value` as an int; None for a bool, a JAX array or an object without `__index__`.

    JAX arrays are excluded even with a known value: `optax.inject_hyperparams` passes such arrays
    to `init` and traced ones to a jitted `update`.

    Example:
      >>> as_int(np.int64(8)), as_int(np.array(8)), as_int(8.0), as_int(True)
      (8, 8, None, None)
    """
    if isinstance(value, bool | jax.Array):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_float(value: Any) -> Any:
    """A real number of Python or NumPy as a float; any other object (JAX array, bool) unchanged.

    Example:
      >>> from fractions import Fraction
      >>> as_float(Fraction(1, 4)), as_float(np.array(2)), as_float("2")
      (0.25, 2.0, '2')
    """
    return float(value) if _is_real(value) and not isinstance(value, jax.Array) else value


def check_int(name: str, value: Any, *, minimum: int) -> int:
    """Returns `value` as an int in [minimum, 2³¹ − 1]."""
    integer = as_int(value)
    if integer is None:
        raise TypeError(
            f"`{name}` must be an int known when the transformation is built, got {value!r}."
            f"{_if_injected(value)}"
        )
    if not minimum <= integer <= INT32_MAX:
        raise ValueError(f"`{name}` must be in [{minimum}, {INT32_MAX}], got {value}.")
    return integer


def check_number(
    name: str, value: Any, *, above: float, below: float = math.inf, inclusive: bool = False
) -> Any:
    """Returns `value`, a number in (above, below), or in [above, below) if `inclusive`.

    Numbers of Python and NumPy are converted to float. A JAX scalar stays an array, and a traced
    one passes unchecked: both come from `optax.inject_hyperparams`.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    if not _is_real(value):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    number = float(value)
    if not ((above <= number if inclusive else above < number) and number < below):
        bounds = f"{'at least' if inclusive else 'above'} {above}"
        bounds += f" and below {below}" if below < math.inf else " and finite"
        raise ValueError(f"`{name}` must be {bounds}, got {value}.")
    return as_float(value)


def check_decay(name: str, value: Any) -> Any:
    """Returns `value`, the decay of a moving average in [0, 1), in float32 or wider.

    `optax.inject_hyperparams` casts numbers to the dtype of the params: in bfloat16, 0.999 is 1.
    """
    if isinstance(value, jax.Array) and value.dtype.itemsize < 4:
        raise TypeError(
            f"`{name}` is given in {value.dtype}, in which 0.999 is 1: pass "
            "`hyperparam_dtype=jnp.float32` to optax.inject_hyperparams."
        )
    return check_number(name, value, above=0.0, below=1.0, inclusive=True)


def check_choice(name: str, value: Any, choices: Collection[Any], *others: str) -> Any:
    """Returns the one of `choices` that equals `value`; `others` describes other allowed values."""
    if not isinstance(value, jax.Array):
        for choice in choices:
            if value == choice:
                return choice
    allowed = ", ".join([*map(repr, choices), *others])
    raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.{_if_injected(value)}")


UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base ** (i + 1)
    for base, unit in ((1000, "b"), (1024, "ib"))
    for i, prefix in enumerate("kmgt")
}


def check_bytes(name: str, value: Any) -> int:
    """Bytes from a number or a string such as `"22GiB"`, rounded down.

    Example:
      >>> check_bytes("budget", "1.5KiB"), check_bytes("budget", "24 GB"), check_bytes("budget", 7)
      (1536, 24000000000, 7)
    """
    number = value if isinstance(value, int) else as_float(value)
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)\s*", str(number).lower())
    try:
        digits, unit = match.groups() if match else ("", "")
        count = float(digits) * UNITS[unit]
    except (ValueError, KeyError):
        count = math.inf
    if not count < math.inf:
        raise ValueError(
            f"`{name}` must be a number of bytes or a string such as '22GiB' or '24GB', got "
            f"{value!r}."
        )
    return int(count)


def _is_real(value: Any) -> bool:
    """Whether `value` is one real number of Python, NumPy or JAX, and no bool."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = (jnp.floating, jnp.integer)
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in real)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _if_injected(value: Any) -> str:
    if not isinstance(value, jax.Array):
        return ""
    return (
        " `natgalore.STATIC_ARGS` lists, for each function, the arguments that cannot change "
        "during training: pass that list as `static_args` to optax.inject_hyperparams."
    )
