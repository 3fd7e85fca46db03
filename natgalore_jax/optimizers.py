"""natural_galore() and galore(): complete optimizers, used in place of `optax.adamw`."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from .fisher.core import scale_by_core_fisher
from .fisher.window import scale_by_fisher
from .selection.select import Rank, Select
from .subspace.basis import BasisUpdate
from .subspace.learning_rate_check import RateFree
from .subspace.project import project
from .subspace.residual import Residual
from .util.validation import Scalar, as_float, check_choice, check_decay


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
    residual_momentum: Scalar | None = None,
    residual_scale: Scalar | None = None,
    select: Select = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    stagger: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Natural GaLore: AdamW in a low-rank subspace, plus the orthogonalised rest of each gradient.

    By default this is GaLore's projection with Adam, plus a residual: the part G − P R that the
    projection discards, orthogonalised by a Newton-Schulz iteration. The residual has no
    state. The paper's Fisher stage is off by default; `fisher="window"` or `fisher="core"` adds it
    before Adam. The paper's algorithm is
    `fisher="window", residual=None, b2=0.999, refresh_every=200`; the defaults here learned better
    in runs of one token per weight (`docs/convergence.md`).

    Weight decay and learning rate act on the full weights. Embeddings, heads, norms and biases get
    plain AdamW.

    Args:
      learning_rate: a number or a schedule, for all leaves. `docs/coming-from.md` converts a rate
        of AdamW or GaLore, `docs/frameworks.md` gives embedding, head and norms a higher one, at
        which they learn better.
      rank: r of the subspace, see :func:`project`.
      fisher: the stage before Adam in the subspace: None, `"core"` (:func:`scale_by_core_fisher`,
        r x r), `"window"` (:func:`scale_by_fisher`, the paper's form, more state than AdamW), or a
        transformation on cores. Beside the `"whitened"` residual neither was better than None
        (three seeds each).
      residual: the treatment of G − P R. `"whitened"` orthogonalises it, at the cost of products of
        m x m and m x n on every step, small in a batch of many tokens. `"isotropic"` needs no
        product. None, as in GaLore, is required by :func:`natgalore_jax.value_and_grad`. See
        :func:`project`.
      residual_momentum, residual_scale: see :func:`project`. A momentum keeps a further number per
        weight, of 4, 1 or half a byte. With 0.95 and 0.4, in 8 bits at rank 16, runs of 19 tokens
        per weight ended 0.03 nats lower (6M weights, three seeds), level with Muon. With 11M and
        33M weights Muon was ahead (one seed). Off, since Muon in 8 bits takes less memory.
      refresh_every: T, steps between refreshes of a basis. 50 ended 0.005 nats below GaLore's 200
        (each of three seeds), and 0.04 below in a run of 500 steps, for about 2 % of the time of
        Llama 350m's steps of 8,192 tokens. T = 1 is much worse.
      scale, basis, side, transport, select, stagger, seed: see :func:`project`.
      b1, b2, eps: of Adam, for all leaves. b2 = 0.95 is common for language models; 0.999 was 0.010
        nats worse (three seeds).
      weight_decay: decoupled, on the full weight, as in `optax.adamw`.
      mask: a tree or callable as in `optax.add_decayed_weights`: the leaves that decay.

    Returns:
      A transformation, used like `optax.adamw(learning_rate)`. Its `update` takes the static
      argument `refresh_bases` of :func:`project`. To change numbers during training build it with
      `optax.inject_hyperparams(natgalore.natural_galore,
      static_args=natgalore.STATIC_ARGS["natural_galore"])`; for bfloat16 params add
      `hyperparam_dtype=jnp.float32`: b1 and b2 in bfloat16 are refused, since 0.999 would be 1.

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
    b1, b2 = check_decay("b1", b1), check_decay("b2", b2)
    learning_rate, eps, weight_decay = map(as_float, (learning_rate, eps, weight_decay))
    if isinstance(fisher, optax.GradientTransformation):
        precondition = fisher
    else:
        check_choice("fisher", fisher, FISHERS, "a transformation")
        precondition = FISHERS[fisher]()
    inner = optax.chain(precondition, optax.scale_by_adam(b1, b2, eps))
    if fisher in FISHERS:
        inner = RateFree(*inner)
    return optax.chain(
        project(
            rank,
            inner,
            refresh_every=refresh_every,
            scale=scale,
            basis=basis,
            side=side,
            transport=transport,
            residual=residual,
            residual_momentum=residual_momentum,
            residual_scale=residual_scale,
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
    residual_momentum: Scalar | None = None,
    residual_scale: Scalar | None = None,
    select: Select = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    stagger: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: :func:`natural_galore` without a residual. Same arguments except `fisher`.

    `refresh_every=200` and `b2=0.999` are the published values. By default power iteration tracks
    the basis and a refresh rotates Adam's moments into the new basis; the published algorithm is
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
        residual_momentum=residual_momentum,
        residual_scale=residual_scale,
        select=select,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        stagger=stagger,
        seed=seed,
    )


# The arguments of each function that cannot change during training: those not annotated as numbers.
#     optax.inject_hyperparams(natgalore.galore, static_args=natgalore.STATIC_ARGS["galore"])
STATIC_ARGS: dict[str, tuple[str, ...]] = {
    function.__name__: tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation not in (Scalar, optax.ScalarOrSchedule)
    )
    for function in (project, scale_by_core_fisher, scale_by_fisher, natural_galore, galore)
}
