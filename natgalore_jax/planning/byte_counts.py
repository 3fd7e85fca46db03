"""Bytes of training: weights, gradients, state and, for a compiled step, its temporaries."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..reporting.memory_report import bytes_by_leaf, nbytes
from ..subspace.projection import core_dtype
from ..subspace.state import Bases, bases_of, decisions_of, subspace_states
from ..tree.cores import Basis
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import LeafSpec, path_name


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes of one leaf of the params.

    Attributes:
      path: name of the leaf.
      shape: shape of the leaf.
      rank: r, or None if it is not projected.
      why: reason it is not projected; empty if it is.
      weights: bytes of the leaf.
      gradients: bytes of its gradient, or of its core under low-rank gradients.
      state: bytes of its optimizer state.
      energy: share of the gradients' energy in r directions, the minimum over the leaf's matrices;
        None without gradients.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    why: str
    weights: int
    gradients: int
    state: int
    energy: float | None = None


@dataclasses.dataclass(frozen=True)
class ByteCount:
    """Result of :func:`byte_count_of`.

    Attributes:
      rows: one per leaf.
      dtypes: bytes by kind, then by dtype. The kinds are weights, gradients and state; for a
        compiled step weights, state and temporaries. The state includes arrays of no leaf, such as
        counts and keys.
    """

    rows: list[Row]
    dtypes: dict[str, dict[str, int]]

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by kind."""
        return {kind: sum(by_dtype.values()) for kind, by_dtype in self.dtypes.items()}

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def byte_count_of(
    tx: optax.GradientTransformation,
    params: PyTree,
    low_rank_gradients: bool = False,
    step: Callable[..., Any] | None = None,
    batch: tuple[Any, ...] = (),
    size: Callable[[Any], int] = nbytes,
) -> ByteCount:
    """Counts the bytes of training from shapes: nothing is allocated.

    Args:
      tx: any optimizer.
      params: a tree of arrays or of `jax.ShapeDtypeStruct`.
      low_rank_gradients: whether gradients are the cores of :func:`value_and_grad`. All gradients
        of a step are counted.
      step: a training step `(params, opt_state, *batch)`. It is compiled, and its temporaries,
        which include the gradients, replace the count of gradients.
      batch: further arguments of `step`, as arrays or shapes.
      size: bytes of one array; `nbytes_on_tpu` counts padding.

    Example:
      >>> import natgalore_jax as natgalore
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}}
      >>> byte_count_of(natgalore.galore(1.0, rank=16), params, low_rank_gradients=True).bytes
      {'weights': 32768, 'gradients': 16384, 'state': 36884}
    """
    state, bases, reasons = state_of(tx, params)
    state_bytes = bytes_by_leaf(state, params, size)
    rows, gradients = [], []
    for path, w in jax.tree_util.tree_leaves_with_path(unbox(params)):
        name, (P, *_) = path_name(path), bases.get(path, (None,))
        G = _gradient(w, P if low_rank_gradients else None)
        gradients.append(G)
        rows.append(
            Row(
                path=name,
                shape=tuple(w.shape),
                rank=None if P is None else P.spec.rank,
                why="" if P is not None else reasons.get(name, "not given to natgalore"),
                weights=size(w),
                gradients=size(G),
                state=state_bytes[name],
            )
        )
    dtypes = {"weights": _by_dtype(params, size), "gradients": _by_dtype(gradients, size)}
    dtypes["state"] = _by_dtype(state, size)
    if step is not None:
        del dtypes["gradients"]
        dtypes["temporaries"] = {"of the step": temporaries(step, params, state, *batch)}
    return ByteCount(rows, dtypes)


def state_of(
    tx: optax.GradientTransformation, params: PyTree
) -> tuple[PyTree, Bases, Mapping[str, str]]:
    """Returns the shapes of the state of `tx`, its bases, and why other leaves have none."""
    state, decisions = decisions_of(tx, params)
    reasons = {name: why for name, why in decisions.items() if not isinstance(why, LeafSpec)}
    return state, bases_of(subspace_states(unbox(state))), reasons


def temporaries(step: Callable[..., Any], params: PyTree, state: PyTree, *batch: Any) -> int:
    """Bytes that a compiled step needs beside weights and state.

    These are XLA's temporary buffers (gradients, activations), the batch, and outputs that do not
    alias a donated argument.

    Args:
      step: a function of `(params, state, *batch)`, jitted or not; if not, it is jitted with the
        first two arguments donated.
      params, state, batch: arrays or shapes.
    """
    program = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=(0, 1))
    memory = program.lower(params, state, *batch).compile().memory_analysis()
    not_aliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + not_aliased + sum(_by_dtype(batch).values())


def _gradient(w: Any, P: Basis | None) -> jax.ShapeDtypeStruct:
    """The shape of a weight's gradient, or of its core if there is a basis."""
    if P is None:
        real = jnp.issubdtype(w.dtype, jnp.inexact)
        return jax.ShapeDtypeStruct(w.shape, w.dtype if real else jax.dtypes.float0)
    return jax.ShapeDtypeStruct(P.spec.core_shape, core_dtype(P.value, w))


def _by_dtype(tree: PyTree | Iterable[Any], size: Callable[[Any], int] = nbytes) -> dict[str, int]:
    """Bytes of arrays by dtype name, largest first."""
    counts: collections.Counter[str] = collections.Counter()
    for x in jax.tree.leaves(tree):
        counts[str(x.dtype)] += size(x)
    return {name: count for name, count in counts.most_common() if count}
