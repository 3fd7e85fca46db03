"""Optax's optimizers as `inner`: their updates, their states and the transport of these.

The oracle runs the same optimizer on explicit cores, PᵀG by NumPy, and rotates its state by the
documented rules. All runs are in float64, so that a difference is a fault and not rounding.
"""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import natgalore_jax as natgalore
from tests.helpers.cases import quick, slow
from tests.helpers.partners import AROUND, INSIDE, PAGE, PARTS, REFUSED, numbers, page
from tests.oracle import oracles


RANK, STEPS, EVERY = 4, 7, 3  # refreshes at steps 0, 3 and 6
SHAPES = {"up": {"kernel": (12, 20)}, "layers": {"kernel": (3, 12, 20)}, "norm": {"scale": (12,)}}
KERNELS = ("up", "layers")
# Sums of 20 products of order one, then quotients of which a denominator may be 1e-5: eps · 1e6.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# --- Bases: functions (G, P, key) -> P --------------------------------------------------------


def nudged(G, P, key):
    """A basis between P and the leading directions of G."""
    return jnp.linalg.qr(P + 0.3 * G @ (G.T @ P))[0]


def permuted(G, P, key):
    """The columns of P in another order, some with the other sign."""
    return P[:, jnp.array([2, 0, 3, 1])] * jnp.array([[1.0, -1.0, -1.0, 1.0]], P.dtype)


def rotated(G, P, key):
    """Another orthonormal basis of the span of P."""
    x = jnp.arange(1.0, 17.0, dtype=P.dtype).reshape(RANK, RANK)
    return P @ jnp.linalg.qr(jnp.cos(x * x))[0]


# --- The two sides of the comparison ----------------------------------------------------------


def weights():
    return jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def gradients(count):
    key = jax.random.fold_in(jax.random.key(3), count)
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), weights())


def run(line, basis, transport, side="short"):
    """The updates of each step, and the states before, between and after them."""
    tx = natgalore.project(
        RANK,
        line.make(),
        basis=basis,
        transport=transport,
        side=side,
        refresh_every=EVERY,
        stagger=False,
    )
    W, states, out = weights(), [tx.init(weights())], []
    update = jax.jit(lambda g, s: tx.update(g, s, W, **line.extra_args))
    for count in range(STEPS):
        updates, state = update(gradients(count), states[-1])
        out.append(updates)
        states.append(state)
    return out, states


def per_matrix(f, name, *arrays):
    """f of the matrices of one leaf; of a stack, f of each of its matrices."""
    arrays = [np.asarray(x) for x in arrays]
    if name != "layers":
        return f(*arrays)
    parts = [f(*matrices) for matrices in zip(*arrays, strict=True)]
    return tuple(map(np.stack, zip(*parts, strict=True))) if len(parts[0]) == 2 else np.stack(parts)


def at_kernels(f, tree):
    """f(name, array) at each projected leaf; other leaves unchanged."""
    return {
        name: jax.tree.map(lambda x, name=name: f(name, x) if name in KERNELS else x, leaf)
        for name, leaf in tree.items()
    }


def bases(state, name):
    sides = state.basis[name]["kernel"], state.right_basis[name]["kernel"]
    return [side.value for side in sides if side is not None]


core = lambda G, P, Q=None: P.T @ G if Q is None else P.T @ G @ Q
lifted = lambda U, P, Q=None: P @ U if Q is None else P @ U @ Q.T


def rotated_state(state, roles, turns):
    """The state of an optimizer of plain cores in new bases, as `transport="rotate"` has it."""

    def factors(state):
        row, col = dict(state.v_row), dict(state.v_col)
        for name in KERNELS:
            if roles.get("v_row") and row[name]["kernel"].size > 1:
                f = lambda row, col, C, *D: oracles.rotated_factors(C, row, col, *D)
                both = per_matrix(f, name, row[name]["kernel"], col[name]["kernel"], *turns[name])
                row[name], col[name] = ({"kernel": jnp.asarray(x)} for x in both)
        return state._replace(v_row=row, v_col=col)

    def visit(path, x):
        if isinstance(x, optax.FactoredState):
            return visited(factors(x), "v")
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        role = next((roles[name] for name in reversed(names) if name in roles), None)
        leaf = next((name for name in names if name in KERNELS), None)
        if leaf is None or role not in RULES or np.size(x) == 1:
            return x
        f = lambda x, C, *D: RULES[role](C, x, *D)
        return jnp.asarray(per_matrix(f, leaf, x, *turns[leaf]))

    def visited(state, field):
        whole = jax.tree_util.tree_map_with_path(visit, {field: getattr(state, field)})
        return state._replace(**whole)

    return jax.tree_util.tree_map_with_path(
        visit, state, is_leaf=lambda x: isinstance(x, optax.FactoredState)
    )


RULES = {"linear": oracles.rotated_linear, "square": oracles.rotated_square}


def oracle(line, states, transport):
    """The updates of `inner` on explicit cores, with the bases in `states`."""
    inner = optax.with_extra_args_support(line.make())
    of = lambda state, f: lambda name, x: jnp.asarray(per_matrix(f, name, x, *bases(state, name)))
    proxies = at_kernels(of(states[0], core), jax.tree.map(jnp.zeros_like, weights()))
    proxies["norm"] = weights()["norm"]
    state = inner.init(proxies)
    for count, (old, new) in enumerate(itertools.pairwise(states)):
        if transport == "rotate" and count % EVERY == 0:
            between = lambda P, P_new: P_new.T @ P
            turns = {
                name: [
                    per_matrix(between, name, *sides)
                    for sides in zip(bases(old, name), bases(new, name), strict=True)
                ]
                for name in KERNELS
            }
            state = rotated_state(state, line.roles, turns)
        R = at_kernels(of(new, core), gradients(count))
        U, state = inner.update(R, state, proxies, **line.extra_args)
        decay = lambda name, u: u + line.decay * weights()[name]["kernel"]
        yield at_kernels(decay, at_kernels(of(new, lifted), U))


def compare(ours, theirs):
    for count, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        for name in SHAPES:
            (a,), (b,) = jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name])
            np.testing.assert_allclose(a, b, **CLOSE, err_msg=f"step {count}, {name}")


# --- Inside -----------------------------------------------------------------------------------


CARRIED = [name for name, line in INSIDE.items() if line.transport == "any"]
SYMMETRIC = [name for name, line in INSIDE.items() if line.symmetry]
ROTATING = [name for name, line in INSIDE.items() if line.symmetry == "turns"]


def one_per_pattern(names):
    """The first of `names` of each pattern: roles, decay, extra arguments; and each wrapper."""
    first = {}
    for name in names:
        line = INSIDE[name]
        roles = *sorted(line.roles.values()), bool(line.decay), bool(line.extra_args)
        first.setdefault(roles, name)
    return {*first.values(), *WRAPPERS.intersection(names)}


# Their states nest, stack or hide those of the optimizer inside them.
WRAPPERS = {"MultiSteps", "inject_hyperparams", "masked", "muon of stacks"}


def test_state_sizes_equal_the_table():
    """State arrays of one core have the sizes the page lists, and none has the weight's size."""
    params = weights() | {"up": {"kernel": jnp.zeros((64, 256))}}
    for name, line in INSIDE.items():
        tx = natgalore.project(8, line.make(), transport="keep")
        arrays = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params).inner_state)
        sizes = [x.size for path, x in arrays if "['up']" in jax.tree_util.keystr(path)]
        assert sum(size for size in sizes if size > 1) == numbers(line.state, 8, 256), name
        assert max((x.size for _, x in arrays), default=0) <= 8 * 256, name


@pytest.mark.parametrize("name", quick(one_per_pattern(CARRIED), CARRIED))
def test_inner_with_rotated_state_equals_the_oracle(name):
    """P inner(PᵀG) through two refreshes."""
    line = INSIDE[name]
    updates, states = run(line, nudged, "rotate")
    compare(updates, oracle(line, states, "rotate"))


@pytest.mark.parametrize("name", quick(["adam", "sm3"], [*INSIDE]))
def test_inner_with_kept_state_equals_the_oracle(name):
    line = INSIDE[name]
    updates, states = run(line, nudged, "keep")
    compare(updates, oracle(line, states, "keep"))


@pytest.mark.parametrize("name", ["adam", *slow("adafactor", "lion", "contrib.muon")])
def test_inner_with_state_rotated_on_both_sides_equals_the_oracle(name):
    line = INSIDE[name]
    updates, states = run(line, nudged, "rotate", side="both")
    compare(updates, oracle(line, states, "rotate"))


@pytest.mark.parametrize("name", quick(["adafactor"], SYMMETRIC))
def test_signed_permutations_of_the_basis_leave_the_trajectory(name):
    """The trajectory equals one without refreshes if inner treats all directions alike."""
    line = INSIDE[name]
    updates, states = run(line, permuted, "rotate")
    compare(updates, oracle(line, [states[0]] * len(states), "keep"))


@pytest.mark.parametrize("name", quick(["novograd"], ROTATING))
def test_rotations_within_the_subspace_leave_the_trajectory(name):
    """The trajectory equals one without refreshes if inner commutes with rotations."""
    line = INSIDE[name]
    updates, states = run(line, rotated, "rotate")
    compare(updates, oracle(line, [states[0]] * len(states), "keep"))


def test_signed_permutations_without_transport_change_the_trajectory():
    """Under `transport="keep"` the comparison above fails from the second refresh on."""
    line = INSIDE["adam"]
    updates, states = run(line, permuted, "keep")
    with pytest.raises(AssertionError, match="step 3, up"):
        compare(updates, oracle(line, [states[0]] * len(states), "keep"))


@pytest.mark.parametrize("name", quick(one_per_pattern(CARRIED), CARRIED))
def test_reset_keeps_the_types_of_the_state(name):
    """The types of the state after an update with a refresh under `transport="reset"`."""
    tx = natgalore.project(RANK, INSIDE[name].make(), transport="reset")
    state = jax.eval_shape(tx.init, weights())
    step = lambda g, s: tx.update(g, s, weights(), **INSIDE[name].extra_args)
    updates, after = jax.eval_shape(step, gradients(0), state)
    assert jax.tree.leaves(after) == jax.tree.leaves(state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, weights())


def test_factors_across_a_stack_longer_than_the_rank_are_refused():
    """Adafactor's two longest axes are then those of the stack and of the columns."""
    params = {"layers": {"kernel": jnp.zeros((6, 12, 20))}}
    init = lambda *args, **kwargs: jax.eval_shape(natgalore.project(*args, **kwargs).init, params)
    make = lambda **kwargs: optax.adafactor(1.0, multiply_by_parameter_scale=False, **kwargs)
    factored = make(min_dim_size_to_factor=4)
    with pytest.raises(
        TypeError, match=r"layers/kernel.*\(\*batch, k\).*\(4, 20\).*factored=False"
    ):
        init(4, factored)
    init(4, factored, transport="keep")
    init(4, make(factored=False))
    init(6, factored)


# --- Refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings('ignore:"seed" is deprecated')  # Optax's own dpsgd passes it
def test_other_inners_are_refused_with_advice(name):
    line = REFUSED[name]
    tx = natgalore.project(RANK, line.make())
    if line.when == "init":
        with pytest.raises(line.error, match=line.match):
            jax.eval_shape(tx.init, weights())
    else:
        state = jax.eval_shape(tx.init, weights())
        update = lambda g, state: tx.update(g, state, weights(), **line.extra_args)
        with pytest.raises(line.error, match=line.match) as caught:
            jax.eval_shape(update, gradients(0), state)
        assert any("`inner`" in note for note in caught.value.__notes__)


def strange(update, init=lambda params: ()):
    return optax.GradientTransformationExtraArgs(init, update)


def by_signs(updates, state, params, **_):
    return jax.tree.map(lambda u, w: u + jnp.sign(w), updates, params), state


def where_positive(updates, state, params, **_):
    return jax.tree.map(lambda u, w: jnp.where(w > 0, u, 0.0), updates, params), state


def transposed(updates, state, params, **_):
    return jax.tree.map(lambda u, w: u + w.T, updates, params), state


def stopped(updates, state, params, **_):
    return jax.tree.map(lambda u, w: u + jax.lax.stop_gradient(w) * w, updates, params), state


def by_rows(updates, state, params, **_):
    return jax.tree.map(lambda u, w: u + jnp.arange(4.0)[:, None] * w, updates, params), state


@pytest.mark.parametrize("update", [by_signs, where_positive, transposed, stopped, by_rows])
def test_inner_that_is_not_affine_in_the_weight_is_refused(update):
    """Also where the derivative at zero weights is that of a decay."""
    tx = natgalore.project(4, strange(update), side="both")  # so that wᵀ has the shape of w
    with pytest.raises(ValueError, match="not a number times the weight"):
        jax.eval_shape(tx.init, {"up": {"kernel": jnp.ones((12, 20))}})


def test_weights_stored_at_init_are_refused_if_update_reads_them():
    """State that each update overwrites without reading passes."""
    init = lambda params: jax.tree.map(jnp.asarray, params)
    kept = strange(lambda u, s, w, **_: (u, s), init)
    renewed = strange(lambda u, s, w, **_: (u, u), init)
    with pytest.raises(ValueError, match="remember weights"):
        jax.eval_shape(natgalore.project(4, kept, transport="keep").init, weights())
    jax.eval_shape(natgalore.project(4, renewed, transport="keep").init, weights())


def test_inner_with_own_extra_arguments_is_checked_at_the_first_update():
    update = lambda u, s, w, *, mine: (jax.tree.map(lambda u, w: u * mine + w * w, u, w), s)
    tx = natgalore.project(4, strange(update))
    state = tx.init(weights())
    with pytest.raises(ValueError, match="not a number times the weight"):
        tx.update(gradients(0), state, weights(), mine=2.0)


# --- Around -----------------------------------------------------------------------------------


def loss(params):
    """Of full rank in the kernel, with a minimum of zero."""
    target = jnp.sin(jnp.arange(240.0)).reshape(12, 20)
    return (
        jnp.square(params["up"]["kernel"] - target).sum()
        + jnp.square(params["norm"]["scale"]).sum()
    )


@pytest.mark.parametrize("name", quick(["apply_if_finite"], [*AROUND]))
@pytest.mark.filterwarnings("ignore:natgalore projects none:UserWarning")
def test_wrapped_optimizer_trains(name):
    line = AROUND[name]
    tx = line.make(natgalore.natural_galore(0.05, RANK, refresh_every=EVERY))
    params = {"up": {"kernel": jnp.ones((12, 20))}, "norm": {"scale": jnp.ones(12)}}
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    fast = lambda params: params.fast if name == "lookahead" else params

    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(loss)(fast(params))
        known = {"value": value, "grad": g, "value_fn": loss}
        given = {name: known[name] for name in line.extra_args}
        updates, state = tx.update(g, state, params, **given)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), loss(fast(params))
    for _ in range(160):  # mechanize stays near the start for 50 of them
        params, state = step(params, state)
    if name == "contrib.schedule_free":
        params = optax.contrib.schedule_free_eval_params(state, params)
    assert loss(fast(params)) < first / 4


@pytest.mark.slow
def test_per_example_gradients_are_aggregated_before_the_projection():
    private = optax.contrib.differentially_private_aggregate(1.0, 0.0, key=0)
    examples = jax.tree.map(lambda *x: jnp.stack(x), gradients(0), gradients(1))
    clipped = [optax.clip_by_global_norm(1.0).update(gradients(i), ())[0] for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *clipped)
    tx = natgalore.project(RANK, optax.trace(0.9))
    both = optax.chain(private, tx)
    actual, _ = both.update(examples, both.init(weights()), weights())
    expected, _ = tx.update(mean, tx.init(weights()), weights())
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_flatten_warns_that_no_leaf_is_projected():
    with pytest.warns(UserWarning, match="projects none of the 1 leaves"):
        optax.flatten(natgalore.galore(1e-2)).init(weights())


# --- The tables -------------------------------------------------------------------------------


def makers(module, prefix=""):
    """The public names of a module whose source mentions a GradientTransformation."""
    for name in dir(module):
        thing = getattr(module, name)
        function = getattr(thing, "func", thing)  # optax.nadam is a partial
        if name.startswith("_") or not (inspect.isfunction(function) or hasattr(thing, "update")):
            continue
        if "GradientTransformation" in inspect.getsource(function):
            yield prefix + name


@pytest.mark.skipif(optax.__version__ != "0.2.8", reason="the tables are those of Optax 0.2.8")
def test_tables_list_every_transformation_of_optax():
    listed = {name.split(",")[0] for name in (*INSIDE, *REFUSED, *AROUND, *PARTS)}
    known = {*makers(optax), *makers(optax.contrib, "contrib.")}
    assert known - listed == set()
    assert {PARTS[name] for name in PARTS} - {""} <= {*INSIDE, *REFUSED, *AROUND}


def test_page_equals_the_tables():
    assert PAGE.read_text() == page(), "run python -m tests.helpers.partners"
