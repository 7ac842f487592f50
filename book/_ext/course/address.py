"""The one place that turns pyproject's address into links: repository, site, Colab, install source."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BRANCH = "main"


def _urls() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]["urls"]


def repository() -> str:
    """The address of the repository, without a slash at the end."""
    return _urls()["Repository"].rstrip("/")


def site() -> str:
    """The address of the published site: pyproject's `Documentation`, or GitHub Pages of the repository."""
    urls = _urls()
    if "Documentation" in urls:
        return urls["Documentation"].rstrip("/") + "/"
    owner, name = repository().split("/")[-2:]
    return f"https://{owner}.github.io/{name}/"


def colab(lesson: str) -> str:
    """The address that opens a lesson's notebook on Colab."""
    owner, name = repository().split("/")[-2:]
    return f"https://colab.research.google.com/github/{owner}/{name}/blob/{BRANCH}/lessons/{lesson}.ipynb"


def install_source() -> str:
    """What pip installs on Colab."""
    return f"git+{repository()}"


def _configure(app, config):
    config.html_baseurl = site()
    config.ogp_site_url = site()
    config.html_theme_options |= {
        "repository_url": repository(),
        "repository_branch": BRANCH,
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
    }


def setup(app):
    app.connect("config-inited", _configure, priority=100)
