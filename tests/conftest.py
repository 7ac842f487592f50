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


def pytest_terminal_summary(terminalreporter):
    """Say where the time went, in seconds of one core as far as the cores were quiet."""
    parts = {"units": 0.0, "lessons": 0.0, "site and the rest": 0.0}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                project = report.nodeid.startswith("tests/project/")
                lesson = project and "test_lesson_as_colab" in report.nodeid
                parts["lessons" if lesson else "site and the rest" if project else "units"] += report.duration
    if sum(parts.values()) > 60:
        terminalreporter.line("seconds: " + ", ".join(f"{name} {took:.0f}" for name, took in parts.items()))
