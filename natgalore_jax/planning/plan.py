"""The ranks that a budget of bytes or a share of the gradients' energy allows, decided before jit.

Candidates (`rank_candidates.py`) are counted by the state that the optimizer itself would make
(`byte_counts.py`), and the search bisects them, until one fits and the next does not.
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
from ..selection.select import Rank
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec
from ..util.validation import check_bytes, check_choice, check_int, check_number
from .byte_counts import ByteCount, Row, byte_count_of, state_of
from .plan_report import Plan
from .rank_candidates import by_energy, by_fraction, largest_that_fits, rules
from .spectra import shares


ROLES = ("linear", "square", "basis")  # what bits=8 encodes: all that `galore` remembers


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
    recipe: Callable[..., optax.GradientTransformation] = galore,
    **settings: Any,
) -> Plan:
    """Chooses ranks by a budget of bytes or by energy, and says where every byte goes.

    The bytes are those of one device that holds everything, and they are exact: of weights as they
    are given, of the state that the optimizer makes, and of all gradients of a step without a
    refresh at once. Activations, what a refresh makes, 8-bit state while it is decoded and other
    temporaries are known to the compiler of a step alone: give `step`, or keep room for them with
    `reserve`.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`, of any size: nothing is allocated.
      budget: bytes, as a number or as `"22GiB"` or `"24GB"`. The ranks are the largest common
        fraction of the short sides, in steps of 1/64, with which it is kept. None: no limit.
      rank: of a recipe, to count it in place of choosing one.
      energy: the share in (0, 1] of the energy of `grads` that each matrix's best basis is to hold,
        with the least rank that does; `"power"` and `"svd"` follow that basis. If a budget does not
        allow it, the largest share that it does, in steps of 1/64 of it.
      grads: gradients like the params, or several of them in a list.
      bits: 8 or 32, of the moments and bases that :func:`quantized` can encode. With `bits=32` the
        recipe may be quantized by itself.
      low_rank_gradients: whether gradients come from :func:`value_and_grad`, as cores, for which
        the optimizer has no residual and refreshes all at once.
      reserve: bytes of the budget to leave alone.
      step: makes of an optimizer the training step, a function `(params, opt_state, *batch)`, best
        jitted with both donated. It is compiled for each candidate, up to seven, and what it holds
        beside weights and state, gradients among it, is counted in place of the gradients.
      batch: what the step is given, as arrays or shapes.
      multiple: of which ranks are, where the short side is larger.
      recipe: :func:`galore`, :func:`natural_galore`, or what can be called as they are.
      **settings: of the recipe: `side`, `basis`, `refresh_every`, ...

    Returns:
      A :class:`Plan`; `print` it. Where nothing fits it is of the smallest ranks.

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
    check_choice("bits", bits, (8, 32))
    check_int("multiple", multiple, minimum=1)
    _check_goal(budget, rank, energy, grads)
    if low_rank_gradients and settings.get("residual") is not None:
        raise ValueError("`residual` needs whole gradients: low_rank_gradients=False.")
    if low_rank_gradients and _residual(recipe, settings) is not None:
        settings["residual"] = None
    settings = {"stagger": not low_rank_gradients, **settings}
    if low_rank_gradients:  # all are refreshed at once, by two more passes: seldom
        settings = {"refresh_every": 200, **settings}
    roles = ROLES if bits == 8 else ()

    def made(rank: Rank, roles: tuple[str, ...] = roles) -> optax.GradientTransformation:
        tx = recipe(1.0, rank=rank, **settings)
        return quantized(tx, roles) if roles else tx

    def counted(rank: Rank) -> ByteCount:
        tx = made(rank)
        program = None if step is None else step(tx)
        return byte_count_of(tx, params, low_rank_gradients, program, batch)

    specs = [] if rank is not None and grads is None else _specs(made(1, ()), params)
    spectra = {} if grads is None else _spectra(specs, params, grads)
    if rank is not None:
        candidates = [rank]
    elif energy is not None:
        candidates = [*map(rules, by_energy(specs, spectra, energy, multiple))]
    else:
        candidates = [*map(rules, by_fraction(specs, multiple))]
    bills = functools.cache(lambda i: counted(candidates[i]))
    left = math.inf if budget is None else budget - reserve
    chosen = largest_that_fits(len(candidates), lambda i: bills(i).total <= left)
    rank, bill = candidates[chosen], bills(chosen)
    savings = {}
    if bill.total > left:
        may_be_low = _residual(recipe, settings) is None
        savings = _savings(functools.partial(made, rank), params, low_rank_gradients, may_be_low)
    return Plan(
        settings={"rank": rank, **settings},
        roles=roles,
        low_rank_gradients=low_rank_gradients,
        rows=[_with_energy(row, spectra) for row in bill.rows],
        dtypes=bill.dtypes | ({"reserved": {"as asked": reserve}} if reserve else {}),
        budget=budget,
        adamw=byte_count_of(optax.adamw(1.0), params).total,
        savings=savings,
        recipe=recipe,
    )


def _check_goal(budget: int | None, rank: Any, energy: Any, grads: Any) -> None:
    """Raises if nothing says how large ranks may be, or two things do."""
    if budget is None and rank is None and energy is None:
        raise ValueError("`plan` needs a `budget`, an `energy` or a `rank`.")
    if rank is not None and energy is not None:
        raise ValueError("`rank` and `energy` both say which ranks to take: give one of them.")
    if energy is not None:
        check_number("energy", energy, above=0.0)
        if energy > 1:
            raise ValueError(f"`energy` is a share, at most 1, got {energy}.")
        if grads is None:
            raise ValueError("`energy` is that of `grads`: give them too.")


def _residual(recipe: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """That of the optimizer which the recipe makes with these settings."""
    parameter = inspect.signature(recipe).parameters.get("residual")
    return settings.get("residual", parameter.default if parameter else None)


def _specs(tx: optax.GradientTransformation, params: PyTree) -> list[LeafSpec]:
    """Of the leaves that an optimizer projects."""
    _, bases, _ = state_of(tx, params)
    return [P.spec for P, *_ in bases.values()]


def _spectra(
    specs: Sequence[LeafSpec], params: PyTree, grads: PyTree | Sequence[PyTree]
) -> dict[str, np.ndarray]:
    """The shares of energy that are held by each number of directions, by the leaf's name."""
    like = jax.tree.structure(unbox(params))
    fits = lambda tree: jax.tree.structure(unbox(tree)) == like
    trees = [grads] if fits(grads) or not isinstance(grads, list | tuple) else [*grads]
    if not trees or not all(map(fits, trees)):
        raise ValueError("`grads` must have the structure of `params`, or be a list of such trees.")
    leaves = [dict(jax.tree_util.tree_leaves_with_path(unbox(tree))) for tree in trees]
    return {spec.name: shares(spec, [tree[spec.path] for tree in leaves]) for spec in specs}


def _with_energy(row: Row, spectra: Mapping[str, np.ndarray]) -> Row:
    if row.rank is None or row.path not in spectra:
        return row
    return dataclasses.replace(row, energy=float(spectra[row.path][:, row.rank - 1].min()))


def _savings(
    made: Callable[..., optax.GradientTransformation],
    params: PyTree,
    low_rank_gradients: bool,
    may_be_low: bool,
) -> dict[str, int]:
    """What takes how many bytes less, of weights, gradients and state."""
    bill = byte_count_of(made(), params, low_rank_gradients)
    low = low_rank_gradients or may_be_low
    narrow = lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16) if _is_wide(w) else w
    ways = {
        "bits=8": lambda: byte_count_of(made(roles=ROLES), params, low_rank_gradients).total,
        "low_rank_gradients=True": lambda: byte_count_of(made(), params, low).total,
        "weights in bfloat16": lambda: (
            byte_count_of(made(), jax.tree.map(narrow, params), low_rank_gradients).total
        ),
        "the state in the host's memory, by natgalore.offload": lambda: (
            bill.total - bill.bytes["state"]
        ),
    }
    found = {way: bill.total - total() for way, total in ways.items()}
    return {way: less for way, less in found.items() if less > 0}


def _is_wide(w: Any) -> bool:
    return jnp.issubdtype(w.dtype, jnp.floating) and jnp.finfo(w.dtype).bits > 16
