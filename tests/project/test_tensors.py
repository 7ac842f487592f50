"""torch's default dtype and device are the user's to set: no tensor of the package takes either from there."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "companion"
MAKERS = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randn",
    "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
# made of whole numbers, they are int64 under every default
WHOLE = {
    "torch.tensor([0, 1])",
    "torch.tensor([0, taken])",
    "torch.tensor(classes)",
    "torch.tensor(sorted({*range(0, steps + 1, every), steps}))",
    "torch.full((S,), CLASSES.index('unconverged'), device=rest.device)",
    "torch.full((S,), iters, device=W.device)",
}


def missing(text):
    """``(line, call, options)``: what each call that makes a tensor leaves to torch's defaults."""
    for node in ast.walk(ast.parse(text)):
        named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if not (named and ast.unparse(node.func.value) == "torch" and node.func.attr in MAKERS):
            continue
        given = {k.arg for k in node.keywords}
        floats = any(isinstance(a, ast.Constant) and isinstance(a.value, float) for a in node.args)
        left = {"dtype", "device"} - given
        if ast.unparse(node) in WHOLE or (node.func.attr == "arange" and not floats):  # of indices: whole numbers
            left.discard("dtype")
        if "generator" in given:  # it has a device, and numbers are drawn there
            left.discard("device")
        if left and None not in given:  # None: ``**like``
            yield node.lineno, ast.unparse(node), sorted(left)


def found(folder, option):
    return [
        f"{path.relative_to(PACKAGE)}:{line}: {call}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for line, call, left in missing(path.read_text(encoding="utf8"))
        if option in left
    ]


def test_every_tensor_has_its_dtype():
    assert found(".", "dtype") == []


@pytest.mark.parametrize("folder", ["rigor", "networks"])
def test_every_tensor_of_the_ground_has_its_device(folder):
    assert found(folder, "device") == []


def test_the_rule_sees_what_it_should():
    seen = [
        (call, left)
        for _, call, left in missing(
            "torch.zeros(3)\ntorch.tensor([0.5], device=d)\ntorch.arange(3)\ntorch.arange(0.5)\n"
            "torch.ones(2, **like)\nx.new_zeros(3)\ntorch.randn(2, generator=g)\ntorch.eye(2, dtype=t, device=d)\n"
        )
    ]
    assert seen == [
        ("torch.zeros(3)", ["device", "dtype"]),
        ("torch.tensor([0.5], device=d)", ["dtype"]),
        ("torch.arange(3)", ["device"]),
        ("torch.arange(0.5)", ["device", "dtype"]),
        ("torch.randn(2, generator=g)", ["dtype"]),
    ]
