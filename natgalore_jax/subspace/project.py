"""project(), project_back() and chain(). The update of a projection is in `engine.py`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ..selection.select import SIDES, Rank, Select, check_rank, select as select_leaves
from ..sharding.array_partitions import use_mesh_of
from ..tree.cores import cores
from ..tree.flax_boxes import axis_names, unbox
from ..tree.leaf_spec import LeafSpec
from ..util.validation import Scalar, check_choice, check_decay, check_int, check_number
from .basis import METHODS, BasisUpdate, StoredBasis
from .engine import Engine
from .refresh import Refresh
from .residual import MUON_SCALE, RESIDUALS, Residual
from .state import NothingProjected, SubspaceState
from .transport import TRANSPORTS


class Projection(optax.GradientTransformationExtraArgs):
    """The result of :func:`project`: a transformation that :func:`chain` can give an inner."""

    with_inner: Any  # inner -> the same projection around it; None if it has an inner


def project(
    rank: Rank = 128,
    inner: optax.GradientTransformation | optax.MultiSteps | None = None,
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
    stagger: bool = True,
    seed: int = 0,
) -> Projection:
    """Runs `inner` in a low-rank subspace of each weight's gradient.

    A weight seen as an m x n matrix, m the projected side, has the orthonormal basis P (m x r).
    `inner` gets the core R = PᵀG (r x n) in place of the gradient, so its state is r x n too, and
    its answer U is returned as scale · P U. On both sides the core is PᵀG Q (r x r), and
    scale · P U Qᵀ is returned. Leaves that are not projected (`describe` lists them, with reasons)
    go to the same `inner` unchanged: one count, one learning rate, one global norm. `inner` may
    have decoupled weight decay, as `optax.adamw` has; it acts on the whole weight.

    Without `inner` the projected gradient P Pᵀ G is returned in full size. A stage of `optax.chain`
    can do no more, since later stages get full-size params; a warning states that this saves no
    memory and that :func:`chain` does.

    Args:
      rank: r, columns of P; at most the short side of a leaf, as `describe` shows. State per weight
        is r·m for P and r·n for each moment. GaLore's choices are 128 to 512 for Llama 60m to 1b. A
        float in (0, 1] is a fraction of each matrix's short side. Different ranks for different
        leaves have the forms of `select`: `[("mlp", 256), ("", 0.25)]`.
      inner: an Optax transformation; :func:`chain` fills it in. `docs/partners.md` lists those of
        Optax. It is traced at init, to refuse one that reads weights in another way than decay.
      refresh_every: T, steps between refreshes of a matrix's basis. 200 is GaLore's.
      scale: α, the factor of P U. GaLore's 0.25 at its learning rate 1e-2 equals 1.0 at 2.5e-3 for
        projected leaves.
      basis: `"power"` (block power iteration, warm from the old basis: no SVD in the program),
        `"svd"` (exact, slow on GPUs and slower on TPUs), `"random"` (signed columns of the cosine
        transform, regenerated from a key of two words wherever it is used: P costs no memory), or
        a pure function (G, P, key) -> P, called once per refresh for each matrix, with G (m x n)
        divided by its largest entry, the old basis, and a key of this matrix and refresh. Its
        columns should be orthonormal. A result that is not finite leaves P unchanged.
      side: the projected side of a matrix: `"short"` (GaLore's), `"long"` (Optax's GaLore's: less
        state under Adam, since the moments have the length of the other side), `"left"` (the
        rows of the matrix view), `"right"` (its columns), or `"both"`, with a second basis Q (n x
        r), as the paper's code does. For a square matrix short and long are left.
      transport: inner's state at a refresh. `"rotate"` transforms it to the new coordinates,
        `"keep"` leaves it, as GaLore and the paper's code do, `"reset"` clears it, except for
        Adam's squares, which become their mean (its count continues).
      residual: what is added for G − P R, which the projection discards. None: nothing, as in
        GaLore. `"whitened"`: G − P R orthogonalised by a Newton-Schulz iteration; no state,
        products of m x m and m x n, the best so far (`docs/convergence.md`). `"isotropic"`: each
        column divided by the root of its mean square; two more reads of G, no product, 0.03 nats
        worse there. Or a pure function (G − P R, R, U) -> S of one matrix (m x n, r x n, r x n;
        cores are r x r for both sides), whose S is added. The two named residuals have entries of
        size 1, like Adam's answers, so `inner` must not contain the learning rate: use
        `optax.scale_by_adam()` as `inner`, and `optax.scale_by_learning_rate` after it. Equations
        in `natgalore_jax/subspace/residual.py`.
      residual_momentum: β in [0, 1), the decay of Nesterov's momentum of G − P R, which then takes
        the place of G − P R; 0.95 is Muon's. Its state is m x n in float32, or 8 or 4 bits with
        :func:`quantized`. None: no momentum, no state. At a refresh the momentum loses its part in
        the new subspace, whatever `transport` is.
      residual_scale: γ, the factor of the residual. The root mean square of the entries of a named
        residual is γ √(1 − r/m), within a tenth. None: 1 without a momentum, the size of Adam's
        answer to a steady gradient. With one 0.2, as for Muon in Moonlight (arXiv:2502.16982), so
        that learning rate and decay are those of AdamW.
      select: which leaves are projected, and as which matrices. None infers both from names and
        shapes, which is right for most models (`describe` shows the result). A list of (pattern,
        view): the first pattern that `re.search` finds in a leaf's name decides; other leaves are
        inferred. Or one view for all leaves; a tree of views like the params, or a prefix of one; a
        function from the params to such a tree. A view is a :class:`MatrixView`, Optax's
        `GaLoreDimensionNumbers` or `MuonDimensionNumbers`, None for a leaf that is not projected,
        or `"auto"`.
      stagger: after step 0, which refreshes all matrices, spreads the refreshes in at most 100
        groups over T steps. False refreshes all at once.
      seed: of random bases; all bases are random before the first refresh.

    Returns:
      A transformation with state :class:`SubspaceState`. Its `update` takes a static argument
      `refresh_bases`: True refreshes all bases, False none, without a condition in the program;
      None, the default, those that are due (`docs/performance.md`). A matrix (or other leaf) whose
      gradient is not finite gets a zero update, counts as a zero gradient in inner's averages, and
      is counted in `skipped`. A finite gradient above 1e19 overflows the squares of an inner Adam,
      as it does without a projection.

    Raises:
      TypeError, ValueError: if an argument is out of range. At init: if a rule of `select` or
        `rank` fits no leaf, a view does not fit its leaf, `inner` reads weights in another way than
        decoupled decay (at the first update, if it has required extra arguments), `inner` contains
        a learning rate beside a `residual`, contains a `project` itself, or `transport` is not
        "keep" and a field of inner's state has no role (see `register_state`). At update: if the
        arrays of a restored state have another rank, side or shape than `init` gives them, or
        gradients differ between devices that share a state (`docs/sharding.md`).

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> tx = natgalore.project(rank=8, inner=optax.trace(0.9))
      >>> state = tx.init({"kernel": jnp.zeros((16, 64))})
      >>> state.inner_state.trace["kernel"].value.shape
      (8, 64)

    Reference: Zhao et al., "GaLore", arXiv:2403.03507, algorithm 2.
    """
    rank = check_rank(rank)
    refresh_every = check_int("refresh_every", refresh_every, minimum=1)
    scale = check_number("scale", scale, above=0.0)
    method = StoredBasis(basis) if callable(basis) else None
    if method is None:
        check_choice("basis", basis, METHODS, "a function (G, P, key) -> P")
        method = METHODS[basis]
    check_choice("side", side, SIDES)
    check_choice("transport", transport, TRANSPORTS)
    if not callable(residual):
        choices = (None, *RESIDUALS)
        check_choice("residual", residual, choices, "a function (G - P R, R, U) -> S")
    if residual_momentum is not None:
        residual_momentum = check_decay("residual_momentum", residual_momentum)
        if residual is None:
            raise ValueError("`residual_momentum` is that of a `residual`, which is None.")
    if residual_scale is None:
        residual_scale = 1.0 if residual_momentum is None else MUON_SCALE
    elif residual is None:
        raise ValueError("`residual_scale` is that of a `residual`, which is None.")
    residual_scale = check_number("residual_scale", residual_scale, above=0.0)
    check_choice("stagger", stagger, (True, False))
    seed = check_int("seed", seed, minimum=0)
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if inner is not None and not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"`inner` must be an Optax transformation, got {inner!r}.")
    refresh = Refresh(refresh_every, method, TRANSPORTS[transport], stagger, seed)

    def around(inner: optax.GradientTransformation | None) -> Projection:
        engine = Engine(
            optax.identity() if inner is None else inner,
            refresh=refresh,
            scale=scale,
            residual=residual,
            residual_momentum=residual_momentum,
            residual_scale=residual_scale,
        )

        def init(params: PyTree) -> SubspaceState:
            if cores(params):
                raise ValueError(
                    "a `natgalore.project`, or an optimizer that contains one, such as "
                    "natgalore.galore, is inside the subspace of another: use one of them."
                )
            specs, reasons = select_leaves(
                unbox(params), unbox(rank), side, unbox(select), axis_names(params)
            )
            chosen = [spec for spec in jax.tree.leaves(specs) if isinstance(spec, LeafSpec)]
            if reasons and not chosen:
                _warn_unprojected(reasons)
            if chosen and inner is None:
                _warn_full_size(chosen)
            with use_mesh_of(params):
                return engine.init(params, specs, reasons)

        def update(updates: PyTree, state: SubspaceState, params: PyTree = None, **extra_args: Any):
            with use_mesh_of(updates):
                return engine.update(updates, state, params, **extra_args)

        projection = Projection(init, update)
        projection.with_inner = around if inner is None else None
        return projection

    return around(inner)


def project_back() -> optax.GradientTransformationExtraArgs:
    """Ends the subspace of a `project` in a :func:`chain`: later stages see whole weights again.

    Returns:
      A marker for :func:`chain`; anywhere else its `init` raises a ValueError.
    """
    return _PROJECT_BACK


def _no_subspace(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "`project_back()` closes a subspace that a `natgalore.project` without `inner` opened "
        "before it in the same `natgalore.chain`; in `optax.chain`, or alone, there is none."
    )


_PROJECT_BACK = optax.GradientTransformationExtraArgs(_no_subspace, _no_subspace)


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, except that stages after `project(...)` work in its subspace.

    The stages between `project(...)` and `project_back()`, or the end, become the `inner` of the
    projection; the others are an ordinary `optax.chain`.

    Args:
      *transforms: Optax transformations; at most one open `project`.

    Raises:
      ValueError: if `project_back()` closes nothing, or a second `project` opens before the first
        is closed.

    Example:
      >>> import natgalore_jax as natgalore, optax
      >>> tx = natgalore.chain(
      ...     natgalore.project(rank=128),
      ...     natgalore.scale_by_core_fisher(),
      ...     optax.scale_by_adam(),
      ...     natgalore.project_back(),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(2.5e-3),
      ... )
    """
    outside: list[optax.GradientTransformation] = []
    inside: list[optax.GradientTransformation] = []
    opened: Projection | None = None

    def close():
        outside.append(opened.with_inner(optax.chain(*inside)))
        inside.clear()

    for stage in transforms:
        if stage is _PROJECT_BACK:
            if opened is None:
                _no_subspace()
            close()
            opened = None
        elif getattr(stage, "with_inner", None) is not None:
            if opened is not None:
                raise ValueError(
                    "`natgalore.chain` met a second `project` before `project_back()`."
                )
            opened = stage
        else:
            (outside if opened is None else inside).append(stage)
    if opened is not None:
        close()
    return optax.chain(*outside)


def _warn_unprojected(reasons: dict[str, str]) -> None:
    shown = [f"{name}: {reason}" for name, reason in list(reasons.items())[:4]]
    more = f", and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    message = (
        f"natgalore projects none of the {len(reasons)} leaves ({'; '.join(shown)}{more}), so it "
        "saves no memory here: every leaf goes to the inner optimizer whole."
    )
    warnings.warn(NothingProjected(message, reasons), stacklevel=3)


def _warn_full_size(specs: list[LeafSpec]) -> None:
    item = jnp.dtype(jnp.float32).itemsize
    whole = item * sum(int(np.prod(spec.shape)) for spec in specs)
    core = item * sum(int(np.prod(spec.core_shape)) for spec in specs)
    warnings.warn(
        "natgalore.project(...) without an inner transformation, as in optax.chain, returns "
        f"full-size gradients, so later stages keep full-size state: {whole:,} bytes a moment on "
        f"the projected leaves. natgalore.chain in place of optax.chain keeps {core:,}. If P Pᵀ G "
        "is what you want, inner=optax.identity() says so.",
        stacklevel=3,
    )
