"""The natural gradient inside the subspace: two forms of the inverse empirical Fisher.

*Window form* (paper, section 3.4). Write the last s cores of one matrix, flattened, as the columns
of H (r·n x s), g = H e the newest. The damped natural gradient is

    u = (λ I + H Hᵀ)⁻¹ H e                                                                    (1)
      = H (λ I + K)⁻¹ e,    K = HᵀH                                                           (2)

(2), the push-through identity, asks for an s x s solve. It equals the paper's Woodbury formula,
(g − H (λ I + K)⁻¹ Hᵀg) / λ, but subtracts nothing: in float32 the formula as printed has no digit
left once |g|²/λ reaches 1e6. In the state H stays (s, r, n), so that n keeps its sharding, and of K
one row is replaced a step. Costs s·r·n numbers a matrix.

*Core form* (paper, section 3.2, with g the r x n core and F = E[g gᵀ]). Keep the decayed mean

    L ← β L + (1 − β) R Rᵀ,    L̂ = L / w,  w the same mean of ones,    λ = ρ tr(L̂) / r          (3)
    U = (L̂ + λ I)⁻ᵖ R                                                                         (4)

Costs 2 r² numbers a matrix. Both remember cores in units of a power of two of their own, so that
gradients of 1e-25 and 1e25 neither vanish nor overflow, and no digit is lost to the scaling.

A core that is zero says nothing: it enters neither H nor L, and its answer is zero.

References: Das, "Natural GaLore", arXiv:2410.16029. Kin of the core form: Gupta et al.,
"Shampoo", arXiv:1802.09568; Gong et al., "Alice", arXiv:2502.07752.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .checks import Scalar, check_choice, check_int, check_number
from .control import when
from .linalg import eye_like, inverse_root, matmul, power_of_two
from .spec import cores, is_core, register_state, replace_cores, subspace_only


class FisherState(NamedTuple):
    """What :func:`scale_by_fisher` remembers: trees with a Core at each projected leaf.

    Attributes:
      count: cores taken in so far, (*batch), int32.
      window: H, the last s cores each divided by its `scale`, (*batch, s, r, n). Slots still empty
        are zero: they add nothing to the Fisher, so a half-filled window needs no mask.
      gram: K of the window as stored, (*batch, s, s).
      scale: the power of two that each slot is a multiple of, (*batch, s).
    """

    count: PyTree
    window: PyTree
    gram: PyTree
    scale: PyTree


class CoreFisherState(NamedTuple):
    """What :func:`scale_by_core_fisher` remembers: trees with a Core at each projected leaf.

    Attributes:
      count: updates so far, one int32.
      weight: w of (3), (*batch). Each matrix counts for itself, since a skipped one takes no part.
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


register_state(FisherState, count="scalar", window="window", gram="gram", scale="scalar")
register_state(
    CoreFisherState,
    weight="scalar",
    scale="scalar",
    fisher="fisher",
    root="root",
    root_scale="root",
)

OUTGROWN = 16.0  # a root serves until L's scale exceeds its own by this: no spike passes it


def scale_by_fisher(
    window: int = 20, damping: Scalar = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each core by the inverse Fisher of the last `window` cores: the paper's form.

    Stands inside a subspace (:func:`project`'s inner, or :func:`chain`); leaves that are not
    projected pass. At s = 20 its state is larger than all of AdamW's: at Llama-1b sizes, rank 512,
    2.6 times. :func:`scale_by_core_fisher` costs 2 r² numbers a matrix.

    Args:
      window: s, cores remembered; the paper's code has 20.
      damping: λ > 0, in units of a squared gradient norm; the paper's code has 1e-3. Below
        4 eps |H|² float32 could not solve for it, and that is used instead.

    Returns:
      A transformation whose updates have the shapes of the cores.

    Raises:
      TypeError, ValueError: if an argument is out of range, or, at init, outside a subspace.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> tx = natgalore.chain(natgalore.project(rank=8), natgalore.scale_by_fisher(damping=1.0))
      >>> grads = {"kernel": jnp.zeros((8, 8)).at[0, 0].set(3.0)}
      >>> updates, _ = tx.update(grads, tx.init(grads), grads)
      >>> round(float(updates["kernel"][0, 0]), 4)  # g / (λ + |g|²)
      0.3

    Reference: Das, arXiv:2410.16029, section 3.4, equations for the Woodbury form.
    """
    check_int("window", window, minimum=1)
    check_number("damping", damping, above=0.0)

    def init(params: PyTree) -> FisherState:
        subspace_only("scale_by_fisher", params)
        zeros = lambda shape: _zeros(params, shape)
        return FisherState(
            count=_zeros(params, lambda r, n: (), jnp.int32),
            window=zeros(lambda r, n: (window, r, n)),
            gram=zeros(lambda r, n: (window, window)),
            scale=zeros(lambda r, n: (window,)),
        )

    def update(updates: PyTree, state: FisherState, params: PyTree = None, **extra_args):
        del params, extra_args
        Rs = _arrays(updates)
        if not Rs:
            return updates, state
        accepted = [(R != 0).any(axis=(-2, -1)) for R in Rs]
        old = zip(*map(_arrays, state), strict=True)
        new = [remember(R, a, *x) for R, a, x in zip(Rs, accepted, old, strict=True)]
        out = [
            jnp.where(a[..., None, None], natural_gradient(*x, damping), 0.0)
            for a, x in zip(accepted, new, strict=True)
        ]
        fields = zip(state, zip(*new, strict=True), strict=True)
        state = FisherState(*[replace_cores(tree, x) for tree, x in fields])
        return replace_cores(updates, out), state

    return optax.GradientTransformationExtraArgs(init, update)


def remember(
    R: Float[Array, "*batch r n"],
    accepted: Bool[Array, "*batch"],
    count: Int[Array, "*batch"],
    window: Float[Array, "*batch s r n"],
    gram: Float[Array, "*batch s s"],
    scale: Float[Array, "*batch s"],
) -> tuple[
    Int[Array, "*batch"],
    Float[Array, "*batch s r n"],
    Float[Array, "*batch s s"],
    Float[Array, "*batch s"],
]:
    """The window after the core R, which takes the slot of the oldest; one row of K with it.

    Returns what it was given of the state, renewed.
    """
    size = window.shape[-3]
    slot = count % size
    unit = power_of_two(jnp.abs(R).max(axis=(-2, -1)))
    newest = (R / unit[..., None, None]).astype(window.dtype)
    # F forgets the order of its terms, so a ring buffer needs no roll. A zero core may take the
    # slot too: its answer is zero, and it leaves the count, hence the slot to the next core.
    replace = lambda H, h, i: lax.dynamic_update_index_in_dim(H, h, i, 0)
    for _ in range(R.ndim - 2):
        replace = jax.vmap(replace)
    window = replace(window, newest, slot)
    row = inner_products("...srn,...rn->...sr", window, newest)
    here = one_hot(slot, size)
    gram = jnp.where(here[..., None, :], row[..., :, None], gram)
    gram = jnp.where(here[..., :, None], row[..., None, :], gram)
    scale = jnp.where(here, unit[..., None], scale)
    return count + accepted.astype(count.dtype), window, gram, scale


def natural_gradient(
    count: Int[Array, "*batch"],
    window: Float[Array, "*batch s r n"],
    gram: Float[Array, "*batch s s"],
    scale: Float[Array, "*batch s"],
    damping: Scalar,
) -> Float[Array, "*batch r n"]:
    """Equation (2) for the core that was remembered last.

    With slots H = H̃ D, D the scales over their largest τ, everything s x s is at most one:
    u = H̃ D (λ/τ² I + D K̃ D)⁻¹ e / τ.
    """
    size, dtype = window.shape[-3], window.dtype
    damping = jnp.asarray(damping, dtype)
    largest = jnp.maximum(scale.max(axis=-1), jnp.sqrt(damping))
    D = scale / largest[..., None]
    K = D[..., :, None] * gram * D[..., None, :]
    energy = jnp.trace(K, axis1=-2, axis2=-1)
    relative = jnp.maximum(damping / largest / largest, 4 * jnp.finfo(dtype).eps * energy)
    newest = one_hot((count - 1) % size, size)
    factor = jsp.linalg.cho_factor(K + relative[..., None, None] * eye_like(K))
    weights = jsp.linalg.cho_solve(factor, newest[..., None].astype(dtype))[..., 0]
    # Where rounding has made K indefinite all the same its columns are parallel, and for equal
    # columns (λ + HHᵀ)⁻¹ g is g / (λ + tr K).
    solved = jnp.isfinite(weights).all(axis=-1, keepdims=True)
    parallel = newest.astype(dtype) / (relative + energy)[..., None]
    weights = jnp.where(solved, weights, parallel) * D
    u = jnp.einsum("...s,...srn->...rn", weights, window, precision=lax.Precision.HIGHEST)
    return u / largest[..., None, None]


def gram(window: Float[Array, "*batch s r n"]) -> Float[Array, "*batch s s"]:
    """All inner products of the cores in a window."""
    return inner_products("...srn,...trn->...str", window, window)


def inner_products(spec: str, a: Array, b: Array) -> Array:
    """Sums over n, then over r: one sum over both loses two more digits at 64 x 4096."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST).sum(axis=-1)


def scale_by_core_fisher(
    decay: Scalar = 0.98, damping: Scalar = 0.1, *, power: float = 0.5, root_every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each core by a power of the inverse r x r Fisher, equations (3) and (4).

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
    check_number("decay", decay, above=0.0, below=1.0, inclusive=True)
    check_number("damping", damping, above=1e-3, inclusive=True)
    check_choice("power", power, (1.0, 0.5, 0.25))
    check_int("root_every", root_every, minimum=1)
    least_damping = 1e-3 if isinstance(damping, jax.core.Tracer) else float(damping)

    def init(params: PyTree) -> CoreFisherState:
        subspace_only("scale_by_core_fisher", params)
        per_matrix = lambda: _zeros(params, lambda r, n: ())
        square = lambda: _zeros(params, lambda r, n: (r, r))
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
        Rs = _arrays(updates)
        if not Rs:
            return updates, state._replace(count=count)
        accepted = [(R != 0).any(axis=(-2, -1)) for R in Rs]
        means = zip(*map(_arrays, (state.weight, state.scale, state.fisher)), strict=True)
        tracked = [track(R, a, *x, decay) for R, a, x in zip(Rs, accepted, means, strict=True)]
        weight, scale, fisher = zip(*tracked, strict=True)
        old = list(zip(_arrays(state.root), _arrays(state.root_scale), strict=True))
        in_turn = state.count % root_every == 0
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
            precondition(R, a, *x, power)
            for R, a, *x in zip(Rs, accepted, root, root_scale, strict=True)
        ]
        fields = (weight, scale, fisher, root, root_scale)
        trees = [replace_cores(tree, x) for tree, x in zip(state[1:], fields, strict=True)]
        return replace_cores(updates, out), CoreFisherState(count, *trees)

    return optax.GradientTransformationExtraArgs(init, update)


def track(
    R: Float[Array, "*batch r n"],
    accepted: Bool[Array, "*batch"],
    weight: Float[Array, "*batch"],
    scale: Float[Array, "*batch"],
    fisher: Float[Array, "*batch r r"],
    decay: Scalar,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch r r"]]:
    """Equation (3) for L in units of σ²; returns the new weight, σ and L / σ²."""
    beta = jnp.asarray(decay, fisher.dtype)
    unit = power_of_two(jnp.abs(R).max(axis=(-2, -1)))
    common = jnp.maximum(scale, unit)
    r = R / unit[..., None, None]
    square = matmul(r, r.mT)
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
    """L̂ + λI of (3), or I where nothing has come in yet."""
    r, dtype = fisher.shape[-1], fisher.dtype
    known = weight > 0
    L = fisher / jnp.where(known, weight, 1.0)[..., None, None]
    shift = jnp.asarray(damping, dtype) * jnp.trace(L, axis1=-2, axis2=-1) / r
    return L + jnp.where(known, shift, 1.0)[..., None, None] * eye_like(L)


def precondition(
    R: Float[Array, "*batch r n"],
    accepted: Bool[Array, "*batch"],
    root: Float[Array, "*batch r r"],
    root_scale: Float[Array, "*batch"],
    power: float,
) -> Float[Array, "*batch r n"]:
    """Equation (4), with R brought to the root's units first: no product overflows on the way."""
    unit = jnp.where(accepted, root_scale, 1.0)
    U = matmul(root, R / unit[..., None, None])
    return jnp.where(accepted[..., None, None], U * (unit ** (1 - 2 * power))[..., None, None], 0.0)


def together(f: Callable[[Array], Array], matrices: list[Array]) -> list[Array]:
    """`f`, which maps stacks of matrices, on a list of matrices and stacks.

    Single matrices of one size go through it as one stack: one loop to compile and to launch where
    an unrolled model has hundreds of leaves. A stack stays its own, and where it is.
    """
    out = [f(A) if A.ndim > 2 else A for A in matrices]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, A in enumerate(matrices):
        if A.ndim == 2:
            groups.setdefault(A.shape, []).append(i)
    for places in groups.values():
        for i, B in zip(places, f(jnp.stack([matrices[i] for i in places])), strict=True):
            out[i] = B
    return out


def one_hot(i: Int[Array, "*batch"], size: int) -> Bool[Array, "*batch size"]:
    return jax.nn.one_hot(i, size, dtype=jnp.bool_)


def _arrays(tree: PyTree) -> list[Array]:
    return [core.value for core in cores(tree)]


def _zeros(params: PyTree, shape: Callable[[int, int], tuple[int, ...]], dtype=None) -> PyTree:
    """Zeros of (*batch, *shape(r, n)) at each Core of `params`, nothing elsewhere."""

    def at(x):
        if not is_core(x):
            return None
        *batch, r, n = x.value.shape
        return x.replace(jnp.zeros((*batch, *shape(r, n)), dtype or x.value.dtype))

    return jax.tree.map(at, params, is_leaf=is_core)
