"""Do the features move? Kernels of a torch module before and after training, and how much they agree."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from companion.arguments import checked
from companion.beyond_ntk.phase1 import evaluating, outputs


@checked
def empirical_ntk(model: nn.Module, X: Float[Tensor, "N ..."]) -> Float[Tensor, "N N"]:
    """Compute ``Theta_ij = sum_a <d f_a(x_i) / d theta, d f_a(x_j) / d theta>`` over all trainable parameters.

    The empirical neural tangent kernel, traced over the outputs, in eval mode: each sample alone, output by output.

    Args:
        model: any module whose samples do not interact in eval mode; not changed.
        X: inputs, one sample a row.

    Returns:
        ``(N, N)``, positive semidefinite.

    Raises:
        TypeError, ValueError: a model that fails on X, or whose output is no vector for each sample.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def output(parameters: dict[str, Tensor], x: Tensor, code: Tensor) -> Tensor:
        return (torch.func.functional_call(model, {**parameters, **fixed}, (x[None].clone(),))[0] * code).sum()

    gradients = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0, None))
    with evaluating(model):
        q = outputs(model, X[:1])
        if q.ndim != 2:
            raise ValueError(f"the model's output has shape {tuple(q.shape[1:])} a sample; a vector is needed")
        gram = X.new_zeros(len(X), len(X))
        for code in torch.eye(q.shape[1], dtype=X.dtype, device=X.device):
            for g in gradients(trained, X, code).values():
                flat = g.reshape(len(X), -1)
                gram += flat @ flat.T
    return gram


@checked
def cka(K: Float[Tensor, "N N"], G: Float[Tensor, "N N"]) -> float:
    """Compute ``<HKH, HGH> / (|HKH| |HGH|)``, ``H = I - 11^T/N``: 1 for kernels that agree up to a factor.

    Centred kernel alignment, blind to a factor and to constants.

    Args:
        K: a positive semidefinite matrix.
        G: another one of the same size.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: shapes that differ, or a kernel that is constant.
    """
    if K.shape != G.shape:
        raise ValueError(f"K is {tuple(K.shape)} and G is {tuple(G.shape)}; equal shapes are needed")
    A, B = (Z - Z.mean(0) - Z.mean(1, keepdim=True) + Z.mean() for Z in (K, G))
    norms = float(torch.linalg.matrix_norm(A)) * float(torch.linalg.matrix_norm(B))
    if norms == 0:
        raise ValueError("K or G is constant; its alignment is not defined")
    return float((A * B).sum()) / norms
