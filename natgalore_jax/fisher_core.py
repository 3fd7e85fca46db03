"""The natural gradient of a core, core form (paper, section 3.2, g the r x n core, F = E[g gᵀ]).

Keep the decayed mean

    L ← β L + (1 − β) R Rᵀ,    L̂ = L / w,  w the same mean of ones,    λ = ρ tr(L̂) / r          (1)
    U = (L̂ + λ I)⁻ᵖ R                                                                         (2)

Costs 2 r² numbers a matrix. L is remembered in units of a power of two of its own, so that
gradients of 1e-25 and 1e25 neither vanish nor overflow, and no digit is lost to the scaling. A core
that is zero says nothing: it does not enter L, and its answer is zero.

References: Das, "Natural GaLore", arXiv:2410.16029. Kin: Gupta et al., "Shampoo",
arXiv:1802.09568; Gong et al., "Alice", arXiv:2502.07752.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .checks import Scalar, check_choice, check_decay, check_int, check_number
from .control import when
from .linalg import POWERS, eye_like, inverse_root, power_of_two, product
from .placement import local
from .roles import register_state
from .spec import at_cores, core_arrays, replace_cores, subspace_only


class CoreFisherState(NamedTuple):
    """What :func:`scale_by_core_fisher` remembers: trees with a Core at each projected leaf.

    Attributes:
      count: updates so far, one int32.
      weight: w of (1), (*batch). Each matrix counts for itself, since a skipped one takes no part.
      scale: σ, the power of two with the trace of `fisher` in [1, 4), (*batch).
      fisher: L / σ², (*batch, r, r).
      root: (L̂ + λI)⁻ᵖ in units of `root_scale`⁻²ᵖ, (*batch, r, r).
      root_scale: σ when the root was computed, (*batch); zero asks for a new root.
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
OUTGROWN = 16.0  # a root serves until L's scale exceeds its own by this: no spike passes it


def scale_by_core_fisher(
    decay: Scalar = 0.98, damping: Scalar = 0.1, *, power: float = 0.5, root_every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each core by a power of the inverse r x r Fisher, equations (1) and (2).

    Stands inside a subspace (:func:`project`'s inner, or :func:`chain`); leaves that are not
    projected pass. With `power` ½ the answer does not depend on the units of the gradient.

    Args:
      decay: β in [0, 1), of the mean of R Rᵀ over steps. 0.98 averages about fifty steps.
      damping: ρ, in units of the mean eigenvalue: λ = ρ tr(L̂)/r. At least 1e-3: below it the
        float32 root has fewer than three digits.
      power: p, one of 1 (the inverse), ½ (its square root, as in Shampoo) and ¼. ½ did best in
        the first measurements.
      root_every: steps between roots of a matrix. A root is also computed when the basis turned
        and when the Fisher outgrew it.

    Returns:
      A transformation whose updates have the shapes of the cores.

    Raises:
      TypeError, ValueError: if an argument is out of range, or, at init, outside a subspace.

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
    check_decay("decay", decay)
    check_number("damping", damping, above=LEAST_DAMPING, inclusive=True)
    check_choice("power", power, POWERS)
    check_int("root_every", root_every, minimum=1)
    least_damping = LEAST_DAMPING if isinstance(damping, jax.core.Tracer) else float(damping)

    def init(params: PyTree) -> CoreFisherState:
        subspace_only("scale_by_core_fisher", params)
        per_matrix = lambda: at_cores(params, lambda r, n: ())
        square = lambda: at_cores(params, lambda r, n: (r, r))
        return CoreFisherState(
            count=jnp.zeros([], jnp.int32),
            weight=per_matrix(),
            scale=per_matrix(),
            fisher=square(),
            root=square(),
            root_scale=per_matrix(),
        )

    def update(updates: PyTree, state: CoreFisherState, params: PyTree = None, **extra_args):
        del params, extra_args
        count = optax.safe_increment(state.count)
        Rs = core_arrays(updates)
        if not Rs:
            return updates, state._replace(count=count)
        in_turn = state.count % root_every == 0
        arguments = (Rs, *map(core_arrays, state[1:]))
        out, *fields = local(step, arguments, *arguments, in_turn)
        trees = [replace_cores(tree, x) for tree, x in zip(state[1:], fields, strict=True)]
        return replace_cores(updates, out), CoreFisherState(count, *trees)

    def step(Rs, weight, scale, fisher, root, root_scale, in_turn):
        """All of it on lists of arrays: the answers, and the fields of the state but its count."""
        largest = [jnp.abs(R).max(axis=(-2, -1)) for R in Rs]
        accepted = [x > 0 for x in largest]
        units = [power_of_two(x) for x in largest]
        rs = [R / unit[..., None, None] for R, unit in zip(Rs, units, strict=True)]
        means = zip(weight, scale, fisher, strict=True)
        tracked = [
            track(*x, *mean, decay) for *x, mean in zip(rs, units, accepted, means, strict=True)
        ]
        weight, scale, fisher = zip(*tracked, strict=True)
        old = list(zip(root, root_scale, strict=True))
        due = [
            a & (in_turn | (s > OUTGROWN * root_scale))
            for a, s, (_, root_scale) in zip(accepted, scale, old, strict=True)
        ]

        def compute(old):
            A = [damped(L, w, damping) for L, w in zip(fisher, weight, strict=True)]
            Zs = together(lambda A: inverse_root(A, power, least_damping), A)
            return [
                (jnp.where(d[..., None, None], Z, Z_old), jnp.where(d, s, s_old))
                for (Z_old, s_old), Z, s, d in zip(old, Zs, scale, due, strict=True)
            ]

        any_due = functools.reduce(operator.or_, [d.any() for d in due])
        root, root_scale = zip(*when(any_due, compute, old), strict=True)
        out = [
            precondition(*x, power) for x in zip(rs, units, accepted, root, root_scale, strict=True)
        ]
        return out, *map(list, (weight, scale, fisher, root, root_scale))

    return optax.GradientTransformationExtraArgs(init, update)


def track(
    r: Float[Array, "*batch r n"],
    unit: Float[Array, "*batch"],
    accepted: Bool[Array, "*batch"],
    weight: Float[Array, "*batch"],
    scale: Float[Array, "*batch"],
    fisher: Float[Array, "*batch r r"],
    decay: Scalar,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch r r"]]:
    """Equation (1) for R = `unit` r and L in units of σ²; returns the new weight, σ and L / σ²."""
    beta = jnp.asarray(decay, fisher.dtype)
    common = jnp.maximum(scale, unit)
    # However r is rounded in a product with itself, it is semidefinite.
    square = product(r, r.mT)
    # Both ratios are powers of two of at most 1; where one underflows, its term is beyond rounding.
    L = (beta * jnp.square(scale / common))[..., None, None] * fisher
    L += ((1 - beta) * jnp.square(unit / common))[..., None, None] * square
    _, exponent = jnp.frexp(jnp.trace(L, axis1=-2, axis2=-1))
    half = (exponent - 1) >> 1
    L = jnp.ldexp(L, -2 * half[..., None, None])
    common = jnp.ldexp(common, half)
    return (
        jnp.where(accepted, beta * weight + (1 - beta), weight),
        jnp.where(accepted, common, scale),
        jnp.where(accepted[..., None, None], L, fisher),
    )


def damped(
    fisher: Float[Array, "*batch r r"],
    weight: Float[Array, "*batch"],
    damping: Scalar,
) -> Float[Array, "*batch r r"]:
    """L̂ + λI of (1), or I where nothing has come in yet."""
    r, dtype = fisher.shape[-1], fisher.dtype
    known = weight > 0
    L = fisher / jnp.where(known, weight, 1.0)[..., None, None]
    damping = jnp.maximum(jnp.asarray(damping, dtype), LEAST_DAMPING)  # a traced one is unchecked
    shift = damping * jnp.trace(L, axis1=-2, axis2=-1) / r
    return L + jnp.where(known, shift, 1.0)[..., None, None] * eye_like(L)


def precondition(
    r: Float[Array, "*batch r n"],
    unit: Float[Array, "*batch"],
    accepted: Bool[Array, "*batch"],
    root: Float[Array, "*batch r r"],
    root_scale: Float[Array, "*batch"],
    power: float,
) -> Float[Array, "*batch r n"]:
    """Equation (2) for R = `unit` r, in the root's units: no product overflows on the way."""
    root_unit = jnp.where(accepted, root_scale, 1.0)
    factor = (unit / root_unit) * root_unit ** (1 - 2 * power)
    U = product(root, r) * factor[..., None, None]
    return jnp.where(accepted[..., None, None], U, 0.0)


def together(f: Callable[[Array], Array], matrices: list[Array]) -> list[Array]:
    """`f`, which maps stacks of matrices, on a list of matrices and stacks.

    Single matrices of one type go through it as one stack: one loop to compile and to launch where
    an unrolled model has hundreds of leaves. A stack stays its own, and where it is.
    """
    out = [f(A) if A.ndim > 2 else A for A in matrices]
    groups: dict[Any, list[int]] = {}
    for i, A in enumerate(matrices):
        if A.ndim == 2:
            groups.setdefault(jax.typeof(A), []).append(i)
    for places in groups.values():
        for i, B in zip(places, f(jnp.stack([matrices[i] for i in places])), strict=True):
            out[i] = B
    return out
