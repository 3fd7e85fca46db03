"""natural_galore() and galore(): the algorithm, in one call, in place of `optax.adamw`."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from .fisher.core import scale_by_core_fisher
from .fisher.window import scale_by_fisher
from .selection.select import Rank, Select
from .subspace.basis import BasisUpdate
from .subspace.project import project
from .subspace.residual import Residual
from .util.validation import Scalar, check_choice, check_decay


FISHERS = {"core": scale_by_core_fisher, "window": scale_by_fisher, None: optax.identity}


def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    *,
    fisher: str | optax.GradientTransformation | None = None,
    refresh_every: int = 50,
    scale: Scalar = 1.0,
    basis: str | BasisUpdate = "power",
    side: str = "short",
    transport: str = "rotate",
    residual: str | Residual | None = "whitened",
    select: Select = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    stagger: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Natural GaLore: AdamW in a low-rank subspace of each gradient, natural gradients beyond it.

    Project, Adam, project back; what the projection left out is added as the inverse root of its
    own Fisher makes it; then decay and learning rate on whole weights. Embeddings, heads, norms and
    biases get plain AdamW. The defaults are what has learned best (`docs/convergence.md`); the
    paper's algorithm, which preconditions by the Fisher within the subspace and leaves out the
    rest, is `fisher="window", residual=None, b2=0.999, refresh_every=200`.

    Args:
      learning_rate: a number or a schedule. One rate serves all leaves; see the README for how to
        choose it coming from AdamW or GaLore.
      rank: r of the subspace, see :func:`project`.
      fisher: before Adam in the subspace, where singular vectors are axes and Adam's second moments
        are a Fisher already: nothing (None), `"core"` (:func:`scale_by_core_fisher`, r x r),
        `"window"` (:func:`scale_by_fisher`, the paper's form, more state than AdamW), or a
        transformation of your own on cores. Neither was better than None beside the whitened
        residual (three seeds each).
      residual: what becomes of the rest of a gradient. `"whitened"` costs products of m x m and
        m x n on every step, which a batch of many tokens hides; `"isotropic"` costs none; None,
        GaLore's, is what :func:`natgalore_jax.value_and_grad` needs. See :func:`project`.
      refresh_every: T, steps between new bases of a matrix. 50 ended 0.005 nats below GaLore's 200
        (each of three seeds), and 0.04 below in a run of 500 steps, for about 2 % of the time of
        Llama 350m's steps of 8,192 tokens. On every step is much worse.
      scale, basis, side, transport, select, stagger, seed: see :func:`project`.
      b1, b2, eps: Adam's, of all leaves. b2 is that of most language models: 0.999 was 0.010 nats
        worse (three seeds).
      weight_decay: decoupled, on the whole weight, as in `optax.adamw`.
      mask: a tree or callable as in `optax.add_decayed_weights`: which leaves decay.

    Returns:
      A transformation to use as `optax.adamw(learning_rate)` is. To change numbers while training
      build it with `optax.inject_hyperparams(natgalore.natural_galore,
      static_args=natgalore.STATIC_ARGS["natural_galore"])`; for bfloat16 params give that
      `hyperparam_dtype=jnp.float32` too, or b2 = 0.999 would be 1 (refused).

    Raises:
      TypeError, ValueError: if an argument is out of range; the message names it.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> params = {"up": {"kernel": jnp.ones((64, 256))}}
      >>> tx = natgalore.natural_galore(2.5e-3, rank=16)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)  # here the gradient is the weight
      >>> params = optax.apply_updates(params, updates)

    Reference: Das, "Natural GaLore", arXiv:2410.16029, algorithm 1.
    """
    check_decay("b1", b1)
    check_decay("b2", b2)
    if isinstance(fisher, optax.GradientTransformation):
        precondition = fisher
    else:
        check_choice("fisher", fisher, FISHERS, "a transformation")
        precondition = FISHERS[fisher]()
    return optax.chain(
        project(
            rank,
            optax.chain(precondition, optax.scale_by_adam(b1, b2, eps)),
            refresh_every=refresh_every,
            scale=scale,
            basis=basis,
            side=side,
            transport=transport,
            residual=residual,
            select=select,
            stagger=stagger,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 128,
    *,
    refresh_every: int = 200,
    scale: Scalar = 1.0,
    basis: str | BasisUpdate = "power",
    side: str = "short",
    transport: str = "rotate",
    residual: str | Residual | None = None,
    select: Select = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    stagger: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: :func:`natural_galore` without a residual; it takes the same arguments but `fisher`.

    New bases every 200 steps and b2 = 0.999 are as published. With the defaults the basis is
    tracked by power iteration and Adam's moments turn with it; the algorithm as published is
    `basis="svd", transport="keep", stagger=False`.

    Example:
      >>> import natgalore_jax as natgalore
      >>> tx = natgalore.galore(2.5e-3, rank=128, weight_decay=0.1)

    Reference: Zhao et al., "GaLore", arXiv:2403.03507.
    """
    return natural_galore(
        learning_rate,
        rank,
        fisher=None,
        refresh_every=refresh_every,
        scale=scale,
        basis=basis,
        side=side,
        transport=transport,
        residual=residual,
        select=select,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        stagger=stagger,
        seed=seed,
    )


# What cannot change while training, by function: the rest is annotated as a number.
#     optax.inject_hyperparams(natgalore.galore, static_args=natgalore.STATIC_ARGS["galore"])
STATIC_ARGS: dict[str, tuple[str, ...]] = {
    function.__name__: tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation not in (Scalar, optax.ScalarOrSchedule)
    )
    for function in (project, scale_by_core_fisher, scale_by_fisher, natural_galore, galore)
}
