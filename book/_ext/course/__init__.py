"""What this course adds to Jupyter Book, one concern a file.

- `address`: the repository's address, read from pyproject.toml;
- `stored_outputs`: the site shows the outputs of the stored notebooks, and no kernel runs;
- `claims`: the page with all claims of all lessons, and the lessons that use a module;
- `api`: the reference of the package, made from its faces;
- `cells`: the builder that turns a lesson into plain Markdown cells for its notebook;
- `repairs`: defects of the tools below us;
- `reading`: what would keep a page from readers who hear it or use no mouse.
"""

from . import address, api, cells, claims, reading, repairs, stored_outputs


def setup(app):
    for part in (address, stored_outputs, claims, api, cells, repairs, reading):
        part.setup(app)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
