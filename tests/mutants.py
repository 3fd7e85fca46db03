"""Plants faults in the library, one at a time, and sees whether the quick tests notice.

    make mutants                         all of them; writes docs/mutants.md
    make mutants ARGS="transport gate"   those whose room or name has one of these words

Each fault is one replacement of text in a copy of the repository. A fault that the tests let pass
is a survivor, and a test is missing. `tests/test_mutants.py` sees that each still applies.
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
    Mutant("basis", "ignores the gradient", "of_product(matmul(G, matmul(G.mT, P)), P)", "P"),
    Mutant("basis", "none of the old basis", "SHIFT = 1e-6", "SHIFT = 0.0"),
    Mutant("basis", "svd of the other sign", "largest < 0, -1.0, 1.0", "largest < 0, 1.0, -1.0"),
    Mutant(
        "basis",
        "trailing singular vectors",
        "full_matrices=False)[0][:, : P.shape[-1]]",
        "full_matrices=False)[0][:, -P.shape[-1] :]",
    ),
    Mutant("basis", "one turn at the start", "first, self.first_turns, 1)", "first, 1, 1)"),
    Mutant("basis", "gradient in its own units", "G / jnp.where(usable, unit, 1.0)", "G"),
    Mutant(
        "basis", "Q has P's key", "for part in (side, index, times)", "for part in (index, times)"
    ),
    Mutant(
        "basis", "random without signs", "signs[:, None] * size", "jnp.abs(signs)[:, None] * size"
    ),
    Mutant("basis", "phase loses its high part", "((high << 8) + odd", "(odd"),
    Mutant(
        "basis",
        "constant column too long",
        "jnp.sqrt(1 / m), jnp.sqrt",
        "jnp.sqrt(2 / m), jnp.sqrt",
    ),
    Mutant("basis", "same columns for every key", "jax.random.permutation(columns_key, ", "("),
    Mutant(
        "linalg",
        "QR of any sign",
        "< 0, -1.0, 1.0).astype(Q.dtype)",
        "< 0, 1.0, 1.0).astype(Q.dtype)",
    ),
    Mutant(
        "linalg",
        "rounding that compilers skip",
        "lax.reduce_precision(x, info.nexp, info.nmant).astype",
        "x.astype",
    ),
    Mutant(
        "refresh",
        "a step late",
        "(count % self.every == phases)",
        "((count + 1) % self.every == phases)",
    ),
    Mutant("refresh", "waits for its turn from cold", " | ((times == 0) & usable)", ""),
    Mutant(
        "refresh",
        "core of the stale basis",
        "R = to_core(G, *bases)",
        "R = to_core(G, *olds)",
    ),
    Mutant("refresh", "C transposed", "matmul(new.mT, P) for", "matmul(P.mT, new) for"),
    Mutant(
        "refresh",
        "state turned by a bad gradient",
        "jnp.where(usable, x, before) for x",
        "x for x",
    ),
    Mutant("refresh", "basis of a bad gradient", "keep(new, x) for new", "new for new"),
    Mutant(
        "refresh",
        "Q never refreshed",
        "self.method.next(unit.mT if side else unit, P, key, n == 0)",
        "P if side else self.method.next(unit, P, key, n == 0)",
    ),
    Mutant("sweep", "one key for a stack", "spec.cut(G, i), order[i]", "spec.cut(G, i), order[0]"),
    Mutant("sweep", "one key for leaves alike", "part, order[e], old", "part, order[0], old"),
    Mutant("sweep", "what is of experts alike", "e // spec.matrices, e % spec.matrices", "e, e"),
    Mutant("control", "a tree of no depth", "if len(states) <= BRANCHES", "if True"),
    Mutant(
        "linalg",
        "a Q that is not checked",
        "return lax.cond(near(gram), ",
        "return (lambda p, f, g: f())(True, ",
    ),
    Mutant(
        "linalg",
        "scales of another condition",
        "least = 1 / math.sqrt(condition)",
        "least = 1 / condition",
    ),
    Mutant(
        "fisher_core",
        "all roots at each new basis",
        "jnp.where(due[..., None, None], Z, old[0])",
        "Z",
    ),
    Mutant(
        "refresh",
        "the same random basis again",
        "index, n + 1, side",
        "index, 1, side",
    ),
    Mutant("refresh", "matrices, not groups", "index * number // max(total, 1) *", "index *"),
    Mutant("lift", "gate open", "x.replace(jnp.where(ok.value[..., None, None], x.value, 0))", "x"),
    Mutant(
        "lift",
        "gate open for other leaves",
        "return jnp.where(ok, x, jnp.zeros_like(x))",
        "return x",
    ),
    Mutant(
        "lift",
        "inner's answer not gated",
        "answer = jax.tree.map(keep_where, answer, finite, is_leaf=is_core)",
        "pass",
    ),
    Mutant(
        "engine",
        "stale basis at lifting",
        "decay, finite, bases, weights, left)",
        "decay, finite, [state.basis, state.right_basis], weights, left)",
    ),
    Mutant("lift", "scale twice", "scale * U, *", "scale * scale * U, *"),
    Mutant("lift", "scale of one part", " + scale * S", " + S"),
    Mutant("lift", "decay doubled", "a * weight, 0)", "2 * a * weight, 0)"),
    Mutant(
        "lift",
        "decay passes the gate",
        "jnp.where(ok.value[..., None, None], a * weight, 0)",
        "a * weight",
    ),
    Mutant(
        "engine",
        "count stands still",
        "count = optax.safe_increment(state.count)",
        "count = state.count",
    ),
    Mutant("engine", "counts the good steps", "n + (~ok).astype", "n + ok.astype"),
    Mutant(
        "lower", "state in the leaf's dtype", "jnp.promote_types(x.dtype, jnp.float32)", "x.dtype"
    ),
    Mutant("engine", "takes a state of any rank", "walk(state, _refuse_misfit)", "pass"),
    Mutant("engine", "another format's number", "FORMAT_VERSION = 1", "FORMAT_VERSION = 2"),
    Mutant("lower", "takes a gradient of any shape", "G.shape != P.spec.shape", "False"),
    Mutant(
        "engine",
        "inner never sees a box",
        "inner, params = boxed(self.inner, params), unbox(params)",
        "inner, params = self.inner, unbox(params)",
    ),
    Mutant("boxes", "cores in boxes", "is_core(x) or not is_box(box)", "not is_box(box)"),
    Mutant("boxes", "any tuple a box", "tuple | Core | Basis", "Core | Basis"),
    Mutant("boxes", "a module a box", " and _is_single(children[0][1])", ""),
    Mutant(
        "boxes", "inner's answer in boxes", "return unbox(updates), state", "return updates, state"
    ),
    Mutant("project", "selects in boxes", "select_leaves(unbox(params)", "select_leaves(params"),
    Mutant("engine", "seed ignored", "basis_key(self.refresh.seed, i", "basis_key(0, i"),
    Mutant("fisher_window", "slot off by one", "slot = count % size", "slot = (count + 1) % size"),
    Mutant(
        "fisher_window",
        "K row not replaced",
        "gram = jnp.where(here[..., :, None], row[..., None, :], gram)",
        "pass",
    ),
    Mutant(
        "fisher_window",
        "answers for the oldest",
        "one_hot((count - 1) % size",
        "one_hot(count % size",
    ),
    Mutant(
        "fisher_window",
        "slot keeps its old scale",
        "scale = jnp.where(here, unit[..., None], scale)",
        "pass",
    ),
    Mutant(
        "fisher_window",
        "damping of other units",
        "damping / largest / largest",
        "damping / largest",
    ),
    Mutant("fisher_window", "damping by the sum", "1.0) / filled", "1.0)"),
    Mutant("fisher_window", "unit of another power", "largest ** (1 - 2 * power)", "largest**-1.0"),
    Mutant(
        "fisher_window",
        "exact column beside rounded ones",
        "newest.astype(gram.dtype)\n",
        "(R / unit[..., None, None])\n",
    ),
    Mutant(
        "fisher_window",
        "a zero core takes a slot",
        "count + accepted.astype(count.dtype)",
        "count + 1",
    ),
    Mutant(
        "fisher_window", "no way out of rounding", "jnp.where(solved, weights, parallel)", "weights"
    ),
    Mutant(
        "fisher_core",
        "count not bias-corrected",
        "fisher / jnp.where(known, weight, 1.0)[..., None, None]",
        "fisher",
    ),
    Mutant(
        "fisher_core", "a spike passes", "(in_turn | (scale > OUTGROWN * root_scale))", "in_turn"
    ),
    Mutant("fisher_core", "a sum, not a mean", "(1 - beta) * jnp.square", "1.0 * jnp.square"),
    Mutant(
        "fisher_core", "unit of another power", "unit ** (1 - 2 * power)", "unit ** (1 - power)"
    ),
    Mutant(
        "fisher_core",
        "roots out of turn",
        "state.count % root_every == 0",
        "state.count % root_every == 1",
    ),
    Mutant(
        "fisher_core",
        "damping not by the mean",
        "trace(L, axis1=-2, axis2=-1) / r",
        "trace(L, axis1=-2, axis2=-1)",
    ),
    Mutant(
        "transport",
        "energy lost",
        "matmul(squares, v) + lost * v.mean",
        "matmul(squares, v) + 0 * v.mean",
    ),
    Mutant(
        "transport",
        "squares turned as momentum",
        "return matmul(squares, v)",
        "return matmul(C, v)",
    ),
    Mutant("transport", "K not renewed", "x = gram(rotated[-1].astype(x.dtype))", "pass"),
    Mutant("transport", "L turned on one side", "matmul(matmul(C, x), C.mT)", "matmul(C, x)"),
    Mutant(
        "transport",
        "root not renewed",
        '            case "root":\n                x = jnp.zeros_like(x)',
        '            case "root":\n                pass',
    ),
    Mutant(
        "transport", "columns left behind", "matmul(turned, D[0].mT) if D else turned", "turned"
    ),
    Mutant("transport", "D transposed", "D[0].mT) if D", "D[0]) if D"),
    Mutant(
        "transport",
        "columns of squares left behind",
        "for d in D:\n                    x =",
        "for d in ():\n                    x =",
    ),
    Mutant(
        "transport",
        "reset of squares too",
        "x = jnp.broadcast_to(x.mean(axis=(0, 1) if D else 0, keepdims=True), x.shape)",
        "x = jnp.zeros_like(x)",
    ),
    Mutant(
        "transport",
        "other factor not rescaled",
        "return new, other * jnp.where(",
        "return new, other + 0 * jnp.where(",
    ),
    Mutant(
        "transport",
        "columns' factor left behind",
        "    for d in D:\n        col, row",
        "    for d in ():\n        col, row",
    ),
    Mutant("transport", "packed cores pass", "if packed and role", "if False and role"),
    Mutant("transport", "any shape passes", "    if not fits:", "    if False:"),
    Mutant("decay", "memories of init pass", "inputs[place] |= bits & (WEIGHT | READ)", "pass"),
    Mutant(
        "decay",
        "a transpose is linear",
        '"reshape", "squeeze"',
        '"reshape", "squeeze", "transpose"',
    ),
    Mutant("decay", "by elements is by a number", "if 0 in inputs else _misread(inputs)", ""),
    Mutant(
        "decay",
        "a decay of zero remembers",
        "        return 0  # a weight decay",
        "        pass  # a weight decay",
    ),
    Mutant("decay", "branches unread", "list(cases)) for cases", "[0]) for cases"),
    Mutant("recipes", "b2 unchecked", '    check_decay("b2", b2)\n', ""),
    Mutant(
        "checks", "half precision passes", "value.dtype.itemsize < 4", "value.dtype.itemsize < 2"
    ),
    Mutant(
        "roles",
        "one number turned",
        "return role in SQUARES and x.shape",
        "return False and x.shape",
    ),
    Mutant(
        "placement", "bases lie as the other side", '"basis": [rows, None]', '"basis": [cols, None]'
    ),
    Mutant(
        "placement", "blocks end where shards do", "None if axis - 1 in blocks else entry", "entry"
    ),
    Mutant(
        "placement",
        "merged axes lie as the first",
        "any(other is not None for other in others)",
        "False",
    ),
    Mutant(
        "dealing",
        "a stack is gathered",
        "if not batch:\n        return f(",
        "if True:\n        return f(",
    ),
    Mutant(
        "placement",
        "what the user said is forgotten",
        "return _known.get() or Layout(None, {})",
        "return Layout(None, {})",
    ),
    Mutant(
        "sharding",
        "ZeRO on an axis twice",
        "if any(axis in held(entry) for entry in parts):",
        "if False:",
    ),
    Mutant(
        "sharding",
        "a state may drift",
        "return updates, placed(state, updates)",
        "return updates, state",
    ),
    Mutant("engine", "cores of any state", "refuse_other_cores(updates, state.basis)", "pass"),
    Mutant("whole", "late gradients wait", "when(due(result), ", "when(due(none), "),
    Mutant("whole", "refreshes when none is due", "when(~due(none)", "when(due(none)"),
    Mutant("gradients", "any optimizer's state", "_key(state) not in engines", "False"),
    Mutant("backward", "blanks as on one device", "return varying_as(lax.full", "return (lax.full"),
    Mutant("backward", "sums of micro-batches", "(t / number)", "t"),
    Mutant("backward", "sums in the leaf's dtype", "x.update(dtype=working_dtype(x))", "x"),
    Mutant("gradients", "passes for every group", "number <= FEW", "number <= 100"),
    Mutant("gradients", "knows no layout", "layout.mesh is None", "False"),
    Mutant("turns", "products of other lengths", "x.value.mT * D[x.spec.path]", "x.value.mT"),
    Mutant("turns", "one turn at the start", "refresh.method.first_turns, 1)", "1, 1)"),
    Mutant("turns", "turns what is not due", "k < x for x in each", "k < x + 1 for x in each"),
    Mutant("turns", "counts each turn", "(usable & first)", "usable"),
    Mutant(
        "turns",
        "inner stays behind",
        "Turning(kept, old.times + (usable & first), recoded(carried, old.carried))",
        "Turning(kept, old.times + (usable & first), old.carried)",
    ),
    Mutant("turns", "one key for ever", "index, old.times + 1, 0)", "index, 1, 0)"),
    Mutant(
        "residual",
        "isotropic on all of a column",
        "left = math.prod(sides) - ",
        "left = math.prod(sides) or ",
    ),
    Mutant("residual", "isotropic without damping", "part + DAMPING", "part + 0.0"),
    Mutant(
        "residual",
        "isotropic by the core",
        "1 - of_R / of_G, 0.0) * (1 + of_R",
        "1 + of_R / of_G, 0.0) * (1 + of_R",
    ),
    Mutant(
        "residual",
        "isotropic with a limit",
        'UNLIMITED = (None, "isotropic", "whitened")',
        'UNLIMITED = (None, "whitened")',
    ),
    Mutant("dealing", "matrices in shards are multiplied", "mesh is None or not shared", "True"),
    Mutant("dealing", "matrices are never dealt out", "names.append(name)", "pass"),
    Mutant("residual", "whitened without damping", "/ of_G) + DAMPING)", "/ of_G))"),
    Mutant("residual", "whitened rounding", "if directions == 0:", "if False:"),
    Mutant(
        "residual",
        "whitened on all directions",
        "min(m if len(bases) == 2 else m - r, n)",
        "min(m, n)",
    ),
    Mutant("linalg", "polar of the long side", "return X.mT if tall else X", "return X"),
    Mutant(
        "linalg", "polar in one turn less", "lax.fori_loop(0, 5, turn", "lax.fori_loop(1, 5, turn"
    ),
    Mutant("sharding", "takes no cores", "True if is_core(G) else G", "G"),
    Mutant("backward", "cores in the leaf's dtype", "core_dtype(P, w))", "w.dtype)"),
    Mutant("tagged", "a factor forgotten", "weight * by.reshape(()), core=core", "weight * by"),
    Mutant("products", "x P comes last", "label for i in contracted[0]", "label for i in batch[0]"),
    Mutant("uses", "minus forgotten", "scale(v, -jnp.ones", "scale(v, jnp.ones"),
    Mutant("uses", "gathers the weight alone", "plain(v) if alone else v", "y"),
    Mutant("lowrank", "scans forward", '("length", "reverse", "unroll")', '("length", "unroll")'),
    Mutant("lowrank", "falls back in silence", "place, x, whole=True))", "place, x, whole=False))"),
    Mutant("lowrank", "in no program", "within=(eqn, *use.within)", "within=use.within"),
    Mutant("costs", "a loop turns once", "times = math.prod(lengths)", "times = 1"),
    Mutant(
        "costs",
        "a weight that falls back is projected at no cost",
        "whole + _lifting(v, v.sizes)",
        "whole",
    ),
    Mutant("costs", "experts as one", "for n in {*x_axes, *_flat(v)}", "for n in {*x_axes}"),
    Mutant(
        "costs",
        "one pass with all weights tagged",
        "w if (path in bases) != projected else",
        "0 or",
    ),
    Mutant(
        "costs",
        "a program called twice is one",
        "(*map(id, use.within), id(use.eqn)",
        "(id(use.eqn)",
    ),
    Mutant(
        "explain",
        "projecting costs nothing",
        "row.whole_flops + projecting(spec)",
        "row.whole_flops",
    ),
    Mutant(
        "explain",
        "no whole gradient where one falls back",
        "nbytes + sum(each",
        "nbytes + 0 * sum(each",
    ),
    Mutant("tables", "leaves alike by name alone", "of(row)), [])", "None), [])"),
    Mutant("nnx", "a step leaves no state", "nnx.update(model, drawn, rest)", "pass"),
    Mutant(
        "nnx", "bases are lost", "nnx.update(optimizer.opt_state, nnx.state(opt_state))", "pass"
    ),
    Mutant(
        "nnx",
        "masks alike in all micro-batches",
        "fold_in)(key.ravel(), after[at].ravel())",
        "fold_in)(key.ravel(), 0 * after[at].ravel())",
    ),
    Mutant("nnx", "statistics of the last micro-batch", "x[0], mean)", "x[0], x[-1])"),
    Mutant(
        "nnx",
        "cores with names of axes",
        "type(w)(G) if is_core(G) else w.replace(G)",
        "w.replace(G)",
    ),
    Mutant("engine", "updates are gathered whole", "layout.hint(", "(lambda x, _: x)("),
    Mutant(
        "placement", "no mesh entered", "if explicit and get_abstract_mesh().empty:", "if False:"
    ),
    Mutant("placement", "manual axes as Auto", "axes=mesh.explicit_axes, ", ""),
    Mutant(
        "manual",
        "unreduced gradients pass",
        "varying(G) - varying(kept",
        "varying(G) & varying(kept",
    ),
    Mutant("manual", "casts none", 'to="varying") if axes else x', 'to="varying") if None else x'),
    Mutant("linalg", "narrow factors of any update", "dtype != jnp.bfloat16 or", "False and"),
    Mutant("linalg", "narrow factors for all that was asked", "16 or all_digits_asked()", "16"),
    Mutant("linalg", "an identity that all devices share", "jnp.zeros_like(A) + jnp", "jnp"),
    Mutant("stacks", "two dtypes in one stack", "else jax.typeof(R), []", "else R.shape, []"),
    Mutant("decay", "a number that was cast is none", ', "pvary"),', "),"),
    Mutant("sharding", "the host is not told", '"pinned_host" if x else', '"device" if x else'),
    Mutant("codes", "what is small becomes zero", "jnp.maximum(q, code.smallest), q)", "q, q)"),
    Mutant(
        "codes",
        "squares as they are",
        "code.nearest(jnp.sqrt(y) if code.squares else y)",
        "code.nearest(y)",
    ),
    Mutant(
        "codes",
        "decades begin at their edge",
        "start = (below + (2 * first + 9) * unit) / 2",
        "start = below",
    ),
    Mutant("codes", "up and never down", "< chance, high, low)", "< 2.0, high, low)"),
    Mutant("codes", "not a number is a number", "q = jnp.where(finite, q, code.nan)", "pass"),
    Mutant("codes", "blocks that shards cut", "(math.gcd(n // b, 8), b)", "b"),
    Mutant(
        "coded",
        "refreshed gradients in the clear",
        "return x.anew(array)\n",
        "return array\n",
    ),
    Mutant("coded", "bases as codes have them", "1.5 * P - 0.5 * matmul", "P - 0.0 * matmul"),
    Mutant("coded", "a basis rounded on each step", "jnp.where(same, a, b)", "b"),
    Mutant(
        "coded",
        "a core in full beside its codes",
        "return x if block is None else decode",
        "return x if True else decode",
    ),
    Mutant("symmetric", "high bytes alone", "(256 * high + jnp.triu(q, 1).mT)", "(256 * high)"),
    Mutant("symmetric", "low bytes of the wrong pair", "jnp.tril(low, -1).mT", "jnp.triu(low, 1)"),
    Mutant("symmetric", "high bytes that do not fit", "(q + 128) / 256", "q / 256"),
    Mutant("symmetric", "a diagonal of ones", "full[..., None], x)", "1.0, x)"),
    Mutant("symmetric", "infinity is zero", "jnp.where(finite, high, NAN)", "high"),
    Mutant("quantize", "the Gram matrix of other cores", "before = _with_grams(before)", "pass"),
    Mutant(
        "quantize",
        "a Fisher by the code of moments",
        "return coded_symmetric(x) if _is_symmetric(x) else x",
        "return coded(CODES['linear'], x, block_of(x), None)",
    ),
    Mutant("parts", "all parts at once", "if before:", "if False:"),
    Mutant("parts", "writes what has not changed", "unchanged = of_new[i] == i", "unchanged = 0"),
    Mutant("parts", "reads apart what is needed together", "in set(wanted):", "in ():"),
    Mutant("parts", "parts of single arrays", "and filled >= LEAST", ""),
    Mutant("parts", "reads calls as one step", "if eqn.primitive.name in INLINED:", "if False:"),
    Mutant(
        "roles",
        "a basis in codes has a dtype",
        'getattr(node.value, "dtype", None)',
        "node.value.dtype",
    ),
    Mutant("quantize", "one key for all leaves", "jax.random.fold_in(key, i)", "key"),
    Mutant("quantize", "one key for all steps", "jax.random.key_data(following)", "key"),
    Mutant("quantize", "cores inside a projection", "if cores(params):", "if False:"),
    Mutant("rounding", "always to zero", "jnp.uint32) + noise", "jnp.uint32) + 0 * noise"),
    Mutant(
        "rounding",
        "half the noise",
        "jnp.uint16).astype(jnp.uint32)",
        "jnp.uint8).astype(jnp.uint32)",
    ),
    Mutant("rounding", "one key for all leaves", "jax.random.fold_in(now, i)", "now"),
    Mutant("rounding", "one key for all steps", "jax.random.key_data(following)", "state.key"),
    Mutant("rounding", "what is not finite too", "jnp.where(jnp.isfinite(x), cut, x)", "cut"),
    Mutant(
        "sharding",
        "scales of a few blocks cut",
        "entries = trimmed([*entries[:-1], *last])",
        "pass",
    ),
    Mutant(
        "linalg",
        "a largest entry that hides NaN",
        "return jnp.where(finite, jnp.abs(X).max(axis=axes), jnp.nan)",
        "return jnp.abs(X).max(axis=axes)",
    ),
    Mutant("offload", "vectors too", "chosen = x.ndim > 1 and", "chosen = x.ndim > 0 and"),
    Mutant(
        "offload",
        "a state stays on the device",
        "return updates, to(jax.memory.Space.Host, state)",
        "return updates, state",
    ),
    Mutant("offload", "windows are moments", '("linear", *SQUARES)', '("linear", "window")'),
    Mutant(
        "refresh",
        "a pass over the gradient on every step",
        "part, n = lax.optimization_barrier((part, old.times))",
        "n = old.times",
    ),
    Mutant(
        "project",
        "stages fall out of the subspace",
        "(outside if opened is None else inside)",
        "outside",
    ),
    Mutant(
        "project",
        "always staggered",
        "TRANSPORTS[transport], stagger, seed)",
        "TRANSPORTS[transport], True, seed)",
    ),
    Mutant(
        "project", "chain forgets refresh_every", "            refresh_every=refresh_every,\n", ""
    ),
    Mutant("project", "chain forgets the side", "            side=side,\n", ""),
    Mutant("project", "chain forgets the transport", "            transport=transport,\n", ""),
    Mutant("project", "chain forgets the residual", "            residual=residual,\n", ""),
    Mutant(
        "residual",
        "ratio upside down",
        "of_U / jnp.where(known, of_R, 1.0)",
        "of_R / jnp.where(known, of_U, 1.0)",
    ),
    Mutant("residual", "one ratio a matrix", "if two_sided else (-2,)", "if True else (-2,)"),
    Mutant(
        "residual", "of the other sign", "U - phi * R, phi * G, norm", "U + phi * R, -phi * G, norm"
    ),
    Mutant("residual", "no limit", "GROWTH * before / jnp.where(grown, size, 1.0), 1", "1.0, 1"),
    Mutant("residual", "norm before the limit", "norm = limit * size", "norm = size"),
    Mutant("residual", "norm of the gradient", "phi * left, 0.0", "phi * of_G, 0.0"),
    Mutant("residual", "a norm of zero remembered", "(norm > 0) & jnp", "jnp"),
    Mutant("residual", "not gated", "G = jnp.where(whole, G, 0)", "pass"),
    Mutant("residual", "a function not gated", "S = jnp.where(whole, S, 0)", "S = S"),
    Mutant("residual", "rounding scaled up", "of_R > RESOLUTION *", "of_R > 0 *"),
    Mutant(
        "linalg",
        "squares that overflow",
        "unit = power_of_two(jnp.abs(X",
        "unit = jnp.ones_like(jnp.abs(X",
    ),
    Mutant(
        "signs", "a difference is a sum", "_sum([inputs[0], _minus(inputs[1])])", "_sum(inputs)"
    ),
    Mutant(
        "signs",
        "noise beside it counts",
        "for x in inputs if x.source == source)",
        "for x in inputs)",
    ),
    Mutant("signs", "a condition must be minus throughout", "_either(cases)", "_sum(cases)"),
    Mutant(
        "signs",
        "numbers have no sign",
        "return Sign(OTHER, bool(x < 0)) if x",
        "return Sign(OTHER) if x",
    ),
    Mutant(
        "layout",
        "layers on the first axis only",
        "return axes\n    return ()",
        "return (0,)\n    return ()",
    ),
    Mutant("layout", "biases tell nothing", "if 0 < k < len(rest):", "if 0 < k < 0:"),
    Mutant("layout", "guesses unmarked", "guess=not known", "guess=False"),
    Mutant("layout", "width by the shortest norm", "longest = max(", "longest = min("),
    Mutant("kinds", "outermost word decides", "for word in reversed(found):", "for word in found:"),
    Mutant(
        "rules",
        "the last rule counts",
        "for pattern, value in compiled if",
        "for pattern, value in compiled[::-1] if",
    ),
    Mutant(
        "select",
        "fractions of the long side",
        "round(rank * short)",
        "round(rank * max(spec.m, spec.n))",
    ),
    Mutant(
        "select",
        "blocks before the stack",
        "(*moved(spec.batch), *counting)",
        "(*counting, *moved(spec.batch))",
    ),
    Mutant(
        "select", "long side for the short", '"short": spec.m > spec.n', '"short": spec.m < spec.n'
    ),
    Mutant(
        "spec",
        "another matrix of the stack",
        "dict(zip(self.batch, self._place(i), strict=True))",
        "dict(zip(self.batch, self._place(0 * i), strict=True))",
    ),
]

FIRST = {  # where a room's faults show soonest; all other quick tests follow
    "basis": ["test_basis", "test_engine", "test_trajectory"],
    "linalg": ["test_linalg", "test_engine", "test_fisher", "test_basis", "test_manual"],
    "manual": ["test_manual"],
    "refresh": ["test_trajectory", "test_engine", "test_sharding"],
    "engine": ["test_trajectory", "test_engine", "test_contract", "test_sharding"],
    "lift": ["test_trajectory", "test_engine", "test_residual"],
    **{
        room: ["test_gradients"]
        for room in ("backward", "gradients", "lowrank", "tagged", "turns", "uses", "whole")
    },
    **{room: ["test_explain"] for room in ("costs", "explain", "products")},
    "tables": ["test_report", "test_explain"],
    "nnx": ["test_nnx_gradients"],
    "lower": ["test_trajectory", "test_engine", "test_gradients"],
    "residual": ["test_residual", "test_trajectory"],
    "signs": ["test_residual"],
    "boxes": ["test_boxes", "test_flax"],
    "sweep": ["test_sweep", "test_trajectory", "test_engine", "test_sharding"],
    "control": ["test_control"],
    "fisher_window": ["test_fisher", "test_trajectory"],
    "fisher_core": ["test_fisher", "test_trajectory"],
    "stacks": ["test_fisher", "test_trajectory"],
    "transport": ["test_transport", "test_trajectory", "test_partners"],
    "decay": ["test_decay", "test_manual", "test_partners"],
    "recipes": ["test_trajectory", "test_injection"],
    "checks": ["test_project", "test_injection"],
    "project": ["test_project", "test_trajectory"],
    "kinds": ["test_layout", "test_unseen"],
    "layout": ["test_layout", "test_unseen"],
    "rules": ["test_select"],
    "select": ["test_select"],
    "sharding": ["test_sharding", "test_offload", "test_quantize", "test_flax", "test_gradients"],
    "offload": ["test_offload"],
    "codes": ["test_quantize"],
    "coded": ["test_quantize", "test_quantize_roles"],
    "symmetric": ["test_quantize_roles"],
    "parts": ["test_parts"],
    "quantize": ["test_quantize", "test_quantize_roles"],
    "rounding": ["test_rounding"],
    "placement": ["test_sharding", "test_manual"],
    "dealing": ["test_sharding", "test_docs_sharding"],
    "roles": ["test_roles", "test_partners", "test_quantize_roles"],
    "spec": ["test_spec", "test_trajectory"],
}


def planted(mutant: Mutant, text: str) -> str:
    """The room's text with the fault in it."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.room}, {mutant.name}: its text stands there not exactly once")
    return text.replace(mutant.old, mutant.new)


def quick_tests(mutant: Mutant) -> list[list[str]]:
    """Test files in two rounds: where the fault should show, and the others."""
    first = [f"tests/{name}.py" for name in FIRST[mutant.room]]
    every = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    skipped = {
        f"tests/test_{name}.py" for name in ("examples", "examples_small", "readme", "mutants")
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
