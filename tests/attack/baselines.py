"""Valid arguments for every public function, small enough that a call takes milliseconds; made anew for each call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from companion import basins, beyond_ntk, data, kernels, mean_field, minimum_norm, networks, rigor, width_bounds

F64 = torch.float64
N, D, M = 6, 4, 5  # samples, inputs, particles


def given(**arguments: Any) -> dict[str, Any]:
    return arguments


def seed(s: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(s)


def normal(s: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seed(s), dtype=F64)


X, Y, LABELS = data.sphere(N, D, seed(1)), data.signs(N, seed(2)), torch.arange(N) % 3
y = Y[:, 0].clone()
A, B = normal(9, 4, 9), normal(10, 9, 3)
RADIUS = A.abs() * 1e-10
IMAGE = normal(19, 2, 2, 5, 5)
WEIGHTS = networks.init_mlp([D, 60, 1], generator=seed(5), zero_last=True)
KERNEL = kernels.relu_kernel(X)
Folder = Callable[[], dict[str, Any]]


def model(double: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(D, 30), nn.Tanh(), nn.Linear(30, 3))
    return made.double() if double else made.float()


def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="attack-"))


GROUND: dict[str, Folder] = {
    "data.check": lambda: given(X=X, Y=Y),
    "data.check_matrix": lambda: given(name="X", A=X, shape="(N, d)"),
    "data.degeneracies": lambda: given(X=X),
    "data.equal_inputs": lambda: given(X=X),
    "data.equal_pairs": lambda: given(groups=LABELS),
    "data.row_norms": lambda: given(X=X),
    "data.unit_rows": lambda: given(X=X),
    "data.sphere": lambda: given(N=3, d=4, generator=seed(), radius=1.0, S=2),
    "data.signs": lambda: given(N=3, generator=seed(), K=2),
    "data.digits": lambda: given(classes=[0, 1], n=20, test=5, targets="onehot", centre_on="all", generator=seed()),
    "data.load_idx": lambda: given(folder=idx_folder()),
    "networks.activation": lambda: given(name="tanh"),
    "networks.as_ensemble": lambda: given(weights=WEIGHTS),
    "networks.check_weights": lambda: given(weights=WEIGHTS, X=X, Y=Y),
    "networks.features": lambda: given(weights=WEIGHTS, X=X, activation="relu"),
    "networks.forward": lambda: given(weights=WEIGHTS, X=X, activation="relu"),
    "networks.gradients": lambda: given(weights=WEIGHTS, X=X, Y=Y, activation="relu"),
    "networks.init_mlp": lambda: given(widths=[3, 5, 1], beta=1.0, S=2, generator=seed(), scheme="lecun"),
    "networks.head": lambda: given(model=model()),
    "networks.inputs": lambda: given(X=X),
    "networks.read": lambda: given(model=model()),
    "kernels.angles": lambda: given(X=X, Z=X),
    "kernels.relu_kernel": lambda: given(X=X, Z=X),
    "kernels.relu_ntk": lambda: given(X=X, Z=X),
    "kernels.relu_hermite": lambda: given(r_max=5),
    "kernels.ntk_gram": lambda: given(weights=WEIGHTS, X=X, activation="relu"),
    "descent.train": lambda: given(weights=WEIGHTS, X=X, Y=Y, step=1e-3, steps=5, every=2, chunk=1, progress=False),
    "descent.default_chunk": lambda: given(shapes=[[1, D, 60], [1, 60, 1]], X=X),
    "certificate.show": lambda: given(value=1.0, digits=3),
    "certificate.plain": lambda: given(value=A),
    "certificate.compare": lambda: given(name="x", measured=1.0, relation="<", required=2.0, status="measured"),
    "certificate.assumed": lambda: given(name="x"),
    "rigor.cat": lambda: given(parts=[interval()], dim=0),
    "rigor.dense_ball": lambda: given(value=A, radius=RADIUS, weight=B.T.contiguous(), bias=torch.ones(3, dtype=F64)),
    "rigor.eig_min_lower": lambda: given(G=KERNEL, radius=KERNEL.abs() * 1e-15),
    "rigor.enclose": lambda: given(model=model(), X=X, batch=4),
    "rigor.exact_rank": lambda: given(A=A),
    "rigor.exact_sigma_min_exceeds": lambda: given(A=A, s=0.1),
    "rigor.frobenius_norm_upper": lambda: given(A=A),
    "rigor.gamma": lambda: given(k=5),
    "rigor.gram": lambda: given(A=A),
    "rigor.norm": lambda: given(A=A, dim=-1),
    "rigor.null_space": lambda: given(A=[[1, 2, 3], [2, 4, 6]]),
    "rigor.point": lambda: given(value=A),
    "rigor.product_error": lambda: given(A=A, B=B),
    "rigor.product_radius": lambda: given(A=A, B=B),
    "rigor.round_down": lambda: given(x=1.0, ulps=1),
    "rigor.round_up": lambda: given(x=1.0, ulps=1),
    "rigor.sigma_min_lower": lambda: given(A=A, method="auto"),
    "rigor.spectral_norm": lambda: given(A=A),
    "rigor.spectral_norm_upper": lambda: given(A=A),
    "rigor.stack": lambda: given(parts=[interval()], dim=0),
}  # fmt: skip


def interval() -> Any:
    return rigor.point(A)


def idx_folder() -> Path:
    """Four files of the format of MNIST, with three images of 2 x 2."""
    path = folder()
    for part, count in (("train", 3), ("t10k", 2)):
        pixels, labels = np.arange(4 * count, dtype=np.uint8), np.arange(count, dtype=np.uint8)
        sizes = np.array([count, 2, 2], dtype=">i4").tobytes()
        (path / f"{part}-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03" + sizes + pixels.tobytes())
        (path / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + sizes[:4] + labels.tobytes())
    return path


# --- The results ------------------------------------------------------------------------------------------------------


def _spectra() -> Any:
    return width_bounds.spectra(X, Y, WEIGHTS)


def _wide() -> list[Tensor]:
    W = [w.clone() for w in WEIGHTS]
    W[0] *= 1e4
    return W


WIDTH_BOUNDS: dict[str, Folder] = {
    "width_bounds.spectra": lambda: given(X=X, Y=Y, weights=WEIGHTS),
    "width_bounds.certify": lambda: given(X=X, Y=Y, weights=_wide(), epsilon=0.5, level="certified", step=1e-12),
    "width_bounds.certify#measured": lambda: given(X=X, Y=Y, weights=WEIGHTS, level="measured"),
    "width_bounds.certify_paper": lambda: given(X=X, Y=Y, weights=WEIGHTS, radii=[0.1, 0.1]),
    "width_bounds.proxy_width": lambda: given(X=X, Y=Y, theorem="C", epsilon=0.5, scale=1.0, last="zero"),
    "width_bounds.proxy_spectra": lambda: given(X=X, Y=Y, lower=[], n=100.0, scale=1.0, last="zero"),
    "width_bounds.chernoff_width": lambda: given(X=X, Y=Y, p=0.1),
    "width_bounds.hermite_lower_bound": lambda: given(X=X, r_max=3),
    "width_bounds.train": lambda: given(X=X, Y=Y, weights=WEIGHTS, step=1e-3, steps=5, progress=False),
    "width_bounds.two_layer_threshold": lambda: given(epsilon=0.5, mode="gd"),
    "width_bounds.smallest_beta": lambda: given(s=_spectra(), theorem="C", epsilon=0.5, tol=1e-3),
    "width_bounds.ball_fixed_point": lambda: given(s=_spectra(), epsilon=0.5, mode="gd", path="telescope"),
    "width_bounds.ball_map": lambda: given(s=_spectra(), C=torch.full((1, 2), 0.1, dtype=F64), epsilon=0.5),
    "width_bounds.necessary_condition": lambda: given(s=_spectra(), N=N),
    "width_bounds.envelope": lambda: given(
        certificate=width_bounds.certify(X, Y, _wide(), epsilon=0.5), step=1e-12, k=torch.arange(3)
    ),
}

BLOCK, LAW = mean_field.TanhMLP(3), torch.full((M,), 1 / M, dtype=F64)
THETA, STATES = normal(11, 2, 3, M, 7), normal(12, 5, 3)
TARGETS, READOUT = normal(13, 5), torch.ones(3, dtype=F64) / 3


def _bell(t: Tensor) -> Tensor:
    return torch.exp(-t * t / 2)


def _net() -> dict[str, Any]:
    return given(block=BLOCK, theta=THETA, X=STATES)


def _problem() -> dict[str, Any]:
    return given(X=STATES, y=TARGETS, v=READOUT)


MEAN_FIELD: dict[str, Folder] = {
    "mean_field.audit": lambda: given(block=BLOCK, u2=1.0),
    "mean_field.certify_zero_loss": lambda: _net() | _problem() | given(
        step=0.01, weights=LAW, constants="local", level="certified"),
    "mean_field.certify_zero_loss#flow": lambda: _net() | _problem() | given(step=None, level="measured"),
    "mean_field.coupling_bound": lambda: given(
        block=mean_field.BallBump(3), theta=mean_field.BallBump(3).draw((M,), seed(1)), weights=LAW, S=0.1, step=0.05,
        L=4, M=5, **_problem()),
    "mean_field.crossing_ratio": lambda: given(block=BLOCK, theta=THETA),
    "mean_field.density_rule": lambda: given(density=_bell, support=(-4.0, 4.0), m=5),
    "mean_field.depth_regularity": lambda: given(theta=THETA, weights=LAW),
    "mean_field.first_variation": lambda: given(
        block=BLOCK, z=torch.ones(2, 5, 3, dtype=F64), p=torch.ones(2, 5, 3, dtype=F64), theta=THETA[:, 0]),
    "mean_field.first_variation_sup": lambda: given(
        block=mean_field.BallBump(1), z=torch.ones(2, 5, 1, dtype=F64), p=torch.ones(2, 5, 1, dtype=F64), points=11),
    "mean_field.forward": lambda: _net() | given(weights=LAW),
    "mean_field.fv_flow": lambda: given(
        block=mean_field.Linear(1), X=STATES[:, :1].clone(), y=TARGETS, v=torch.ones(1, dtype=F64), density=_bell,
        support=(-40.0, 40.0), cells=20, times=[0.0, 0.01], depth=3),
    "mean_field.gram_kernel": lambda: _net() | given(v=READOUT, weights=LAW),
    "mean_field.init_particles": lambda: given(block=BLOCK, L=2, M=3, S=2, depth="iid", generator=seed()),
    "mean_field.isotonic_floor": lambda: given(x=TARGETS, y=TARGETS.flip(0)),
    "mean_field.limit_flow": lambda: given(
        block=BLOCK, theta=THETA[0, 0], weights=LAW, times=[0.0, 0.1], step=0.05, depth=3, **_problem()),
    "mean_field.monitors": lambda: given(block=BLOCK, weights=LAW, **_problem()),
    "mean_field.normal_rule": lambda: given(dims=2, order=3),
    "mean_field.rescaled_gradient": lambda: _net() | _problem() | given(weights=LAW),
    "mean_field.train": lambda: _net() | _problem() | given(step=0.01, steps=4, chunk=1, progress=False),
}  # fmt: skip

W_0, SIGNS = minimum_norm.initialize(D, 24, generator=seed(8))


def _layer() -> dict[str, Any]:
    return given(X=X, y=y, W0=W_0, signs=SIGNS)


def _solution() -> Any:
    return minimum_norm.solve(X, y, W_0, SIGNS)


def _closed() -> Any:
    W, signs = minimum_norm.initialize(D, 24, kappa=1e6, generator=seed(8))
    return minimum_norm.certify(X, y, W, signs, step=1e-4)


MINIMUM_NORM: dict[str, Folder] = {
    "minimum_norm.certify": lambda: _layer() | given(step=1e-4, reference="midpoint", level="certified"),
    "minimum_norm.certify#measured": lambda: _layer() | given(step=1e-4, reference="gate", level="measured"),
    "minimum_norm.certify_after": lambda: _layer() | given(W=W_0.clone(), step=1e-4, level="certified"),
    "minimum_norm.certify_width": lambda: given(X=X, y=y, m=100, step=1e-3, kappa=1.0, delta=0.1),
    "minimum_norm.empirical_gram": lambda: given(X=X, W=W_0, chunk=8),
    "minimum_norm.figure_1_data": lambda: given(seed=11, bias=False),
    "minimum_norm.forward": lambda: given(X=X, W=W_0, signs=SIGNS, chunk=8),
    "minimum_norm.function_bound": lambda: given(solution=_solution(), Z=X, certificate=_closed(), residual=0.0),
    "minimum_norm.generalization_bound": lambda: given(X=X, y=y, delta=0.1),
    "minimum_norm.initialize": lambda: given(d=4, m=6, kappa=1.0, S=2, generator=seed()),
    "minimum_norm.kernel_regression": lambda: given(X=X, y=y, Z=X),
    "minimum_norm.lyapunov_terms": lambda: given(solution=_solution(), W=W_0, step=1e-3),
    "minimum_norm.perp_constant": lambda: given(X=X, y=y, step=1e-2, kappa=1.0, steps=5, draws=10, generator=seed()),
    "minimum_norm.perp_constant_n1": lambda: given(rho=1.0, e0=1.0, step=0.1, kappa=1.0),
    "minimum_norm.safe_step": lambda: given(X=X),
    "minimum_norm.solve": _layer,
    "minimum_norm.spectrum_bounds": lambda: given(X=X),
    "minimum_norm.train": lambda: _layer() | given(step=1e-3, steps=5, progress=False),
}  # fmt: skip

FEATURES = torch.cat([normal(14, N, 9), torch.ones(N, 1, dtype=F64)], 1)
V_0, Y_2 = torch.zeros(10, 2, dtype=F64), normal(3, N, 2)


def _sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


def _batchnorm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()


def _tied() -> nn.Module:
    return beyond_ntk.mlp([D, 3, 8, 2], generator=seed())


def _two_phase() -> dict[str, Any]:
    made = model()
    return given(model=made, last=made[-1], X=X, y=LABELS, optimizer=_sgd, tau=2, batch=3, noise=1e-3, floor=1e-6,
                options={"steps": 5}, generator=seed(), progress=False)  # fmt: skip


def _last() -> dict[str, Any]:
    made = model()
    return given(model=made, last=made[-1])


def _regression() -> dict[str, Any]:
    return given(M=FEATURES, V0=V_0, Y=Y_2)


def _statistics() -> dict[str, Any]:
    made = _batchnorm()
    return given(model=made, statistics=beyond_ntk.batchnorm_statistics(made, X))


BEYOND_NTK: dict[str, Folder] = {
    "beyond_ntk.average_loss": lambda: given(M=FEATURES, V=V_0, Y=Y_2, loss="squared"),
    "beyond_ntk.batchnorm_statistics": lambda: given(model=_batchnorm(), X=X),
    "beyond_ntk.centre": lambda: given(M=FEATURES),
    "beyond_ntk.certify_expressivity": lambda: given(model=model(), X=X, seed=0, batch=4),
    "beyond_ntk.certify_gap": lambda: given(model=model(), X=X, y=LABELS, loss="cross_entropy", batch=4),
    "beyond_ntk.certify_rate": lambda: given(model=model(), X=X, y=LABELS, steps=10, method="auto"),
    "beyond_ntk.cka": lambda: given(K=KERNEL, G=KERNEL + 1),
    "beyond_ntk.comparator_bound": lambda: _regression() | given(t=5, loss="squared", step=0.01, comparators=[V_0 + 1]),
    "beyond_ntk.conv_resnet": lambda: given(
        image=(1, 4, 4), channels=(2, 2), wide=5, classes=2, generator=seed()),
    "beyond_ntk.cross_entropy_bound": lambda: given(sigma_N=1.0, N=5, K=3, t=5, step=0.01, V0_norm=0.0),
    "beyond_ntk.curvature": lambda: given(M=FEATURES, loss="squared"),
    "beyond_ntk.duplicate_floor": lambda: given(groups=LABELS, Y=Y_2, loss="squared"),
    "beyond_ntk.empirical_ntk": lambda: given(model=model(), X=X),
    "beyond_ntk.exact_curve": lambda: _regression() | given(t=5, step=0.01),
    "beyond_ntk.kaczmarz_bound": lambda: _regression() | given(t=5),
    "beyond_ntk.last_layer_features": lambda: _last() | given(X=X, batch=4),
    "beyond_ntk.last_weights": lambda: given(last=model()[-1]),
    "beyond_ntk.linear_rate": lambda: given(sigma_N=1.0, N=5, step=0.01, mu=0.0),
    "beyond_ntk.mlp": lambda: given(widths=[3, 4, 2], generator=seed()),
    "beyond_ntk.phase2_gd": lambda: _regression() | given(loss="squared", steps=5, step=0.01, every=2, progress=False),
    "beyond_ntk.phase2_lbfgs": lambda: _regression() | given(loss="squared", ridge=0.0, steps=5),
    "beyond_ntk.phase2_nesterov": lambda: _regression() | given(loss="squared", steps=5, progress=False),
    "beyond_ntk.ridge_gap": lambda: given(M=FEATURES, V=torch.zeros(10, 3, dtype=F64), labels=LABELS, ridge=0.1),
    "beyond_ntk.separation": lambda: given(xi=X, D=X.abs() * 1e-15, seed=0),
    "beyond_ntk.sgd_bound": lambda: given(
        M=FEATURES, V0=torch.zeros(10, 3, dtype=F64), labels=LABELS, t=5, step=0.01),
    "beyond_ntk.single_sample_sgd": lambda: _regression() | given(
        loss="squared", step=0.01, steps=5, S=2, generator=seed()),
    "beyond_ntk.spline_witness": lambda: given(z=torch.linspace(0, 1, 5, dtype=F64), beta=1.0),
    "beyond_ntk.switch_batchnorm": _statistics,
    "beyond_ntk.tie": lambda: given(model=_tied()),
    "beyond_ntk.tied_floor": lambda: given(Y=Y_2),
    "beyond_ntk.tied_train": lambda: given(model=_tied(), X=X, Y=Y_2, optimizer=_sgd, steps=3),
    "beyond_ntk.two_phase": _two_phase,
    "beyond_ntk.with_constant": lambda: given(h=FEATURES),
}  # fmt: skip

SHALLOW, X_2, Y_1 = [normal(15, 2, 12), normal(16, 12, 1)], normal(17, 5, 2), normal(18, 5, 1)
ONE = [SHALLOW[0][:, :1].clone(), SHALLOW[1][:1].clone()]


def _stacked() -> dict[str, Any]:
    return given(weights=[W[None] for W in SHALLOW], X=X_2, Y=Y_1, act="tanh")


def _trained() -> Any:
    return basins.train_lm_newton(**_stacked(), iters=3, newton_from=2)


def _exact() -> dict[str, Any]:
    made = basins.example_e1()
    return given(weights=made.point, X=made.X, Y=made.y, act="sin", level="exact", competitor=made.competitor)


BASINS: dict[str, Folder] = {
    "basins.certify_full_rank": lambda: given(weights=SHALLOW, X=X_2, act="tanh"),
    "basins.certify_no_basin": lambda: given(N=5, m=8, act="tanh", loss="square", X=X_2),
    "basins.certify_strict_minimum": lambda: given(weights=ONE, X=X_2, Y=Y_1, act="tanh", competitor=SHALLOW),
    "basins.certify_strict_minimum#measured": lambda: given(weights=ONE, X=X_2, Y=Y_1, act="tanh", level="measured",
                                                           competitor=SHALLOW),
    "basins.certify_strict_minimum#exact": _exact,
    "basins.classify_endpoints": lambda: given(
        trained=_trained(), X=X_2, Y=Y_1, act="tanh", starts=1, tolerance=1e-8, zero=1e-14),
    "basins.descent_road": lambda: given(weights=SHALLOW, X=X_2, Y=Y_1, act="tanh", loss="square", seed=0),
    "basins.dual_function": lambda: given(e=TARGETS, X=X_2, act="tanh", W=SHALLOW[0]),
    "basins.exact_bad_minimum": lambda: given(act="tanh", a=[1], x=[1, 2, 3], base=2),
    "basins.exit_time_of_e1": lambda: given(T=0.4, per_unit=4),
    "basins.exit_times": lambda: _stacked() | given(T=0.1, level=1e9, generator=seed(), step=0.01, longest=0.05),
    "basins.eyring_kramers": lambda: given(
        H_min=torch.eye(2, dtype=F64), H_saddle=torch.diag(torch.tensor([1.0, -1.0], dtype=F64)), barrier=1.0, T=0.1,
        n_saddles=1),
    "basins.loss_derivatives": lambda: _stacked() | given(loss="square"),
    "basins.plant_bad_minimum": lambda: given(
        W=_touching()[0], e=_touching()[1], X=X_2, act="tanh", tau=0.1, seed=0),
    "basins.road_losses": lambda: given(road=basins.descent_road(SHALLOW, X_2, Y_1, "tanh"), n=5),
    "basins.split_neuron": lambda: given(weights=SHALLOW, j=0, shares=[0.5, 0.5]),
    "basins.touching_points": lambda: given(
        X=X_2, m=2, act="tanh", starts=3, generator=seed(), iters=3, spread=1.0),
    "basins.train_lm_newton": lambda: _stacked() | given(iters=3, newton_from=2, tolerance=1e-12, chunk=1),
}  # fmt: skip


def _touching() -> tuple[Tensor, Tensor]:
    found = basins.touching_points(X_2, 1, "tanh", 20, seed(0))
    ok = found.ok.nonzero()[:, 0] if hasattr(found, "ok") else torch.tensor([0])
    s = int(ok[0]) if len(ok) else 0
    return found.W[s], found.e[s]


def _twice(x: int) -> dict[str, float]:
    return {"twice": 2.0 * x}


LAB: dict[str, Folder] = {
    "lab.grid": lambda: given(a=[1, 2]),
    "lab.stored": lambda: given(store=folder()),
    "lab.sweep": lambda: given(function=_twice, configurations=[{"x": 1}], progress=False),
}

BASELINES: dict[str, Folder] = {
    **GROUND, **WIDTH_BOUNDS, **MEAN_FIELD, **MINIMUM_NORM, **BEYOND_NTK, **BASINS, **LAB,
}  # fmt: skip
# what has no argument that could be wrong, or answers only through what others made
LEFT_OUT = {
    "certificate.gather", "certificate.html_row", "certificate.silent", "descent.iterate",
    "networks.ancestors", "beyond_ntk.untie", "basins.example_e1", "basins.example_e4",
    "rigor.check_ball",
}  # fmt: skip
