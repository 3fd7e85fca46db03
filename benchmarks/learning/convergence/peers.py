"""Optimizers of other papers that Optax does not have.

They take trees of weight matrices, (m, n) or stacks of them. Each is written for one matrix G
(m x n) with m ≤ n: a taller one is transposed on its way in and out, so only short sides are
projected. Common parts: Adam's update U for a core R after t steps,

    M ← β₁ M + (1 − β₁) R,    V ← β₂ V + (1 − β₂) R∘R                                          (1)
    U = M̂ / (√V̂ + ε),    M̂ = M / (1 − β₁ᵗ),    V̂ = V / (1 − β₂ᵗ)                               (2)

the ratio of column norms, and a limit on the growth of a norm,

    φ_j = ‖U_j‖ / (‖R_j‖ + ε)                                                                  (3)
    S ← S min(1, γ ‖S_before‖ / ‖S‖)                                                           (4)

where no limit applies after a zero, as at the start.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.custom_batching import sequential_vmap

from benchmarks.common.muon import newton_schulz
from natgalore_jax.subspace.basis import GENERATOR, svd
from natgalore_jax.util.control_flow import by_platform
from natgalore_jax.util.linalg import matmul, product
from natgalore_jax.util.orthonormalise import orthonormalise


MatrixState = dict[str, jax.Array]  # of one matrix, or of a stack of matrices

# Sequential: batched factorisations deadlocked on two cores (jaxlib 0.10.2).
orthonormal = sequential_vmap(orthonormalise)
leading = sequential_vmap(lambda G, P: svd(G, P, jax.random.key(0)))
eigenvectors = sequential_vmap(lambda A: jnp.linalg.eigh(A)[1][:, ::-1])  # largest first

short_first = lambda X: X if X.shape[-2] <= X.shape[-1] else X.mT
lengths = lambda X, axis=0: jnp.sqrt(jnp.square(X).sum(axis=axis, keepdims=True))
mean = lambda before, new, decay: decay * before + (1 - decay) * new
zeros = lambda **shapes: {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


class PeerState(NamedTuple):
    """The number of steps, and a dict of float32 arrays at each leaf."""

    count: jax.Array
    kept: Any


def per_matrix(
    learning_rate: optax.ScalarOrSchedule,
    start: Callable[[jax.Array, int, int], MatrixState],
    step: Callable[[jax.Array, MatrixState, jax.Array], tuple[jax.Array, MatrixState]],
    refresh: Callable[[jax.Array, MatrixState, jax.Array], MatrixState] | None = None,
    due: Callable[[jax.Array], jax.Array] = lambda t: t == 1,
    finish: Callable[[jax.Array], jax.Array] = lambda U: U,
) -> optax.GradientTransformation:
    """Applies `step` to every matrix of a tree and scales by the learning rate.

    Args:
      learning_rate: a number or a schedule.
      start: (key, m, n) -> state of a matrix.
      step: (G, state, t) -> (update, state). t is 1 at the first step.
      refresh: (G, state, t) -> state, called before `step` where due(t).
      due: t -> bool.
      finish: transforms the updates, in the layout of the leaves, before the learning rate.
    """

    def init(params):
        leaves, treedef = jax.tree.flatten(params)
        key = jax.random.key(0, impl=GENERATOR)
        kept, first = [], 0
        for leaf in leaves:
            *stack, m, n = short_first(leaf).shape
            number = first + jnp.arange(math.prod(stack))
            # Keys by the number among all matrices: a stack starts as separate matrices would.
            one = lambda i, m=m, n=n: start(jax.random.fold_in(key, i), m, n)
            back = lambda x, stack=stack: x.reshape(*stack, *x.shape[1:])
            kept.append(jax.tree.map(back, jax.vmap(one)(number)))
            first += len(number)
        return PeerState(jnp.zeros([], jnp.int32), treedef.unflatten(kept))

    def update(updates, state, params=None):
        del params
        t = state.count + 1
        leaves, treedef = jax.tree.flatten(updates)
        results, kept = [], []
        for leaf, old in zip(leaves, treedef.flatten_up_to(state.kept), strict=True):
            G = short_first(leaf).astype(jnp.float32)
            each = lambda f, G=G: f if G.ndim == 2 else jax.vmap(f, (0, 0, None))
            if refresh is not None:
                # Outside vmap, which would turn it into a select that runs both branches.
                refreshed = lambda G, old, each=each: each(refresh)(G, old, t)
                old = lax.cond(due(t), refreshed, lambda G, old: old, G, old)
            U, new = each(step)(G, old, t)
            results.append(finish(U if U.shape == leaf.shape else U.mT).astype(leaf.dtype))
            kept.append(new)
        return treedef.unflatten(results), PeerState(t, treedef.unflatten(kept))

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )


def adam(R, M, V, t, b1: float, b2: float, eps: float):
    """Equations (1) and (2): the update and both moments."""
    M, V = mean(M, R, b1), mean(V, R * R, b2)
    return M / (1 - b1**t) / (jnp.sqrt(V / (1 - b2**t)) + eps), M, V


def limit_growth(S, before, limit: float):
    """Equation (4): the limited S and its norm."""
    norm = jnp.linalg.norm(S)
    most = jnp.where(before > 0, limit * before, jnp.inf)
    return S * jnp.minimum(1.0, most / norm), jnp.minimum(norm, most)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float = 0.95,
    precondition_every: int = 10,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam in the eigenbases of L and R, on both sides of each matrix:

        G' = Q_Lᵀ G Q_R,    M ← β₁ M + (1 − β₁) G,    U by (1) and (2) of G' and Q_Lᵀ M Q_R
        L ← β L + (1 − β) G Gᵀ,    R ← β R + (1 − β) Gᵀ G,    W ← W − η Q_L U Q_Rᵀ
        Q ← Q of the QR decomposition of L Q,    every `precondition_every` steps

    As in the authors' code, the first gradient only initialises L, R and, by eigh, the bases; it
    enters no moment. A refresh first sorts the columns, with V, by their eigenvalues qᵀLq.

    Reference: Vyas et al., arXiv:2409.11321, algorithms 3 and 4.
    """

    def start(key, m, n):
        del key
        return zeros(M=(m, n), V=(m, n), L=(m, m), R=(n, n), QL=(m, m), QR=(n, n))

    def sorted_refresh(A, Q):
        Y = matmul(A, Q)
        order = jnp.argsort(-(Q * Y).sum(axis=0))
        return orthonormal(Y[:, order]), order

    def refresh(G, kept, t):
        del G

        def first():
            return {**kept, "QL": eigenvectors(kept["L"]), "QR": eigenvectors(kept["R"])}

        def later():
            QL, rows = sorted_refresh(kept["L"], kept["QL"])
            QR, columns = sorted_refresh(kept["R"], kept["QR"])
            return {**kept, "QL": QL, "QR": QR, "V": kept["V"][rows][:, columns]}

        return lax.cond(t == 2, first, later)

    def step(G, kept, t):
        M, V, L, R, QL, QR = (kept[name] for name in ("M", "V", "L", "R", "QL", "QR"))
        rotated = lambda X: product(product(QL.mT, X), QR)
        # At t = 1 the bases are zero, and so is the update.
        U, _, V = adam(rotated(G), rotated(M), V, jnp.maximum(t - 1, 1), b1, b2, eps)
        new = {"M": jnp.where(t > 1, mean(M, G, b1), M), "V": V, "QL": QL, "QR": QR}
        new["L"] = mean(L, product(G, G.mT), shampoo_beta)
        new["R"] = mean(R, product(G.mT, G), shampoo_beta)
        return product(product(QL, U), QR.mT), new

    due = lambda t: (t > 1) & ((t - 2) % precondition_every == 0)
    return per_matrix(learning_rate, start, step, refresh, due)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    refresh_every: int = 200,
    scale: float = 1.0,
    limit: float = 1.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """GaLore, plus its residual scaled column by column as Adam scales the core:

        R = Pᵀ G,    U by (1) and (2),    S = (G − P R) diag(φ) with φ of (3), limited by (4)
        W ← W − η α (P U + S)

    P holds the leading left singular vectors of the gradient at each refresh; moments are kept.

    Reference: Chen et al., arXiv:2410.01623, algorithm 1.
    """

    def start(key, m, n):
        del key
        r = min(rank, m)
        return zeros(P=(m, r), M=(r, n), V=(r, n), norm=())

    def step(G, kept, t):
        P = kept["P"]
        R = product(P.mT, G)
        U, M, V = adam(R, kept["M"], kept["V"], t, b1, b2, eps)
        S = (G - product(P, R)) * (lengths(U) / (lengths(R) + eps))
        S, norm = limit_growth(S, kept["norm"], limit)
        return scale * (product(P, U) + S), {"P": P, "M": M, "V": V, "norm": norm}

    refresh = lambda G, kept, t: {**kept, "P": leading(G, kept["P"])}
    due = lambda t: (t - 1) % refresh_every == 0
    return per_matrix(learning_rate, start, step, refresh, due)


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    refresh_every: int = 200,
    scale: float = 1.0,
    limit: float = 1.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    axis: int | None = 0,
) -> optax.GradientTransformation:
    """The gradient, with columns scaled as Adam scales those of a random projection:

        R = Pᵀ G with P_ij ~ N(0, 1/r),    U by (1) and (2),    S = √α G diag(φ) with φ of (3)
        W ← W − η S, limited by (4)

    P is drawn anew at each refresh and regenerated from its key at each step; moments are kept.
    Full-rank Adam's scale would need √α = √(m/r), which the paper leaves to η: its α is 1. With
    `axis` None one φ = ‖U‖ / ‖R‖ scales all columns.

    Reference: Zhu et al., arXiv:2412.05270, algorithm 1.
    """

    def start(key, m, n):
        r = min(rank, m)
        return {"key": jax.random.key_data(key), **zeros(M=(r, n), V=(r, n), norm=())}

    def step(G, kept, t):
        key = jax.random.wrap_key_data(kept["key"], impl=GENERATOR)
        P = random_projection(key, (t - 1) // refresh_every, G.shape[0], kept["M"].shape[0])
        R = product(P.mT, G)
        U, M, V = adam(R, kept["M"], kept["V"], t, b1, b2, eps)
        S = math.sqrt(scale) * G * (lengths(U, axis) / (lengths(R, axis) + eps))
        S, norm = limit_growth(S, kept["norm"], limit)
        return S, {"key": kept["key"], "M": M, "V": V, "norm": norm}

    return per_matrix(learning_rate, start, step)


def random_projection(key, times, m: int, r: int):
    """P of APOLLO (m x r) after `times` refreshes."""
    key = jax.random.fold_in(key, times)
    return jax.random.normal(key, (m, r), jnp.float32) / math.sqrt(r)


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule, *, scale: float = 128.0, **settings: Any
) -> optax.GradientTransformation:
    """APOLLO of rank 1, with one φ per matrix and √α = √128, as in the paper."""
    return apollo(learning_rate, 1, scale=scale, axis=None, **settings)


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    rho: float = 0.908,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam on a core whose basis changes at every step, with error feedback:

        A = G + E,    B = ρ P M̂ + (1 − ρ) A,    P' = Q of the QR decomposition of B Bᵀ P
        C = P'ᵀ P,    M' = C M,    V' = (1 − β₂ᵗ⁻¹) |C∘C (V̂ − M̂∘M̂) + (C M̂)∘(C M̂)|
        U by (1) and (2) of R = P'ᵀ A, M' and V',    W ← W − η P' U
        E ← A − P' R + (P M − P' M') β₁ / (1 − β₁)

    The first P holds the leading left singular vectors of the first gradient. The paper's
    experiments take β₁ = 0.908 and β₂ = 0.99.

    Reference: Robert et al., arXiv:2410.16103, algorithm 1.
    """

    def start(key, m, n):
        del key
        r = min(rank, m)
        return zeros(P=(m, r), M=(r, n), V=(r, n), error=(m, n))

    def step(G, kept, t):
        P, M, V = kept["P"], kept["M"], kept["V"]
        # At t = 1 the moments are zero and the divisors only avoid 0 / 0.
        w1, w2 = (jnp.maximum(1 - beta ** (t - 1), 1 - beta) for beta in (b1, b2))
        first, second = M / w1, V / w2
        A = G + kept["error"]
        B = rho * product(P, first) + (1 - rho) * A
        new_P = orthonormal(matmul(B, matmul(B.mT, P)))
        C = matmul(new_P.mT, P)
        M = matmul(C, M)
        spread = matmul(C * C, second - first * first) + jnp.square(matmul(C, first))
        R = product(new_P.mT, A)
        U, new, V = adam(R, M, w2 * jnp.abs(spread), t, b1, b2, eps)
        lost = product(P, kept["M"]) - product(new_P, M)
        error = A - product(new_P, R) + b1 / (1 - b1) * lost
        return product(new_P, U), {"P": new_P, "M": new, "V": V, "error": error}

    refresh = lambda G, kept, t: {**kept, "P": leading(G, kept["P"])}
    return per_matrix(learning_rate, start, step, refresh)


def polar(X):
    """Muon's approximation of the polar factor, in bfloat16 on accelerators."""
    if X.shape[-2] > X.shape[-1]:
        return polar(X.mT).mT
    narrow = lambda X: newton_schulz(X.astype(jnp.bfloat16)).astype(X.dtype)
    return by_platform(X, gpu=narrow, tpu=narrow, default=newton_schulz)


def cosmos(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    b1: float = 0.9,
    b2: float = 0.96,
    gamma: float = 0.2,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """SOAP in the leading eigenspace of G Gᵀ, Muon on the rest of the momentum:

        M ← β₁ M + (1 − β₁) G,    P' ← Q of the QR decomposition of β₂ P S + (1 − β₂) G Gᵀ P
        C = Pᵀ P',    R = P'ᵀ G,    S ← β₂ Cᵀ S C + (1 − β₂) R Rᵀ,    V ← β₂ V + (1 − β₂) R∘R
        A = P' (P'ᵀ M / (1 − β₁ᵗ) / (√(V / (1 − β₂ᵗ)) + ε)),    B = polar(M − P' P'ᵀ M)
        X = A + γ √(mn) B / ‖B‖,    W ← W − η √(mn) X / ‖X‖

    The first P holds the leading left singular vectors of the first gradient. The update has a root
    mean square of η. γ is the paper's; the defaults of b1 and b2 are this comparison's.

    Reference: Liu et al., arXiv:2502.17410, algorithm 1.
    """

    def start(key, m, n):
        del key
        r = min(rank, m)
        return zeros(P=(m, r), S=(r, r), V=(r, n), M=(m, n))

    def unit_rms(X):
        norm = jnp.linalg.norm(X)
        return math.sqrt(X.size) * X / jnp.where(norm > 0, norm, 1.0)

    def step(G, kept, t):
        P, S = kept["P"], kept["S"]
        new_P = orthonormal(b2 * matmul(P, S) + (1 - b2) * matmul(G, matmul(G.mT, P)))
        C, R = matmul(P.mT, new_P), product(new_P.mT, G)
        S = mean(matmul(matmul(C.mT, S), C), matmul(R, R.mT), b2)
        M, V = mean(kept["M"], G, b1), mean(kept["V"], R * R, b2)
        U = product(new_P.mT, M)
        A = product(new_P, U / (1 - b1**t) / (jnp.sqrt(V / (1 - b2**t)) + eps))
        rest = M - product(new_P, U)
        B = polar(unit_rms(rest) / math.sqrt(rest.size))
        return unit_rms(A + gamma * unit_rms(B)), {"P": new_P, "S": S, "V": V, "M": M}

    refresh = lambda G, kept, t: {**kept, "P": leading(G, kept["P"])}
    return per_matrix(learning_rate, start, step, refresh)


def dion(
    learning_rate: optax.ScalarOrSchedule, rank: int, *, mu: float = 0.95
) -> optax.GradientTransformation:
    """Momentum; every step applies and partly removes its component of rank r:

        B = M + G,    P = Q of the QR decomposition of B Q,    R = Bᵀ P
        M ← B − (1 − μ) P Rᵀ,    Q ← R, each column over its length
        W ← W − η √(outputs / inputs) P Qᵀ

    Kernels have shape (inputs, outputs). The first Q is random.

    Reference: Ahn et al., arXiv:2504.05295, algorithm 1.
    """

    def start(key, m, n):
        Q = jax.random.normal(key, (n, min(rank, m)), jnp.float32)
        return {"Q": Q, **zeros(M=(m, n))}

    def step(G, kept, t):
        del t
        B = kept["M"] + G
        P = orthonormal(matmul(B, kept["Q"]))
        R = matmul(B.mT, P)
        M = B - (1 - mu) * product(P, R.mT)
        length = lengths(R)
        # A column of zeros would remain zero forever.
        Q = jnp.where(length > 0, R / jnp.where(length > 0, length, 1.0), kept["Q"])
        return product(P, Q.mT), {"M": M, "Q": Q}

    by_shape = lambda U: U * math.sqrt(U.shape[-1] / U.shape[-2])
    return per_matrix(learning_rate, start, step, finish=by_shape)
