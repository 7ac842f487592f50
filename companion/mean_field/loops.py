"""The loops over the layers of a mean-field ResNet, forward and adjoint, in memory allocated once.

A `Loop` holds the states of all layers, two scratch panels ``(S, n, M)`` and nothing else that grows with depth, unless
it is told to keep the panels: then nothing is computed twice.  `Loop` itself serves every block through its
`mean_field` and `pull`; the subclasses are the same arithmetic with fewer passes for the blocks trained at size.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from companion.mean_field.blocks import BallBump, Block, GaussBump, ReluMLP, TanhMLP


class Loop:
    """Forward and adjoint of ``z_{l+1} = z_l + (1/L) sum_m w_m f(z_l, theta_lm)`` for S networks of one shape.

    Args:
        block: the block.
        shape: ``(S, L, M, n)``.
        w: the particles' weights ``(M,)``.
        keep: whether what the forward pass computes is kept for the adjoint, layer by layer.
    """

    extra = 0  # columns that a state carries beside its d coordinates

    def __init__(self, block: Block, shape: tuple[int, int, int, int], w: Float[Tensor, " M"], keep: bool) -> None:
        self.block, self.w, self.keep = block, w, keep
        self.S, self.L, self.M, self.n = shape
        self.uniform = 1 / len(w) if bool((w == w[0]).all()) else None
        S, L, _, n = shape
        self.carried = w.new_ones(L + 1, S, n, block.d + self.extra)
        self.z = self.carried[..., : block.d]
        self.layers = list(self.carried.unbind(0))
        self.p = w.new_empty(2, S, n, block.d)
        self.allocate()

    def allocate(self) -> None:
        """Allocate panels and what depends on the parameters alone."""

    def panels(self, count: int) -> list[list[Tensor]]:
        """`count` panels ``(S, n, M)`` for each layer: the same ones for all layers, unless they are kept."""
        shape = (count, self.L if self.keep else 1, self.S, self.n, self.M)
        return [list(layers.unbind(0)) * (1 if self.keep else self.L) for layers in self.w.new_empty(shape)]

    def load(self, theta: Float[Tensor, "S L M k"]) -> None:
        """Take the parameters, and compute what depends on them alone."""
        self.theta = theta
        self.particles = list(theta.unbind(1))

    def push(self, l: int) -> None:
        """Compute state l + 1 from state l."""
        z = self.layers[l]
        torch.add(z, self.block.mean_field(z, self.particles[l], self.w), alpha=1 / self.L, out=self.layers[l + 1])

    def pull(self, l: int, p: Tensor, out: Tensor, G: Tensor) -> None:
        """Compute adjoint l from adjoint l + 1, and the gradient with respect to layer l's law."""
        back, grads = self.block.pull(self.layers[l], self.particles[l], self.w, p)
        torch.add(p, back, alpha=1 / self.L, out=out)
        G[:, l] = grads

    def finish(self, G: Tensor) -> None:
        """What is left to do for all layers at once."""

    def forward(self, X: Float[Tensor, "n d"]) -> Float[Tensor, "T S n d"]:
        """The states ``z_0, ..., z_L``; a view of the loop's memory."""
        self.z[0] = X
        self.start()
        for l in range(self.L):
            self.push(l)
        return self.z

    def start(self) -> None:
        """Complete state 0."""

    def backward(
        self, p_L: Float[Tensor, "S n d"], G: Float[Tensor, "S L M k"], record: Float[Tensor, "T S n d"] | None = None
    ) -> None:
        """The adjoint after `forward`: ``p_l = p_{l+1} + (1/L) p_{l+1}^T sum_m w_m d_z f(z_l, theta_lm)``.

        Args:
            p_L: adjoint of the last state.
            G: where ``sum_i p_{l+1}^T d_theta f(z_l, theta_lm)`` goes.
            record: where the adjoints of all layers go, if they are wanted.
        """
        now, after = self.p
        now.copy_(p_L)
        if record is not None:
            record[self.L] = p_L
        for l in range(self.L - 1, -1, -1):
            self.pull(l, now, after, G)
            now, after = after, now
            if record is not None:
                record[l] = now
        self.finish(G)


class MLPLoop(Loop):
    """``f = v sigma(a . z + b)``: a state carries a 1, so that ``(a, b)`` is one matrix; the adjoint recomputes sigma.

    Of the six products of a layer none is doubled but the first.  A layer's particles are copied next to each other
    before they are multiplied, and its gradient is made with the particles last: both are quicker than strides.
    """

    extra = 1

    def allocate(self) -> None:
        S, M, d, new = self.S, self.M, self.block.d, self.w.new_empty
        self.H, self.Q = self.panels(1)[0], new(S, self.n, M)
        self.v, self.ab, self.g_v, self.g_ab = new(S, M, d), new(S, M, d + 1), new(S, d, M), new(S, d + 1, M)
        self.sums = new(S, self.n, d)
        self.relu = isinstance(self.block, ReluMLP)

    def sigma(self, l: int) -> Tensor:
        """Fetch layer l's particles, and compute its panel."""
        d = self.block.d
        self.v.copy_(self.particles[l][..., :d])
        self.ab.copy_(self.particles[l][..., d:])
        if self.keep and self.pulling:
            return self.H[l]
        panel = torch.bmm(self.layers[l], self.ab.mT, out=self.H[l])
        return panel.relu_() if self.relu else panel.tanh_()

    def forward(self, X: Float[Tensor, "n d"]) -> Float[Tensor, "T S n d"]:
        self.pulling = False
        return super().forward(X)

    def push(self, l: int) -> None:
        h, factor = self.sigma(l), 1 / self.L
        if self.uniform:
            factor *= self.uniform
        else:
            h = torch.mul(h, self.w, out=self.Q)
        torch.baddbmm(self.z[l], h, self.v, alpha=factor, out=self.sums)
        self.z[l + 1].copy_(self.sums)

    def pull(self, l: int, p: Tensor, out: Tensor, G: Tensor) -> None:
        d, self.pulling = self.block.d, True
        h = self.sigma(l)
        G[:, l, :, :d] = torch.bmm(p.mT, h, out=self.g_v).mT
        q = torch.bmm(p, self.v.mT, out=self.Q)
        if self.relu:
            torch.ops.aten.threshold_backward.grad_input(q, h, 0, grad_input=q)
        else:
            q.addcmul_(q, h.square(), value=-1)
        G[:, l, :, d:] = torch.bmm(self.layers[l].mT, q, out=self.g_ab).mT
        factor = 1 / self.L
        if self.uniform:
            factor *= self.uniform
        else:
            q.mul_(self.w)
        torch.baddbmm(p, q, self.ab[..., :d], alpha=factor, out=out)


class BallBumpLoop(Loop):
    """``f = u b exp(-|z - R c|^2 / 2)`` in the coordinates ``(u, b, c)``, taken once for all layers.

    A state carries ``(z, 1, -|z|^2 / 2)``, so that the exponent is one product with ``(R c, -|R c|^2 / 2, 1)``.  What
    has an entry for each particle is stored with the particles last, ``(L, S, ., M)``: long rows are quick to pass.
    """

    extra = 2

    def allocate(self) -> None:
        S, L, M, d, new = self.S, self.L, self.M, self.block.d, self.w.new_empty
        self.E, self.T = self.panels(1)[0], new(S, self.n, M)
        self.centres = self.w.new_ones(L, S, d + 2, M)
        self.q, self.zeta, self.g = new(L, S, 1, M), new(L, S, 2 * d, M), new(L, S, 2 * d, M)
        self.out, self.back, self.g_T = new(L, S, d, M), new(L, S, d + 1, M), new(L, S, d + 2, M)
        self.sums, self.g_b = new(S, self.n, d + 1), new(L, S, d, M)
        views = (self.centres, self.out.mT, self.zeta[:, :, :d], self.back.mT, self.g_b, self.g_T)
        self.lists = [list(t.unbind(0)) for t in views]
        self.state_list = list(self.z.unbind(0))

    def load(self, theta: Float[Tensor, "S L M k"]) -> None:
        d, R = self.block.d, self.block.R
        rows = theta.permute(1, 0, 3, 2).contiguous()
        self.u, omega = rows[:, :, :1], rows[:, :, 1:]
        torch.sum(omega * omega, 2, keepdim=True, out=self.q).add_(1).rsqrt_()
        torch.mul(omega, self.q, out=self.zeta)
        b, Rc = self.zeta[:, :, :d], self.centres[:, :, :d]
        torch.mul(self.zeta[:, :, d:], R, out=Rc)
        torch.sum(Rc * Rc, 2, out=self.centres[:, :, d]).mul_(-0.5)
        wu = torch.mul(self.u, self.w, out=self.back[:, :, d:]).mul_(1 / self.L)
        torch.mul(wu, b, out=self.out)
        torch.mul(wu, Rc, out=self.back[:, :, :d])

    def start(self) -> None:
        self.lift(0)

    def lift(self, l: int) -> None:
        z = self.state_list[l]
        torch.sum(z * z, -1, out=self.carried[l, ..., self.block.d + 1]).mul_(-0.5)

    def bumps(self, l: int) -> Tensor:
        return torch.bmm(self.layers[l], self.lists[0][l], out=self.E[l]).exp_()

    def push(self, l: int) -> None:
        self.state_list[l + 1].copy_(torch.baddbmm(self.state_list[l], self.bumps(l), self.lists[1][l]))
        self.lift(l + 1)

    def pull(self, l: int, p: Tensor, out: Tensor, G: Tensor) -> None:
        d = self.block.d
        _, _, b, back, g_b, g_T = self.lists
        E = self.E[l] if self.keep else self.bumps(l)
        torch.bmm(p.mT, E, out=g_b[l])
        T = torch.bmm(p, b[l], out=self.T).mul_(E)
        torch.bmm(self.layers[l].mT, T, out=g_T[l])
        sums = torch.bmm(T, back[l], out=self.sums)
        torch.add(p, sums[..., :d], out=out).addcmul_(self.state_list[l], sums[..., d:], value=-1)

    def finish(self, G: Tensor) -> None:
        d, g = self.block.d, self.g
        total, rows = self.g_T[:, :, d : d + 1], G.permute(1, 0, 3, 2)
        torch.mul(self.centres[:, :, :d], total, out=g[:, :, d:])
        torch.sub(self.g_T[:, :, :d], g[:, :, d:], out=g[:, :, d:]).mul_(self.block.R)
        g[:, :, :d] = self.g_b
        g.mul_(self.u)
        g.addcmul_(self.zeta, (self.zeta * g).sum(2, keepdim=True), value=-1)  # through the chart, as in `unchart`
        rows[:, :, :1] = total
        torch.mul(g, self.q, out=rows[:, :, 1:])


class GaussBumpLoop(Loop):
    """``f = alpha sqrt(e) s exp(-s^2 / 2)`` with ``s = z - theta``; the slope serves both derivatives."""

    def allocate(self) -> None:
        (self.slope,), self.s = self.panels(1), self.w.new_empty(self.S, self.n, self.M)
        self.square = torch.empty_like(self.s)

    def load(self, theta: Float[Tensor, "S L M k"]) -> None:
        super().load(theta)
        self.weights = (self.w * (self.block.alpha * math.exp(0.5) / self.L))[None, :, None].expand(self.S, -1, -1)

    def gauss(self, l: int) -> tuple[Tensor, Tensor, Tensor]:
        """``s``, ``s^2`` and ``exp(-s^2 / 2)``, the last where the slope will be."""
        s = torch.sub(self.layers[l], self.particles[l].mT, out=self.s)
        square = torch.mul(s, s, out=self.square)
        return s, square, torch.mul(square, -0.5, out=self.slope[l]).exp_()

    def push(self, l: int) -> None:
        s, square, g = self.gauss(l)
        torch.baddbmm(self.layers[l], s.mul_(g), self.weights, out=self.layers[l + 1])
        if self.keep:
            g.addcmul_(square, g, value=-1)

    def pull(self, l: int, p: Tensor, out: Tensor, G: Tensor) -> None:
        slope = self.slope[l]
        if not self.keep:
            _, square, slope = self.gauss(l)
            slope.addcmul_(square, slope, value=-1)
        G[:, l] = torch.bmm(slope.mT, p)
        torch.addcmul(p, p, torch.bmm(slope, self.weights), out=out)

    def finish(self, G: Tensor) -> None:
        G.mul_(-self.block.alpha * math.exp(0.5))


LOOPS: dict[type, type[Loop]] = {BallBump: BallBumpLoop, GaussBump: GaussBumpLoop, ReluMLP: MLPLoop, TanhMLP: MLPLoop}


def loop(block: Block, shape: tuple[int, int, int, int], w: Float[Tensor, " M"], keep: bool) -> Loop:
    """The quickest loop there is for this block.

    Args:
        block: the block.
        shape: ``(S, L, M, n)``.
        w: the particles' weights ``(M,)``.
        keep: whether what the forward pass computes is kept for the adjoint.

    Returns:
        The loop.
    """
    return LOOPS.get(type(block), Loop)(block, shape, w, keep)
