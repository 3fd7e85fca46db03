"""The natural gradient of a core, window form (paper, section 3.4).

Write the last s cores of one matrix, flattened, as the columns of H (r·n x s), g = H e the newest.
The damped natural gradient, and its gentler powers p = ½ and ¼, are

    u = (λ I + H Hᵀ)⁻ᵖ H e                                                                    (1)
      = H (λ I + K)⁻ᵖ e,    K = HᵀH                                                           (2)

(2), the push-through identity, asks for an s x s solve. For p = 1 it equals the paper's Woodbury
formula, (g − H (λ I + K)⁻¹ Hᵀg) / λ, but subtracts nothing: in float32 the formula as printed has
no digit left once |g|²/λ reaches 1e6. In the state H stays (s, r, n), so that n keeps its sharding,
and of K one row is replaced a step. Costs s·r·n numbers a matrix.

Cores are remembered in units of a power of two of their own, so that gradients of 1e-25 and 1e25
neither vanish nor overflow, and no digit is lost to the scaling. A core that is zero says nothing:
it does not enter H, and its answer is zero.

Reference: Das, "Natural GaLore", arXiv:2410.16029.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..sharding.partitioning import with_auto_axes
from ..tree.leaf_spec import core_arrays, replace_cores, require_cores, zeros_at_cores
from ..tree.state_roles import register_state
from ..util.linalg import POWERS, eye_like, power_of_two, rounded, symmetric_inverse_root
from ..util.validation import Scalar, check_choice, check_int, check_number


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


register_state(FisherState, count="scalar", window="window", gram="gram", scale="scalar")


def scale_by_fisher(
    window: int = 20,
    damping: Scalar = 1e-3,
    *,
    relative: bool = False,
    power: float = 1.0,
    window_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each core by the inverse Fisher of the last `window` cores: the paper's form.

    Stands inside a subspace (:func:`project`'s inner, or :func:`chain`); leaves that are not
    projected pass. At s = 20 its state is larger than all of AdamW's: at Llama-1b sizes, rank 512,
    2.6 times. :func:`scale_by_core_fisher` costs 2 r² numbers a matrix.

    Args:
      window: s, cores remembered; the paper's code has 20.
      damping: λ > 0, in units of a squared gradient norm; the paper's code has 1e-3. Below
        4 eps |H|² float32 could not solve for it, and that is used instead.
      relative: whether λ is `damping` times the mean |H_i|² of the cores remembered, so that with
        `power` ½ the answer does not depend on the units of the gradient.
      power: p of (2), one of 1 (the inverse, as in the paper), ½ and ¼. Below 1 it takes an
        eigendecomposition of K a matrix and step.
      window_dtype: of the remembered cores, by default that of the cores. bfloat16 halves the
        state; the answer is then exact for the rounded cores, the newest included.

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
    and powers below 1 are ours.
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

        def answer(R, *old):
            accepted = (R != 0).any(axis=(-2, -1))
            new = remember(R, accepted, *old)
            u = natural_gradient(*new, damping, relative, power)
            return jnp.where(accepted[..., None, None], u, 0.0), *new

        arguments = list(zip(Rs, *map(core_arrays, state), strict=True))
        results = [with_auto_axes(answer, like, *like) for like in arguments]
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
    """The window after the core R, which takes the slot of the oldest; one row of K with it.

    Returns what it was given of the state, renewed.
    """
    size = window.shape[-3]
    slot = count % size
    unit = power_of_two(jnp.abs(R).max(axis=(-2, -1)))
    newest = rounded(R / unit[..., None, None], window.dtype)
    # F forgets the order of its terms, so a ring buffer needs no roll. A zero core may take the
    # slot too: its answer is zero, and it leaves the count, hence the slot to the next core.
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
    """Equation (2) for the core that was remembered last.

    With slots H = H̃ D τ, D the scales over their largest τ, everything s x s is at most r·n:
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
    # Where rounding has made K indefinite all the same its columns are parallel, and for equal
    # columns (λ + HHᵀ)⁻ᵖ g is g / (λ + tr K)ᵖ.
    solved = jnp.isfinite(weights).all(axis=-1, keepdims=True)
    parallel = newest / ((damping + energy) ** power)[..., None]
    weights = jnp.where(solved, weights, parallel) * D
    H = window.astype(dtype)
    u = jnp.einsum("...s,...srn->...rn", weights, H, precision=lax.Precision.HIGHEST)
    return u * (largest ** (1 - 2 * power))[..., None, None]


def gram(window: Float[Array, "*batch s r n"]) -> Float[Array, "*batch s s"]:
    """All inner products of the cores in a window."""
    return inner_products("...srn,...trn->...str", window, window)


def inner_products(spec: str, a: Array, b: Array) -> Array:
    """Sums over n, then over r: one sum over both loses two more digits at 64 x 4096."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST).sum(axis=-1)


def one_hot(i: Int[Array, "*batch"], size: int) -> Bool[Array, "*batch size"]:
    return jax.nn.one_hot(i, size, dtype=jnp.bool_)
