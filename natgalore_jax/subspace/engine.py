"""One update of a projection.

    1. flatten     the gradients into projected leaves and others
    2. refresh     P where it is due, and inner's state with it; project R = PᵀG, or PᵀG Q
    3. inner       U = inner(R): one transformation over one tree of Cores and other leaves
    4. lift        P U, or P U Qᵀ, plus the residual, plus inner's decay of the whole weight
    5. unflatten   the updates, in the shapes, dtypes and boxes of the leaves

A matrix whose gradient is not finite gives inner a zero core and gets a zero update.

Inner sees float32 (float64 for a float64 leaf), whatever the dtype of the params: a second moment
in bfloat16 with b2 = 0.999 could not change.

Reference: Zhao et al., "GaLore", arXiv:2403.03507, algorithm 2; Das, "Natural GaLore",
arXiv:2410.16029, algorithm 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ..quantization.quantized_array import dequantize, requantize
from ..sharding.array_partitions import partitions_of, with_auto_axes
from ..sharding.partitioning import LeafPartition, role_partition
from ..sharding.shard_map import check_reduced
from ..tree.cores import Core, cores, is_core, replace_cores
from ..tree.flax_boxes import is_box, rebox, rebox_like, unbox, unbox_cores
from ..tree.leaf_spec import LeafSpec
from ..util.validation import Scalar
from .initial_state import initial_state
from .inner import Inner
from .projection import Projected, from_subspace, refresh_and_project, to_working_dtype
from .refresh import MatrixState, Refresh
from .residual import Momentum, Residual
from .state import ResidualMomentumState, Settings, SubspaceState, flatten
from .state_checks import check_cores, check_fits, check_tree


class Engine:
    """The transformation behind :func:`project`, where its arguments are checked."""

    def __init__(
        self,
        inner: optax.GradientTransformation,
        *,
        refresh: Refresh,
        scale: Any,
        residual: str | Residual | None,
        residual_momentum: Scalar | None,
        residual_scale: Scalar,
    ):
        self.inner = Inner(inner)
        self.refresh = refresh
        self.scale = scale
        self.residual = residual
        self.residual_momentum = residual_momentum
        self.residual_scale = residual_scale

    def init(self, params: PyTree, specs: PyTree, reasons: dict[str, str]) -> SubspaceState:
        """The state for `params`.

        Args:
          params: the parameters.
          specs: like the params without boxes: the LeafSpec of each projected leaf, else None.
          reasons: why the others are not projected, by name.
        """
        settings = Settings(self.refresh, self.residual is not None, tuple(reasons.items()))
        has_momentum = self.residual_momentum is not None
        return initial_state(self.inner, settings, self.residual, has_momentum, params, specs)

    def update(
        self, updates: PyTree, state: SubspaceState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SubspaceState]:
        """The update of every leaf, in its shape and dtype, and the new state."""
        bare = unbox_cores(state)
        if jax.tree.structure(bare) == jax.tree.structure(state):
            return self._update(updates, state, params, extra_args)
        updates, new_state = self._update(updates, bare, params, extra_args)
        return updates, rebox_like(new_state, state)

    def _update(
        self, updates: PyTree, state: SubspaceState, params: PyTree, extra_args: dict[str, Any]
    ) -> tuple[PyTree, SubspaceState]:
        # 1. Flatten: lists with an entry for each leaf, or for each projected leaf.
        refresh_bases = check_refresh_bases(
            extra_args.pop("refresh_bases", None), bool(cores(updates))
        )
        if self.residual is not None and cores(updates):
            raise ValueError(
                "`residual` needs whole gradients, and these are cores: take those of "
                "jax.value_and_grad, or residual=None."
            )
        boxes = _params_at_cores(updates, params)
        updates, params, leaves = unbox(updates), unbox(params), unbox(boxes)
        check_fits(state)
        check_tree(updates, state)
        state, momentum = self._without_momentum(state)
        check_cores(updates, state.basis, self.refresh)
        check_reduced(updates, state.skipped)
        gradients, treedef = jax.tree.flatten(updates, is_leaf=is_core)
        places = [i for i, P in enumerate(treedef.flatten_up_to(state.basis)) if P is not None]
        specs, roles, states, unflatten = flatten(state, self.refresh.transport)
        partitions = partitions_of(leaves, specs)
        leaf_partitions = [partitions.leaf(spec) for spec in specs]

        # 2. Refresh and project.
        states, bases = with_auto_axes(
            functools.partial(
                refresh_and_project,
                self.refresh,
                specs,
                roles,
                leaf_partitions,
                refresh_bases=refresh_bases,
            ),
            lambda: _projected_partitions(specs, leaf_partitions, states),
            [gradients[i] for i in places],
            states,
            state.count,
        )
        state = unflatten(states)

        # 3. Inner, on one tree of Cores and other leaves.
        other = {i: to_working_dtype(x) for i, x in enumerate(gradients) if i not in {*places}}
        finite = {i: jnp.isfinite(x).all() for i, x in other.items()}
        inputs = {i: jnp.where(finite[i], x, jnp.zeros_like(x)) for i, x in other.items()}
        for i, spec, x in zip(places, specs, states, strict=True):
            finite[i], inputs[i] = x.finite, Core(x.R, spec)
        cores_in = treedef.unflatten([inputs[i] for i in range(len(gradients))])
        answer, decay, inner_state = self.inner.update(
            boxes, cores_in, state.inner_state, params, extra_args
        )

        # 4. Lift.
        weights = treedef.flatten_up_to(leaves if params is None else params)
        answers = treedef.flatten_up_to(answer)
        new_momenta = []
        lifted = {
            # Masked again: inner's momentum moves leaves whose gradient is not finite.
            i: jnp.where(finite[i], answers[i], jnp.zeros_like(answers[i])).astype(weights[i].dtype)
            for i in other
        }
        for i, spec, partition, x, P, a, M in zip(
            places,
            specs,
            leaf_partitions,
            states,
            bases,
            decay,
            [M.value for M in cores(momentum)] or [None] * len(places),
            strict=True,
        ):
            lifted[i], new = with_auto_axes(
                functools.partial(
                    from_subspace,
                    spec.unnamed,
                    partition,
                    self.residual,
                    jnp.dtype(weights[i].dtype),
                ),
                (
                    partition.partition,
                    None if M is None else role_partition("full", spec, partition),
                ),
                self.scale,
                answers[i].value,
                x.finite,
                P,
                None if self.residual is None else (gradients[i], x.R),
                self.residual_scale,
                None if M is None else Momentum(dequantize(M), self.residual_momentum),
                None if a is None else (a, weights[i]),
            )
            new_momenta.append(requantize(new, M))

        # 5. Unflatten.
        skipped = [
            _count(n, ~finite[i]) for i, n in enumerate(treedef.flatten_up_to(state.skipped))
        ]
        if momentum is not None:
            momentum = replace_cores(momentum, new_momenta)
            inner_state = ResidualMomentumState(momentum, inner_state)
        new_state = state._replace(
            count=optax.safe_increment(state.count),
            skipped=treedef.unflatten(skipped),
            inner_state=inner_state,
        )
        updates = treedef.unflatten([lifted[i] for i in range(len(gradients))])
        return rebox(updates, boxes), new_state

    def _without_momentum(self, state: SubspaceState) -> tuple[SubspaceState, PyTree]:
        """The state with inner's own state, and the momentum of the residual, or None.

        Raises:
          ValueError: if the state has a momentum that the projection lacks, or the reverse.
        """
        given = isinstance(state.inner_state, ResidualMomentumState)
        if given != (self.residual_momentum is not None):
            raise ValueError(
                f"the state is from a run {'with' if given else 'without'} `residual_momentum`, "
                f"and this projection has {self.residual_momentum}: `tx.init` makes its state."
            )
        if not given:
            return state, None
        momentum, inner_state = state.inner_state
        return state._replace(inner_state=inner_state), momentum


def check_refresh_bases(refresh_bases: Any, of_cores: bool) -> bool | None:
    """The argument of `update`; `of_cores`: whether gradients are cores.

    Raises:
      TypeError: if it is traced, or not True, False or None.
      ValueError: if the gradients are cores, whose bases `value_and_grad` has refreshed.
    """
    if refresh_bases is None:
        return None
    if not isinstance(refresh_bases, (bool, np.bool_)):
        raise TypeError(
            "`refresh_bases` must be True, False or None when a program is traced, for example by "
            f"jax.jit(step, static_argnames='refresh_bases'), got {refresh_bases!r}."
        )
    if of_cores:
        raise ValueError(
            "`refresh_bases` is for whole gradients: value_and_grad refreshes the bases of cores."
        )
    return bool(refresh_bases)


def _params_at_cores(updates: PyTree, params: PyTree) -> PyTree:
    """`updates` with the params, in their boxes, where it has Cores.

    Without params a number of the core's dtype stands there; only its dtype is used.
    """
    if not cores(updates):
        return updates
    if params is None:
        leaf = lambda G: jnp.zeros([], G.value.dtype) if is_core(G) else G
        return jax.tree.map(leaf, updates, is_leaf=is_core)
    stop = lambda x: is_core(x) or is_box(x)
    return jax.tree.map(lambda G, w: w if is_core(G) else G, updates, params, is_leaf=stop)


def _projected_partitions(
    specs: list[LeafSpec], partitions: list[LeafPartition], states: list[MatrixState]
) -> Projected:
    """The partitions of a :class:`Projected`, or arrays that have them."""
    bases, new = [], []
    for spec, leaf, state in zip(specs, partitions, states, strict=True):
        partition = functools.partial(role_partition, leaf=leaf)
        bases.append(tuple(partition("basis", side) for side in spec.sides))
        new.append(state._replace(R=partition("linear", spec), finite=partition("scalar", spec)))
    return Projected(new, bases)


def _count(n: Any, event: Array) -> Any:
    """A counter, or Core of counters, that has counted an event."""
    add = lambda n: n + event.astype(n.dtype)
    return n.replace(add(n.value)) if is_core(n) else add(n)
