"""The natural gradient of a core, core form (paper, section 3.2, g the r x n core, F = E[g gᵀ]).

With the decayed mean

    L ← β L + (1 − β) R Rᵀ,    L̂ = L / w,  w the same mean of ones,    λ = ρ tr(L̂) / r          (1)

the preconditioned core is

    U = (L̂ + λ I)⁻ᵖ R                                                                         (2)

Memory: 2 r² numbers per matrix. L is stored in units of its own power of two, so that gradients of
1e-25 and 1e25 neither vanish nor overflow, without rounding by the scaling. A zero core does not
enter L, and its result is zero.

References: Das, "Natural GaLore", arXiv:2410.16029. Related: Gupta et al., "Shampoo",
arXiv:1802.09568; Gong et al., "Alice", arXiv:2502.07752.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..sharding.array_partitions import with_auto_axes
from ..tree.cores import core_arrays, replace_cores, require_cores, zeros_at_cores
from ..tree.state_roles import register_state
from ..util.control_flow import run_if_due, when
from ..util.linalg import POWERS, eye_like, inverse_root, power_of_two, product
from ..util.validation import Scalar, check_choice, check_decay, check_int, check_number


class CoreFisherState(NamedTuple):
    """State of :func:`scale_by_core_fisher`: trees with a Core at each projected leaf.

    Attributes:
      count: the number of updates so far, one int32.
      weight: w of (1), (*batch). Each matrix has its own, since zero cores do not enter L.
      scale: σ, the power of two with the trace of `fisher` in [1, 4), (*batch).
      fisher: L / σ², (*batch, r, r).
      root: (L̂ + λI)⁻ᵖ in units of `root_scale`⁻²ᵖ, (*batch, r, r).
      root_scale: σ when the root was computed, (*batch); zero forces a new root.
    """

    count: Int[Array, ""]
    weight: PyTree
    scale: PyTree
    fisher: PyTree
    root: PyTree
    root_scale: PyTree


register_state(
    CoreFisherState,
    weight="scalar",
    scale="scalar",
    fisher="fisher",
    root="root",
    root_scale="root",
)

LEAST_DAMPING = 1e-3
OUTGROWN = 16.0  # a larger ratio of L's scale to the root's, as after a spike, forces a new root


def scale_by_core_fisher(
    decay: Scalar = 0.98, damping: Scalar = 0.1, *, power: float = 0.5, root_every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each core by a power of the inverse r x r Fisher, equations (1) and (2).

    For use inside a subspace, in :func:`project`'s `inner` or in :func:`chain`; leaves that are not
    projected are unchanged. With `power` ½ the result is independent of the units of the gradient.

    Args:
      decay: β in [0, 1), of the mean of R Rᵀ over steps. 0.98 averages about fifty steps.
      damping: ρ, in units of the mean eigenvalue: λ = ρ tr(L̂)/r. At least 1e-3, below which the
        float32 root has fewer than three digits.
      power: p, one of 1 (the inverse), ½ (its square root, as in Shampoo) and ¼. Beside the
        residual ¼ ended 0.016 nats below ½ (one seed, `docs/convergence.md`).
      root_every: steps between roots of a matrix. A root is also recomputed after a refresh of the
        basis (unless `transport="keep"`), and once √tr(L) has grown 16-fold or more, in powers of
        two, since the last root.

    Returns:
      A transformation whose updates have the shapes of the cores.

    Raises:
      TypeError, ValueError: if an argument is out of range, or, at update, outside a subspace.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> tx = natgalore.chain(natgalore.project(rank=8), natgalore.scale_by_core_fisher())
      >>> grads = {"kernel": 3.0 * jnp.eye(8)}
      >>> updates, _ = tx.update(grads, tx.init(grads), grads)
      >>> round(float(updates["kernel"][0, 0]), 4)  # g / sqrt(g² + 0.1 g²)
      0.9535

    Reference: Das, arXiv:2410.16029, section 3.2. Differs from it: g is the r x n core rather than
    its vec, so F is r x r, and p = ½ by default.
    """
    decay = check_decay("decay", decay)
    damping = check_number("damping", damping, above=LEAST_DAMPING, inclusive=True)
    power = check_choice("power", power, POWERS)
    root_every = check_int("root_every", root_every, minimum=1)
    least_damping = LEAST_DAMPING if isinstance(damping, jax.core.Tracer) else float(damping)

    def init(params: PyTree) -> CoreFisherState:
        number = lambda: zeros_at_cores(params, lambda r, n: ())
        square = lambda: zeros_at_cores(params, lambda r, n: (r, r))
        return CoreFisherState(
            count=jnp.zeros([], jnp.int32),
            weight=number(),
            scale=number(),
            fisher=square(),
            root=square(),
            root_scale=number(),
        )

    def update(updates: PyTree, state: CoreFisherState, params: PyTree = None, **extra_args):
        del params, extra_args
        require_cores("scale_by_core_fisher", state.fisher)
        count = optax.safe_increment(state.count)
        Rs = core_arrays(updates)
        if not Rs:
            return updates, state._replace(count=count)
        in_turn = state.count % root_every == 0
        leaves = list(zip(Rs, *map(core_arrays, state[1:]), strict=True))
        results = with_auto_axes(step, leaves, leaves, in_turn, decay, damping)
        U, *fields = zip(*results, strict=True)
        trees = [replace_cores(tree, x) for tree, x in zip(state[1:], fields, strict=True)]
        return replace_cores(updates, U), CoreFisherState(count, *trees)

    def step(leaves, in_turn, decay, damping):
        """Equations (1) and (2): U and the new fields of the state, without `count`, per leaf."""
        new = [accumulate(*leaf, decay, in_turn) for leaf in leaves]

        renew = functools.partial(new_root, power, least_damping, damping)
        roots = run_if_due(
            [leaf.due.any() for leaf in new],
            [
                functools.partial(when, leaf.due.any(), functools.partial(renew, leaf))
                for leaf in new
            ],
            [tuple(leaf[-2:]) for leaf in leaves],
        )
        return [
            (precondition(power, x, *root), x.weight, x.scale, x.fisher, *root)
            for x, root in zip(new, roots, strict=True)
        ]

    return optax.GradientTransformationExtraArgs(init, update)


class Accumulated(NamedTuple):
    """One leaf after equation (1).

    Attributes:
      r: the core in units of `unit`, (*batch, r, n).
      unit: a power of two, (*batch).
      accepted: whether the core was not zero, (*batch).
      due: whether a new root is due, (*batch).
      weight, scale, fisher: see :class:`CoreFisherState`.
    """

    r: Float[Array, "*batch r n"]
    unit: Float[Array, "*batch"]
    accepted: Bool[Array, "*batch"]
    due: Bool[Array, "*batch"]
    weight: Float[Array, "*batch"]
    scale: Float[Array, "*batch"]
    fisher: Float[Array, "*batch r r"]


@jax.jit  # traced once for equal leaves
def accumulate(
    R: Float[Array, "*batch r n"],
    weight: Float[Array, "*batch"],
    scale: Float[Array, "*batch"],
    fisher: Float[Array, "*batch r r"],
    root: Float[Array, "*batch r r"],
    root_scale: Float[Array, "*batch"],
    decay: Scalar,
    in_turn: Bool[Array, ""],
) -> Accumulated:
    """Equation (1) for one leaf, with L and R Rᵀ in units of powers of two.

    Args:
      R: the core.
      weight, scale, fisher, root, root_scale: the old state.
      decay: β.
      in_turn: whether `root_every` makes all roots due.
    """
    del root
    trace = lambda x: jnp.trace(x, axis1=-2, axis2=-1)
    unit = power_of_two(jnp.abs(R).max(axis=(-2, -1)))
    r = R / per_matrix(unit)
    square = product(r, r.mT)  # semidefinite even if the product rounds r
    accepted = trace(square) > 0
    beta = jnp.asarray(decay, fisher.dtype)
    common = jnp.maximum(scale, unit)
    # Both ratios are powers of two of at most 1; where one underflows, its term is negligible.
    a, b = beta * jnp.square(scale / common), (1 - beta) * jnp.square(unit / common)
    growth = power_of_two(a * trace(fisher) + b * trace(square), root=True)
    a = jnp.where(accepted, a, 1.0) / jnp.where(accepted, growth * growth, 1.0)
    b = jnp.where(accepted, b, 0.0) / jnp.where(accepted, growth * growth, 1.0)
    scale = jnp.where(accepted, common * growth, scale)
    return Accumulated(
        r=r,
        unit=unit,
        accepted=accepted,
        due=accepted & (in_turn | (scale > OUTGROWN * root_scale)),
        weight=jnp.where(accepted, beta * weight + (1 - beta), weight),
        scale=scale,
        fisher=per_matrix(a) * fisher + per_matrix(b) * square,
    )


@functools.partial(jax.jit, static_argnames=("power", "least_damping"))
def new_root(
    power: float,
    least_damping: float,
    damping: Scalar,
    leaf: Accumulated,
    old: tuple[Float[Array, "*batch r r"], Float[Array, "*batch"]],
) -> tuple[Float[Array, "*batch r r"], Float[Array, "*batch"]]:
    """`root` and `root_scale` where the matrices of a leaf are due, else the old ones."""
    root = inverse_root(damped(leaf.fisher, leaf.weight, damping), power, least_damping)
    return jnp.where(per_matrix(leaf.due), root, old[0]), jnp.where(leaf.due, leaf.scale, old[1])


@functools.partial(jax.jit, static_argnames="power")
def precondition(
    power: float,
    leaf: Accumulated,
    root: Float[Array, "*batch r r"],
    root_scale: Float[Array, "*batch"],
) -> Float[Array, "*batch r n"]:
    """U of (2)."""
    factor = answer_scale(leaf.unit, leaf.accepted, root_scale, power)
    return product(root, leaf.r) * per_matrix(factor)


def answer_scale(
    unit: Float[Array, "*batch"],
    accepted: Bool[Array, "*batch"],
    root_scale: Float[Array, "*batch"],
    power: float,
) -> Float[Array, "*batch"]:
    """Factor that turns (scaled root) @ r into equation (2) without overflow."""
    root_unit = jnp.where(accepted, root_scale, 1.0)
    return jnp.where(accepted, unit / root_unit * root_unit ** (1 - 2 * power), 0.0)


def damped(
    fisher: Float[Array, "*batch r r"],
    weight: Float[Array, "*batch"],
    damping: Scalar,
) -> Float[Array, "*batch r r"]:
    """L̂ + λI of (1), or I before the first nonzero core."""
    r, dtype = fisher.shape[-1], fisher.dtype
    known = weight > 0
    L = fisher / jnp.where(known, weight, 1.0)[..., None, None]
    # A traced damping is not checked.
    damping = jnp.maximum(jnp.asarray(damping, dtype), LEAST_DAMPING)
    shift = damping * jnp.trace(L, axis1=-2, axis2=-1) / r
    return L + jnp.where(known, shift, 1.0)[..., None, None] * eye_like(L)


def per_matrix(x: Array) -> Array:
    """One number per matrix, with axes to broadcast over rows and columns."""
    return x[..., None, None]
