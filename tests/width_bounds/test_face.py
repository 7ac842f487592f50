"""Whatever a caller hands to a public function: an answer, or one sentence that names the argument."""

import math

import pytest
import torch
from making import relu_problem

from companion import width_bounds as wb

X, Y, WEIGHTS = relu_problem(6, 6, (6, 60, 1), 2, beta=3.0)
SPECTRA = wb.spectra(X, Y, WEIGHTS).member(0)
CERTIFICATE = wb.certify(X, Y, WEIGHTS)
STEP = CERTIFICATE.quantities["max_step"]
NETWORK = {"X": X, "Y": Y, "weights": WEIGHTS}
GOOD = {
    "spectra": NETWORK,
    "certify": {**NETWORK, "epsilon": 0.25, "level": "measured", "step": STEP},
    "certify_paper": {**NETWORK, "radii": [1.0, 1.0]},
    "train": {**NETWORK, "step": STEP, "steps": 2, "certificate": CERTIFICATE},
    "envelope": {"certificate": CERTIFICATE, "step": STEP, "k": torch.arange(3)},
    "ball_map": {"s": SPECTRA, "C": SPECTRA.w * 0, "epsilon": 0.25, "mode": "gd", "path": "plain"},
    "ball_fixed_point": {"s": SPECTRA, "epsilon": 0.25, "mode": "gd", "path": "plain"},
    "smallest_beta": {"s": SPECTRA, "theorem": "C", "epsilon": 0.25, "tol": 1e-3},
    "necessary_condition": {"s": SPECTRA, "N": 6},
    "two_layer_threshold": {"epsilon": 0.25, "mode": "gd"},
    "proxy_spectra": {"X": X, "Y": Y, "lower": [torch.eye(6).double()], "n": 50.0, "scale": 1.0, "last": "zero"},
    "proxy_width": {"X": X, "Y": Y, "theorem": "P", "lower": [], "scale": 1.0, "last": "zero", "radius": 1.0},
    "chernoff_width": {"X": X, "Y": Y, "p": 0.01},
    "hermite_lower_bound": {"X": X, "r_max": 3},
}
BAD = {
    "None": lambda v: None,
    "a word": lambda v: "none of these",
    "a complex number": lambda v: 1j,
    "an object": lambda v: object(),
    "a list": lambda v: [v],
    "a dictionary": lambda v: {"a": v},
    "nan": lambda v: math.nan,
    "infinity": lambda v: math.inf,
    "zero": lambda v: 0,
    "minus one": lambda v: -1,
    "1e300": lambda v: 1e300,
    "10^12": lambda v: 10**12,
    "a tensor": lambda v: torch.ones(2),
}
BAD_TENSOR = {
    "numpy": lambda v: v.numpy(),
    "flat": lambda v: v.flatten(),
    "scalar": lambda v: v.sum(),
    "empty": lambda v: v[:0],
    "one row short": lambda v: v[1:],
    "one column short": lambda v: v[..., 1:],
    "one axis more": lambda v: v[None, None],
    "float32": lambda v: v.float(),
    "float16": lambda v: v.half(),
    "int64": lambda v: v.long(),
    "bool": lambda v: v.bool(),
    "complex": lambda v: v.to(torch.complex128),
    "sparse": lambda v: v.to_sparse(),
    "meta": lambda v: v.to("meta"),
    "nan": lambda v: torch.full_like(v, math.nan),
    "infinity": lambda v: torch.full_like(v, math.inf),
    "times 1e200": lambda v: v * 1e200,
    "times 1e308": lambda v: v * 1e308,
    "times 1e-200": lambda v: v * 1e-200,
    "times 1e-320": lambda v: v * 1e-320,
    "one entry 1e155": lambda v: torch.where(torch.arange(v.shape[-1]) == 0, 1e155, v),
    "zero": lambda v: v * 0,
    "negative strides": lambda v: v.to(torch.complex128).conj().imag + v,
}


def changes(value):
    """What may stand in the place of an argument; in a list also in the place of its first item."""
    yield from BAD.items()
    if isinstance(value, torch.Tensor):
        yield from BAD_TENSOR.items()
    if isinstance(value, list) and value:
        for name, change in changes(value[0]):
            yield f"first item {name}", lambda v, change=change: [change(v[0]), *v[1:]]
        yield "one item less", lambda v: v[:-1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:step is")
@pytest.mark.parametrize("name", GOOD)
def test_an_answer_or_one_sentence(name):
    function, refused, raw = getattr(wb, name), 0, []
    function(**GOOD[name])
    for argument, value in GOOD[name].items():
        for change, make in changes(value):
            if (argument, change) == ("steps", "10^12"):
                continue  # a run without end is what was asked for
            try:
                bad = make(value)
            except RuntimeError:
                continue  # not every dtype can hold every change
            try:
                function(**{**GOOD[name], argument: bad})
            except (TypeError, ValueError) as error:
                refused += 1
                words = str(error)
                if ("needed" not in words and "; " not in words) or "\n" in words:
                    raw.append(f"{argument} <- {change}: {words}")
            except Exception as error:
                raw.append(f"{argument} <- {change}: {type(error).__name__}: {error}")
    assert raw == []
    assert refused >= 10 * len(GOOD[name])
