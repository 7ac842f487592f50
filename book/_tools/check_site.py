"""Check a built site, with the standard library only.

    python book/_tools/check_site.py FOLDER REPOSITORY

Links and anchors inside the site resolve; identifiers are unique on their page; every picture says what it shows; no
page or style sheet loads anything from another site; links to Colab open a notebook of this repository.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# attributes that make a browser load something at once (a link to follow loads nothing)
LOADS = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
# kinds of <link> that name a page and load nothing
NAMES_ONLY = {"alternate", "author", "canonical", "help", "index", "license", "next", "prev", "search"}
ELSEWHERE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
CSS_LOAD = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
SCRIPT_LOAD = re.compile(r"""\b(?:import|from|fetch|importScripts)\s*\(?\s*["']((?:https?:)?//[^"']+)""")
FILE_NAME = re.compile(r"\.(png|svg|jpe?g|gif|webp)$|^_images/|/_images/", re.IGNORECASE)


class Page(HTMLParser):
    """What one page links to, loads, names and shows."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.pictures: list[tuple[str, str | None]] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self._inside = tag if tag in ("style", "script") else ""
        if given.get("id"):
            self.ids.append(given["id"])
        if tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and not set(given.get("rel", "").lower().split()) <= NAMES_ONLY:
            self.loads.append(given.get("href", ""))
        for name in LOADS.get(tag, ()):
            if name in given:
                self.loads += [part.split()[0] for part in _candidates(name, given[name])]
        self.loads += CSS_LOAD.findall(given.get("style", ""))
        # the theme writes the site's name beside its logo, so that the logo itself must stay silent
        if tag == "img" and not (given.get("alt") == "" and "logo__image" in given.get("class", "").split()):
            self.pictures.append((given.get("src", ""), given.get("alt")))

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "style":
            self.loads += CSS_LOAD.findall(data)
        if self._inside == "script":
            self.loads += SCRIPT_LOAD.findall(data)


def _candidates(name: str, value: str) -> list[str]:
    parts = value.split(",") if name == "srcset" and not value.startswith("data:") else [value]
    return [part for part in parts if part.strip()]


def read(folder: Path) -> dict[Path, Page]:
    """The pages of a site; what lies in _static and _sources is not a page."""
    found = sorted(p for p in folder.rglob("*.html") if p.relative_to(folder).parts[0] not in ("_static", "_sources"))
    return {path: Page(path.read_text(encoding="utf8")) for path in found}


def identifiers(pages: dict[Path, Page]) -> list[str]:
    """Identifiers that occur twice on a page."""
    return [
        f"{path.name}: the id {name!r} occurs {page.ids.count(name)} times"
        for path, page in pages.items()
        for name in sorted(set(page.ids))
        if page.ids.count(name) > 1
    ]


def _target(path: Path, link: str, folder: Path) -> tuple[Path, str]:
    parts = urlsplit(link)
    base = folder if parts.path.startswith("/") else path.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    return (target / "index.html" if target.is_dir() else target), unquote(parts.fragment)


def links(pages: dict[Path, Page], folder: Path) -> list[str]:
    """Links and loads inside the site that lead nowhere."""
    problems = []
    known = {path.resolve(): page for path, page in pages.items()}
    for path, page in pages.items():
        for link in sorted({*page.links, *page.loads}):
            if urlsplit(link).scheme or ELSEWHERE.match(link):
                continue
            target, anchor = _target(path.resolve(), link, folder.resolve())
            if not target.is_file():
                problems.append(f"{path.name}: {link} does not exist")
            elif anchor and target in known and anchor not in known[target].ids:
                problems.append(f"{path.name}: {link} has no such anchor")
    return problems


def pictures(pages: dict[Path, Page]) -> list[str]:
    """Pictures without a text that says what they show."""
    problems = []
    for path, page in pages.items():
        for source, text in page.pictures:
            if not (text or "").strip():
                problems.append(f"{path.name}: the picture {source[:80]} has no alternative text")
            elif FILE_NAME.search(text.strip()) or text.strip() in (source, Path(urlsplit(source).path).stem):
                problems.append(f"{path.name}: the alternative text {text[:80]!r} is a file name")
    return problems


def loads(pages: dict[Path, Page], folder: Path) -> list[str]:
    """What is loaded from another site, by a page or by a style sheet."""
    problems = [
        f"{path.name} loads {one}" for path, page in pages.items() for one in page.loads if ELSEWHERE.match(one)
    ]
    for sheet in sorted(folder.rglob("*.css")):
        found = CSS_LOAD.findall(sheet.read_text(encoding="utf8", errors="replace"))
        problems += [f"{sheet.relative_to(folder)} loads {one}" for one in found]
    return problems


def launches(pages: dict[Path, Page], repository: str, branch: str = "main") -> list[str]:
    """Links to Colab that do not open this repository's notebook of the page, and lessons without such a link."""
    owner, name = repository.rstrip("/").split("/")[-2:]
    problems = []
    for path, page in pages.items():
        found = {link for link in page.links if "colab.research.google.com" in link}
        here = path.parent.name == "lessons"
        lesson = f"https://colab.research.google.com/github/{owner}/{name}/blob/{branch}/lessons/{path.stem}.ipynb"
        wanted = {lesson} if here else set()
        problems += [f"{path.name}: {link} does not open {lesson}" for link in sorted(found - wanted) if here]
        start = lesson.rsplit("/", 1)[0] + "/"
        problems += [f"{path.name}: {link} is elsewhere" for link in found if not here and not link.startswith(start)]
        problems += [f"{path.name}: no link opens {link}" for link in sorted(wanted - found)]
    return problems


def check(folder: Path, repository: str) -> list[str]:
    """All problems of the site in `folder`, a sentence each."""
    pages = read(folder)
    if not pages:
        return [f"{folder} holds no page"]
    return [
        *links(pages, folder),
        *identifiers(pages),
        *pictures(pages),
        *loads(pages, folder),
        *launches(pages, repository),
    ]


if __name__ == "__main__":
    found = check(Path(sys.argv[1]), sys.argv[2])
    sys.exit("\n".join(found) or None)
