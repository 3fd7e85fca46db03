"""Natural GaLore in float64 NumPy, one function per equation, one loop over matrices.

Slow, dense and literal, so that a reader who knows arXiv:2410.16029 sees it here: the Fisher
matrix of a core is built and solved whole, an inverse root is an eigendecomposition, a stack of
layers is a list of matrices. Nothing here may import jax or natgalore_jax.

A matrix is seen with its projected side first: G is (m, n), P is (m, r), the core R = PᵀG is
(r, n). Projected on both sides it is seen as it is, and with Q (n, r) the core PᵀG Q is (r, r).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


def projected_side_first(matrix, side="short"):
    """The matrix, or its transpose: a view, so that writing to it writes to the matrix.

    Of a square matrix the left side is both the short and the long one.
    """
    rows, columns = matrix.shape
    turned = {
        "short": rows > columns,
        "long": rows < columns,
        "left": False,
        "right": True,
        "both": False,
    }
    return matrix.T if turned[side] else matrix


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


def largest_positive(p):
    """The columns with signs such that the largest entry of each is positive."""
    largest = np.take_along_axis(p, np.abs(p).argmax(axis=0)[None], axis=0)
    return p * np.sign(largest)


def svd_basis(g, p, turns):
    """The leading left singular vectors of G, the largest entry of each positive."""
    del turns
    left, _, _ = np.linalg.svd(g / np.abs(g).max(), full_matrices=False)
    return largest_positive(left[:, : p.shape[1]])


def float32_svd_basis(g, p, turns):
    """The same by a float32 SVD, which the torch programs make of a float64 gradient too."""
    del turns
    left, _, _ = np.linalg.svd(np.float32(g), full_matrices=False)
    return largest_positive(np.float64(left[:, : p.shape[1]]))


# --- Transport: what a state in the old bases becomes in the new ones --------------------------
# C = P_newᵀ P_old turns the rows of a core; D = Q_newᵀ Q_old its columns, if they have a basis.


def rotated_linear(c, x, d=None):
    """What is linear in the core goes where the core goes: C x, or C x Dᵀ."""
    return c @ x if d is None else c @ x @ d.T


def rotated_square(c, v, d=None):
    """(C∘C) v, and for the share of a direction that the old basis missed, the column's mean.

    Then the same of the rows, by D.
    """
    squares = c * c
    known = squares.sum(axis=1, keepdims=True)
    v = squares @ v + (1 - known) * v.mean(axis=0, keepdims=True)
    return v if d is None else rotated_square(d, v.T).T


def rotated_factors(c, row, col, d=None):
    """Squares kept as row colᵀ / mean(row): turned as what they stand for, and factored anew."""
    mean = row.mean()
    dense = rotated_square(c, np.outer(row, col) / (mean if mean else 1.0), d)
    return dense.mean(axis=1), dense.mean(axis=0)


def rotated_fisher(c, fisher):
    """What is quadratic in the core, R Rᵀ: C L Cᵀ. Of the columns it has forgotten the names."""
    return c @ fisher @ c.T


def reset_square(v, two_sided):
    """The mean over the directions that have lost their meaning, for each of them."""
    return np.full_like(v, v.mean()) if two_sided else np.tile(v.mean(axis=0), (len(v), 1))


# --- Fisher, window form (section 3.4): F = Σ h hᵀ over the last s cores -----------------------


def natural_gradient(cores, damping, power=1.0, relative=False):
    """(λ I + Σ_i h_i h_iᵀ)⁻ᵖ g, where g is the newest of `cores` and h_i is one of them as a
    vector. λ is the damping, or is relative to the mean of |h_i|²."""
    columns = [core.ravel() for core in cores]
    if relative:
        damping = damping * np.mean([h @ h for h in columns])
    fisher = sum(np.outer(h, h) for h in columns)
    damped = damping * np.eye(len(fisher)) + fisher
    if power == 1:
        solution = np.linalg.solve(damped, columns[-1])
    else:
        values, vectors = np.linalg.eigh(damped)
        solution = vectors @ (values**-power * (vectors.T @ columns[-1]))
    return solution.reshape(cores[-1].shape)


@dataclass
class WindowFisher:
    """One matrix's window of the last s cores that were not zero, kept in `dtype` if it is given.

    A type of few digits and a wide range, such as bfloat16: no units are needed here.
    """

    window: int = 20
    damping: float = 1e-3
    power: float = 1.0
    relative: bool = False
    dtype: type | None = None
    cores: list = field(default_factory=list)

    def stored(self, core):
        return core if self.dtype is None else core.astype(self.dtype).astype(np.float64)

    def precondition(self, core, count):
        del count
        if not core.any():
            return np.zeros_like(core)
        self.cores = [*self.cores, self.stored(core)][-self.window :]
        return natural_gradient(self.cores, self.damping, self.power, self.relative)

    def rotate(self, c, d=None):
        self.cores = [self.stored(rotated_linear(c, core, d)) for core in self.cores]

    def reset(self, two_sided):
        del two_sided
        self.cores = []


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

    def rotate(self, c, d=None):
        del d
        if self.weight:
            self.fisher = rotated_fisher(c, self.fisher)
        self.stale = True

    def reset(self, two_sided):
        del two_sided
        self.fisher, self.weight, self.root, self.unit_of_root = 0.0, 0.0, None, 0.0


# --- Residual: what the projection leaves out ---------------------------------------------------


def isotropic(left, core, u, g=None):
    """Each column of what is left over the root of its mean square, a little damped.

    The core of both sides has no columns of the gradient: then it is the matrix as a whole. The
    damping is in units of `g`, by default of the gradient whose residual and core these are.
    """
    (m, n), (r, k) = left.shape, core.shape
    axis, numbers = (0, m - r) if k == n else (None, m * n - r * k)
    square = (left**2).sum(axis)
    whole = square + (core**2).sum(axis) if g is None else (g**2).sum(axis)  # by Pythagoras
    variance = (square + 1e-3 * whole) / max(numbers, 1)
    return left / np.sqrt(np.where(whole > 0, variance, 1.0))


QUINTICS = (  # in four digits, as the library has them; `minimax_steps(0.016, 3)` derives them
    (7.7877, -22.0545, 15.9205),
    (3.3472, -2.4633, 0.4916),
    (2.3437, -1.6832, 0.4083),
)


def minimax_steps(least, steps, degree=5, margin=1.01):
    """Odd polynomials whose composition is nearest to 1 on [least, 1], each on a range 1 % wider.

    The composition of best approximations is the best composition (arXiv:2505.16932, theorem 3.1).
    Returns the coefficients of x, x³, … of each, and the last error.
    """
    low, high, rows, error = least, 1.0, [], 0.0
    for _ in range(steps):
        coefficients, error = minimax_odd(low, high * margin, degree)
        rows.append(coefficients)
        low, high = 1 - error, 1 + error
    return rows, error


def minimax_odd(low, high, degree):
    """The odd polynomial nearest to 1 on [low, high] and its error, by Remez's exchange."""
    powers = np.arange(1, degree + 1, 2)
    count = len(powers) + 1  # of points at which the error alternates
    x = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(count) / (count - 1))
    for _ in range(50):
        signs = (-1.0) ** np.arange(count)[:, None]
        *c, error = np.linalg.solve(np.hstack([x[:, None] ** powers, signs]), np.ones(count))
        dense = np.zeros(degree + 1)
        dense[powers] = c
        roots = np.polynomial.Polynomial(dense).deriv().roots().real
        x = np.array([low, *sorted(t for t in roots if low < t < high), high])
    return np.array(c), abs(error)


def whitened(left, core, u, g=None):
    """The residual with the singular values that three steps of the quintics return."""
    (m, n), (r, k) = left.shape, core.shape
    numbers, directions = m * n - r * k, min(m if k < n else m - r, n)
    if directions == 0:
        return np.zeros_like(left)
    left_vectors, values, right_vectors = np.linalg.svd(left, full_matrices=False)
    whole = (left**2).sum() + (core**2).sum() if g is None else (g**2).sum()
    size = np.sqrt((left**2).sum() + 1e-3 * whole)  # of T and G
    values = values / (size or 1.0)
    # The Schatten 4-norm over the Frobenius norm.
    values = values / (((values**4).sum() / ((values**2).sum() or 1.0) ** 2) ** 0.25 or 1.0)
    for a, b, c in QUINTICS:
        values = a * values + b * values**3 + c * values**5
    return np.sqrt(numbers / directions) * (left_vectors * values) @ right_vectors


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

    def rotate(self, c, d=None):
        if np.ndim(self.m):  # before the first step there is nothing to carry over
            self.m = rotated_linear(c, self.m, d)
            self.v = rotated_square(c, self.v, d)

    def reset(self, two_sided):
        """The count goes on, so v, whose bias it takes out, cannot start over: Adam would leap."""
        if np.ndim(self.m):
            self.m = np.zeros_like(self.m)
            self.v = reset_square(self.v, two_sided)


class TorchAdam(Adam):
    """Adam as the torch programs of both papers have it: ε is added where the bias still is."""

    def step(self, g, count):
        """m̂ / ((√v + ε) / √(1 − b2ᵗ))."""
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m_hat = self.m / (1 - self.b1 ** (count + 1))
        return m_hat * np.sqrt(1 - self.b2 ** (count + 1)) / (np.sqrt(self.v) + self.eps)


# --- The whole optimizer ------------------------------------------------------------------------


@dataclass
class Matrix:
    """One matrix weight, in the orientation of its owner, and what is remembered for it."""

    weight: np.ndarray
    bases: list[np.ndarray]  # P, or P and Q
    adam: Adam
    fisher: WindowFisher | CoreFisher | None
    skipped: int = 0
    momentum: np.ndarray | float = 0.0  # of the residual
    cold: bool = True  # no basis from a gradient yet: the first usable one brings it, at any step


@dataclass
class Other:
    """One leaf that is not projected: plain Adam."""

    weight: np.ndarray
    adam: Adam
    skipped: int = 0


BASES = {"power": power_basis, "svd": svd_basis}


def phase(index, refresh_every, total, stagger):
    """The step of a period at which matrix `index` of `total` is refreshed.

    Under `stagger` at most 100 groups begin their periods one after another, evenly spread.
    """
    groups = min(100, refresh_every, total) if stagger else 1
    return (index * groups // total) * refresh_every // groups


def due(index, count, refresh_every, total, stagger):
    """Whether a matrix is refreshed at step `count`: all are at step 0."""
    return count == 0 or count % refresh_every == phase(index, refresh_every, total, stagger)


class NaturalGaLore:
    """Steps lists of weights: `matrices` in their subspaces, `others` by plain Adam.

    Args:
      matrices: the projected weights, each two-dimensional, a stack unrolled.
      others: the other weights, of any shape.
      bases: what each matrix starts with: P, or [P, Q] where `side` is "both".
      due: `due(index, count, refresh_every, total)`, whether matrix `index` of `total` is refreshed
        at step `count`, counted from 0.
      fisher: makes the Fisher form of one matrix, or is None.
      basis: a name, or a function `(G, P, turns) -> P`; for Q it is given Gᵀ and Q.
      side: which side of a matrix is projected: "short", "long", "left", "right" or "both".
      transport: "rotate", "keep" or "reset".
      residual: makes what is added for what is left out, `(G − P R, R, U) -> S`; None is nothing.
      residual_momentum: β of Nesterov's momentum of G − P R, or None. `residual` then also takes
        (1 − β) G, in whose units it damps.
      residual_scale: what S is multiplied by.
      adam: the kind of Adam.
      decay_after: whether weights decay after they have moved, as in the torch programs.
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
        side: str = "short",
        transport: str = "rotate",
        residual: Callable | None = None,
        residual_momentum: float | None = None,
        residual_scale: float = 1.0,
        adam: type[Adam] = Adam,
        decay_after: bool = False,
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
        self.side, self.decay_after, self.residual = side, decay_after, residual
        self.beta, self.residual_scale = residual_momentum, residual_scale
        self.count = 0
        starts = bases if side == "both" else [[p] for p in bases]
        self.matrices = [
            Matrix(
                float64(w),
                [float64(p) for p in start],
                adam(b1, b2, eps),
                fisher() if fisher else None,
            )
            for w, start in zip(matrices, starts, strict=True)
        ]
        self.others = [Other(float64(w), adam(b1, b2, eps)) for w in others]

    def step(self, matrix_gradients, other_gradients):
        """Moves every weight once."""
        for index, (matrix, g) in enumerate(zip(self.matrices, matrix_gradients, strict=True)):
            g = projected_side_first(np.asarray(g, np.float64), self.side)
            is_due = self.due(index, self.count, self.refresh_every, len(self.matrices))
            if (is_due or matrix.cold) and np.isfinite(g).all() and g.any():
                self.refresh(matrix, g)
            self.step_matrix(matrix, g)
        for other, g in zip(self.others, other_gradients, strict=True):
            self.step_other(other, np.asarray(g, np.float64))
        self.count += 1

    def refresh(self, matrix, g):
        """New bases from this step's gradient, each by itself, and the state carried over."""
        old = matrix.bases
        turns = 4 if matrix.cold else 1
        matrix.bases = [
            self.new_basis(view, p, turns) for view, p in zip((g, g.T), old, strict=False)
        ]
        matrix.cold = False
        for state in (matrix.adam, matrix.fisher):
            if state is None or self.transport == "keep":
                continue
            if self.transport == "rotate":
                state.rotate(*[new.T @ p for new, p in zip(matrix.bases, old, strict=True)])
            else:
                state.reset(two_sided=len(old) == 2)

    def step_matrix(self, matrix, g):
        """Project, precondition, Adam, lift, and the residual."""
        finite = np.isfinite(g).all()
        matrix.skipped += not finite
        g = g if finite else np.zeros_like(g)
        p, *right = matrix.bases
        core = p.T @ g
        for q in right:
            core = core @ q
        u = core if matrix.fisher is None else matrix.fisher.precondition(core, self.count)
        u = matrix.adam.step(u, self.count) * finite
        lifted = self.lift(matrix, u)
        if self.residual is not None:
            left = g - self.lift(matrix, core)
            damp = {}
            if self.beta is not None:
                left = self.nesterov(matrix, left)
                damp = {"g": (1 - self.beta) * g}
            s = self.residual(left, core, u, **damp)
            lifted = lifted + self.residual_scale * s * finite
        self.move(projected_side_first(matrix.weight, self.side), self.scale * lifted)

    def nesterov(self, matrix, left):
        """M ← β (M without its part in the subspace) + (1 − β) T; the momentum of the next step."""
        old = np.zeros_like(left) + matrix.momentum
        p, *right = matrix.bases
        inside = p.T @ old
        for q in right:
            inside = inside @ q
        old = old - self.lift(matrix, inside)
        matrix.momentum = self.beta * old + (1 - self.beta) * left
        return self.beta * matrix.momentum + (1 - self.beta) * left

    def lift(self, matrix, x):
        p, *right = matrix.bases
        lifted = p @ x
        for q in right:
            lifted = lifted @ q.T
        return lifted

    def step_other(self, other, g):
        finite = np.isfinite(g).all()
        other.skipped += not finite
        direction = other.adam.step(g if finite else np.zeros_like(g), self.count) * finite
        self.move(other.weight, direction)

    def move(self, weight, direction):
        """W ← W − lr (direction + decay · W): the decay is decoupled, and acts on all of W."""
        if self.decay_after:
            weight -= self.learning_rate * direction
            weight *= 1 - self.learning_rate * self.weight_decay
        else:
            weight -= self.learning_rate * (direction + self.weight_decay * weight)


# --- The dynamic code of 8 bits (arXiv:2110.02861) ----------------------------------------------


def dynamic_code(bits, decades=7):
    """The values of some decades below 1, ascending, with 0 before them and scaled to end in 1.

    The lowest decade has 2^(bits - decades) equal cells between a tenth and the whole of it, and
    each one above twice as many; the values are their middles.
    """
    values = [0.0]
    for decade in range(1 - decades, 1):
        edges = np.linspace(0.1, 1, 2 ** (bits - 1 + decade) + 1)
        values.extend(10.0**decade * (edges[:-1] + edges[1:]) / 2)
    return np.array(values) / values[-1]
