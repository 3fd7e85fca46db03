"""project(), project_back() and chain(): how a subspace is spelled. The work is in `engine.py`."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from ..selection.select import SIDES, Rank, Select, check_rank, select as select_leaves
from ..sharding.partitioning import use_mesh_of
from ..tree.flax_boxes import axis_names, unbox
from ..tree.leaf_spec import LeafSpec
from ..util.validation import Scalar, check_choice, check_int, check_number
from .basis import METHODS, BasisUpdate, StoredBasis
from .engine import Engine, State
from .refresh import Refresh
from .residual import RESIDUALS, Residual
from .transport import TRANSPORTS


class Projection(optax.GradientTransformationExtraArgs):
    """What :func:`project` returns: an Optax transformation that :func:`chain` can complete."""

    around: Any  # inner -> the same projection around it; None once it has an inner


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
    select: Select = None,
    stagger: bool = True,
    seed: int = 0,
) -> Projection:
    """Runs `inner` in a low-rank subspace of each weight's gradient: the engine of the library.

    A weight seen as an m x n matrix, m the projected side, has the orthonormal basis P (m x r).
    `inner` gets the core R = PᵀG (r x n) in the weight's place, so all it remembers is r x n too,
    and its answer U comes back as scale · P U. On both sides the core is PᵀG Q (r x r), and
    scale · P U Qᵀ comes back. Leaves that are not projected (`describe` tells which, and why) reach
    the same `inner` as they are: one count, one learning rate, one global norm. `inner` may decay
    weights in the decoupled way of `optax.adamw`; the whole weight decays.

    Without `inner` the projected gradient P Pᵀ G comes back in full size. That is what a stage of
    `optax.chain` can do, since every later stage there is given full-size params; a warning says
    that it saves no memory and that :func:`chain` does.

    Args:
      rank: r, columns of P; a leaf whose short side is shorter gets that side, as `describe` says.
        State per weight is r·m for P and r·n for each moment. 128 to 512 are GaLore's choices for
        Llama 60m to 1b. A float in (0, 1] is a fraction of each matrix's short side. Different
        ranks for different leaves are spelled as in `select`: `[("mlp", 256), ("", 0.25)]`.
      inner: an Optax transformation; :func:`chain` fills it in. `docs/partners.md` lists those of
        Optax. It is traced at init, so that it is refused there if it misreads weights.
      refresh_every: T, steps between new bases of a matrix. 200 is GaLore's.
      scale: α, what P U is multiplied by. GaLore's 0.25 at its learning rate 1e-2 does to these
        leaves what 1.0 does at 2.5e-3.
      basis: `"power"` (block power iteration, warm from the old basis: no SVD in the program),
        `"svd"` (exact, slow on GPUs and slower on TPUs), `"random"` (signed columns of the cosine
        transform, regenerated from a key of two words wherever it is used: P costs no memory), or
        a pure function (G, P, key) -> P, called once a refresh on each matrix with G (m x n)
        divided by its largest entry, the basis before, and a key of this matrix and refresh. Its
        columns should be orthonormal. A result that is not finite leaves P as it was.
      side: which side of a matrix is projected: `"short"` (GaLore's), `"long"` (Optax's GaLore's:
        less state under Adam, since the moments have the length of the other side), `"left"` (the
        leading axes of the weight), `"right"`, or `"both"`, with one more basis Q (n x r), as the
        paper's code does. A square matrix's short and long are its left.
      transport: what inner's state becomes when P turns. `"rotate"` carries it to the new
        coordinates, `"keep"` leaves it as GaLore and the paper's code do, `"reset"` starts over,
        but for Adam's squares, which become their mean (its count goes on).
      residual: what becomes of G − P R, which the projection leaves out. None: nothing, as in
        GaLore. `"whitened"` adds its whitened form to P U, all directions left out equally far:
        entries of size 1, for an inner whose answers have that size too, such as Adam; no state,
        products of m x m and m x n as Muon's, by far the best so far (`docs/convergence.md`).
        `"isotropic"`: each column over the root of its mean square, as if all directions left out
        had one second moment: two more reads of G, no product, nearly as good. `"fira"`: each
        column times |U_j| / |R_j|, limited so that its norm grows by 1 % a step, with one number a
        matrix of state. Or a pure function
        (G − P R, R, U) -> S of one matrix (m x n, r x n, r x n; cores are r x r of both sides),
        whose S is added, limited in the same way; it needs G − P R whole. U must come without the
        learning rate, so `inner` is a `scale_by_...`, with the rate in a stage after it. See
        `residual.py`.
      select: which leaves are projected, and as which matrices. None reads names and shapes, which
        is right for most models (`describe` says what it made of yours). Else a list of
        (pattern, view), of which the first whose pattern `re.search` finds in the leaf's name
        counts, and the rest is read; or one view for all leaves; or a tree of views like the
        params, or a prefix of one; or a function from the params to such a tree. A view is a
        :class:`MatrixView`, one of Optax's `GaLoreDimensionNumbers` and `MuonDimensionNumbers`,
        None for a leaf to be left whole, or `"auto"`.
      stagger: refresh matrices in at most 100 groups spread over T, so that no step pays for all.
        False refreshes all at once.
      seed: of random bases, which all are before the first refresh.

    Returns:
      A transformation with state :class:`SubspaceState`, within a :class:`ResidualState` if there
      is a `residual` whose growth is limited. A matrix (or other leaf) whose gradient is not finite
      gets a zero update, counts as a zero gradient in what `inner` averages, and is counted in
      `skipped`. A finite gradient above 1e19 still overflows the squares of an inner Adam, as it
      does without us.

    Raises:
      TypeError, ValueError: if an argument is out of range; or, at init, if a rule of `select` or
        `rank` fits no leaf, a view does not fit its leaf, `inner` reads weights in any way but
        decoupled decay or, beside a `residual`, has a learning rate in it (at the first update, if
        it asks for extra arguments that are none of Optax's), or `transport` is not "keep" and no
        role is known for something it remembers (see `register_state`); or, at update, if the state
        was saved by a run of another `rank`, `side` or shape of a weight, or gradients differ
        between devices that share it (`docs/sharding.md`).

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as natgalore, optax
      >>> tx = natgalore.project(rank=8, inner=optax.trace(0.9))
      >>> state = tx.init({"kernel": jnp.zeros((16, 64))})
      >>> state.inner_state.trace["kernel"].value.shape
      (8, 64)

    References: Zhao et al., "GaLore", arXiv:2403.03507, algorithm 2; Chen et al., "Fira",
    arXiv:2410.01623, of that residual.
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
    check_choice("stagger", stagger, (True, False))
    seed = check_int("seed", seed, minimum=0)
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if inner is not None and not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"`inner` must be an Optax transformation, got {inner!r}.")
    engine = Engine(
        optax.identity() if inner is None else inner,
        refresh=Refresh(refresh_every, method, TRANSPORTS[transport], stagger, seed),
        scale=scale,
        residual=residual,
    )

    def init(params: PyTree) -> State:
        specs, reasons = select_leaves(
            unbox(params), unbox(rank), side, unbox(select), axis_names(params)
        )
        chosen = [spec for spec in jax.tree.leaves(specs) if isinstance(spec, LeafSpec)]
        if reasons and not chosen:
            _warn_unprojected(reasons)
        if chosen and inner is None:
            _warn_full_size(params, chosen)
        with use_mesh_of(params):
            return engine.init(params, specs)

    def update(updates: PyTree, state: State, params: PyTree = None, **extra_args: Any):
        with use_mesh_of(updates):
            return engine.update(updates, state, params, **extra_args)

    projection = Projection(init, update)
    projection.around = None
    if inner is None:
        projection.around = functools.partial(
            project,
            rank,
            refresh_every=refresh_every,
            scale=scale,
            basis=basis,
            side=side,
            transport=transport,
            residual=residual,
            select=select,
            stagger=stagger,
            seed=seed,
        )
    return projection


def project_back() -> optax.GradientTransformationExtraArgs:
    """Closes what `project` opened in a :func:`chain`: stages after it see whole weights again.

    Returns:
      A marker that :func:`chain` reads; anywhere else its `init` raises a ValueError.
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

    What stands between `project(...)` and `project_back()`, or the end, becomes the `inner` of the
    projection; the rest is an ordinary `optax.chain`.

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
        outside.append(opened.around(optax.chain(*inside)))
        inside.clear()

    for stage in transforms:
        if stage is _PROJECT_BACK:
            if opened is None:
                _no_subspace()
            close()
            opened = None
        elif getattr(stage, "around", None) is not None:
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
    warnings.warn(
        f"natgalore projects none of the {len(reasons)} leaves ({'; '.join(shown)}{more}), so it "
        "saves no memory here: every leaf goes to the inner optimizer whole.",
        stacklevel=3,
    )


def _warn_full_size(params: PyTree, specs: list[LeafSpec]) -> None:
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
