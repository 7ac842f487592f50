"""One hidden layer to second order: ``f(x) = sum_j v_j sigma(w_j . x)``, its Hessian in closed form, and a trainer.

Weights are the usual pair ``[W, V]`` with ``W`` of shape (S, D, m), ``V`` of shape (S, m, 1); a bias is one more column
of ones in ``X``.  The parameters in a row are ``theta = (v_1, ..., v_m, w_1, ..., w_m)``, ``p = m (1 + D)`` numbers.

The loss is ``L = sum_n l(f(x_n), y_n)`` with ``l = (f - y)^2 / 2`` (``"square"``) or ``l = log(1 + e^f) - y f``
(``"logistic"``, y in [0, 1]).  Everything rests on the dual function ``g_e(w) = sum_n e_n sigma(w . x_n)`` with
``e = dl/df``: the gradient is ``dL/dv_j = g_e(w_j)``, ``dL/dw_j = v_j grad g_e(w_j)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion import networks
from companion.arguments import checked
from companion.networks import ACTIVATIONS, Activation, activation

Loss = Literal["square", "logistic"]
_LM_UP, _LM_DOWN = 4.0, 0.25  # the damping after a rejected and after an accepted step
_COMPACT = 5  # finished networks leave the batch every so many iterations
_KICK = 50  # a push along a direction of negative curvature every so many Newton steps
_KICK_SIZES = (0.3, -0.3, 0.03, -0.03)


def recognized(sigma: Activation, *names: str) -> bool:
    """Whether sigma is companion's own activation of one of these names; another one may bear the same name."""
    return sigma.name in names and sigma is ACTIVATIONS.get(sigma.name)


def check_shallow(
    weights: Sequence[Tensor],
    X: Tensor,
    Y: Tensor | None = None,
    act: str | Activation = "tanh",
    *,
    order: int = 2,
    outputs: int | None = 1,
) -> tuple[list[Tensor], Activation]:
    """Refuse what is not one hidden layer for these finite data, and return the stacked weights and the activation.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, K) or without S.
        X: inputs, shape (N, D) or (S, N, D).
        Y: targets, shape (N, K) or (S, N, K), or None.
        act: name or `Activation`.
        order: how many derivatives of the activation are needed (0, 1 or 2).
        outputs: the number K of outputs needed; None for any.

    Returns:
        The stacked weights and the `Activation`.

    Raises:
        TypeError: weights that are no tensors.
        ValueError: more or fewer than two matrices, shapes that do not fit, NaN or infinity in weights, too many
            outputs, or an activation without the derivatives asked for (relu and step have no Hessian).
    """
    sigma = activation(act)
    for name, T in (("X", X), ("Y", Y)):
        if T is None:
            continue
        if T.ndim not in (2, 3):
            raise ValueError(f"{name} has shape {tuple(T.shape)}; (N, columns) or (S, N, columns) is needed")
    networks.check_weights(weights, X, Y)
    stacked = networks.as_ensemble(weights)
    if len(stacked) != 2:
        raise ValueError(f"weights holds {len(stacked)} matrices; [W, V] of one hidden layer is needed")
    S = len(stacked[0])
    for name, T in (("X", X), ("Y", Y)):
        if T is not None and T.ndim == 3 and len(T) != S:
            raise ValueError(f"{name} holds {len(T)} data sets for {S} networks; one for each is needed")
    if Y is not None and Y.shape[-2] != X.shape[-2]:
        raise ValueError(f"Y has {Y.shape[-2]} rows, X has {X.shape[-2]}; one target for each input is needed")
    if outputs is not None and stacked[1].shape[2] != outputs:
        raise ValueError(f"V has {stacked[1].shape[2]} columns; {outputs} output is needed")
    if order >= 2 and (sigma.second is None or recognized(sigma, "relu", "step")):
        raise ValueError(f"activation {sigma.name!r} has no second derivative; a smooth one is needed for a Hessian")
    return stacked, sigma


class Derivatives(NamedTuple):
    """The loss to second order; the Hessian is ``gram + curvature``.

    ``loss`` (S,), ``e`` (S, N) the derivative of the loss in the outputs, ``gradient`` (S, p), ``gram`` (S, p, p) the
    Gauss-Newton part ``J^T diag(l'') J``, ``curvature`` (S, p, p) the rest, ``J`` (S, N, p) the Jacobian of f.
    """

    loss: Tensor
    e: Tensor
    gradient: Tensor
    gram: Tensor
    curvature: Tensor
    J: Tensor

    @property
    def hessian(self) -> Tensor:
        """The Hessian, (S, p, p)."""
        return self.gram + self.curvature


@checked(double=True)
def loss_derivatives(
    weights: Sequence[Tensor],
    X: Float[Tensor, "*x N D"],
    Y: Float[Tensor, "*y N 1"],
    act: str | Activation,
    *,
    loss: Loss = "square",
) -> Derivatives:
    """Loss, gradient and Hessian in closed form: ``Hessian = J^T diag(l'') J + C(e)``.

    ``C(e)`` has ``grad g_e(w_j)`` in the blocks ``(v_j, w_j)``, ``v_j Hess g_e(w_j)`` in the blocks ``(w_j, w_j)``, and
    nothing else.  Each p x p tensor costs ``8 S p^2`` bytes.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, 1) or without S.
        X: inputs, shape (N, D), or (S, N, D) with each network's own.
        Y: targets, shape (N, 1) or (S, N, 1).
        act: name or `Activation` with two derivatives.
        loss: ``"square"`` or ``"logistic"``.

    Returns:
        The `Derivatives` at ``theta = (v_1..v_m, w_1..w_m)``.

    Raises:
        TypeError: not float64.
        ValueError: see `check_shallow`; an unknown loss.

    Source: derived in lesson 5, exercise on the Hessian.
    """
    (W, V), sigma = check_shallow(weights, X, Y, act)
    S, D, m = W.shape
    X = X.expand(S, *X.shape[-2:])
    Z = X @ W  # (S, N, m)
    H, first = sigma.value(Z), sigma.derivative(Z)
    value, e, weight = pointwise((H @ V)[..., 0], Y[..., 0], loss)
    J = torch.cat([H, torch.einsum("snj,sj,snd->snjd", first, V[..., 0], X).flatten(2)], 2)
    g, grad, hess = dual_function(e, X, act, W)
    C = W.new_zeros(S, m * (1 + D), m * (1 + D))
    for j in range(m):
        w = slice(m + j * D, m + (j + 1) * D)
        C[:, j, w] = C[:, w, j] = grad[:, j]
        C[:, w, w] = V[:, j, :, None] * hess[:, j]
    gradient = torch.cat([g, (V * grad).flatten(1)], 1)
    return Derivatives(value.sum(-1), e, gradient, J.mT @ (weight[..., None] * J), C, J)


def pointwise(f: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """``l(f, y)`` with its first and second derivative in f, entry by entry."""
    if loss == "square":
        e = f - y
        return 0.5 * e**2, e, torch.ones_like(e)
    s = torch.sigmoid(f)
    return torch.logaddexp(f, f.new_zeros(())) - y * f, s - y, s * (1 - s)


@checked(double=True)
def dual_function(
    e: Float[Tensor, "*a N"], X: Float[Tensor, "*b N D"], act: str | Activation, W: Float[Tensor, "*c D m"]
) -> tuple[Float[Tensor, "S m"], Float[Tensor, "S m D"], Float[Tensor, "S m D D"]]:
    """``g_e(w) = sum_n e_n sigma(w . x_n)`` with gradient and Hessian in w, at the m columns of W.

    Args:
        e: coefficients, shape (N,) or (S, N).
        X: inputs, shape (N, D) or (S, N, D).
        act: name or `Activation` with two derivatives.
        W: where to evaluate, shape (D, m) or (S, D, m).

    Returns:
        ``g`` (S, m), ``grad g`` (S, m, D), ``Hess g`` (S, m, D, D).
    """
    sigma = activation(act)
    e, X, W = (T if T.ndim == n else T[None] for T, n in ((e, 2), (X, 3), (W, 3)))
    Z = X @ W
    g = torch.einsum("...n,...nj->...j", e, sigma.value(Z))
    grad = torch.einsum("...nj,...nd->...jd", e[..., None] * sigma.derivative(Z), X)
    hess = torch.einsum("...nj,...nd,...nc->...jdc", e[..., None] * sigma.second(Z), X, X)
    return g, grad, hess


# --- the trainer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Where `train_lm_newton` stopped; every tensor has the leading axis S.

    Args:
        weights: ``[W, V]`` at the end.
        loss: ``L`` at the end, (S,).
        gradient: ``||grad L||`` at the end, (S,).
        iterations: iterations made until the gradient fell below the tolerance, else all of them, (S,).
        converged: whether the gradient fell below the tolerance, (S,).
        halfway: the largest absolute parameter at half the iterations (at the end for those that had finished), (S,).
    """

    weights: list[Tensor]
    loss: Float[Tensor, " S"]
    gradient: Float[Tensor, " S"]
    iterations: Int[Tensor, " S"]
    converged: Bool[Tensor, " S"]
    halfway: Float[Tensor, " S"]


class _Point(NamedTuple):
    """A batch of networks with all that a step needs; neurons first, samples last, so that one GEMM serves them all."""

    W: Tensor  # (B, m, D)
    v: Tensor  # (B, m)
    h: Tensor  # (B, m, N) features
    A: Tensor  # (B, m, N) v_j sigma'(z)
    r: Tensor  # (B, N) residual f - y
    loss: Tensor  # (B,)
    gv: Tensor  # (B, m)
    gW: Tensor  # (B, m, D)
    norm: Tensor  # (B,) norm of the gradient


class _Problem(NamedTuple):
    """Data of a batch: X (N, D) or (B, N, D), Y (B, N), the activation, and whether the dual system is smaller."""

    X: Tensor
    Y: Tensor
    sigma: Activation
    dual: bool

    def take(self, keep: Tensor) -> _Problem:
        return self._replace(X=self.X if self.X.ndim == 2 else self.X[keep], Y=self.Y[keep])

    def at(self, W: Tensor, v: Tensor) -> _Point:
        B, m, D = W.shape
        Z = (W.reshape(B * m, D) @ self.X.mT).view(B, m, -1) if self.X.ndim == 2 else W @ self.X.mT
        h = self.sigma.value(Z)
        if self.sigma.pull is None:
            A = v[..., None] * self.sigma.derivative(Z)
        else:
            A = self.sigma.pull(v[..., None].expand_as(h).contiguous(), h)
        r = torch.bmm(v[:, None], h)[:, 0].sub_(self.Y)
        gv = torch.bmm(h, r[..., None])[..., 0]
        gW = self.back(A * r[:, None])
        norm = (gv.square().sum(1) + gW.square().sum((1, 2))).sqrt()
        return _Point(W, v, h, A, r, 0.5 * r.square().sum(1), gv, gW, norm)

    def back(self, A: Tensor) -> Tensor:
        """``sum_n A_jn x_n``: (B, m, N) -> (B, m, D)."""
        if self.X.ndim == 2:
            return (A.reshape(-1, A.shape[-1]) @ self.X).view(*A.shape[:2], -1)
        return A @ self.X


@checked(double=True)
def train_lm_newton(
    weights: Sequence[Tensor],
    X: Float[Tensor, "*x N D"],
    Y: Float[Tensor, "*y N 1"],
    act: str | Activation,
    *,
    iters: int = 250,
    newton_from: int = 100,
    tolerance: float = 1e-10,
    chunk: int = 512,
) -> Trained:
    """Minimize ``0.5 ||f - y||^2`` for thousands of tiny networks: Levenberg-Marquardt, then exact Newton.

    A step solves ``(J^T J + mu I) delta = grad``, through ``delta = J^T (J J^T + mu I)^{-1} r`` when ``N < p``, with
    ``mu = lambda min(||grad||, 1)`` and each network's own ``lambda`` (a quarter after an accepted step, four times
    after a rejected one).  A step is accepted if the loss falls, or stays equal to rounding while the gradient falls.
    From `newton_from` on the matrix is the exact Hessian plus ``mu I`` where that is positive definite; every 50 Newton
    steps a network at rest with negative curvature is pushed along it.  Networks that are done leave the batch.

    Args:
        weights: ``[W, V]``, shapes (S, D, m), (S, m, 1); not changed.
        X: inputs, shape (N, D), or (S, N, D) with each network's own.
        Y: targets, shape (N, 1) or (S, N, 1).
        act: name or `Activation` with two derivatives.
        iters: iterations at most.
        newton_from: the first iteration with the exact Hessian.
        tolerance: a network is done when ``||grad|| < tolerance``.
        chunk: networks handled at once; the last bits of the results depend on it.

    Returns:
        The `Trained` networks.  Converged is not minimal: see `companion.basins.classify_endpoints`.

    Raises:
        TypeError: not float64.
        ValueError: see `check_shallow`, or a number out of range.
    """
    (W, V), sigma = check_shallow(weights, X, Y, act)
    if iters < 1 or newton_from < 0 or chunk < 1 or not tolerance > 0:
        raise ValueError(
            f"iters, newton_from, chunk, tolerance are {iters}, {newton_from}, {chunk}, {tolerance}; positive is needed"
        )
    S, D, m = W.shape
    N = X.shape[-2]
    neurons, v, Y = W.mT.contiguous(), V[..., 0].contiguous(), Y[..., 0].expand(S, N)
    out = [torch.empty_like(neurons), torch.empty_like(v), *(W.new_empty(S) for _ in range(3))]
    iterations = torch.full((S,), iters, device=W.device)
    with torch.no_grad():
        for a in range(0, S, chunk):
            s = slice(a, a + chunk)
            data = _Problem(X if X.ndim == 2 else X[s], Y[s], sigma, m * (1 + D) > N)
            _train_chunk(data, neurons[s], v[s], iters, newton_from, tolerance, [o[s] for o in out], iterations[s])
    neurons, v, loss, gradient, halfway = out
    weights = [neurons.mT.contiguous(), v[..., None]]
    return Trained(weights, loss, gradient, iterations, gradient < tolerance, halfway)


def _train_chunk(
    data: _Problem,
    W: Tensor,
    v: Tensor,
    iters: int,
    newton_from: int,
    tolerance: float,
    out: list[Tensor],
    iterations: Tensor,
) -> None:
    """Train one chunk; results go into `out` (W, v, loss, gradient, halfway) and `iterations`."""
    alive = torch.arange(len(v), device=v.device)
    point, damping = data.at(W, v), v.new_full((len(v),), 1e-2)
    halfway = v.new_full((len(v),), -1.0)
    for k in range(iters + 1):
        if k % _COMPACT == 0 or k == iters:
            done = (point.norm < tolerance) | (k == iters)
            if k == iters // 2 // _COMPACT * _COMPACT:
                halfway = _largest(point.W, point.v)
            if bool(done.any()):
                gone, at = alive[done], [t[done] for t in point]
                now = _largest(at[0], at[1])
                half = torch.where(halfway[done] < 0, now, halfway[done])
                for o, t in zip(out, (at[0], at[1], at[5], at[8], half), strict=True):
                    o[gone] = t
                iterations[gone[at[8] < tolerance]] = k
                keep = ~done
                if not bool(keep.any()):
                    return
                alive, damping, halfway, data = alive[keep], damping[keep], halfway[keep], data.take(keep)
                point = _Point(*(t[keep] for t in point))
        if k > newton_from and (k - newton_from) % _KICK == 0:
            point = _kick(data, point)
        point, damping = _step(data, point, damping, k >= newton_from)


def _largest(W: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(W.abs().amax((1, 2)), v.abs().amax(1))


def _step(data: _Problem, at: _Point, damping: Tensor, newton: bool) -> tuple[_Point, Tensor]:
    """One damped step of every network, kept where it is accepted."""
    mu = damping * at.norm.clamp(max=1.0)
    mu = mu.clamp_min(1e-300)
    if data.dual and not newton:
        dW, dv = _dual_direction(data, at, mu)
    else:
        dW, dv = _primal_direction(data, at, mu, newton)
    new = data.at(at.W - dW, at.v - dv)
    better = new.loss < at.loss
    accept = better | ((new.loss <= at.loss * (1 + 1e-13)) & (new.norm < at.norm))
    masks = {n: accept.view(-1, *(1,) * (n - 1)) for n in (1, 2, 3)}
    # a rejected trial may hold NaN: it is selected away, never multiplied
    merged = _Point(*(torch.where(masks[b.ndim], a, b) for a, b in zip(new, at, strict=True)))
    damping = torch.where(accept, damping * _LM_DOWN, damping * _LM_UP)
    return merged, damping.clamp(1e-20, 1e20)


def _dual_direction(data: _Problem, at: _Point, mu: Tensor) -> tuple[Tensor, Tensor]:
    """``J^T (J J^T + mu I)^{-1} r`` with ``J J^T = h^T h + (A^T A) * (X X^T)``; J itself is never formed."""
    K = torch.bmm(at.h.mT, at.h)
    K.addcmul_(torch.bmm(at.A.mT, at.A), data.X @ data.X.mT)
    K.diagonal(dim1=1, dim2=2).add_(mu[:, None] + 1e-15 * K.diagonal(dim1=1, dim2=2).amax(1, keepdim=True))
    factor, _ = torch.linalg.cholesky_ex(K)
    a = torch.cholesky_solve(at.r[..., None], factor)
    return data.back(at.A * a.mT), torch.bmm(at.h, a)[..., 0]


def _primal_direction(data: _Problem, at: _Point, mu: Tensor, newton: bool) -> tuple[Tensor, Tensor]:
    """``(M + mu I)^{-1} grad`` with M the exact Hessian where ``M + mu I`` is positive definite, else ``J^T J``."""
    B, m, D = at.W.shape
    J = _jacobian(data, at)
    gram = torch.bmm(J.mT, J)
    shift = mu[:, None] + 1e-15 * gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    gram.diagonal(dim1=1, dim2=2).add_(shift)
    gradient = torch.cat([at.gv, at.gW.flatten(1)], 1)[..., None]
    factor, info = torch.linalg.cholesky_ex(gram)
    if newton:
        exact, failed = torch.linalg.cholesky_ex(gram + _curvature(data, at))
        factor = torch.where(((failed == 0) | (info != 0))[:, None, None], exact, factor)
    delta = torch.cholesky_solve(gradient, factor)[..., 0]
    return delta[:, m:].view(B, m, D), delta[:, :m]


def _jacobian(data: _Problem, at: _Point) -> Tensor:
    """The Jacobian of f in theta, (B, N, p)."""
    X = data.X.expand(len(at.v), *data.X.shape[-2:])
    return torch.cat([at.h.mT, torch.einsum("bjn,bnd->bnjd", at.A, X).flatten(2)], 2)


def _curvature(data: _Problem, at: _Point) -> Tensor:
    """The second part of the Hessian of every network, (B, p, p)."""
    B, m, D = at.W.shape
    X = data.X if data.X.ndim == 3 else data.X[None]
    _, grad, hess = dual_function(at.r, X, data.sigma, at.W.mT)
    C = at.W.new_zeros(B, m * (1 + D), m * (1 + D))
    j = torch.arange(m, device=C.device)
    w = (m + j[:, None] * D + torch.arange(D, device=C.device)).contiguous()  # (m, D): where w_j sits in theta
    C[:, j[:, None], w] = grad
    C[:, w, j[:, None]] = grad
    C[:, w[:, :, None], w[:, None, :]] = at.v[..., None, None] * hess
    return C


def _kick(data: _Problem, at: _Point) -> _Point:
    """Push every network at rest along its most negative curvature, to the lowest of a few trial points."""
    B, m, D = at.W.shape
    J = _jacobian(data, at)
    # a network that started at infinity stays there, and must not stop the others
    values, vectors = torch.linalg.eigh(torch.nan_to_num(torch.bmm(J.mT, J) + _curvature(data, at)))
    stuck = (at.norm < 1e-3) & (values[:, 0] < -1e-8)
    if not bool(stuck.any()):
        return at
    best, u = at, vectors[:, :, 0]
    for size in _KICK_SIZES:
        trial = data.at(at.W + size * u[:, m:].view(B, m, D), at.v + size * u[:, :m])
        take = stuck & (trial.loss < best.loss)
        best = _Point(
            *(torch.where(take.view(-1, *(1,) * (b.ndim - 1)), a, b) for a, b in zip(trial, best, strict=True))
        )
    return best
