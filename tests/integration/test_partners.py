"""Optax's optimizers as `inner`: what they compute, keep, and carry to another basis.

The oracle runs the same optimizer on explicit cores, PᵀG by NumPy, and turns its state by the
documented rules. All of it is in float64: then a difference is a fault, and no rounding.
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


def lines(table, quick=None, **fixed):
    """Its lines as cases; slow ones but for those of the names `quick`."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if quick is None or name in quick else pytest.mark.slow)
            for name, line in table.items()
            if all(getattr(line, field) == value for field, value in fixed.items())
        ],
    )


# --- Bases: functions (G, P, key) -> P --------------------------------------------------------


def nudged(G, P, key):
    """It shares a part with P, and follows G."""
    return jnp.linalg.qr(P + 0.3 * G @ (G.T @ P))[0]


def renamed(G, P, key):
    """The directions of P in another order, some with the other sign."""
    return P[:, jnp.array([2, 0, 3, 1])] * jnp.array([[1.0, -1.0, -1.0, 1.0]], P.dtype)


def turned(G, P, key):
    """Other directions of the same subspace."""
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


def each(f, name, *arrays):
    """f of the matrices of one leaf, for each of the stack where it is one."""
    arrays = [np.asarray(x) for x in arrays]
    if name != "layers":
        return f(*arrays)
    parts = [f(*matrices) for matrices in zip(*arrays, strict=True)]
    return tuple(map(np.stack, zip(*parts, strict=True))) if len(parts[0]) == 2 else np.stack(parts)


def at_kernels(f, tree):
    """f of the name and the array of each leaf that is projected; the others as they are."""
    return {
        name: jax.tree.map(lambda x, name=name: f(name, x) if name in KERNELS else x, leaf)
        for name, leaf in tree.items()
    }


def bases(state, name):
    sides = state.basis[name]["kernel"], state.right_basis[name]["kernel"]
    return [side.value for side in sides if side is not None]


core = lambda G, P, Q=None: P.T @ G if Q is None else P.T @ G @ Q
lifted = lambda U, P, Q=None: P @ U if Q is None else P @ U @ Q.T


def carried(state, roles, turns):
    """The state of an optimizer of plain cores in new bases: what `transport="rotate"` promises."""

    def factors(state):
        row, col = dict(state.v_row), dict(state.v_col)
        for name in KERNELS:
            if roles.get("v_row") and row[name]["kernel"].size > 1:
                f = lambda row, col, C, *D: oracles.rotated_factors(C, row, col, *D)
                both = each(f, name, row[name]["kernel"], col[name]["kernel"], *turns[name])
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
        return jnp.asarray(each(f, leaf, x, *turns[leaf]))

    def visited(state, field):
        whole = jax.tree_util.tree_map_with_path(visit, {field: getattr(state, field)})
        return state._replace(**whole)

    return jax.tree_util.tree_map_with_path(
        visit, state, is_leaf=lambda x: isinstance(x, optax.FactoredState)
    )


RULES = {"linear": oracles.rotated_linear, "square": oracles.rotated_square}


def oracle(line, states, transport):
    """The updates of `inner` on explicit cores, with the bases that the states name."""
    inner = optax.with_extra_args_support(line.make())
    of = lambda state, f: lambda name, x: jnp.asarray(each(f, name, x, *bases(state, name)))
    proxies = at_kernels(of(states[0], core), jax.tree.map(jnp.zeros_like, weights()))
    proxies["norm"] = weights()["norm"]
    state = inner.init(proxies)
    for count, (old, new) in enumerate(itertools.pairwise(states)):
        if transport == "rotate" and count % EVERY == 0:
            between = lambda P, P_new: P_new.T @ P
            turns = {
                name: [
                    each(between, name, *sides)
                    for sides in zip(bases(old, name), bases(new, name), strict=True)
                ]
                for name in KERNELS
            }
            state = carried(state, line.roles, turns)
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


# The types of their states are those of other lines, and a state is carried by its types.
ALIKE = {
    *("adamaxw", "centralize", "clip", "clip_by_global_norm", "contrib.acprop", "contrib.adopt"),
    *("contrib.normalize", "ema", "nadam", "nadamw", "named_chain", "normalize_by_update_norm"),
    *("polyak_sgd", "radam", "set_to_zero", "sgd, nesterov", "sign_sgd", "yogi"),
}
SELDOM = {"add_noise", "adabelief", "apply_if_finite", "conditionally_mask", "partition", "rprop"}


@lines(INSIDE, quick=INSIDE.keys() - ALIKE - SELDOM, transport="any")
def test_runs_on_cores_and_is_carried_to_new_ones(name):
    """P inner(PᵀG) through two refreshes; and what it holds of a core is what the page says."""
    line = INSIDE[name]
    updates, states = run(line, nudged, "rotate")
    compare(updates, oracle(line, states, "rotate"))
    held = jax.tree_util.tree_leaves_with_path(states[-1].inner_state)
    sizes = [np.size(x) for path, x in held if "['up']" in jax.tree_util.keystr(path)]
    assert sum(size for size in sizes if size > 1) == numbers(line.state, RANK, 20)


@lines(INSIDE, quick=("adam", "sm3"))
def test_runs_on_cores_and_is_kept_as_it_is(name):
    line = INSIDE[name]
    updates, states = run(line, nudged, "keep")
    compare(updates, oracle(line, states, "keep"))


@pytest.mark.parametrize("name", ["adam", "adafactor", "lion", "contrib.muon"])
def test_is_carried_on_both_sides(name):
    line = INSIDE[name]
    updates, states = run(line, nudged, "rotate", side="both")
    compare(updates, oracle(line, states, "rotate"))


NAMES = ("adam", "amsgrad", "adan", "adafactor", "lion", "novograd")
TURNS = ("sgd, momentum", "novograd", "muon of stacks")


@lines({k: v for k, v in INSIDE.items() if v.symmetry}, quick=NAMES)
def test_new_names_for_old_directions_change_nothing(name):
    """The trajectory is that without any refresh, where inner treats all directions alike."""
    line = INSIDE[name]
    updates, states = run(line, renamed, "rotate")
    still = [states[0]] * len(states)  # the basis of the start, throughout
    compare(updates, oracle(line, still, "keep"))


@lines(INSIDE, quick=TURNS, symmetry="turns")
def test_another_basis_of_the_same_subspace_changes_nothing(name):
    """Where inner does not know directions from their mixtures."""
    line = INSIDE[name]
    updates, states = run(line, turned, "rotate")
    compare(updates, oracle(line, [states[0]] * len(states), "keep"))


def test_without_transport_new_names_change_much():
    """The test above sees something."""
    line = INSIDE["adam"]
    updates, states = run(line, renamed, "keep")
    with pytest.raises(AssertionError, match="step 3, up"):
        compare(updates, oracle(line, [states[0]] * len(states), "keep"))


@lines(INSIDE, quick=ALIKE.union(NAMES), transport="any")
def test_can_start_over(name):
    """Under `transport="reset"` a refresh leaves the state's types as they are."""
    tx = natgalore.project(RANK, INSIDE[name].make(), transport="reset")
    state = jax.eval_shape(tx.init, weights())
    step = lambda g, s: tx.update(g, s, weights(), **INSIDE[name].extra_args)
    updates, after = jax.eval_shape(step, gradients(0), state)
    assert jax.tree.leaves(after) == jax.tree.leaves(state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, weights())


def test_nothing_is_as_large_as_the_weight():
    """The state of an inner by its shapes, at sizes at which a core is far smaller."""
    params = weights() | {"up": {"kernel": jnp.zeros((64, 256))}}
    for name, line in INSIDE.items():
        tx = natgalore.project(8, line.make(), transport="keep")
        held = jax.tree.leaves(tx.init(params).inner_state)
        assert max(map(np.size, held), default=0) <= 8 * 256, name


def test_a_stack_longer_than_the_rank_is_not_factored_across_its_matrices():
    """Adafactor's two longest axes are then those of the stack and of the columns."""
    params = {"layers": {"kernel": jnp.zeros((6, 12, 20))}}
    make = lambda **kwargs: optax.adafactor(1.0, multiply_by_parameter_scale=False, **kwargs)
    factored = make(min_dim_size_to_factor=4)
    with pytest.raises(TypeError, match=r"layers/kernel.*\(6, 20\).*\(4, 20\).*factored=False"):
        natgalore.project(4, factored).init(params)
    natgalore.project(4, factored, transport="keep").init(params)
    natgalore.project(4, make(factored=False)).init(params)
    natgalore.project(6, factored).init(params)


# --- Refused ----------------------------------------------------------------------------------


@lines(REFUSED)
@pytest.mark.filterwarnings('ignore:"seed" is deprecated')  # Optax's own dpsgd passes it
def test_is_refused_with_advice(name):
    line = REFUSED[name]
    tx = natgalore.project(RANK, line.make())
    if line.when == "init":
        with pytest.raises(line.error, match=line.match):
            tx.init(weights())
    else:
        state = tx.init(weights())
        with pytest.raises(line.error, match=line.match) as caught:
            tx.update(gradients(0), state, weights(), **line.extra_args)
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
def test_weights_read_where_no_derivative_shows_it_are_refused(update):
    tx = natgalore.project(4, strange(update), side="both")  # so that wᵀ has the shape of w
    with pytest.raises(ValueError, match="not a number times the weight"):
        tx.init({"up": {"kernel": jnp.ones((12, 20))}})


def test_weights_remembered_from_init_are_refused_where_they_are_used():
    """What is written anew before it is read is no memory."""
    init = lambda params: jax.tree.map(jnp.asarray, params)
    kept = strange(lambda u, s, w, **_: (u, s), init)
    renewed = strange(lambda u, s, w, **_: (u, u), init)
    with pytest.raises(ValueError, match="remember weights"):
        natgalore.project(4, kept, transport="keep").init(weights())
    natgalore.project(4, renewed, transport="keep").init(weights())


def test_arguments_of_its_own_put_the_reading_off_to_the_first_update():
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


@lines(AROUND)
@pytest.mark.filterwarnings("ignore:natgalore projects none:UserWarning")
def test_trains_with_what_is_around_it(name):
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
    for _ in range(80):
        params, state = step(params, state)
    if name == "contrib.schedule_free":
        params = optax.contrib.schedule_free_eval_params(state, params)
    assert loss(fast(params)) < first / 4


@pytest.mark.slow
def test_per_example_gradients_are_aggregated_in_front():
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


def test_flatten_around_warns_that_nothing_is_projected():
    with pytest.warns(UserWarning, match="projects none of the 1 leaves"):
        optax.flatten(natgalore.galore(1e-2)).init(weights())


# --- The tables -------------------------------------------------------------------------------


def makers(module, prefix=""):
    """The public names of a module that make transformations, as their source tells."""
    for name in dir(module):
        thing = getattr(module, name)
        function = getattr(thing, "func", thing)  # optax.nadam is a partial
        if name.startswith("_") or not (inspect.isfunction(function) or hasattr(thing, "update")):
            continue
        if "GradientTransformation" in inspect.getsource(function):
            yield prefix + name


@pytest.mark.skipif(optax.__version__ != "0.2.8", reason="the tables are those of Optax 0.2.8")
def test_every_transformation_of_optax_is_listed():
    listed = {name.split(",")[0] for name in (*INSIDE, *REFUSED, *AROUND, *PARTS)}
    known = {*makers(optax), *makers(optax.contrib, "contrib.")}
    assert known - listed == set()
    assert {PARTS[name] for name in PARTS} - {""} <= {*INSIDE, *REFUSED, *AROUND}


def test_the_page_is_that_of_the_tables():
    assert PAGE.read_text() == page(), "run python -m tests.helpers.partners"
