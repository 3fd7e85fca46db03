"""Training with `natgalore.nnx.value_and_grad` equals that with `nnx.value_and_grad`.

ATOL is that of `test_value_and_grad.py`: the sums of (x P)ᵀ ȳ and of PᵀG round differently.
"""

import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import natgalore_jax as natgalore
from natgalore_jax.tree.cores import Core
from tests.helpers.cases import slow


RANK, ATOL = 3, 2e-5


class Model(nnx.Module):
    """Linear layers with optional batch statistics, dropout, and a scanned stack with dropout."""

    def __init__(self, rngs, statistics=True, masks=True, stacked=False):
        self.up = nnx.Linear(12, 16, use_bias=False, rngs=rngs)  # BatchNorm removes a bias
        self.norm = nnx.BatchNorm(16, rngs=rngs) if statistics else None
        self.drop = nnx.Dropout(0.5, rngs=rngs) if masks else None
        make = nnx.vmap(Inner)
        self.stack = make(rngs.split(2)) if stacked else None
        self.down = nnx.Linear(16, 10, rngs=rngs)
        self.calls = nnx.Variable(jnp.int32(0))

    def __call__(self, x):
        self.calls[...] += 1
        x = self.up(x)
        x = x if self.norm is None else self.norm(x)
        x = jnp.tanh(x)
        x = x if self.drop is None else self.drop(x)
        if self.stack is not None:
            x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.stack
            )
        return self.down(x)


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.drop(self.linear(x)))


def loss_fn(model, x, power=2):
    return jnp.mean(jnp.abs(model(x) - 1) ** power)


def optimizer_of(model, wrt=nnx.Param, **kwargs):
    settings = {"rank": RANK, "refresh_every": 2, "stagger": False, "residual": None} | kwargs
    return nnx.Optimizer(model, natgalore.natural_galore(1e-2, **settings), wrt=wrt)


def batches(steps=5):
    return [jax.random.normal(jax.random.key(i), (8, 12)) for i in range(steps)]


def full_gradients(loss=loss_fn, has_aux=False):
    gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.Param), has_aux=has_aux)
    return lambda model, optimizer, *args, **kwargs: gradients(model, *args, **kwargs)


def trained(gradients, model, optimizer, data=None, jit=nnx.jit):
    """(value, model state, optimizer state) after each step."""

    def step(model, optimizer, x):
        value, grads = gradients(model, optimizer, x)
        optimizer.update(model, grads)
        return value

    step, history = jit(step), []
    for x in batches() if data is None else data:
        value = step(model, optimizer, x)
        states = (nnx.as_pure(nnx.state(x)) for x in (model, optimizer))
        history.append((value, *map(key_data, states)))
    return history


def key_data(state):
    """The state with random keys as integers."""
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(data, state)


def both_ways(ours, reference, **settings):
    model = Model(nnx.Rngs(0), **settings.pop("model", {}))
    other = nnx.clone(model)
    return (
        trained(ours, model, optimizer_of(model), **settings),
        trained(reference, other, optimizer_of(other), **settings),
    )


def assert_same_training(ours, reference):
    for got, want in zip(ours, reference, strict=True):
        chex.assert_trees_all_close(got[:2], want[:2], atol=ATOL)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        chex.assert_trees_all_equal_shapes_and_dtypes(got[2], want[2])


@pytest.mark.parametrize("refresh", ["passes", "gradient"])
def test_training_through_refreshes(refresh):
    """Params, statistics, counters and random streams, after each step."""
    ours = natgalore.nnx.value_and_grad(loss_fn, refresh=refresh, on_fallback="error")
    actual, expected = both_ways(ours, full_gradients())
    assert_same_training(actual, expected)
    assert [int(state["calls"]) for _, state, _ in actual] == [1, 2, 3, 4, 5]
    mean = [np.asarray(state["norm"]["mean"]) for _, state, _ in actual]
    assert np.abs(mean[1] - mean[0]).max() > 1e-3
    assert int(actual[-1][1]["drop"]["rngs"]["count"]) == 5


@pytest.mark.slow
def test_without_jit():
    ours = natgalore.nnx.value_and_grad(loss_fn, on_fallback="error")
    data = batches(3)
    assert_same_training(*both_ways(ours, full_gradients(), data=data, jit=lambda f: f))


@pytest.mark.slow
def test_stacked_layers_with_dropout():
    ours = natgalore.nnx.value_and_grad(loss_fn, on_fallback="error")
    assert_same_training(
        *both_ways(ours, full_gradients(), data=batches(3), model={"stacked": True})
    )


@pytest.mark.slow
def test_auxiliary_outputs_and_keywords():
    def loss(model, x, power):
        return loss_fn(model, x, power), {"mean": x.mean(), "calls": model.calls[...]}

    ours = natgalore.nnx.value_and_grad(loss, has_aux=True)
    fixed = lambda f: lambda model, optimizer, x: f(model, optimizer, x, power=4)
    reference = fixed(full_gradients(loss, has_aux=True))
    actual, expected = both_ways(fixed(ours), reference, data=batches(3))
    assert_same_training(actual, expected)
    assert [int(aux["calls"]) for (_, aux), *_ in actual] == [1, 2, 3]


@pytest.mark.slow
def test_gradients_follow_the_wrt_of_the_optimizer():
    """Here the kernels. A core is in a Variable of its weight's type."""
    kernels = nnx.All(nnx.Param, nnx.PathContains("kernel"))
    model = Model(nnx.Rngs(0))
    optimizer = optimizer_of(model, wrt=kernels)
    ours = natgalore.nnx.value_and_grad(loss_fn)
    value, grads = nnx.jit(ours)(model, optimizer, batches()[0])
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"kernel"}
    assert isinstance(grads["up"]["kernel"], nnx.Param)
    assert isinstance(grads["up"]["kernel"].get_value(), Core)
    bias = model.down.bias[...]
    optimizer.update(model, grads)
    np.testing.assert_array_equal(model.down.bias[...], bias)
    assert value.shape == ()


def test_only_full_gradients_keep_sharding_metadata():
    """The axes of a core are not those of its weight."""
    named = lambda init, *names: nnx.with_metadata(init, out_sharding=names)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        kernel_init = named(nnx.initializers.normal(), "d", None)
        bias_init = named(nnx.initializers.zeros, "d")
        model = nnx.Linear(12, 16, kernel_init=kernel_init, bias_init=bias_init, rngs=nnx.Rngs(0))
        other = nnx.clone(model)
        loss = lambda model, x: jnp.sum(model(x) ** 2)
        gradients = natgalore.nnx.value_and_grad(loss)
        _, grads = nnx.jit(gradients)(model, optimizer_of(model), batches()[0])
        ours, expected = (
            trained(f, x, optimizer_of(x), batches(3))
            for f, x in ((gradients, model), (full_gradients(loss), other))
        )
    assert grads["bias"].get_metadata()["out_sharding"] == ("d",)
    assert "out_sharding" not in grads["kernel"].get_metadata()
    assert_same_training(ours, expected)


@pytest.mark.slow
def test_micro_batches_equal_one_batch():
    """For a model without statistics and dropout."""
    ours = natgalore.nnx.value_and_grad(loss_fn, micro_batches=4)
    split = lambda model, optimizer, x: ours(model, optimizer, x.reshape(4, 2, 12))
    plain = {"statistics": False, "masks": False}
    assert_same_training(*both_ways(split, full_gradients(), model=plain))


def test_state_after_micro_batches():
    """Statistics are means, a counter has its last value, untrained params are unchanged."""
    model = Model(nnx.Rngs(0), masks=False)
    model.down.bias[...] = jnp.full(10, 0.1).at[0].set(-jnp.inf)
    alone, x = nnx.clone(model), jax.random.normal(jax.random.key(0), (7, 2, 12))
    gradients = natgalore.nnx.value_and_grad(loss_fn, micro_batches=7)
    nnx.jit(gradients)(model, optimizer_of(model, wrt=nnx.PathContains("kernel")), x)
    np.testing.assert_array_equal(model.down.bias[...], alone.down.bias[...])
    means = []
    for part in x:
        one = nnx.clone(alone)
        loss_fn(one, part)
        means.append(one.norm.mean[...])
    np.testing.assert_allclose(model.norm.mean[...], np.mean(means, axis=0), atol=1e-6)
    assert int(model.calls[...]) == 1


@pytest.mark.parametrize("stacked", [True, *slow(False)])
def test_dropout_masks_differ_between_micro_batches(stacked):
    """And between steps; they are those of `nnx.split_rngs`."""
    model = Model(nnx.Rngs(0), statistics=False, stacked=stacked)
    before = nnx.clone(model)
    masks = lambda model, x: (loss_fn(model, x), model.drop(jnp.ones(64)))
    gradients = nnx.jit(natgalore.nnx.value_and_grad(masks, True, micro_batches=3))
    optimizer, x = optimizer_of(model), jnp.ones((3, 2, 12))
    drawn = []
    for _ in range(2):
        (_, each), _ = gradients(model, optimizer, x)
        drawn.extend(np.asarray(each))
    assert len({mask.tobytes() for mask in drawn}) == 6
    assert int(model.drop.rngs.count[...]) == int(before.drop.rngs.count[...]) + 2
    if not stacked:
        with nnx.split_rngs(before, splits=3):
            key = before.drop.rngs.key[...]
        second = jax.random.fold_in(key[1], 1)  # the loss itself draws the first
        np.testing.assert_array_equal(jax.random.bernoulli(second, 0.5, (64,)), drawn[1] > 0)


def test_errors():
    model = Model(nnx.Rngs(0))
    optimizer, x = optimizer_of(model), batches()[0]
    gradients = natgalore.nnx.value_and_grad(loss_fn)
    for arguments in [(optimizer, model, x), (model, x, optimizer)]:
        with pytest.raises(TypeError, match=r"arguments are \(model, optimizer, \*args\)") as error:
            gradients(*arguments)
        assert "\n" not in str(error.value)

    def keeps(model, x):
        model.seen = nnx.Intermediate(x)
        return loss_fn(model, x)

    with pytest.raises(ValueError, match="return new values as `aux`") as error:
        natgalore.nnx.value_and_grad(keeps)(model, optimizer, x)
    assert "\n" not in str(error.value)
    power = lambda model, x: loss_fn(model, x) + jnp.sum(model.up.kernel[...] ** 3)
    with pytest.raises(ValueError, match="integer_pow of `up/kernel`"):
        natgalore.nnx.value_and_grad(power, on_fallback="error")(model, optimizer, x)
    with pytest.raises(ValueError, match="`refresh`"):
        natgalore.nnx.value_and_grad(loss_fn, refresh="never")(model, optimizer, x)


def test_flax_is_optional():
    """The library imports Flax on access to `natgalore.nnx`."""
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import natgalore_jax as natgalore\n"
        "natgalore.value_and_grad, natgalore.explain\n"
        "try: natgalore.nnx\n"
        "except ImportError as error: print(error)\n"
        "try: natgalore.other\n"
        "except AttributeError as error: print(error)"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert "flax" in first
    assert second == "module 'natgalore_jax' has no attribute 'other'"


@pytest.mark.slow
def test_without_projection_gradients_are_those_of_nnx():
    model = Model(nnx.Rngs(0))
    other, x = nnx.clone(model), batches()[0]
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    got = natgalore.nnx.value_and_grad(loss_fn)(model, optimizer, x)
    chex.assert_trees_all_close(*map(nnx.as_pure, (got, nnx.value_and_grad(loss_fn)(other, x))))


def test_example_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs/low-rank-gradients.md").read_text()
    code = re.search(r"## NNX\n.*?```python\n(.*?)```", page, re.S)[1]
    scope = {"jnp": jnp, "natgalore": natgalore}
    exec(code, scope)
    assert scope["loss"] > 0
