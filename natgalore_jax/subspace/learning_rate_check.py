"""Whether the inner transformation contains a learning rate, which a residual does not allow.

A residual is added to inner's answer U before the learning rate: entries of both have size 1. An
inner that ends with −lr, as `optax.adamw` does, has the opposite sign and a much smaller size, and
the residual would dominate. So inner is run on a small random gradient g in place of each core, and
g is compared with the odd part of its answer,

    U = (inner(g) − inner(−g)) / 2,                                                            (1)

in which noise that inner adds cancels.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, use_abstract_mesh
from jaxtyping import PyTree

from ..tree.cores import Core, cores, is_core
from .weight_decay import Misread


STEPS = 5  # enough for a warmup from 0, and for gradients summed over up to 5 steps
LARGEST = (4, 8)  # sides of the small cores
# RMS of the largest answer to a gradient of RMS 1. Adam's is 1, a residual's 1, that of a Fisher
# window with power 1 on a 4 x 8 core 0.03 at its first step. Without a rate only Adadelta's is
# smaller, 0.003.
SMALLEST_RMS = 0.02


class RateFree(optax.GradientTransformationExtraArgs):
    """An inner transformation that is known to contain no learning rate, and is not checked."""


def check_learning_rate(
    inner: optax.GradientTransformationExtraArgs, params: PyTree, sized: bool
) -> None:
    """Raises if inner's answer has the opposite sign of its gradient, or is small.

    An inner that does not run on small cores, or answers zero in STEPS steps, passes.

    Args:
      inner: the transformation.
      params: what it was initialised with: Cores and other leaves; shapes suffice.
      sized: whether the residual has entries of size 1, so that the size of the answer counts.

    Raises:
      ValueError: the message names a leaf.
    """
    with jax.ensure_compile_time_eval(), use_abstract_mesh(AbstractMesh((), ())):
        try:
            gradient, steps = _probe(inner, params)
        except (TypeError, ValueError):
            return
    for R, *answers in zip(gradient, *steps, strict=True):
        answers = [U for U in answers if U.any()] or answers
        rms = max(math.sqrt(np.mean(np.square(U))) for U in answers)
        # At the last step: a transformation that starts later returns gradients before.
        negative = np.vdot(R.value, answers[-1]) < 0
        if math.isfinite(rms) and (negative or (sized and 0 < rms < SMALLEST_RMS)):
            how = "with the opposite sign" if negative else f"with one of RMS {rms:.1g}"
            raise Misread(
                f"`residual` is added before the learning rate, but at `{R.spec.name}` the inner "
                f"transformation answers a gradient of RMS 1 {how}: a learning rate is in it. Use "
                "a `scale_by_...` transformation as `inner`, and put the rate after "
                "`natgalore.project_back()`."
            )


def _probe(
    inner: optax.GradientTransformationExtraArgs, params: PyTree
) -> tuple[list[Core], list[list[np.ndarray]]]:
    """A small random gradient in place of each Core, and U of (1) for each step and Core."""
    rng = np.random.default_rng(0)
    normal = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape), dtype)

    def small(x):
        if not is_core(x):
            return normal([min(size, 2) for size in x.shape], x.dtype)
        *batch, r, n = x.value.shape
        shape = (*[1] * len(batch), min(r, LARGEST[0]), min(n, LARGEST[1]))
        return x.replace(normal(shape, x.value.dtype))

    def answers(gradient):
        state = inner.init(weights)
        for _ in range(STEPS):
            answer, state = inner.update(gradient, state, weights, value=jnp.ones([]))
            yield [np.asarray(U.value, np.float32) for U in cores(answer)]

    gradient = jax.tree.map(small, params, is_leaf=is_core)
    weights = jax.tree.map(jnp.zeros_like, gradient)
    both = zip(answers(gradient), answers(jax.tree.map(jnp.negative, gradient)), strict=True)
    odd = [[(U - V) / 2 for U, V in zip(*signs, strict=True)] for signs in both]
    return cores(gradient), odd
