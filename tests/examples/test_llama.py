"""The Llama of the examples against NumPy, and its options."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.common import llama
from tests.helpers.cases import slow


SMALL = llama.LlamaConfig(hidden=16, intermediate=44, heads=2, layers=2, vocabulary=50)


def size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class Net:
    """Jitted init, logits and loss of a Llama."""

    def __init__(self, config: llama.LlamaConfig):
        self.structure = llama.structure(config)
        self.logits = jax.jit(lambda params, tokens: self.model(params)(tokens))
        self.loss = jax.jit(
            lambda params, tokens: llama.next_token_loss(self.model(params), tokens)
        )
        self.config = config

    def model(self, params) -> llama.Llama:
        return nnx.merge(self.structure, params)

    def init(self):
        @jax.jit
        def params(key):
            model = llama.Llama(self.config, nnx.Rngs(key))
            return nnx.to_pure_dict(nnx.state(model, nnx.Param))

        return params(jax.random.key(0))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(SMALL)


@pytest.fixture(scope="module")
def params(net):
    return net.init()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(50, size=(2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def reference(net, params, tokens):
    """Loss and gradient of the plain, unrolled model."""
    return jax.jit(jax.value_and_grad(net.loss))(params, tokens)


class TestLlama:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "flags",
        [{"scan": True}, {"remat": True}, {"scan": True, "remat": True}],
        ids=" ".join,
    )
    def test_scan_and_remat_do_not_change_loss_or_gradient(self, params, tokens, reference, flags):
        def stack(params):
            layers = [params["layers"][i] for i in range(SMALL.layers)]
            return params | {"layers": jax.tree.map(lambda *ws: jnp.stack(ws), *layers)}

        loss, grads = reference
        if "scan" in flags:
            params, grads = stack(params), stack(grads)
        other = Net(replace(SMALL, **flags))
        assert jax.tree.map(jnp.shape, jax.eval_shape(other.init)) == jax.tree.map(
            jnp.shape, params
        )
        other_loss, other_grads = jax.jit(jax.value_and_grad(other.loss))(params, tokens)
        # The same products in another order: a few units in the last place of float32.
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other_grads, grads)

    @pytest.mark.parametrize(
        ("name", "millions"),
        [("60m", 58), ("130m", 134), *slow(("350m", 368), ("1b", 1339), ("7b", 6738))],
    )
    def test_sizes_have_the_parameters_of_the_paper(self, name, millions):
        config = llama.CONFIGS[name]
        unrolled = llama.abstract_params(config)
        scanned = llama.abstract_params(replace(config, scan=True))
        assert round(size(unrolled) / 1e6) == millions
        assert size(scanned) == size(unrolled)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(unrolled))
        h, i, layers = config.hidden, config.intermediate, config.layers
        assert scanned["layers"]["attention"]["query"]["kernel"].shape == (layers, h, h)
        assert scanned["layers"]["mlp"]["down"]["kernel"].shape == (layers, i, h)
        assert unrolled["layers"][layers - 1]["mlp"]["gate"]["kernel"].shape == (h, i)

    @pytest.mark.parametrize("hidden", [32, *slow(256)])
    def test_initial_loss_is_that_of_a_uniform_guess(self, hidden):
        config = replace(SMALL, hidden=hidden, layers=1, vocabulary=256)
        tokens = np.random.default_rng(0).integers(256, size=(8, 33)).astype(np.int32)
        net = Net(config)
        loss = net.loss(net.init(), tokens)
        # Logits of variance 1 / hidden add half of that; the rest is the noise of 256 targets.
        assert loss == pytest.approx(math.log(256) + 0.5 / hidden, abs=0.03)

    def test_attention_is_causal(self, net, params, tokens):
        changed = tokens.copy()
        changed[:, 5] = (changed[:, 5] + 1) % 50
        before, after = net.logits(params, tokens), net.logits(params, changed)
        np.testing.assert_array_equal(before[:, :5], after[:, :5])
        assert np.all(np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-6)

    def test_rotary_products_depend_on_distance_only(self):
        query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
        angles = llama.rotary_angles(12, 8)

        @jax.jit
        def product(i, j):
            return jnp.vdot(
                llama.rotate(query, angles[i][None]), llama.rotate(key, angles[j][None])
            )

        # Angles up to 11 radians are rounded to 1e-6, the products are of order one.
        np.testing.assert_allclose(product(3, 1), product(11, 9), atol=1e-5)
        assert abs(product(3, 1) - product(3, 2)) > 1e-2

    def test_attention_equals_numpy(self):
        attention = llama.Attention(SMALL, nnx.Rngs(0))
        x = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
        q, k, v = (
            (x.astype(np.float64) @ np.asarray(w.kernel[...], np.float64)).reshape(2, 7, 2, 8)
            for w in (attention.query, attention.key, attention.value)
        )
        # RoPE on complex numbers: a rotation is a product with exp(i · position · frequency).
        turn = np.exp(1j * np.outer(np.arange(7), 10_000.0 ** (-np.arange(4) / 4)))[:, None, :]
        q, k = ((z[..., :4] + 1j * z[..., 4:]) * turn for z in (q, k))
        mixed = np.zeros((2, 7, 2, 8))
        for b, i, h in np.ndindex(2, 7, 2):
            scores = np.real(k[b, : i + 1, h].conj() @ q[b, i, h]) / np.sqrt(8)
            weights = np.exp(scores) / np.exp(scores).sum()
            mixed[b, i, h] = weights @ v[b, : i + 1, h]
        expected = mixed.reshape(2, 7, 16) @ np.asarray(attention.out.kernel[...], np.float64)
        # Float32 against float64 over sums of 16 terms of order one.
        np.testing.assert_allclose(jax.jit(lambda x: attention(x))(x), expected, atol=1e-5)

    def test_mlp_equals_numpy(self):
        mlp = llama.MLP(SMALL, nnx.Rngs(0))
        x = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
        gate, up, down = (np.asarray(w.kernel[...], float) for w in (mlp.gate, mlp.up, mlp.down))
        expected = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
        np.testing.assert_allclose(jax.jit(lambda x: mlp(x))(x), expected, atol=1e-5)  # as above

    def test_layer_with_zero_outputs_is_the_identity(self):
        layer = llama.Layer(SMALL, nnx.Rngs(0))
        for kernel in (layer.attention.out.kernel, layer.mlp.down.kernel):
            kernel[...] = jnp.zeros_like(kernel[...])
        x = jax.random.normal(jax.random.key(0), (2, 7, 16))
        np.testing.assert_array_equal(jax.jit(lambda x: layer(x))(x), x)

    def test_weights_are_float32_with_bfloat16_activations(self, tokens):
        net = Net(replace(SMALL, dtype=jnp.bfloat16))
        params = jax.eval_shape(net.init)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        assert jax.eval_shape(net.logits, params, tokens).dtype == jnp.bfloat16
        assert jax.eval_shape(net.loss, params, tokens).dtype == jnp.float32

    def test_indivisible_heads_are_refused(self):
        with pytest.raises(ValueError, match=r"2 \* heads, got 16 and 3 heads"):
            replace(SMALL, heads=3)
