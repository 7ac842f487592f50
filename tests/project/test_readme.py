"""The README's example is run as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf8")


def test_the_example_for_ones_own_network_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "Theorem C" in shown
    if "certified" in shown.splitlines()[0]:
        assert "False" not in shown.splitlines()[-1]


def test_every_picture_exists_and_has_an_alternative_text():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert len(pictures) >= 2
    for alt, path in pictures:
        assert len(alt) > 20
        assert (Path(__file__).parents[2] / path).exists()
