"""PPO on CartPole in one jitted program, its seeds under `vmap`, as in PureJaxRL.

    python examples/trainers/ppo.py          four seeds of both optimizers; two minutes on two cores

The environment, the policy and the training loop are JAX, so that `jax.vmap(train)` trains every
seed at once. With Natural GaLore the line of the optimizer changes, nothing else: the refresh of
the bases depends on the count of steps alone, which all seeds share.

PPO: Schulman et al., arXiv:1707.06347. PureJaxRL: Lu et al., arXiv:2210.05639.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import natgalore_jax as natgalore


ENVIRONMENTS, STEPS, EPOCHS, BATCHES, WIDTH = 16, 64, 4, 4, 64
DISCOUNT, TRACE, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
OPTIMIZERS = {
    "AdamW": optax.adamw(2.5e-3),
    "Natural GaLore": natgalore.natural_galore(2.5e-3, rank=16),
}


class Transition(NamedTuple):
    """One step of every environment."""

    observation: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def balance(state: jax.Array, push: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of a pole of 0.5 m (half) and 0.1 kg on a cart of 1 kg, 0.02 s later.

    Args:
        state: position, speed, angle and angular speed, (4,).
        push: 1 to the right, 0 to the left, with 10 N.

    Returns:
        The new state, and whether the pole fell or the cart left the track.

    Reference: Barto, Sutton and Anderson, IEEE SMC-13 (1983); the constants are Gymnasium's.
    """
    _, speed, angle, turn = state
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    force = (20.0 * push - 10.0 + 0.05 * turn**2 * sin) / 1.1
    turning = (9.8 * sin - cos * force) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    pushing = force - 0.05 * turning * cos / 1.1
    state += 0.02 * jnp.array([speed, pushing, turn, turning])
    return state, (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 0.2095)


def init(key: jax.Array) -> Any:
    """Weights of an actor and a critic with two hidden layers each."""

    def network(key, outputs, scale):
        sizes = [4, WIDTH, WIDTH, outputs]
        keys = jax.random.split(key, 3)
        gains = [2**0.5, 2**0.5, scale]
        orthogonal = lambda k, m, n, gain: gain * jax.nn.initializers.orthogonal()(k, (m, n))
        kernels = map(orthogonal, keys, sizes, sizes[1:], gains)
        return [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in kernels]

    actor, critic = jax.random.split(key)
    return {"actor": network(actor, 2, 0.01), "critic": network(critic, 1, 1.0)}


def apply(layers: Any, x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def act(params: Any, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the two actions, and the value."""
    log_probs = jax.nn.log_softmax(apply(params["actor"], observation))
    return log_probs, apply(params["critic"], observation)[..., 0]


def loss_fn(params: Any, batch: Transition, advantage: jax.Array, target: jax.Array) -> jax.Array:
    log_probs, value = act(params, batch.observation)
    log_prob = jnp.take_along_axis(log_probs, batch.action[:, None], axis=1)[:, 0]
    ratio = jnp.exp(log_prob - batch.log_prob)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    actor = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    return actor + VALUE * 0.5 * jnp.square(value - target).mean() - ENTROPY * entropy


def train(tx: optax.GradientTransformation, updates: int, key: jax.Array) -> jax.Array:
    """Trains one policy; returns the mean length of the episodes that end in each update."""
    key, params_key, reset_key = jax.random.split(key, 3)
    reset = lambda key: jax.random.uniform(key, (ENVIRONMENTS, 4), minval=-0.05, maxval=0.05)
    params = init(params_key)

    def interact(carry, key):
        params, observation, length = carry
        action_key, reset_key = jax.random.split(key)
        log_probs, value = act(params, observation)
        action = jax.random.categorical(action_key, log_probs)
        log_prob = jnp.take_along_axis(log_probs, action[:, None], axis=1)[:, 0]
        new, fell = jax.vmap(balance)(observation, action.astype(jnp.float32))
        length += 1
        done = fell | (length == 500)
        step = Transition(observation, action, log_prob, value, jnp.ones(ENVIRONMENTS), done)
        ended = jnp.stack([jnp.where(done, length, 0).sum(), done.sum()])
        observation = jnp.where(done[:, None], reset(reset_key), new)
        return (params, observation, jnp.where(done, 0, length)), (step, ended)

    def estimate(carry, step):
        advantage, next_value = carry
        kept = DISCOUNT * (1 - step.done)
        advantage = step.reward + kept * next_value - step.value + kept * TRACE * advantage
        return (advantage, step.value), advantage

    def learn(carry, indices, data):
        params, state = carry
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[indices], data)
        grads = jax.grad(loss_fn)(params, *batch)
        changes, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, changes), state), None

    def update(carry, key):
        params, state, observation, length = carry
        act_key, batch_key = jax.random.split(key)
        (_, observation, length), (steps, ended) = lax.scan(
            interact, (params, observation, length), jax.random.split(act_key, STEPS)
        )
        _, value = act(params, observation)
        _, advantage = lax.scan(estimate, (jnp.zeros(ENVIRONMENTS), value), steps, reverse=True)
        data = (steps, advantage, advantage + steps.value)
        shuffle = lambda key: jax.random.permutation(key, STEPS * ENVIRONMENTS)
        batches = jax.vmap(shuffle)(jax.random.split(batch_key, EPOCHS)).reshape(
            EPOCHS * BATCHES, -1
        )
        (params, state), _ = lax.scan(lambda c, i: learn(c, i, data), (params, state), batches)
        total, episodes = ended.sum(0)
        return (params, state, observation, length), total / jnp.maximum(episodes, 1)

    start = (params, tx.init(params), reset(reset_key), jnp.zeros(ENVIRONMENTS, jnp.int32))
    _, lengths = lax.scan(update, start, jax.random.split(key, updates))
    return lengths


def main(updates: int = 60, seeds: int = 4) -> dict[str, np.ndarray]:
    """Trains all seeds of both optimizers; returns lengths of episodes, (seeds, updates)."""
    found = {}
    keys = jax.random.split(jax.random.key(0), seeds)
    for name, tx in OPTIMIZERS.items():
        start = time.perf_counter()
        train_all = jax.jit(jax.vmap(lambda key, tx=tx: train(tx, updates, key)))
        compiled = train_all.lower(keys).compile()
        compile_seconds = time.perf_counter() - start
        found[name] = np.asarray(compiled(keys))
        first, last = found[name][:, :5].mean(1), found[name][:, -5:].mean(1)
        print(
            f"{name}: steps until the pole falls {first.mean():.0f} at first, "
            f"{last.mean():.0f} at the end ({', '.join(f'{x:.0f}' for x in last)}); "
            f"compiled in {compile_seconds:.1f} s"
        )
    return found


if __name__ == "__main__":
    main()
