"""Trajectories through several refreshes against the float64 oracle.

Every setting is a factor of `Case`. Every two levels of the factors meet in the quick run, every
three in the slow one. The gradients do not depend on the weights, so that an error of one step is
not amplified by later ones and a tolerance can be derived.
"""

import dataclasses
import functools
import itertools
import random

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import natgalore_jax as natgalore
from natgalore_jax.subspace.basis import expand, svd
from natgalore_jax.subspace.state import SubspaceState
from natgalore_jax.tree.cores import Basis, core_arrays
from tests.helpers.cases import slow
from tests.helpers.compiling import AS_FOR_USERS
from tests.oracle import oracles


RANK = 4
STEPS = 10
REFRESH_EVERY = 3  # refreshes at steps 0, 3, 6 and 9, or staggered around them


# --- The factors ------------------------------------------------------------------------------


def one_call(fisher, learning_rate, weight_decay, adam, **subspace):
    subspace = {"residual": None} | subspace
    return natgalore.natural_galore(
        learning_rate, RANK, fisher=fisher, weight_decay=weight_decay, **adam, **subspace
    )


def stages(fisher, adam):
    by_name = {
        None: (),
        "core": (natgalore.scale_by_core_fisher(),),
        "window": (natgalore.scale_by_fisher(),),
    }
    fisher = by_name[fisher] if fisher is None or isinstance(fisher, str) else (fisher,)
    return *fisher, optax.scale_by_adam(**adam)


def line_by_line(fisher, learning_rate, weight_decay, adam, **subspace):
    return natgalore.chain(
        natgalore.project(RANK, **subspace),
        *stages(fisher, adam),
        natgalore.project_back(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def wrapper(fisher, learning_rate, weight_decay, adam, **subspace):
    return optax.chain(
        natgalore.project(RANK, inner=optax.chain(*stages(fisher, adam)), **subspace),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def around_adamw(fisher, learning_rate, weight_decay, adam, **subspace):
    assert fisher is None
    return natgalore.chain(
        natgalore.project(RANK, **subspace),
        optax.adamw(learning_rate, weight_decay=weight_decay, **adam),
    )


SPELLINGS = {
    "one_call": one_call,
    "line_by_line": line_by_line,
    "wrapper": wrapper,
    "around_adamw": around_adamw,
}

# Constructors of the library's form and of the oracle's.
FISHERS = {
    "no_fisher": (lambda: None, None),
    "core": (lambda: "core", lambda: oracles.CoreFisher(0.98, 0.1, 0.5, 10)),
    "core_inverse": (
        lambda: natgalore.scale_by_core_fisher(0.9, 0.2, power=1.0, root_every=2),
        lambda: oracles.CoreFisher(0.9, 0.2, 1.0, 2),
    ),
    "core_fourth_root": (
        lambda: natgalore.scale_by_core_fisher(0.8, 0.1, power=0.25, root_every=4),
        lambda: oracles.CoreFisher(0.8, 0.1, 0.25, 4),
    ),
    "window": (lambda: "window", lambda: oracles.WindowFisher(20, 1e-3)),
    "window_of_3": (
        lambda: natgalore.scale_by_fisher(3, 0.1),
        lambda: oracles.WindowFisher(3, 0.1),
    ),
    "window_relative": (
        lambda: natgalore.scale_by_fisher(4, 0.2, relative=True, power=0.5),
        lambda: oracles.WindowFisher(4, 0.2, 0.5, relative=True),
    ),
    "window_rounded": (
        lambda: natgalore.scale_by_fisher(4, 0.1, power=0.25, window_dtype=jnp.bfloat16),
        lambda: oracles.WindowFisher(4, 0.1, 0.25, dtype=ml_dtypes.bfloat16),
    ),
}


def function(G, P, key):
    """A basis that depends on G's units and on P, so that each call changes it."""
    Q, R = jnp.linalg.qr(G @ (G.T @ P) + 0.3 * P)
    return Q * jnp.sign(jnp.diagonal(R))[None]


def oracle_function(g, p, turns):
    g = g / np.abs(g).max()
    return oracles.orthonormal(g @ (g.T @ p) + 0.3 * p)


class Following:
    """The oracle's basis for `basis="random"`: the one that the library drew."""

    def __init__(self):
        self.next = {}

    def between(self, old, new):
        """Records each changed basis under its old value."""
        pairs = [(p.tobytes(), q) for p, q in zip(old, new, strict=True) if (p != q).any()]
        self.next = dict(pairs)
        assert len(self.next) == len(pairs)  # no two bases are one

    def __call__(self, g, p, turns):
        return self.next[p.tobytes()]


# The library's basis, and what makes the oracle's.
BASES = {
    "power": ("power", lambda: "power"),
    "svd": ("svd", lambda: "svd"),
    "function": (function, lambda: oracle_function),
    "random": ("random", Following),
}


def damped(left, R, U):
    """A user's residual, on NumPy arrays where the oracle calls it."""
    return left * (np if isinstance(left, np.ndarray) else jnp).linalg.norm(U) / (1 + abs(R).sum())


# The library's residual, the oracle's, and arguments of both.
RESIDUALS = {
    "none": (None, None, {}),
    "isotropic": ("isotropic", oracles.isotropic, {}),
    "whitened": ("whitened", oracles.whitened, {"residual_scale": 0.7}),
    "momentum": ("whitened", oracles.whitened, {"residual_momentum": 0.8, "residual_scale": 0.2}),
    "own": (damped, damped, {}),
}

TREES = {
    "tall": {"layers": {"0": {"attention": {"query": {"kernel": (20, 12)}}}}},
    "wide": {"layers": {"0": {"attention": {"query": {"kernel": (12, 20)}}}}},
    "stack": {
        "layers": {
            "mlp": {"down": {"kernel": (3, 20, 12)}, "up": {"kernel": (3, 12, 20)}},
            "mlp_norm": {"scale": (3, 12)},
        }
    },
    "mixed": {
        "embed": {"embedding": (16, 12)},
        "head": {"kernel": (12, 16)},
        "layers": {
            "0": {
                "attention": {
                    "out": {"kernel": (4, 5, 12)},  # (heads, head width, d)
                    "query": {"bias": (12,), "kernel": (12, 12)},
                },
                "mlp": {"up": {"kernel": (12, 20)}},
            }
        },
        "norm": {"scale": (12,)},
    },
}


def decaying_rate(count):
    return 0.1 / (1 + 0.2 * count)


FINISHES = {
    "plain": {"learning_rate": 0.1, "weight_decay": 0.0, "scale": 1.0},
    "decayed": {"learning_rate": decaying_rate, "weight_decay": 0.3, "scale": 0.25},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One level of each factor."""

    spelling: str
    fisher: str
    transport: str
    basis: str
    side: str
    calendar: str
    tree: str
    finish: str
    gradients: str
    residual: str = "none"

    def __str__(self):
        return "-".join(dataclasses.astuple(self))


FACTORS = {
    "spelling": SPELLINGS,
    "fisher": FISHERS,
    "transport": ("rotate", "keep", "reset"),
    "basis": BASES,
    "side": ("short", "long", "left", "right", "both"),
    "calendar": ("staggered", "together"),
    "tree": TREES,
    "finish": FINISHES,
    "gradients": ("good", "spoiled"),
    "residual": RESIDUALS,
}


def makes_sense(levels):
    """Whether these levels of some factors can be combined."""
    if levels.get("spelling") != "around_adamw":
        return True
    if levels.get("fisher", "no_fisher") != "no_fisher":
        return False  # it would stand beside another Adam, not before it
    if levels.get("residual", "none") != "none":
        return False  # the learning rate is inside, so it is refused
    # Its decay is inside the gate: see test_update_of_a_nonfinite_gradient_is_zero.
    return (levels.get("finish"), levels.get("gradients")) != ("decayed", "spoiled")


def covering(strength, seed=0):
    """Few cases in which every `strength` levels that can meet do meet.

    Each case starts from levels that have not met, and every other factor takes the level that
    meets most of the missing ones. Reference: AETG, Cohen et al. (1997).
    """
    rng = random.Random(seed)
    missing = {}  # a set in insertion order: every xdist worker must find the same cases
    for some in itertools.combinations(FACTORS, strength):
        for levels in itertools.product(*[FACTORS[name] for name in some]):
            meeting = tuple(zip(some, levels, strict=True))
            if makes_sense(dict(meeting)):
                missing[meeting] = None

    def newly_met(case):
        pairs = [(name, case[name]) for name in FACTORS if name in case]
        return [x for x in itertools.combinations(pairs, strength) if x in missing]

    while missing:
        case = dict(next(iter(missing)))
        for name in rng.sample(list(FACTORS), len(FACTORS)):
            levels = rng.sample(list(FACTORS[name]), len(FACTORS[name]))
            levels = [case | {name: level} for level in levels if name not in case]
            case = max(filter(makes_sense, levels), key=lambda x: len(newly_met(x)), default=case)
        if len(case) == len(FACTORS):  # else no level makes sense: the next order is another one
            for x in newly_met(case):
                del missing[x]
            yield Case(**case)


def cheapest_cover():
    """The pairwise cover that compiles least, of 20 seeds: several leaves take twice the time."""
    cost = lambda cases: sum(1 + (case.tree in ("stack", "mixed")) for case in cases)
    return min((list(covering(2, seed)) for seed in range(20)), key=cost)


COVER = cheapest_cover()
# Every level and four fifths of the pairs; the first cases of a cover meet most of them.
QUICK = [*COVER[:20], next(case for case in COVER if case.spelling == "around_adamw")]


# --- Weights and gradients ----------------------------------------------------------------------


def names(path):
    return [key.key for key in path]


def is_projected(path):
    return names(path)[-1] == "kernel" and "head" not in names(path)


def as_matrices(path, leaf, *steps):
    """A projected leaf as (*steps, matrices, rows, columns); heads and their width are rows."""
    if "out" in names(path):
        return leaf.reshape(*steps, 1, -1, leaf.shape[-1])
    return leaf.reshape(*steps, -1, *leaf.shape[-2:])


def unrolled(tree):
    """The projected matrices of a tree, stacks unrolled, and its other leaves."""
    matrices, others = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if is_projected(path):
            matrices.extend(as_matrices(path, np.asarray(leaf)))
        else:
            others.append(np.asarray(leaf))
    return matrices, others


def drifting(rng, shape):
    """Gradients of one leaf at each step: six directions that rotate by 0.3 a step, and noise.

    There are more directions than the rank, with gaps between their sizes, so that the singular
    vectors are well determined and each refresh both rotates the basis and loses a part of it.
    """
    if len(shape) == 1:
        return drifting(rng, (*shape, 1))[..., 0]
    *stack, rows, columns = shape
    sizes = np.array([1.0, 0.7, 0.5, 0.35, 0.2, 0.1])
    left = rng.standard_normal((2, *stack, rows, 6))
    right = rng.standard_normal((2, *stack, columns, 6))
    angle = 0.3 * np.arange(STEPS).reshape(-1, *[1] * len(shape))
    turned = (np.cos(angle) * left[0] + np.sin(angle) * left[1]) * sizes
    signal = turned @ np.swapaxes(np.cos(angle) * right[0] + np.sin(angle) * right[1], -1, -2)
    return signal + 0.03 * rng.standard_normal((STEPS, *shape))


def spoil(gradients, stagger):
    """Zero and non-finite gradients at refreshes, beside them and at the first step.

    The matrices cycle through three patterns; the other leaves have one.
    """
    total = len(unrolled(jax.tree.map(lambda g: g[0], gradients))[0])

    def refreshes(index):
        return [t for t in range(STEPS) if oracles.due(index, t, REFRESH_EVERY, total, stagger)]

    index = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if not is_projected(path):
            leaf[2].flat[-1] = np.nan
            leaf[5] = 0.0
            continue
        for matrix in np.moveaxis(as_matrices(path, leaf, STEPS), 1, 0):
            first, second, third, *_ = refreshes(index)
            match index % 3:
                case 0:  # its first basis stays until the third refresh, which is its first
                    matrix[first, 1, 2] = np.nan
                    matrix[second] = 0.0
                    matrix[second + 1, 3, 4] = np.inf
                case 1:  # one refresh missed, and a hole in the window
                    matrix[second - 1] = 0.0
                    matrix[second, 1, 2] = -np.inf
                case 2:  # zero at first, later non-finite in every entry
                    matrix[first] = 0.0
                    matrix[third] = np.nan
            index += 1
    return gradients


def problem(case):
    """Weights, and gradients with an axis of steps in front."""
    rng = np.random.default_rng(list(map(ord, case.tree)))

    def series(path, weight):
        view = as_matrices(path, weight) if is_projected(path) else weight
        return drifting(rng, view.shape).reshape(STEPS, *weight.shape)

    is_shape = lambda x: isinstance(x, tuple)
    weights = jax.tree.map(rng.standard_normal, TREES[case.tree], is_leaf=is_shape)
    gradients = jax.tree_util.tree_map_with_path(series, weights)
    if case.gradients == "spoiled":
        gradients = spoil(gradients, case.calendar == "staggered")
    return weights, gradients


# --- Both sides ---------------------------------------------------------------------------------


def subspace(state) -> SubspaceState:
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SubspaceState))
    return next(node for node in found if isinstance(node, SubspaceState))


expanded = jax.jit(expand, static_argnums=(1, 2))


def bases(state):
    """Every matrix's [P], or [P, Q], in the order of the oracle's matrices."""

    def unrolled_bases(tree):
        for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Basis)):
            full = np.asarray(expanded(x.value, x.spec, jnp.float64), np.float64)
            yield from full.reshape(-1, x.spec.m, x.spec.rank)

    left = list(unrolled_bases(subspace(state).basis))
    right = list(unrolled_bases(subspace(state).right_basis))
    return [list(both) for both in zip(left, right, strict=True)] if right else [[p] for p in left]


def momenta(state):
    """M of every matrix, in the order of the oracle's matrices."""
    stacks = core_arrays(subspace(state).inner_state.momentum)
    return [M for x in stacks for M in np.asarray(x).reshape(-1, *x.shape[-2:])]


def skipped(state):
    """Counts of non-finite gradients of each matrix and of each other leaf."""
    matrices, others = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(subspace(state).skipped):
        (matrices if is_projected(path) else others).extend(np.ravel(leaf))
    return matrices, others


@functools.lru_cache(maxsize=2)
def compiled(tx, dtype):
    """Jitted init and training step; in float32 with XLA's default options."""
    options = AS_FOR_USERS if dtype == np.float32 else None

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(tx.init, compiler_options=options), jax.jit(step, compiler_options=options)


def initial(tx, weights):
    init, _ = compiled(tx, jax.tree.leaves(weights)[0].dtype)
    return init(weights)


def trajectory(tx, weights, gradients):
    """Weights and state after each step."""
    _, step = compiled(tx, jax.tree.leaves(weights)[0].dtype)
    params, state = weights, initial(tx, weights)
    for t in range(len(jax.tree.leaves(gradients)[0])):
        params, state = step(params, state, jax.tree.map(lambda g, t=t: g[t], gradients))
        yield params, state


def settings(case, **changes):
    """Arguments of the library and the oracle."""
    return {
        **FINISHES[case.finish],
        # On both sides' singular vectors a core is diagonal up to rounding, which Adam without ε
        # would scale up to 1: an ε of 1e-3 is far above it.
        "adam": {"b1": 0.8, "b2": 0.95, "eps": 1e-3 if case.side == "both" else 1e-8},
        "refresh_every": REFRESH_EVERY,
        "side": case.side,
        "transport": case.transport,
        **changes,
    }


def library(case, **changes):
    kwargs = {"stagger": case.calendar == "staggered", **settings(case, **changes)}
    basis, _ = BASES[case.basis]
    residual, _, arguments = RESIDUALS[case.residual]
    kwargs |= {"basis": basis, "residual": residual, **arguments}
    return SPELLINGS[case.spelling](FISHERS[case.fisher][0](), **kwargs)


def oracle(case, weights, start, **changes):
    kwargs = settings(case, **changes)
    due = functools.partial(oracles.due, stagger=case.calendar == "staggered")
    matrices, others = unrolled(weights)
    return oracles.NaturalGaLore(
        matrices, others, start, due=due, fisher=FISHERS[case.fisher][1],
        basis=BASES[case.basis][1](), residual=RESIDUALS[case.residual][1],
        **RESIDUALS[case.residual][2], **kwargs.pop("adam"), **kwargs,
    )  # fmt: skip


def flat(lists):
    return [x for some in lists for x in some]


def compare(case, weights, gradients, atol, **changes):
    """Compares weights, bases and counts with the oracle's after every step."""
    tx = library(case, **changes)
    start = bases(initial(tx, weights))
    reference = oracle(case, weights, start if case.side == "both" else flat(start), **changes)
    rate, before = reference.learning_rate, flat(start)
    for t, (params, state) in enumerate(trajectory(tx, weights, gradients)):
        if callable(rate):
            reference.learning_rate = rate(t)
        after = flat(bases(state))
        if isinstance(reference.new_basis, Following):
            reference.new_basis.between(before, after)
        reference.step(*unrolled(jax.tree.map(lambda g, t=t: g[t], gradients)))
        before = after
        matrices, others = unrolled(params)
        sides = {
            "P or Q": (after, flat([x.bases for x in reference.matrices])),
            "matrix": (matrices, [x.weight for x in reference.matrices]),
            "other leaf": (others, [x.weight for x in reference.others]),
            "momentum": (momenta(state), [x.momentum for x in reference.matrices])
            if RESIDUALS[case.residual][2].get("residual_momentum")
            else ([], []),
            "skips of matrix": (skipped(state)[0], [x.skipped for x in reference.matrices]),
            "skips of other leaf": (skipped(state)[1], [x.skipped for x in reference.others]),
        }
        for name, (actual, expected) in sides.items():
            for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
                where = f"step {t}, {name} {i}"
                np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=where)


# Float64 rounds at 1e-16; QR, SVD (gaps of a tenth) and Adam's division lose two digits, and ten
# steps of size 0.1 add up. The window's solve loses cond = 1 + |H|²/λ, up to 1e6, more.
FLOAT64 = {fisher: 1e-9 if fisher.startswith("window") else 1e-12 for fisher in FISHERS}


def float64(case):
    """The tolerance; a whitened residual scales up small directions, and their rounding, by 485."""
    return max(FLOAT64[case.fisher], 1e-11 * (case.residual in ("whitened", "momentum")))


@pytest.mark.parametrize("case", [*QUICK, *slow(*[x for x in COVER if x not in QUICK])], ids=str)
def test_trajectory_equals_the_oracle(case):
    with jax.enable_x64(True):
        compare(case, *problem(case), atol=float64(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(covering(3)), ids=str)
def test_trajectory_equals_the_oracle_in_every_three_levels(case):
    # Among this many numbers one lies midway between two of bfloat16 and is rounded the other way
    # here: 2⁻⁹ of one of a window's 240 entries, times the learning rate.
    atol = max(float64(case), 1e-6 * (case.fisher == "window_rounded"))
    with jax.enable_x64(True):
        compare(case, *problem(case), atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fisher", "side", "tree"),
    [("core", "short", "mixed"), ("core", "both", "tall"), ("window_of_3", "short", "wide")],
)
def test_float32_trajectory_equals_the_oracle(fisher, side, tree):
    case = Case("one_call", fisher, "rotate", "power", side, "staggered", tree, "plain", "spoiled")
    weights, gradients = jax.tree.map(np.float32, problem(case))
    # A core of size 10 is off by 1e-6 (float32 rounds at 6e-8). Adam divides by at least eps =
    # 1e-2, the rate is 0.1: 1e-5 a step, and twice that with the window's solve.
    adam = {"b1": 0.8, "b2": 0.95, "eps": 1e-2}
    compare(case, weights, gradients, atol=2e-5, adam=adam)


def test_core_fisher_renews_its_root_when_gradients_grow():
    """Gradients that grow a hundredfold between two roots: the old root would let them through."""
    case = Case("one_call", "core", "rotate", "power", "short", "together", "wide", "plain", "good")
    weights, gradients = problem(case)
    growth = np.array([1, 1, 1, 1, 100, 100, 1, 1e-3, 1e4, 1e4])
    gradients = jax.tree.map(lambda g: g * growth[:, None, None], gradients)
    with jax.enable_x64(True):
        compare(case, weights, gradients, atol=1e-12, refresh_every=100)


# --- Exact relations ----------------------------------------------------------------------------


def after(tx, weights, gradients):
    """The weights after the last step, in float64."""
    with jax.enable_x64(True):
        *_, (params, _) = trajectory(tx, weights, gradients)
        return jax.tree.map(np.asarray, params)


def assert_close(actual, expected, atol):
    """Equal up to the order of float64 operations over some steps."""
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=atol)
    jax.tree.map(close, actual, expected)


def everything(tree, **changes):
    """An optimizer with both Fisher stages, Adam, decay and a schedule, and a problem for it."""
    case = Case("wrapper", "core", "rotate", "svd", "short", "together", tree, "decayed", "good")
    both = optax.chain(natgalore.scale_by_core_fisher(), natgalore.scale_by_fisher(3, 0.1))
    kwargs = {"stagger": False, "basis": "svd", **settings(case, **changes)}
    return SPELLINGS["wrapper"](both, **kwargs), *problem(case)


@pytest.mark.slow
def test_transport_is_the_identity_before_the_second_refresh():
    rotate, keep = (
        after(*everything("wide", transport=transport, refresh_every=STEPS))
        for transport in ("rotate", "keep")
    )
    jax.tree.map(np.testing.assert_array_equal, rotate, keep)


def test_stacked_layers_equal_separate_layers():
    tx, weights, gradients = everything("stack")
    del weights["layers"]["mlp"]["down"], gradients["layers"]["mlp"]["down"]
    for bad, where in ((np.nan, (4, 1, 2, 3)), (np.inf, (REFRESH_EVERY, 2, 3, 4))):
        gradients["layers"]["mlp"]["up"]["kernel"][where] = bad
    layers = {str(i): jax.tree.map(lambda w, i=i: w[i], weights["layers"]) for i in range(3)}
    series = {str(i): jax.tree.map(lambda g, i=i: g[:, i], gradients["layers"]) for i in range(3)}
    apart = after(tx, {"layers": layers}, {"layers": series})["layers"]
    together = after(tx, weights, gradients)["layers"]
    for i in range(3):
        assert_close(apart[str(i)], jax.tree.map(lambda w, i=i: w[i], together), atol=1e-11)


@pytest.mark.slow
def test_leaves_are_independent():
    tx, weights, gradients = everything("mixed")
    expected = after(tx, weights, gradients)["layers"]["0"]["mlp"]
    gradients["layers"]["0"]["attention"]["query"]["kernel"][:] *= 100
    gradients["layers"]["0"]["attention"]["query"]["kernel"][3] = np.nan
    gradients["embed"]["embedding"][4] = np.inf
    actual = after(tx, weights, gradients)["layers"]["0"]["mlp"]
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def permuted_svd(G, P, key):
    """`svd` with its basis vectors in another order and of other signs."""
    P = svd(G, P, key)
    order, signs = jax.numpy.argsort(G[: P.shape[1], 0]), jax.numpy.sign(G[: P.shape[1], 1])
    return P[:, order] * signs[None]


@pytest.mark.slow
def test_order_and_signs_of_basis_vectors_do_not_matter():
    """Under rotate and reset; under keep they change the weights as much as training does."""
    for transport in ("rotate", "reset"):
        expected = after(*everything("wide", transport=transport))
        actual = after(*everything("wide", basis=permuted_svd, transport=transport))
        assert_close(actual, expected, atol=1e-9)
    plain, other = (
        after(*everything("wide", basis=basis, transport="keep"))["layers"]["0"]
        for basis in ("svd", permuted_svd)
    )
    kernel, other = (x["attention"]["query"]["kernel"] for x in (plain, other))
    assert np.abs(kernel - other).max() > 1e-3


@pytest.mark.slow
def test_random_bases_differ_by_matrix_side_and_refresh():
    weights = {
        "layers": {"mlp": {"kernel": np.ones((2, 12, 12))}, "norm": {"scale": np.ones((2, 12))}}
    }
    gradients = jax.tree.map(lambda w: np.ones((3, *w.shape)), weights)
    tx = natgalore.project(
        RANK, optax.identity(), side="both", basis="random", refresh_every=1, stagger=False
    )
    with jax.enable_x64(True):
        drawn = [p for _, state in trajectory(tx, weights, gradients) for p in flat(bases(state))]
    assert len(drawn) == 3 * 2 * 2
    for p, q in itertools.combinations(drawn, 2):
        assert np.abs(p - q).max() > 0.1  # entries are about 1/√12


@pytest.mark.slow
def test_linear_inner_at_full_rank_equals_the_inner_alone():
    """P Pᵀ = I, and momentum rotated into the new basis is the same momentum."""
    _, weights, gradients = everything("mixed")
    inner = optax.trace(0.9, nesterov=True)
    lifted = natgalore.project(12, inner=inner, refresh_every=3, transport="rotate")
    expected = after(inner, weights, gradients)
    assert_close(after(lifted, weights, gradients), expected, atol=1e-11)


def test_galore_equals_natural_galore_without_residual():
    _, weights, gradients = everything("wide")
    kwargs = {"refresh_every": 3, "weight_decay": 0.1, "b1": 0.8, "b2": 0.95, "scale": 0.5}
    jax.tree.map(
        np.testing.assert_array_equal,
        after(natgalore.galore(0.1, RANK, **kwargs), weights, gradients),
        after(natgalore.natural_galore(0.1, RANK, residual=None, **kwargs), weights, gradients),
    )


@pytest.mark.slow
def test_mask_selects_the_leaves_that_decay():
    _, weights, gradients = everything("mixed")
    weights, gradients = (x["layers"]["0"]["attention"] for x in (weights, gradients))
    mask = jax.tree.map(lambda w: w.ndim > 1, weights)
    some, both, none = (
        after(natgalore.galore(0.1, RANK, **kwargs), weights, gradients)
        for kwargs in ({"weight_decay": 0.3, "mask": mask}, {"weight_decay": 0.3}, {})
    )
    expected = jax.tree.map(lambda decays, a, b: a if decays else b, mask, both, none)
    jax.tree.map(np.testing.assert_array_equal, some, expected)


def test_update_of_a_nonfinite_gradient_is_zero():
    """For one matrix of a stack and for another leaf, with the decay inside inner."""
    case = Case(
        "around_adamw", "no_fisher", "rotate", "power", "short", "together", "stack", "decayed", ""
    )
    weights, gradients = problem(case)
    tx = library(case)
    gradients["layers"]["mlp"]["up"]["kernel"][2, 1, 0, 0] = np.nan
    gradients["layers"]["mlp_norm"]["scale"][2, 1, 0] = np.inf
    _, first, second = itertools.islice(trajectory(tx, weights, gradients), 3)
    moved = jax.tree.map(lambda a, b: np.asarray(a != b), first[0], second[0])["layers"]
    assert moved["mlp"]["up"]["kernel"].all(axis=(1, 2)).tolist() == [True, False, True]
    assert not moved["mlp"]["up"]["kernel"][1].any()
    assert not moved["mlp_norm"]["scale"].any()
    assert moved["mlp"]["down"]["kernel"].all()
