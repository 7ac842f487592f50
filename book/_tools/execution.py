"""Running code cells in a kernel of their own."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_ext"))

from course import address, lessons


class Broken(Exception):
    """A lesson's text and notebook do not belong together, its run failed, or rounding moves what it prints."""


def run_cells(sources: list[str], name: str) -> list:
    """Run code cells in a kernel of their own, in an empty folder; return them with their outputs.

    Args:
        sources: the cells' code.
        name: what is run, for a message.
    """
    return asyncio.run(_run(sources, name))


def run_at_once(notebooks: list[list[str]], name: str, path: Path) -> list[list]:
    """Run several lists of code cells at once, each as `run_cells` does, going on after a cell that raises.

    Args:
        notebooks: the code of each one's cells.
        name: what is run, for a message.
        path: a folder, besides the repository's own, from which the cells can import.

    Returns:
        The cells with their outputs; the output of a cell that raised is the error.
    """

    async def run():
        return await asyncio.gather(*(_run(sources, name, through_errors=True, path=[path]) for sources in notebooks))

    return asyncio.run(run())


async def _run(sources: list[str], name: str, through_errors: bool = False, path: Sequence[Path] = ()) -> list:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=lessons.METADATA)
    with tempfile.TemporaryDirectory() as folder:
        # neither the reader's own start-up files nor a chosen backend may change what a lesson prints
        environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
        environment |= {"IPYTHONDIR": folder, "PYTHONPATH": os.pathsep.join(map(str, (address.ROOT, *path)))}
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            allow_errors=through_errors,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=40"],
        )
        try:
            await client.async_execute(env=environment)
        except CellExecutionError as error:
            raise Broken(f"{name}: a cell failed\n{error}") from error
    return cells
