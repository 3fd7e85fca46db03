"""Plants faults in the library, one at a time, and sees whether the quick tests notice.

    make mutants                         all of them; writes docs/mutants.md
    make mutants ARGS="transport gate"   those whose room or name has one of these words

Each fault is one replacement of text in a copy of the repository. A fault that the tests let pass
is a survivor, and a test is missing.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "mutants.md"


class Mutant(NamedTuple):
    """A fault: in `room`, `old`, which stands there once, becomes `new`."""

    room: str
    name: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "subspace/basis", "ignores the gradient", "from_product(matmul(G, matmul(G.mT, P)), P)", "P"
    ),
    Mutant("subspace/basis", "none of the old basis", "SHIFT = 1e-6", "SHIFT = 0.0"),
    Mutant(
        "subspace/basis",
        "svd of the other sign",
        "largest < 0, -1.0, 1.0",
        "largest < 0, 1.0, -1.0",
    ),
    Mutant(
        "subspace/basis",
        "trailing singular vectors",
        "full_matrices=False)[0][:, : P.shape[-1]]",
        "full_matrices=False)[0][:, -P.shape[-1] :]",
    ),
    Mutant(
        "subspace/basis",
        "one turn at the start",
        "first, self.first_iterations, 1)",
        "first, 1, 1)",
    ),
    Mutant("subspace/basis", "gradient in its own units", "G / jnp.where(usable, unit, 1.0)", "G"),
    Mutant(
        "subspace/basis",
        "Q has P's key",
        "for part in (side, index, times)",
        "for part in (index, times)",
    ),
    Mutant(
        "subspace/basis",
        "random without signs",
        "signs[:, None] * size",
        "jnp.abs(signs)[:, None] * size",
    ),
    Mutant("subspace/basis", "phase loses its high part", "((high << 8) + odd", "(odd"),
    Mutant(
        "subspace/basis",
        "constant column too long",
        "jnp.sqrt(1 / m), jnp.sqrt",
        "jnp.sqrt(2 / m), jnp.sqrt",
    ),
    Mutant(
        "subspace/basis", "same columns for every key", "jax.random.permutation(columns_key, ", "("
    ),
    Mutant(
        "util/linalg",
        "QR of any sign",
        "< 0, -1.0, 1.0).astype(Q.dtype)",
        "< 0, 1.0, 1.0).astype(Q.dtype)",
    ),
    Mutant(
        "util/linalg",
        "rounding that compilers skip",
        "lax.reduce_precision(x, info.nexp, info.nmant).astype",
        "x.astype",
    ),
    Mutant(
        "subspace/refresh",
        "a step late",
        "(count % self.every == phases)",
        "((count + 1) % self.every == phases)",
    ),
    Mutant("subspace/refresh", "waits for its turn from cold", " | ((times == 0) & usable)", ""),
    Mutant(
        "subspace/refresh",
        "core of the stale basis",
        "R = to_core(G, *bases)",
        "R = to_core(G, *olds)",
    ),
    Mutant("subspace/refresh", "C transposed", "matmul(new.mT, P) for", "matmul(P.mT, new) for"),
    Mutant(
        "subspace/refresh",
        "state turned by a bad gradient",
        "jnp.where(usable, x, before) for x",
        "x for x",
    ),
    Mutant("subspace/refresh", "basis of a bad gradient", "keep(new, x) for new", "new for new"),
    Mutant(
        "subspace/refresh",
        "Q never refreshed",
        "self.method.next(unit.mT if side else unit, P, key, n == 0)",
        "P if side else self.method.next(unit, P, key, n == 0)",
    ),
    Mutant(
        "subspace/refresh_loop",
        "one key for a stack",
        "spec.cut(G, i), order[i]",
        "spec.cut(G, i), order[0]",
    ),
    Mutant(
        "subspace/refresh_loop",
        "one key for leaves alike",
        "part, order[e], old",
        "part, order[0], old",
    ),
    Mutant(
        "subspace/refresh_loop",
        "what is of experts alike",
        "e // spec.matrices, e % spec.matrices",
        "e, e",
    ),
    Mutant("util/control_flow", "a tree of no depth", "if len(states) <= BRANCHES", "if True"),
    Mutant(
        "util/linalg",
        "a Q that is not checked",
        "return lax.cond(near(gram), ",
        "return (lambda p, f, g: f())(True, ",
    ),
    Mutant(
        "util/linalg",
        "scales of another condition",
        "least = 1 / math.sqrt(condition)",
        "least = 1 / condition",
    ),
    Mutant(
        "fisher/core",
        "all roots at each new basis",
        "jnp.where(due[..., None, None], Z, old[0])",
        "Z",
    ),
    Mutant(
        "subspace/refresh",
        "the same random basis again",
        "index, n + 1, side",
        "index, 1, side",
    ),
    Mutant(
        "subspace/refresh", "matrices, not groups", "index * number // max(total, 1) *", "index *"
    ),
    Mutant(
        "subspace/lift",
        "gate open",
        "x.replace(jnp.where(ok.value[..., None, None], x.value, 0))",
        "x",
    ),
    Mutant(
        "subspace/lift",
        "gate open for other leaves",
        "return jnp.where(ok, x, jnp.zeros_like(x))",
        "return x",
    ),
    Mutant(
        "subspace/lift",
        "inner's answer not gated",
        "answer = jax.tree.map(keep_where, answer, finite, is_leaf=is_core)",
        "pass",
    ),
    Mutant(
        "subspace/engine",
        "stale basis at lifting",
        "decay, finite, bases, weights, left)",
        "decay, finite, [state.basis, state.right_basis], weights, left)",
    ),
    Mutant("subspace/lift", "scale twice", "scale * U, *", "scale * scale * U, *"),
    Mutant("subspace/lift", "scale of one part", " + scale * S", " + S"),
    Mutant("subspace/lift", "decay doubled", "a * weight, 0)", "2 * a * weight, 0)"),
    Mutant(
        "subspace/lift",
        "decay passes the gate",
        "jnp.where(ok.value[..., None, None], a * weight, 0)",
        "a * weight",
    ),
    Mutant(
        "subspace/engine",
        "count stands still",
        "count = optax.safe_increment(state.count)",
        "count = state.count",
    ),
    Mutant("subspace/engine", "counts the good steps", "n + (~ok).astype", "n + ok.astype"),
    Mutant(
        "subspace/projection",
        "state in the leaf's dtype",
        "jnp.promote_types(x.dtype, jnp.float32)",
        "x.dtype",
    ),
    Mutant("subspace/engine", "takes a state of any rank", "walk(state, _refuse_misfit)", "pass"),
    Mutant(
        "subspace/engine", "another format's number", "FORMAT_VERSION = 1", "FORMAT_VERSION = 2"
    ),
    Mutant(
        "subspace/projection", "takes a gradient of any shape", "G.shape != P.spec.shape", "False"
    ),
    Mutant(
        "subspace/engine",
        "inner never sees a box",
        "inner, params = boxed(self.inner, params), unbox(params)",
        "inner, params = self.inner, unbox(params)",
    ),
    Mutant("tree/flax_boxes", "cores in boxes", "is_core(x) or not is_box(box)", "not is_box(box)"),
    Mutant("tree/flax_boxes", "any tuple a box", "tuple | Core | Basis", "Core | Basis"),
    Mutant("tree/flax_boxes", "a module a box", " and _is_single(children[0][1])", ""),
    Mutant(
        "tree/flax_boxes",
        "inner's answer in boxes",
        "return unbox(updates), state",
        "return updates, state",
    ),
    Mutant(
        "subspace/project",
        "selects in boxes",
        "select_leaves(unbox(params)",
        "select_leaves(params",
    ),
    Mutant("subspace/engine", "seed ignored", "basis_key(self.refresh.seed, i", "basis_key(0, i"),
    Mutant("fisher/window", "slot off by one", "slot = count % size", "slot = (count + 1) % size"),
    Mutant(
        "fisher/window",
        "K row not replaced",
        "gram = jnp.where(here[..., :, None], row[..., None, :], gram)",
        "pass",
    ),
    Mutant(
        "fisher/window",
        "answers for the oldest",
        "one_hot((count - 1) % size",
        "one_hot(count % size",
    ),
    Mutant(
        "fisher/window",
        "slot keeps its old scale",
        "scale = jnp.where(here, unit[..., None], scale)",
        "pass",
    ),
    Mutant(
        "fisher/window",
        "damping of other units",
        "damping / largest / largest",
        "damping / largest",
    ),
    Mutant("fisher/window", "damping by the sum", "1.0) / filled", "1.0)"),
    Mutant("fisher/window", "unit of another power", "largest ** (1 - 2 * power)", "largest**-1.0"),
    Mutant(
        "fisher/window",
        "exact column beside rounded ones",
        "newest.astype(gram.dtype)\n",
        "(R / unit[..., None, None])\n",
    ),
    Mutant(
        "fisher/window",
        "a zero core takes a slot",
        "count + accepted.astype(count.dtype)",
        "count + 1",
    ),
    Mutant(
        "fisher/window", "no way out of rounding", "jnp.where(solved, weights, parallel)", "weights"
    ),
    Mutant(
        "fisher/core",
        "count not bias-corrected",
        "fisher / jnp.where(known, weight, 1.0)[..., None, None]",
        "fisher",
    ),
    Mutant(
        "fisher/core", "a spike passes", "(in_turn | (scale > OUTGROWN * root_scale))", "in_turn"
    ),
    Mutant("fisher/core", "a sum, not a mean", "(1 - beta) * jnp.square", "1.0 * jnp.square"),
    Mutant(
        "fisher/core", "unit of another power", "unit ** (1 - 2 * power)", "unit ** (1 - power)"
    ),
    Mutant(
        "fisher/core",
        "roots out of turn",
        "state.count % root_every == 0",
        "state.count % root_every == 1",
    ),
    Mutant(
        "fisher/core",
        "damping not by the mean",
        "trace(L, axis1=-2, axis2=-1) / r",
        "trace(L, axis1=-2, axis2=-1)",
    ),
    Mutant(
        "subspace/transport",
        "energy lost",
        "matmul(squares, v) + lost * v.mean",
        "matmul(squares, v) + 0 * v.mean",
    ),
    Mutant(
        "subspace/transport",
        "squares turned as momentum",
        "return matmul(squares, v)",
        "return matmul(C, v)",
    ),
    Mutant("subspace/transport", "K not renewed", "x = gram(rotated[-1].astype(x.dtype))", "pass"),
    Mutant(
        "subspace/transport", "L turned on one side", "matmul(matmul(C, x), C.mT)", "matmul(C, x)"
    ),
    Mutant(
        "subspace/transport",
        "root not renewed",
        '            case "root":\n                x = jnp.zeros_like(x)',
        '            case "root":\n                pass',
    ),
    Mutant(
        "subspace/transport",
        "columns left behind",
        "matmul(turned, D[0].mT) if D else turned",
        "turned",
    ),
    Mutant("subspace/transport", "D transposed", "D[0].mT) if D", "D[0]) if D"),
    Mutant(
        "subspace/transport",
        "columns of squares left behind",
        "for d in D:\n                    x =",
        "for d in ():\n                    x =",
    ),
    Mutant(
        "subspace/transport",
        "reset of squares too",
        "x = jnp.broadcast_to(x.mean(axis=(0, 1) if D else 0, keepdims=True), x.shape)",
        "x = jnp.zeros_like(x)",
    ),
    Mutant(
        "subspace/transport",
        "other factor not rescaled",
        "return new, other * jnp.where(",
        "return new, other + 0 * jnp.where(",
    ),
    Mutant(
        "subspace/transport",
        "columns' factor left behind",
        "    for d in D:\n        col, row",
        "    for d in ():\n        col, row",
    ),
    Mutant("subspace/transport", "packed cores pass", "if packed and role", "if False and role"),
    Mutant("subspace/transport", "any shape passes", "    if not fits:", "    if False:"),
    Mutant(
        "subspace/weight_decay",
        "memories of init pass",
        "inputs[place] |= bits & (WEIGHT | READ)",
        "pass",
    ),
    Mutant(
        "subspace/weight_decay",
        "a transpose is linear",
        '"reshape", "squeeze"',
        '"reshape", "squeeze", "transpose"',
    ),
    Mutant(
        "subspace/weight_decay",
        "by elements is by a number",
        "if 0 in inputs else _misread(inputs)",
        "",
    ),
    Mutant(
        "subspace/weight_decay",
        "a decay of zero remembers",
        "        return 0  # a weight decay",
        "        pass  # a weight decay",
    ),
    Mutant("subspace/weight_decay", "branches unread", "list(cases)) for cases", "[0]) for cases"),
    Mutant("optimizers", "b2 unchecked", '    check_decay("b2", b2)\n', ""),
    Mutant(
        "util/validation",
        "half precision passes",
        "value.dtype.itemsize < 4",
        "value.dtype.itemsize < 2",
    ),
    Mutant(
        "tree/state_roles",
        "one number turned",
        "return role in SQUARES and x.shape",
        "return False and x.shape",
    ),
    Mutant(
        "sharding/partitioning",
        "bases lie as the other side",
        '"basis": [rows, None]',
        '"basis": [cols, None]',
    ),
    Mutant(
        "sharding/partitioning",
        "blocks end where shards do",
        "None if axis - 1 in blocks else entry",
        "entry",
    ),
    Mutant(
        "sharding/partitioning",
        "merged axes lie as the first",
        "any(other is not None for other in others)",
        "False",
    ),
    Mutant(
        "sharding/distributed",
        "a stack is gathered",
        "if not batch:\n        return f(",
        "if True:\n        return f(",
    ),
    Mutant(
        "sharding/partitioning",
        "what the user said is forgotten",
        "return _known.get() or Layout(None, {})",
        "return Layout(None, {})",
    ),
    Mutant(
        "sharding/state_shardings",
        "ZeRO on an axis twice",
        "if any(axis in held(entry) for entry in parts):",
        "if False:",
    ),
    Mutant(
        "sharding/state_shardings",
        "a state may drift",
        "return updates, placed(state, updates)",
        "return updates, state",
    ),
    Mutant("subspace/engine", "cores of any state", "check_cores(updates, state.basis)", "pass"),
    Mutant(
        "lowrank_grads/refresh_from_gradients",
        "late gradients wait",
        "when(due(result), ",
        "when(due(none), ",
    ),
    Mutant(
        "lowrank_grads/refresh_from_gradients",
        "refreshes when none is due",
        "when(~due(none)",
        "when(due(none)",
    ),
    Mutant(
        "lowrank_grads/value_and_grad",
        "any optimizer's state",
        "_key(state) not in engines",
        "False",
    ),
    Mutant(
        "lowrank_grads/loss",
        "blanks as on one device",
        "return varying_as(lax.full",
        "return (lax.full",
    ),
    Mutant("lowrank_grads/loss", "sums of micro-batches", "(t / number)", "t"),
    Mutant(
        "lowrank_grads/loss", "sums in the leaf's dtype", "x.update(dtype=working_dtype(x))", "x"
    ),
    Mutant(
        "lowrank_grads/value_and_grad", "passes for every group", "number <= FEW", "number <= 100"
    ),
    Mutant("lowrank_grads/value_and_grad", "knows no layout", "layout.mesh is None", "False"),
    Mutant(
        "lowrank_grads/refresh",
        "products of other lengths",
        "x.value.mT * D[x.spec.path]",
        "x.value.mT",
    ),
    Mutant(
        "lowrank_grads/refresh",
        "one turn at the start",
        "refresh.method.first_iterations, 1)",
        "1, 1)",
    ),
    Mutant(
        "lowrank_grads/refresh",
        "turns what is not due",
        "k < x for x in each",
        "k < x + 1 for x in each",
    ),
    Mutant("lowrank_grads/refresh", "counts each turn", "(usable & first)", "usable"),
    Mutant(
        "lowrank_grads/refresh",
        "inner stays behind",
        "Turning(kept, old.times + (usable & first), recoded(carried, old.carried))",
        "Turning(kept, old.times + (usable & first), old.carried)",
    ),
    Mutant("lowrank_grads/refresh", "one key for ever", "index, old.times + 1, 0)", "index, 1, 0)"),
    Mutant(
        "subspace/residual",
        "isotropic on all of a column",
        "left = math.prod(sides) - ",
        "left = math.prod(sides) or ",
    ),
    Mutant("subspace/residual", "isotropic without damping", "part + DAMPING", "part + 0.0"),
    Mutant(
        "subspace/residual",
        "isotropic by the core",
        "1 - of_R / of_G, 0.0) * (1 + of_R",
        "1 + of_R / of_G, 0.0) * (1 + of_R",
    ),
    Mutant(
        "subspace/residual",
        "isotropic with a limit",
        'UNLIMITED = (None, "isotropic", "whitened")',
        'UNLIMITED = (None, "whitened")',
    ),
    Mutant(
        "sharding/distributed",
        "matrices in shards are multiplied",
        "mesh is None or not shared",
        "True",
    ),
    Mutant(
        "sharding/distributed",
        "matrices are never on_whole_matrices out",
        "names.append(name)",
        "pass",
    ),
    Mutant("subspace/residual", "whitened without damping", "/ of_G) + DAMPING)", "/ of_G))"),
    Mutant("subspace/residual", "whitened rounding", "if directions == 0:", "if False:"),
    Mutant(
        "subspace/residual",
        "whitened on all directions",
        "min(m if len(bases) == 2 else m - r, n)",
        "min(m, n)",
    ),
    Mutant("util/linalg", "polar of the long side", "return X.mT if tall else X", "return X"),
    Mutant(
        "util/linalg",
        "polar in one turn less",
        "lax.fori_loop(0, 5, turn",
        "lax.fori_loop(1, 5, turn",
    ),
    Mutant("sharding/state_shardings", "takes no cores", "True if is_core(G) else G", "G"),
    Mutant("lowrank_grads/loss", "cores in the leaf's dtype", "core_dtype(P, w))", "w.dtype)"),
    Mutant(
        "lowrank_grads/tangent_weight",
        "a factor forgotten",
        "weight * by.reshape(()), core=core",
        "weight * by",
    ),
    Mutant(
        "lowrank_grads/dot_general",
        "x P comes last",
        "label for i in contracted[0]",
        "label for i in batch[0]",
    ),
    Mutant(
        "lowrank_grads/primitive_rules",
        "minus forgotten",
        "scale(v, -jnp.ones",
        "scale(v, jnp.ones",
    ),
    Mutant(
        "lowrank_grads/primitive_rules", "gathers the weight alone", "plain(v) if alone else v", "y"
    ),
    Mutant(
        "lowrank_grads/interpreter",
        "scans forward",
        '("length", "reverse", "unroll")',
        '("length", "unroll")',
    ),
    Mutant(
        "lowrank_grads/interpreter",
        "falls back in silence",
        "place, x, whole=True))",
        "place, x, whole=False))",
    ),
    Mutant(
        "lowrank_grads/interpreter",
        "in no program",
        "within=(eqn, *use.within)",
        "within=use.within",
    ),
    Mutant("lowrank_grads/flops", "a loop turns once", "times = math.prod(lengths)", "times = 1"),
    Mutant(
        "lowrank_grads/flops",
        "a weight that falls back is projected at no cost",
        "whole + _lifting(v, v.sizes)",
        "whole",
    ),
    Mutant(
        "lowrank_grads/flops",
        "experts as one",
        "for n in {*x_axes, *_flat(v)}",
        "for n in {*x_axes}",
    ),
    Mutant(
        "lowrank_grads/flops",
        "one pass with all weights tagged",
        "w if (path in bases) != projected else",
        "0 or",
    ),
    Mutant(
        "lowrank_grads/flops",
        "a program called twice is one",
        "(*map(id, use.within), id(use.eqn)",
        "(id(use.eqn)",
    ),
    Mutant(
        "lowrank_grads/explain",
        "projecting costs nothing",
        "row.whole_flops + projecting(spec)",
        "row.whole_flops",
    ),
    Mutant(
        "lowrank_grads/explain",
        "no whole gradient where one falls back",
        "nbytes + sum(each",
        "nbytes + 0 * sum(each",
    ),
    Mutant("util/text_tables", "leaves alike by name alone", "of(row)), [])", "None), [])"),
    Mutant("lowrank_grads/nnx", "a step leaves no state", "nnx.update(model, drawn, rest)", "pass"),
    Mutant(
        "lowrank_grads/nnx",
        "bases are lost",
        "nnx.update(optimizer.opt_state, nnx.state(opt_state))",
        "pass",
    ),
    Mutant(
        "lowrank_grads/nnx",
        "masks alike in all micro-batches",
        "fold_in)(key.ravel(), after[at].ravel())",
        "fold_in)(key.ravel(), 0 * after[at].ravel())",
    ),
    Mutant(
        "lowrank_grads/nnx", "statistics of the last micro-batch", "x[0], mean)", "x[0], x[-1])"
    ),
    Mutant(
        "lowrank_grads/nnx",
        "cores with names of axes",
        "type(w)(G) if is_core(G) else w.replace(G)",
        "w.replace(G)",
    ),
    Mutant("subspace/engine", "updates are gathered whole", "layout.hint(", "(lambda x, _: x)("),
    Mutant(
        "sharding/partitioning",
        "no mesh entered",
        "if explicit and get_abstract_mesh().empty:",
        "if False:",
    ),
    Mutant("sharding/partitioning", "manual axes as Auto", "axes=mesh.explicit_axes, ", ""),
    Mutant(
        "sharding/shard_map",
        "unreduced gradients pass",
        "varying(G) - varying(kept",
        "varying(G) & varying(kept",
    ),
    Mutant(
        "sharding/shard_map",
        "casts none",
        'to="varying") if axes else x',
        'to="varying") if None else x',
    ),
    Mutant("util/linalg", "narrow factors of any update", "dtype != jnp.bfloat16 or", "False and"),
    Mutant(
        "util/linalg",
        "narrow factors for all that was asked",
        "16 or highest_precision_requested()",
        "16",
    ),
    Mutant("util/linalg", "an identity that all devices share", "jnp.zeros_like(A) + jnp", "jnp"),
    Mutant(
        "fisher/stacks", "two dtypes in one stack", "else jax.typeof(R), []", "else R.shape, []"
    ),
    Mutant("subspace/weight_decay", "a number that was cast is none", ', "pvary"),', "),"),
    Mutant(
        "sharding/state_shardings",
        "the host is not told",
        '"pinned_host" if x else',
        '"device" if x else',
    ),
    Mutant(
        "quantization/dynamic_8bit",
        "what is small becomes zero",
        "jnp.maximum(q, code.smallest), q)",
        "q, q)",
    ),
    Mutant(
        "quantization/dynamic_8bit",
        "squares as they are",
        "code.nearest(jnp.sqrt(y) if code.squares else y)",
        "code.nearest(y)",
    ),
    Mutant(
        "quantization/dynamic_8bit",
        "decades begin at their edge",
        "start = (below + (2 * first + 9) * unit) / 2",
        "start = below",
    ),
    Mutant(
        "quantization/dynamic_8bit",
        "up and never down",
        "< chance, high, low)",
        "< 2.0, high, low)",
    ),
    Mutant(
        "quantization/dynamic_8bit",
        "not a number is a number",
        "q = jnp.where(finite, q, code.nan)",
        "pass",
    ),
    Mutant("quantization/dynamic_8bit", "blocks that shards cut", "(math.gcd(n // b, 8), b)", "b"),
    Mutant(
        "quantization/quantized_array",
        "refreshed gradients in the clear",
        "return x.anew(array)\n",
        "return array\n",
    ),
    Mutant(
        "quantization/quantized_array",
        "bases as codes have them",
        "1.5 * P - 0.5 * matmul",
        "P - 0.0 * matmul",
    ),
    Mutant(
        "quantization/quantized_array", "a basis rounded on each step", "jnp.where(same, a, b)", "b"
    ),
    Mutant(
        "quantization/quantized_array",
        "a core in full beside its codes",
        "return x if block is None else decode",
        "return x if True else decode",
    ),
    Mutant(
        "quantization/symmetric_16bit",
        "high bytes alone",
        "(256 * high + jnp.triu(q, 1).mT)",
        "(256 * high)",
    ),
    Mutant(
        "quantization/symmetric_16bit",
        "low bytes of the wrong pair",
        "jnp.tril(low, -1).mT",
        "jnp.triu(low, 1)",
    ),
    Mutant(
        "quantization/symmetric_16bit", "high bytes that do not fit", "(q + 128) / 256", "q / 256"
    ),
    Mutant("quantization/symmetric_16bit", "a diagonal of ones", "full[..., None], x)", "1.0, x)"),
    Mutant(
        "quantization/symmetric_16bit", "infinity is zero", "jnp.where(finite, high, NAN)", "high"
    ),
    Mutant(
        "quantization/quantized",
        "the Gram matrix of other cores",
        "before = _with_grams(before)",
        "pass",
    ),
    Mutant(
        "quantization/quantized",
        "a Fisher by the code of moments",
        "return coded_symmetric(x) if _is_symmetric(x) else x",
        "return coded(CODES['linear'], x, block_of(x), None)",
    ),
    Mutant("quantization/staged_update", "all parts at once", "if before:", "if False:"),
    Mutant(
        "quantization/staged_update",
        "writes what has not changed",
        "unchanged = of_new[i] == i",
        "unchanged = 0",
    ),
    Mutant(
        "quantization/staged_update",
        "reads apart what is needed together",
        "in set(wanted):",
        "in ():",
    ),
    Mutant("quantization/staged_update", "parts of single arrays", "and filled >= LEAST", ""),
    Mutant(
        "quantization/staged_update",
        "reads calls as one step",
        "if eqn.primitive.name in INLINED:",
        "if False:",
    ),
    Mutant(
        "tree/state_roles",
        "a basis in codes has a dtype",
        'getattr(node.value, "dtype", None)',
        "node.value.dtype",
    ),
    Mutant("quantization/quantized", "one key for all leaves", "jax.random.fold_in(key, i)", "key"),
    Mutant(
        "quantization/quantized", "one key for all steps", "jax.random.key_data(following)", "key"
    ),
    Mutant("quantization/quantized", "cores inside a projection", "if cores(params):", "if False:"),
    Mutant(
        "quantization/stochastic_rounding",
        "always to zero",
        "jnp.uint32) + noise",
        "jnp.uint32) + 0 * noise",
    ),
    Mutant(
        "quantization/stochastic_rounding",
        "half the noise",
        "jnp.uint16).astype(jnp.uint32)",
        "jnp.uint8).astype(jnp.uint32)",
    ),
    Mutant(
        "quantization/stochastic_rounding",
        "one key for all leaves",
        "jax.random.fold_in(now, i)",
        "now",
    ),
    Mutant(
        "quantization/stochastic_rounding",
        "one key for all steps",
        "jax.random.key_data(following)",
        "state.key",
    ),
    Mutant(
        "quantization/stochastic_rounding",
        "what is not finite too",
        "jnp.where(jnp.isfinite(x), cut, x)",
        "cut",
    ),
    Mutant(
        "sharding/state_shardings",
        "scales of a few blocks cut",
        "entries = trimmed([*entries[:-1], *last])",
        "pass",
    ),
    Mutant(
        "util/linalg",
        "a largest entry that hides NaN",
        "return jnp.where(finite, jnp.abs(X).max(axis=axes), jnp.nan)",
        "return jnp.abs(X).max(axis=axes)",
    ),
    Mutant("sharding/offload", "vectors too", "chosen = x.ndim > 1 and", "chosen = x.ndim > 0 and"),
    Mutant(
        "sharding/offload",
        "a state stays on the device",
        "return updates, to(jax.memory.Space.Host, state)",
        "return updates, state",
    ),
    Mutant(
        "sharding/offload", "windows are moments", '("linear", *SQUARES)', '("linear", "window")'
    ),
    Mutant(
        "subspace/refresh",
        "a pass over the gradient on every step",
        "part, n = lax.optimization_barrier((part, old.times))",
        "n = old.times",
    ),
    Mutant(
        "subspace/project",
        "stages fall out of the subspace",
        "(outside if opened is None else inside)",
        "outside",
    ),
    Mutant(
        "subspace/project",
        "always staggered",
        "TRANSPORTS[transport], stagger, seed)",
        "TRANSPORTS[transport], True, seed)",
    ),
    Mutant(
        "subspace/project",
        "chain forgets refresh_every",
        "            refresh_every=refresh_every,\n",
        "",
    ),
    Mutant("subspace/project", "chain forgets the side", "            side=side,\n", ""),
    Mutant(
        "subspace/project", "chain forgets the transport", "            transport=transport,\n", ""
    ),
    Mutant(
        "subspace/project", "chain forgets the residual", "            residual=residual,\n", ""
    ),
    Mutant(
        "subspace/residual",
        "ratio upside down",
        "of_U / jnp.where(known, of_R, 1.0)",
        "of_R / jnp.where(known, of_U, 1.0)",
    ),
    Mutant(
        "subspace/residual", "one ratio a matrix", "if two_sided else (-2,)", "if True else (-2,)"
    ),
    Mutant(
        "subspace/residual",
        "of the other sign",
        "U - phi * R, phi * G, norm",
        "U + phi * R, -phi * G, norm",
    ),
    Mutant(
        "subspace/residual",
        "no limit",
        "GROWTH * before / jnp.where(grown, size, 1.0), 1",
        "1.0, 1",
    ),
    Mutant("subspace/residual", "norm before the limit", "norm = limit * size", "norm = size"),
    Mutant("subspace/residual", "norm of the gradient", "phi * left, 0.0", "phi * of_G, 0.0"),
    Mutant("subspace/residual", "a norm of zero remembered", "(norm > 0) & jnp", "jnp"),
    Mutant("subspace/residual", "not gated", "G = jnp.where(whole, G, 0)", "pass"),
    Mutant("subspace/residual", "a function not gated", "S = jnp.where(whole, S, 0)", "S = S"),
    Mutant("subspace/residual", "rounding scaled up", "of_R > RESOLUTION *", "of_R > 0 *"),
    Mutant(
        "util/linalg",
        "squares that overflow",
        "unit = power_of_two(jnp.abs(X",
        "unit = jnp.ones_like(jnp.abs(X",
    ),
    Mutant(
        "subspace/learning_rate_check",
        "a difference is a sum",
        "_sum([inputs[0], _minus(inputs[1])])",
        "_sum(inputs)",
    ),
    Mutant(
        "subspace/learning_rate_check",
        "noise beside it counts",
        "for x in inputs if x.source == source)",
        "for x in inputs)",
    ),
    Mutant(
        "subspace/learning_rate_check",
        "a condition must be minus throughout",
        "_either(cases)",
        "_sum(cases)",
    ),
    Mutant(
        "subspace/learning_rate_check",
        "numbers have no sign",
        "return Sign(OTHER, bool(x < 0)) if x",
        "return Sign(OTHER) if x",
    ),
    Mutant(
        "selection/infer_axes",
        "layers on the first axis only",
        "return axes\n    return ()",
        "return (0,)\n    return ()",
    ),
    Mutant("selection/infer_axes", "biases tell nothing", "if 0 < k < len(rest):", "if 0 < k < 0:"),
    Mutant("selection/infer_axes", "guesses unmarked", "guess=not known", "guess=False"),
    Mutant(
        "selection/infer_axes", "width by the shortest norm", "longest = max(", "longest = min("
    ),
    Mutant(
        "selection/name_rules",
        "outermost word decides",
        "for word in reversed(found):",
        "for word in found:",
    ),
    Mutant(
        "selection/per_leaf",
        "the last rule counts",
        "for pattern, value in compiled if",
        "for pattern, value in compiled[::-1] if",
    ),
    Mutant(
        "selection/select",
        "fractions of the long side",
        "round(rank * short)",
        "round(rank * max(spec.m, spec.n))",
    ),
    Mutant(
        "selection/select",
        "blocks before the stack",
        "(*moved(spec.batch), *counting)",
        "(*counting, *moved(spec.batch))",
    ),
    Mutant(
        "selection/select",
        "long side for the short",
        '"short": spec.m > spec.n',
        '"short": spec.m < spec.n',
    ),
    Mutant(
        "tree/leaf_spec",
        "another matrix of the stack",
        "dict(zip(self.batch, self._place(i), strict=True))",
        "dict(zip(self.batch, self._place(0 * i), strict=True))",
    ),
]

FIRST = {  # where a room's faults show soonest; all other quick tests follow
    "subspace/basis": [
        "subspace/test_basis",
        "subspace/test_engine",
        "integration/test_trajectory",
    ],
    "util/linalg": [
        "util/test_linalg",
        "subspace/test_engine",
        "fisher/test_window",
        "subspace/test_basis",
        "sharding/test_shard_map",
    ],
    "sharding/shard_map": ["sharding/test_shard_map"],
    "subspace/refresh": [
        "integration/test_trajectory",
        "subspace/test_engine",
        "sharding/test_state_shardings",
    ],
    "subspace/engine": [
        "integration/test_trajectory",
        "subspace/test_engine",
        "integration/test_contract",
        "sharding/test_state_shardings",
    ],
    "subspace/lift": [
        "integration/test_trajectory",
        "subspace/test_engine",
        "subspace/test_residual",
    ],
    **{
        room: [
            f"lowrank_grads/test_{name}"
            for name in ("dot_general", "primitive_rules", "interpreter", "loss", "refresh")
        ]
        + ["lowrank_grads/test_value_and_grad"]
        for room in (
            "lowrank_grads/loss",
            "lowrank_grads/value_and_grad",
            "lowrank_grads/interpreter",
            "lowrank_grads/tangent_weight",
            "lowrank_grads/refresh",
            "lowrank_grads/primitive_rules",
            "lowrank_grads/refresh_from_gradients",
        )
    },
    **{
        room: ["lowrank_grads/test_explain"]
        for room in ("lowrank_grads/flops", "lowrank_grads/explain", "lowrank_grads/dot_general")
    },
    "util/text_tables": ["reporting/test_describe", "lowrank_grads/test_explain"],
    "lowrank_grads/nnx": ["lowrank_grads/test_nnx"],
    "subspace/projection": [
        "integration/test_trajectory",
        "subspace/test_engine",
        "lowrank_grads/test_refresh",
        "lowrank_grads/test_value_and_grad",
    ],
    "subspace/residual": ["subspace/test_residual", "integration/test_trajectory"],
    "subspace/learning_rate_check": ["subspace/test_residual"],
    "tree/flax_boxes": ["tree/test_flax_boxes", "integration/test_flax"],
    "subspace/refresh_loop": [
        "subspace/test_refresh_loop",
        "integration/test_trajectory",
        "subspace/test_engine",
        "sharding/test_state_shardings",
    ],
    "util/control_flow": ["util/test_control_flow"],
    "fisher/window": [
        "fisher/test_window",
        "fisher/test_both_forms",
        "integration/test_trajectory",
    ],
    "fisher/core": ["fisher/test_core", "fisher/test_both_forms", "integration/test_trajectory"],
    "fisher/stacks": ["fisher/test_core", "integration/test_trajectory"],
    "subspace/transport": [
        "subspace/test_transport",
        "integration/test_trajectory",
        "integration/test_partners",
    ],
    "subspace/weight_decay": [
        "subspace/test_weight_decay",
        "sharding/test_shard_map",
        "integration/test_partners",
    ],
    "optimizers": ["integration/test_trajectory", "integration/test_injection"],
    "util/validation": ["subspace/test_project", "integration/test_injection"],
    "subspace/project": ["subspace/test_project", "integration/test_trajectory"],
    "selection/name_rules": ["selection/test_infer_axes", "selection/test_held_out_trees"],
    "selection/infer_axes": ["selection/test_infer_axes", "selection/test_held_out_trees"],
    "selection/per_leaf": ["selection/test_select"],
    "selection/select": ["selection/test_select"],
    "sharding/state_shardings": [
        "sharding/test_state_shardings",
        "sharding/test_offload",
        "quantization/test_quantized",
        "integration/test_flax",
        "lowrank_grads/test_refresh",
        "lowrank_grads/test_value_and_grad",
    ],
    "sharding/offload": ["sharding/test_offload"],
    "quantization/dynamic_8bit": ["quantization/test_quantized"],
    "quantization/quantized_array": [
        "quantization/test_quantized",
        "quantization/test_quantized_roles",
    ],
    "quantization/symmetric_16bit": ["quantization/test_quantized_roles"],
    "quantization/staged_update": ["quantization/test_staged_update"],
    "quantization/quantized": ["quantization/test_quantized", "quantization/test_quantized_roles"],
    "quantization/stochastic_rounding": ["quantization/test_stochastic_rounding"],
    "sharding/partitioning": ["sharding/test_state_shardings", "sharding/test_shard_map"],
    "sharding/distributed": ["sharding/test_state_shardings", "docs/test_sharding"],
    "tree/state_roles": [
        "tree/test_state_roles",
        "integration/test_partners",
        "quantization/test_quantized_roles",
    ],
    "tree/leaf_spec": ["tree/test_leaf_spec", "integration/test_trajectory"],
}


def planted(mutant: Mutant, text: str) -> str:
    """The room's text with the fault in it."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.room}, {mutant.name}: its text stands there not exactly once")
    return text.replace(mutant.old, mutant.new)


def quick_tests(mutant: Mutant) -> list[list[str]]:
    """Test files in two rounds: where the fault should show, and the others."""
    first = [f"tests/{name}.py" for name in FIRST[mutant.room]]
    every = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    skipped = {
        f"tests/{name}.py"
        for name in ("examples/test_pretrain", "examples/test_quickstart", "docs/test_readme")
    }
    return [first, [name for name in every if name not in {*first, *skipped}]]


def failing_without_a_fault(jobs: int) -> str:
    """The quick tests that fail as the library is, a line each."""
    files = [name for some in quick_tests(MUTANTS[0]) for name in some]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=no"]
    command += ["-n", str(jobs), *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) .*", run.stdout, re.MULTILINE)
    return "\n".join(failed or run.stdout.splitlines()[-1:]) if run.returncode else ""


def verdict(mutant: Mutant) -> tuple[str, float]:
    """The test that killed the mutant, or `survived`, or what went wrong; and seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("natgalore_jax", "tests", "examples", "docs", "benchmarks"):
            ignore = shutil.ignore_patterns("__pycache__", "runs")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        room = copy / "natgalore_jax" / f"{mutant.room}.py"
        room.write_text(planted(mutant, room.read_text()))
        for files in quick_tests(mutant):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow"]
            command += ["-p", "no:cacheprovider", "--tb=no", *files]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            run = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, check=False
            )
            if run.returncode:
                killer = re.search(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
                # Anything but a failed test is no verdict: the fault should be one that runs.
                said = killer[1] if killer else f"error: {run.stdout.strip().splitlines()[-1:]}"
                return said, time.perf_counter() - started
    return "survived", time.perf_counter() - started


def write_report(verdicts: dict[Mutant, str]) -> None:
    survivors = sum(said == "survived" for said in verdicts.values())
    lines = [
        "# Planted faults",
        "",
        "Do the tests notice when the library is wrong? Each row is one fault, planted alone in a "
        "copy of the repository, and the first of the quick tests that failed there. A fault that "
        "none notices has survived: a test is missing. What each fault changes in "
        "`natgalore_jax/<room>.py` is in [tests/mutants.py](../tests/mutants.py); `make mutants` "
        "plants them all again and writes this page.",
        "",
        f"Faults: {len(verdicts)}. Killed: {len(verdicts) - survivors}. Survived: {survivors}.",
        "",
        "| room | fault | killed by |",
        "|---|---|---|",
    ]
    for mutant, said in verdicts.items():
        killer = f"`{said.split('[')[0]}`" if said.startswith("tests/") else said
        lines.append(f"| {mutant.room} | {mutant.name} | {killer} |")
    REPORT.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only faults whose room or name has one of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    args = parser.parse_args()
    wanted = [
        m for m in MUTANTS if not args.words or any(w in f"{m.room} {m.name}" for w in args.words)
    ]
    print(f"the quick tests without a fault, then {len(wanted)} faults", flush=True)
    if failed := failing_without_a_fault(args.jobs):
        sys.exit(f"tests fail without a fault, so they would tell nothing:\n{failed}")
    verdicts: dict[Mutant, str] = {}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(verdict, mutant): mutant for mutant in wanted}
        for future in concurrent.futures.as_completed(futures):
            mutant, (said, seconds) = futures[future], future.result()
            verdicts[mutant] = said
            done = f"{len(verdicts)}/{len(wanted)}"
            print(f"{done}  {mutant.room}: {mutant.name}  {said}  {seconds:.0f} s", flush=True)
    if not args.words:
        write_report({mutant: verdicts[mutant] for mutant in MUTANTS})
    bad = [m for m, said in verdicts.items() if said == "survived" or said.startswith("error")]
    sys.exit(f"{len(bad)} of {len(wanted)} were not killed" if bad else 0)


if __name__ == "__main__":
    main()
