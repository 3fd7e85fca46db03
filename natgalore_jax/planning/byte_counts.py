"""Where the bytes of training go: weights, gradients, state and, of a compiled step, the rest."""

import collections
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..lowrank_grads.loss import Bases, bases_of
from ..quantization.quantized_array import is_quantized
from ..reporting.memory_report import bytes_by_leaf, nbytes
from ..selection.select import decisions
from ..subspace.engine import SubspaceState
from ..subspace.projection import core_dtype
from ..tree.flax_boxes import unbox
from ..tree.leaf_spec import Basis, LeafSpec, path_name


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of the params, in bytes.

    Attributes:
      path: its name.
      shape: its shape.
      rank: r, or None where it is not projected.
      why: it is not.
      weights: of itself.
      gradients: of its gradient, a core where that is what is made.
      state: of what the optimizer keeps for it.
      energy: the share of the given gradients' energy that r directions hold, in the matrix of the
        leaf where it is least; None where there are none.
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
    """What :func:`byte_count_of` counted.

    Attributes:
      rows: one for each leaf.
      dtypes: bytes by kind and, of arrays that are known, by dtype. The kinds are weights,
        gradients and state or, of a compiled step, weights, state and temporaries. Of the state
        they hold what belongs to no leaf too, counts and keys.
    """

    rows: list[Row]
    dtypes: dict[str, dict[str, int]]

    @property
    def bytes(self) -> dict[str, int]:
        """By kind."""
        return {kind: sum(held.values()) for kind, held in self.dtypes.items()}

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def byte_count_of(
    tx: optax.GradientTransformation,
    params: PyTree,
    low_rank_gradients: bool = False,
    step: Callable[..., Any] | None = None,
    batch: tuple[Any, ...] = (),
) -> ByteCount:
    """Counts what training holds, from shapes: nothing is allocated.

    Args:
      tx: any optimizer.
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
      low_rank_gradients: whether gradients come from :func:`value_and_grad`, as cores, and not
        whole; in each case all at once.
      step: of `(params, opt_state, *batch)`, which is compiled, and whose temporaries take the
        place of the gradients, that are among them.
      batch: arrays, or shapes.

    Example:
      >>> import natgalore_jax as natgalore
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}}
      >>> byte_count_of(natgalore.galore(1.0, rank=16), params, low_rank_gradients=True).bytes
      {'weights': 32768, 'gradients': 16384, 'state': 36884}
    """
    state, bases, reasons = state_of(tx, params)
    held = bytes_by_leaf(state, params)
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
                weights=nbytes(w),
                gradients=nbytes(G),
                state=held[name],
            )
        )
    dtypes = {"weights": _by_dtype(params), "gradients": _by_dtype(gradients)}
    dtypes["state"] = _by_dtype(state)
    if step is not None:
        del dtypes["gradients"]
        dtypes["temporaries"] = {"of the step": temporaries(step, params, state, *batch)}
    return ByteCount(rows, dtypes)


def state_of(
    tx: optax.GradientTransformation, params: PyTree
) -> tuple[PyTree, Bases, Mapping[str, str]]:
    """The shapes of the state of `tx`, its bases, and why other leaves are not projected."""
    with warnings.catch_warnings(), decisions() as made:
        warnings.filterwarnings("ignore", "natgalore projects none")  # the reasons say why
        state = jax.eval_shape(lambda params: tx.init(params), params)  # traced, not remembered
    is_subspace = lambda x: isinstance(x, SubspaceState)
    nodes = jax.tree.leaves(unbox(state), is_leaf=is_subspace)
    reasons = {name: why for name, why in made.items() if not isinstance(why, LeafSpec)}
    return state, bases_of(list(filter(is_subspace, nodes))), reasons


def temporaries(step: Callable[..., Any], params: PyTree, state: PyTree, *batch: Any) -> int:
    """What a compiled step holds beside weights and state, in bytes.

    That is what its compiler has set aside for gradients, activations and all else on the way, the
    batch, and what it returns that does not take the place of what it was given.

    Args:
      step: a function of `(params, state, *batch)`; under `jax.jit` already, or it is put there,
        donating the first two.
      params, state, batch: arrays, or shapes.
    """
    program = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=(0, 1))
    memory = program.lower(params, state, *batch).compile().memory_analysis()
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + returned + sum(_by_dtype(batch).values())


def _gradient(w: Any, P: Basis | None) -> jax.ShapeDtypeStruct:
    """Of a weight; its core, where it has a basis."""
    if P is None:
        real = jnp.issubdtype(w.dtype, jnp.inexact)
        return jax.ShapeDtypeStruct(w.shape, w.dtype if real else jax.dtypes.float0)
    kept = P.replace(P.value.scales) if is_quantized(P.value) else P  # in the dtype of its scales
    return jax.ShapeDtypeStruct(P.spec.core_shape, core_dtype(kept, w))


def _by_dtype(tree: PyTree | Iterable[Any]) -> dict[str, int]:
    """Bytes of arrays by the name of their dtype, most first."""
    held: collections.Counter[str] = collections.Counter()
    for x in jax.tree.leaves(tree):
        held[str(x.dtype)] += nbytes(x)
    return {name: count for name, count in held.most_common() if count}
