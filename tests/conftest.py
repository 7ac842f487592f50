"""Shapes are checked at run time in every test: the hook must come before the first import of companion."""

import jaxtyping
import pytest
from hypothesis import settings

jaxtyping.install_import_hook("companion", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture
def unchecked():
    """Switch the shape checker off, so that a test of bad input sees companion's own sentence."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
