"""The natural gradient of a core, window form (paper, section 3.4).

Write the last s cores of one matrix, flattened, as the columns of H (r·n x s), g = H e the newest
(e the unit vector of its slot). The damped natural gradient, and its gentler powers p = ½ and ¼,
are

    u = (λ I + H Hᵀ)⁻ᵖ H e                                                                    (1)
      = H (λ I + K)⁻ᵖ e,    K = HᵀH                                                           (2)

(2), the push-through identity, needs an s x s solve. For p = 1 it equals the paper's Woodbury
formula, (g − H (λ I + K)⁻¹ Hᵀg) / λ, but without the subtraction, which cancels all digits in
float32 once |g|²/λ reaches 1e6. In the state H has shape (s, r, n), so that n keeps its sharding,
and each step replaces one row of K. Memory: s·r·n numbers per matrix.

Each core is stored in units of its own power of two, so that gradients of 1e-25 and 1e25 neither
vanish nor overflow, without rounding by the scaling. A zero core does not enter H, and its result
is zero.

Reference: Das, "Natural GaLore", arXiv:2410.16029.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..sharding.array_partitions import with_auto_axes
from ..tree.cores import core_arrays, replace_cores, require_cores, zeros_at_cores
from ..tree.state_roles import register_state
from ..util.linalg import POWERS, eye_like, power_of_two, rounded, symmetric_inverse_root
from ..util.validation import Scalar, check_choice, check_int, check_number


class FisherState(NamedTuple):
    """State of :func:`scale_by_fisher`: trees with a Core at each projected leaf.

    Attributes:
      count: the number of cores that entered H so far, (*batch), int32.
      window: H, the last s cores, each divided by its `scale`, (*batch, s, r, n). Empty slots are
        zero and add nothing to the Fisher, so a partly filled window needs no mask.
      gram: K of the window as stored, (*batch, s, s).
      scale: the power of two that is the unit of each slot, (*batch, s).
    """

    count: PyTree
    window: PyTree
    gram: PyTree
    scale: PyTree


register_state(FisherState, count="scalar", window="window", gram="gram", scale="scalar")


def scale_by_fisher(
    window: int = 20,
    damping: Scalar = 1e-3,
    *,
    relative: bool = False,
    power: float = 1.0,
    window_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each core by the inverse Fisher of the last `window` cores, as in the paper.

    For use inside a subspace, in :func:`project`'s `inner` or in :func:`chain`; leaves that are not
    projected are unchanged. At s = 20 the state is larger than AdamW's: 2.6 times at Llama-1b
    sizes, rank 512. :func:`scale_by_core_fisher` stores 2 r² numbers per matrix.

    Args:
      window: s, the number of stored cores; 20 in the paper's code.
      damping: λ > 0, in units of a squared gradient norm; 1e-3 in the paper's code. At least
        4 eps |H|² is used, the limit of a float32 solve.
      relative: whether λ is `damping` times the mean |H_i|² of the stored cores. With `power` ½ the
        result is then independent of the units of the gradient.
      power: p of (2), one of 1 (the inverse, as in the paper), ½ and ¼. Powers below 1 need one
        eigendecomposition of K per matrix and step.
      window_dtype: the dtype of the stored cores, by default the cores' own. bfloat16 halves the
        state; the result is then exact for the rounded cores, the newest included.

    Returns:
      A transformation whose updates have the shapes of the cores.

    Raises:
      TypeError, ValueError: if an argument is out of range, or, at update, outside a subspace.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> tx = natgalore.chain(natgalore.project(rank=8), natgalore.scale_by_fisher(damping=1.0))
      >>> grads = {"kernel": jnp.zeros((8, 8)).at[0, 0].set(3.0)}
      >>> updates, _ = tx.update(grads, tx.init(grads), grads)
      >>> round(float(updates["kernel"][0, 0]), 4)  # g / (λ + |g|²)
      0.3

    Reference: Das, arXiv:2410.16029, section 3.4, equations for the Woodbury form. Relative damping
    and powers below 1 are not in the paper.
    """
    window = check_int("window", window, minimum=1)
    damping = check_number("damping", damping, above=0.0)
    check_choice("relative", relative, (True, False))
    power = check_choice("power", power, POWERS)
    if window_dtype is not None and not jnp.issubdtype(window_dtype, jnp.floating):
        raise ValueError(f"`window_dtype` must be a floating dtype or None, got {window_dtype!r}.")

    def init(params: PyTree) -> FisherState:
        return FisherState(
            count=zeros_at_cores(params, lambda r, n: (), jnp.int32),
            window=zeros_at_cores(params, lambda r, n: (window, r, n), window_dtype),
            gram=zeros_at_cores(params, lambda r, n: (window, window)),
            scale=zeros_at_cores(params, lambda r, n: (window,)),
        )

    def update(updates: PyTree, state: FisherState, params: PyTree = None, **extra_args):
        del params, extra_args
        require_cores("scale_by_fisher", state.window)
        Rs = core_arrays(updates)
        if not Rs:
            return updates, state

        def answer(damping, R, *old):
            accepted = (R != 0).any(axis=(-2, -1))
            new = remember(R, accepted, *old)
            u = natural_gradient(*new, damping, relative, power)
            return jnp.where(accepted[..., None, None], u, 0.0), *new

        arguments = list(zip(Rs, *map(core_arrays, state), strict=True))
        results = [with_auto_axes(answer, leaf, damping, *leaf) for leaf in arguments]
        out, *fields = zip(*results, strict=True)
        trees = [replace_cores(tree, x) for tree, x in zip(state, fields, strict=True)]
        return replace_cores(updates, out), FisherState(*trees)

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
    """Stores the core R in the slot of the oldest and replaces that row of K.

    Returns the new `count`, `window`, `gram` and `scale`.
    """
    size = window.shape[-3]
    slot = count % size
    unit = power_of_two(jnp.abs(R).max(axis=(-2, -1)))
    newest = rounded(R / unit[..., None, None], window.dtype)
    # The Fisher is independent of the order of cores, so the ring buffer needs no roll. A zero core
    # is written too, but leaves the count unchanged, so that the next core overwrites its slot.
    replace = lambda H, h, i: lax.dynamic_update_index_in_dim(H, h, i, 0)
    for _ in range(R.ndim - 2):
        replace = jax.vmap(replace)
    window = replace(window, newest, slot)
    row = inner_products(
        "...srn,...rn->...sr", window.astype(gram.dtype), newest.astype(gram.dtype)
    )
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
    relative: bool = False,
    power: float = 1.0,
) -> Float[Array, "*batch r n"]:
    """Equation (2) for the newest core.

    With H = H̃ D τ, D the scales divided by their largest τ, entries of s x s matrices are at most
    r·n:
    u = τ^(1-2p) H̃ D (λ/τ² I + D K̃ D)⁻ᵖ e.
    """
    size, dtype = window.shape[-3], gram.dtype
    damping = jnp.asarray(damping, dtype)
    floor = jnp.finfo(dtype).tiny if relative else jnp.sqrt(damping)
    largest = jnp.maximum(scale.max(axis=-1), floor)
    D = scale / largest[..., None]
    K = D[..., :, None] * gram * D[..., None, :]
    energy = jnp.trace(K, axis1=-2, axis2=-1)
    filled = jnp.clip(count, 1, size).astype(dtype)
    if relative:
        damping *= jnp.where(energy > 0, energy, 1.0) / filled
    else:
        damping = damping / largest / largest
    damping = jnp.maximum(damping, 4 * jnp.finfo(dtype).eps * energy)
    newest = one_hot((count - 1) % size, size).astype(dtype)
    damped = K + damping[..., None, None] * eye_like(K)
    if power == 1.0:
        factor = jsp.linalg.cho_factor(damped)
        weights = jsp.linalg.cho_solve(factor, newest[..., None])[..., 0]
    else:
        root = symmetric_inverse_root(damped, power, damping)
        weights = jnp.einsum("...st,...t->...s", root, newest, precision=lax.Precision.HIGHEST)
    # If rounding makes K indefinite despite the damping, its columns are nearly parallel, and for
    # parallel columns (λ + HHᵀ)⁻ᵖ g is g / (λ + tr K)ᵖ.
    solved = jnp.isfinite(weights).all(axis=-1, keepdims=True)
    parallel = newest / ((damping + energy) ** power)[..., None]
    weights = jnp.where(solved, weights, parallel) * D
    H = window.astype(dtype)
    u = jnp.einsum("...s,...srn->...rn", weights, H, precision=lax.Precision.HIGHEST)
    return u * (largest ** (1 - 2 * power))[..., None, None]


def gram(window: Float[Array, "*batch s r n"]) -> Float[Array, "*batch s s"]:
    """The Gram matrix K of the cores in a window."""
    return inner_products("...srn,...trn->...str", window, window)


def inner_products(spec: str, a: Array, b: Array) -> Array:
    """Inner products, summed over n, then over r: one sum loses two more digits at 64 x 4096."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST).sum(axis=-1)


def one_hot(i: Int[Array, "*batch"], size: int) -> Bool[Array, "*batch size"]:
    return jax.nn.one_hot(i, size, dtype=jnp.bool_)
