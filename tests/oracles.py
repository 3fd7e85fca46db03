"""Natural GaLore in float64 NumPy, one function per equation, one loop over matrices.

Slow, dense and literal, so that a reader who knows arXiv:2410.16029 sees it here: the Fisher
matrix of a core is built and solved whole, an inverse root is an eigendecomposition, a stack of
layers is a list of matrices. Nothing here may import jax or natgalore_jax.

A matrix is seen with its short side first: G is (m, n) with m <= n, P is (m, r), the core
R = PᵀG is (r, n).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


def short_side_first(matrix):
    """The matrix as (m, n), m <= n. Its own inverse, unless the matrix is square: then as is."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


# --- Basis: G -> P ----------------------------------------------------------------------------


def orthonormal(y):
    """Q of the one QR decomposition y = Q R whose R has a positive diagonal."""
    q, upper = np.linalg.qr(y)
    return q * np.sign(np.diag(upper))


def power_basis(g, p, turns):
    """`turns` turns of block power iteration on G Gᵀ, from the columns of `p`."""
    g = g / np.abs(g).max()
    for _ in range(turns):
        y = g @ (g.T @ p)
        p = orthonormal(y / np.linalg.norm(y) + 1e-6 * p)
    return p


def svd_basis(g, p, turns):
    """The leading left singular vectors of G, the largest entry of each positive."""
    del turns
    left, _, _ = np.linalg.svd(g / np.abs(g).max(), full_matrices=False)
    left = left[:, : p.shape[1]]
    largest = np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0)
    return left * np.sign(largest)


# --- Transport: what a state in the old basis becomes in the new one, C = P_newᵀ P_old ---------


def rotated_linear(c, x):
    """What is linear in the core goes where the core goes: C x."""
    return c @ x


def rotated_square(c, v):
    """(C∘C) v, and for the share of a direction that the old basis missed, the column's mean."""
    squares = c * c
    known = squares.sum(axis=1, keepdims=True)
    return squares @ v + (1 - known) * v.mean(axis=0, keepdims=True)


def rotated_fisher(c, fisher):
    """What is quadratic in the core, R Rᵀ: C L Cᵀ."""
    return c @ fisher @ c.T


# --- Fisher, window form (section 3.4): F = Σ h hᵀ over the last s cores -----------------------


def natural_gradient(cores, damping):
    """(λ I + Σ_i h_i h_iᵀ)⁻¹ g, where g is the newest of `cores` and h_i is one of them as a
    vector."""
    columns = [core.ravel() for core in cores]
    fisher = sum(np.outer(h, h) for h in columns)
    solution = np.linalg.solve(damping * np.eye(len(fisher)) + fisher, columns[-1])
    return solution.reshape(cores[-1].shape)


@dataclass
class WindowFisher:
    """One matrix's window of the last s cores that were not zero."""

    window: int = 20
    damping: float = 1e-3
    cores: list = field(default_factory=list)

    def precondition(self, core, count):
        del count
        if not core.any():
            return np.zeros_like(core)
        self.cores = [*self.cores, core][-self.window :]
        return natural_gradient(self.cores, self.damping)

    def rotate(self, c):
        self.cores = [rotated_linear(c, core) for core in self.cores]


# --- Fisher, core form (section 3.2): L = decayed mean of R Rᵀ ---------------------------------


def inverse_root(fisher, damping, power):
    """(L̂ + λ I)⁻ᵖ with λ = damping · tr(L̂)/r, by eigenvalues."""
    absolute = damping * np.trace(fisher) / len(fisher)
    values, vectors = np.linalg.eigh(fisher)
    return (vectors * (values + absolute) ** -power) @ vectors.T


def unit_of(fisher):
    """The power of two σ for which tr(L)/σ² is in [1, 4)."""
    return 2.0 ** np.floor(np.log2(np.trace(fisher)) / 2)


@dataclass
class CoreFisher:
    """One matrix's mean of R Rᵀ, and a root of it that is renewed only now and then."""

    decay: float = 0.98
    damping: float = 0.1
    power: float = 0.5
    root_every: int = 10
    fisher: np.ndarray | float = 0.0
    weight: float = 0.0
    root: np.ndarray | None = None
    unit_of_root: float = 0.0
    stale: bool = False

    def precondition(self, core, count):
        if not core.any():
            return np.zeros_like(core)
        self.fisher = self.decay * self.fisher + (1 - self.decay) * core @ core.T
        self.weight = self.decay * self.weight + (1 - self.decay)
        outgrown = unit_of(self.fisher) > 16 * self.unit_of_root
        if self.root is None or self.stale or outgrown or count % self.root_every == 0:
            self.root = inverse_root(self.fisher / self.weight, self.damping, self.power)
            self.unit_of_root = unit_of(self.fisher)
            self.stale = False
        return self.root @ core

    def rotate(self, c):
        if self.weight:
            self.fisher = rotated_fisher(c, self.fisher)
        self.stale = True


# --- Adam, as optax.scale_by_adam has it --------------------------------------------------------


@dataclass
class Adam:
    """The moments of one leaf, or of one core."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0

    def step(self, g, count):
        """m̂ / (√v̂ + ε), with the biases of the `count + 1` steps taken out."""
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m_hat = self.m / (1 - self.b1 ** (count + 1))
        v_hat = self.v / (1 - self.b2 ** (count + 1))
        return m_hat / (np.sqrt(v_hat) + self.eps)

    def rotate(self, c):
        if np.ndim(self.m):  # before the first step there is nothing to carry over
            self.m = rotated_linear(c, self.m)
            self.v = rotated_square(c, self.v)


# --- The whole optimizer ------------------------------------------------------------------------


@dataclass
class Matrix:
    """One matrix weight, in the orientation of its owner, and what is remembered for it."""

    weight: np.ndarray
    basis: np.ndarray
    adam: Adam
    fisher: WindowFisher | CoreFisher | None
    skipped: int = 0
    cold: bool = True  # no basis from a gradient yet: the first usable one brings it, at any step


@dataclass
class Other:
    """One leaf that is not projected: plain Adam."""

    weight: np.ndarray
    adam: Adam
    skipped: int = 0


BASES = {"power": power_basis, "svd": svd_basis}


class NaturalGaLore:
    """Steps lists of weights: `matrices` in their subspaces, `others` by plain Adam.

    Args:
      matrices: the projected weights, each two-dimensional, a stack unrolled.
      others: the other weights, of any shape.
      bases: the initial P of each matrix.
      due: `due(index, count, refresh_every, total)`, whether matrix `index` of `total` is refreshed
        at step `count`, counted from 0.
      fisher: makes the Fisher form of one matrix, or is None.
      basis: a name, or a function `(G, P, turns) -> P`.
    """

    def __init__(
        self,
        matrices: Sequence[np.ndarray],
        others: Sequence[np.ndarray],
        bases: Sequence[np.ndarray],
        *,
        learning_rate: float,
        due: Callable[[int, int, int, int], bool],
        refresh_every: int = 200,
        fisher: Callable[[], WindowFisher | CoreFisher] | None = None,
        basis: str | Callable = "power",
        transport: str = "rotate",
        scale: float = 1.0,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        def float64(x):
            return np.array(x, np.float64)

        self.learning_rate, self.scale, self.weight_decay = learning_rate, scale, weight_decay
        self.due, self.refresh_every, self.transport = due, refresh_every, transport
        self.new_basis = BASES.get(basis, basis)
        self.count = 0
        self.matrices = [
            Matrix(float64(w), float64(p), Adam(b1, b2, eps), fisher() if fisher else None)
            for w, p in zip(matrices, bases, strict=True)
        ]
        self.others = [Other(float64(w), Adam(b1, b2, eps)) for w in others]

    def step(self, matrix_gradients, other_gradients):
        """Moves every weight once."""
        for index, (matrix, g) in enumerate(zip(self.matrices, matrix_gradients, strict=True)):
            g = short_side_first(np.asarray(g, np.float64))
            is_due = self.due(index, self.count, self.refresh_every, len(self.matrices))
            if (is_due or matrix.cold) and np.isfinite(g).all() and g.any():
                self.refresh(matrix, g)
            self.step_matrix(matrix, g)
        for other, g in zip(self.others, other_gradients, strict=True):
            self.step_other(other, np.asarray(g, np.float64))
        self.count += 1

    def refresh(self, matrix, g):
        """A new P from this step's gradient, and the state carried over to it."""
        old = matrix.basis
        matrix.basis = self.new_basis(g, old, 4 if matrix.cold else 1)
        matrix.cold = False
        if self.transport == "rotate":
            c = matrix.basis.T @ old
            matrix.adam.rotate(c)
            if matrix.fisher is not None:
                matrix.fisher.rotate(c)

    def step_matrix(self, matrix, g):
        """Project, precondition, Adam, lift."""
        finite = np.isfinite(g).all()
        matrix.skipped += not finite
        p = matrix.basis
        core = p.T @ (g if finite else np.zeros_like(g))
        if matrix.fisher is not None:
            core = matrix.fisher.precondition(core, self.count)
        lifted = p @ matrix.adam.step(core, self.count) * finite
        view = short_side_first(matrix.weight)  # a view: it writes the weight itself
        view += self.decayed(self.scale * lifted, view)

    def step_other(self, other, g):
        finite = np.isfinite(g).all()
        other.skipped += not finite
        direction = other.adam.step(g if finite else np.zeros_like(g), self.count) * finite
        other.weight += self.decayed(direction, other.weight)

    def decayed(self, direction, weight):
        """−lr (direction + decay · W): the decay is decoupled, and acts on the whole weight."""
        return -self.learning_rate * (direction + self.weight_decay * weight)
