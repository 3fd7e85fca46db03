"""Chooses ranks by a budget of bytes or a share of the gradients' energy, from shapes alone.

A bisection over the candidates of `rank_candidates.py` counts the bytes of each from the state of
the optimizer itself (`byte_counts.py`).
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ..optimizers import galore
from ..quantization.quantized import quantized
from ..reporting.memory_report import nbytes, nbytes_on_tpu
from ..selection.select import Rank, check_rank
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec
from ..util.validation import check_bytes, check_choice, check_int, check_number
from .byte_counts import ByteCount, Row, byte_count_of, state_of
from .plan_report import Plan
from .rank_candidates import by_energy, by_fraction, energy_shares, largest_that_fits, rules


QUANTIZED_ROLES = ("linear", "square", "basis", "full")  # those of all arrays in galore's state


def plan(
    params: PyTree,
    budget: int | float | str | None = None,
    *,
    rank: Rank | None = None,
    energy: float | None = None,
    grads: PyTree | Sequence[PyTree] | None = None,
    bits: int = 8,
    low_rank_gradients: bool = True,
    reserve: int | float | str = 0,
    step: Callable[[optax.GradientTransformation], Callable[..., Any]] | None = None,
    batch: tuple[Any, ...] = (),
    multiple: int = 8,
    tpu: bool = False,
    recipe: Callable[..., optax.GradientTransformation] = galore,
    **settings: Any,
) -> Plan:
    """Chooses ranks by a budget of bytes or by energy, and reports the bytes of each leaf.

    The bytes are exact for one device that holds everything: weights, the optimizer's state, and
    all gradients of a step without a refresh. Activations, the temporaries of a refresh and decoded
    8-bit state are not counted: only the compiler of a training step knows them. Pass `step`, or
    set room aside with `reserve`.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`, of any size: nothing is allocated.
      budget: bytes, as a number or as `"22GiB"` or `"24GB"`. The ranks are the largest common
        fraction of the short sides, in steps of 1/64, that fits. None: no limit.
      rank: a rank as in :func:`project`, counted instead of a chosen one.
      energy: the share in (0, 1] of the energy of `grads` that the best basis of each matrix must
        hold; the smallest such ranks are chosen. `"power"` and `"svd"` follow that basis. If a
        budget does not allow it, the largest share that fits, in steps of 1/64 of `energy`.
      grads: full gradients in the structure of the params, or a list of several.
      bits: 8 or 32, of the moments and bases that :func:`quantized` can encode. With `bits=32` the
        recipe may call :func:`quantized` itself.
      low_rank_gradients: whether gradients are the cores of :func:`value_and_grad`. The optimizer
        then has no residual and refreshes all matrices at once.
      reserve: bytes of the budget to leave unused.
      step: a function from an optimizer to its training step `(params, opt_state, *batch)`, best
        jitted with params and state donated. It is compiled for each candidate, up to seven, and
        its temporaries, which include the gradients, replace the count of gradients.
      batch: further arguments of the training step, as arrays or shapes.
      multiple: chosen ranks are multiples of it, or the full short side.
      tpu: whether to count the padding of arrays in a TPU's memory, which stores tiles of 8 x 128.
        Ranks that are multiples of 8 and sides that are multiples of 128 need none.
      recipe: :func:`galore`, :func:`natural_galore`, or a function with their arguments.
      **settings: arguments of the recipe: `side`, `basis`, `refresh_every`, ...

    Returns:
      A :class:`Plan`; `print` it. If no candidate fits, it is the plan of the smallest ranks.

    Raises:
      TypeError, ValueError: if an argument is out of range; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as natgalore
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}}
      >>> planned = natgalore.plan(params, budget="1.3MiB", bits=32)
      >>> planned.rank, planned.bytes  # 4·256·1024, 4·16·1024, 4·16·(256 + 2·1024) + 5·4
      (16, {'weights': 1048576, 'gradients': 65536, 'state': 147476})
      >>> tx = planned.optimizer(2.5e-3, weight_decay=0.1)
    """
    budget = None if budget is None else check_bytes("budget", budget)
    reserve = check_bytes("reserve", reserve)
    bits = check_choice("bits", check_int("bits", bits, minimum=1), (8, 32))
    multiple = check_int("multiple", multiple, minimum=1)
    rank = None if rank is None else check_rank(rank)
    energy = None if energy is None else check_number("energy", energy, above=0.0)
    if not callable(recipe):
        raise TypeError(f"`recipe` must be a function such as natgalore.galore, got {recipe!r}.")
    _check_goal(budget, rank, energy, grads)
    for name in ("residual", "residual_momentum"):
        if low_rank_gradients and settings.get(name) is not None:
            raise ValueError(f"`{name}` needs full gradients: low_rank_gradients=False.")
    if low_rank_gradients and _residual(recipe, settings) is not None:
        settings["residual"] = None
    settings = {"stagger": not low_rank_gradients, **settings}
    if low_rank_gradients:  # a refresh costs two more passes of the model: make it rare
        settings = {"refresh_every": 200, **settings}
    roles = QUANTIZED_ROLES if bits == 8 else ()

    def optimizer(rank: Rank, roles: tuple[str, ...] = roles) -> optax.GradientTransformation:
        tx = recipe(1.0, rank=rank, **settings)
        return quantized(tx, roles) if roles else tx

    specs = [] if rank is not None and grads is None else _specs(optimizer(1, ()), params)
    spectra = {} if grads is None else _spectra(specs, params, grads)
    if rank is not None:
        candidates = [rank]
    elif energy is not None:
        candidates = [*map(rules, by_energy(specs, spectra, energy, multiple))]
    else:
        candidates = [*map(rules, by_fraction(specs, multiple))]

    @functools.cache
    def count(i: int) -> ByteCount:
        tx = optimizer(candidates[i])
        program = None if step is None else step(tx)
        return byte_count_of(tx, params, low_rank_gradients, program, batch, size)

    size = nbytes_on_tpu if tpu else nbytes
    available = math.inf if budget is None else budget - reserve
    chosen = largest_that_fits(len(candidates), lambda i: count(i).total <= available)
    rank, bytes_of = candidates[chosen], count(chosen)
    savings = {}
    if bytes_of.total > available:
        can_be_low = low_rank_gradients or _residual(recipe, settings) is None
        of_roles = functools.partial(optimizer, rank)
        savings = _savings(of_roles, params, low_rank_gradients, can_be_low, size)
    return Plan(
        settings={"rank": rank, **settings},
        roles=roles,
        low_rank_gradients=low_rank_gradients,
        rows=[_with_energy(row, spectra) for row in bytes_of.rows],
        dtypes=bytes_of.dtypes | ({"reserved": {"as requested": reserve}} if reserve else {}),
        budget=budget,
        adamw=byte_count_of(optax.adamw(1.0), params, size=size).total,
        savings=savings,
        recipe=recipe,
    )


def _check_goal(budget: int | None, rank: Any, energy: Any, grads: Any) -> None:
    """Raises if the ranks are undetermined or determined twice."""
    if budget is None and rank is None and energy is None:
        raise ValueError("`plan` needs a `budget`, an `energy` or a `rank`.")
    if rank is not None and energy is not None:
        raise ValueError("`rank` and `energy` both determine the ranks: pass one of them.")
    if energy is not None and energy > 1:
        raise ValueError(f"`energy` is a share, at most 1, got {energy}.")
    if energy is not None and grads is None:
        raise ValueError("`energy` is a share of the energy of `grads`: pass `grads` too.")


def _residual(recipe: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """The residual of the recipe under these settings."""
    parameter = inspect.signature(recipe).parameters.get("residual")
    return settings.get("residual", parameter.default if parameter else None)


def _specs(tx: optax.GradientTransformation, params: PyTree) -> list[LeafSpec]:
    """The specs of the leaves that an optimizer projects."""
    _, bases, _ = state_of(tx, params)
    return [P.spec for P, *_ in bases.values()]


def _spectra(
    specs: Sequence[LeafSpec], params: PyTree, grads: PyTree | Sequence[PyTree]
) -> dict[str, np.ndarray]:
    """The energy shares of every rank, by the leaf's name."""
    structure = jax.tree.structure(unbox(params))
    fits = lambda tree: jax.tree.structure(unbox(tree)) == structure
    trees = [grads] if fits(grads) or not isinstance(grads, list | tuple) else [*grads]
    if not trees or not all(map(fits, trees)):
        raise ValueError("`grads` must have the structure of `params`, or be a list of such trees.")
    leaves = [dict(jax.tree_util.tree_leaves_with_path(unbox(tree))) for tree in trees]
    return {spec.name: energy_shares(spec, [tree[spec.path] for tree in leaves]) for spec in specs}


def _with_energy(row: Row, spectra: Mapping[str, np.ndarray]) -> Row:
    """The row with the energy of its rank, if the leaf has spectra."""
    if row.rank is None or row.path not in spectra:
        return row
    return dataclasses.replace(row, energy=float(spectra[row.path][:, row.rank - 1].min()))


def _savings(
    optimizer: Callable[..., optax.GradientTransformation],
    params: PyTree,
    low_rank_gradients: bool,
    can_be_low: bool,
    size: Callable[[Any], int],
) -> dict[str, int]:
    """Changes that save bytes of weights, gradients or state, with the bytes each saves."""
    count = functools.partial(byte_count_of, size=size)
    now = count(optimizer(), params, low_rank_gradients)
    narrow = lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16) if _is_wide(w) else w
    changes = {
        "bits=8": lambda: count(optimizer(roles=QUANTIZED_ROLES), params, low_rank_gradients).total,
        "low_rank_gradients=True": lambda: count(optimizer(), params, can_be_low).total,
        "weights in bfloat16": lambda: (
            count(optimizer(), jax.tree.map(narrow, params), low_rank_gradients).total
        ),
        "the state in the host's memory, by natgalore.offload": lambda: (
            now.total - now.bytes["state"]
        ),
    }
    saved = {change: now.total - total() for change, total in changes.items()}
    return {change: count for change, count in saved.items() if count > 0}


def _is_wide(w: Any) -> bool:
    """Whether a weight is floating point of more than 16 bits."""
    return jnp.issubdtype(w.dtype, jnp.floating) and jnp.finfo(w.dtype).bits > 16
