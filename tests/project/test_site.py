"""The site builds without a warning and its pages hold together; each check is shown to fail on a broken page."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import check_site
import pytest
from course import address, api, lessons, reading, repairs
from docutils import nodes
from docutils.utils import new_document

REPOSITORY = "https://github.com/someone/else"
COLAB = "https://colab.research.google.com/github/someone/else/blob/main/lessons/01-a.ipynb"

# --- the built site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make book` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    program = Path(sys.executable).with_name("jupyter-book")
    toc = address.ROOT / "book" / "_toc.yml"
    command = [program, "build", address.ROOT, "--path-output", folder, "--toc", toc, "-W", "--keep-going"]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    done = subprocess.run(command, cwd=address.ROOT, env=environment, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    assert "WARNING" not in log, log[-6000:]
    return folder / "_build" / "html"


@pytest.mark.pipeline
@pytest.mark.xdist_group("site")
class TestSite:
    def test_nothing_is_broken(self, site):
        assert check_site.check(site, address.repository()) == []

    def test_every_lesson_has_its_page_and_its_notebook(self, site):
        for name in lessons.names():
            assert (site / "lessons" / f"{name}.html").exists()
            offered = site / "_sources" / "lessons" / f"{name}.ipynb"
            assert offered.read_bytes() == lessons.notebook_path(name).read_bytes()

    def test_a_lesson_is_the_chapter_of_its_number(self, site):
        for name in lessons.names():
            if chapter := re.match(r"(\d\d)-", name):  # an appendix (01a-...) is a section of its lesson
                text = (site / "lessons" / f"{name}.html").read_text(encoding="utf8")
                assert re.search(r'<h1><span class="section-number">(\d+)\. </span>', text)[1] == str(int(chapter[1]))
                assert set(re.findall(r'class="eqno">\((\d+)\.', text)) == {str(int(chapter[1]))}

    def test_every_repair_of_the_tools_below_is_still_needed(self, site):
        made = json.loads((site.parent / ".doctrees" / "repairs.json").read_text(encoding="utf8"))
        assert set(made) == {*repairs.NAMES, *reading.BODY, *reading.PAGE, "links from the source"}
        assert [name for name, count in made.items() if count == 0] == []

    def test_the_lessons_show_their_stored_pictures(self, site):
        for name in lessons.names():
            cells = lessons.stored_code(name)
            stored = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
            pages = check_site.read(site / "lessons")
            shown = [source for source, _ in pages[site / "lessons" / f"{name}.html"].pictures if "_images" in source]
            assert len(shown) >= stored

    def test_every_module_has_its_place_in_the_reference(self, site):
        pages = "".join(page.read_text(encoding="utf8") for page in (site / "book" / "api").glob("*.html"))
        for name in api.modules("companion")[1:]:
            assert pages.count(f'id="module-{name}"') == 1, name

    def test_no_name_of_a_face_is_described_twice(self, site):
        described = [
            name
            for page in (site / "book" / "api").glob("*.html")
            for name in re.findall(r'class="sig sig-object py" id="([^"]+)"', page.read_text(encoding="utf8"))
        ]
        assert len(described) == len(set(described)) > 100
        for module in [module for module in api.modules("companion") if module.count(".") == 1]:
            for name in getattr(importlib.import_module(module), "__all__", ()):
                elsewhere = [f"{inner}.{name}" for inner in api.modules(module)[1:]]
                assert not set(elsewhere) & set(described)

    def test_search_engines_are_told_the_published_address(self, site):
        assert f'<link rel="canonical" href="{address.site()}' in (site / "book" / "notation.html").read_text()


# --- repairs of other people's pages

DEFECTS = {
    "name of a fold": ('<summary aria-label="Toggle hidden content">Proof', "<summary>Proof"),
    "role of a reference": ('<div role="doc-biblioentry">', '<div role="listitem">'),
    "long signature": (
        "<dl>\n<dd>X: Tensor</dd>\n<dd>y: Tensor</dd>\n</dl>",
        '<span class="sig-lines"><span>X: Tensor</span>\n<span>y: Tensor</span>\n</span>',
    ),
    "name of the search button": (
        '<button class="btn search-button-field" title="Search" aria-label="Search">',
        '<button class="btn search-button-field">',
    ),
    "title of the theme switch": ('<i class="theme-switch fa-lg"  title="Light">', '<i class="theme-switch fa-lg">'),
    "region of the contents": (
        '<div id="pst-primary-sidebar" class="side">',
        '<div id="pst-primary-sidebar" class="side" role="region" aria-label="Contents">',
    ),
}


@pytest.mark.parametrize(("name", "rule"), [*reading.BODY.items(), *reading.PAGE.items()])
def test_a_repair_changes_what_it_names_and_counts_it(monkeypatch, name, rule):
    monkeypatch.setattr(reading, "made", Counter())
    defect, repaired = DEFECTS[name]
    page = f"<p>{defect}</p>\n"
    assert reading.replace(page + page, {name: rule}) == f"<p>{repaired}</p>\n" * 2
    assert reading.replace(f"<p>{repaired}</p>", {name: rule}) == f"<p>{repaired}</p>"
    assert reading.made == {name: 2}


def test_boxes_get_identifiers_of_their_own(monkeypatch):
    monkeypatch.setattr(repairs, "made", Counter())
    document = new_document("page")
    document += [
        nodes.section(ids=["proof-content", "a"]),
        nodes.section(ids=["proof-content"]),
        nodes.section(ids=["b"]),
    ]
    repairs._unique_ids(None, document)
    assert [node["ids"] for node in document] == [["proof-content-1", "a"], ["proof-content-2"], ["b"]]
    assert repairs.made == {"shared ids": 2}


# --- the checks can fail

GOOD = f"""<html><head><link rel="stylesheet" href="style.css"><link rel="canonical" href="https://example.org/"></head>
<body><h1 id="top">A</h1><a href="#top">up</a><a href="01-a.html#top">here</a><a href="https://example.org/">out</a>
<img src="plot.png" alt="The loss falls."><a href="{COLAB}">Colab</a></body></html>"""


@pytest.fixture
def problems(tmp_path):
    """The problems of a small site whose only page is `page`."""
    folder = tmp_path / "site" / "lessons"
    folder.mkdir(parents=True)
    (folder / "plot.png").touch()

    def answer(page: str, style: str = "body { background: url(plot.png) }") -> list[str]:
        (folder / "01-a.html").write_text(page)
        (folder / "style.css").write_text(style)
        return check_site.check(folder.parent, REPOSITORY)

    return answer


def test_a_good_page_passes(problems):
    assert problems(GOOD) == []


def test_an_empty_site_is_found(tmp_path):
    assert "holds no page" in check_site.check(tmp_path, REPOSITORY)[0]


BROKEN = {
    "link": ('href="01-a.html#top"', 'href="02-b.html"', "02-b.html does not exist"),
    "picture that is missing": ('src="plot.png"', 'src="other.png"', "other.png does not exist"),
    "anchor": ('href="#top"', 'href="#bottom"', "#bottom has no such anchor"),
    "anchor on a page": ("01-a.html#top", "01-a.html#bottom", "01-a.html#bottom has no such anchor"),
    "id": ("<body>", '<body><p id="top">', "the id 'top' occurs 2 times"),
    "no alt": (' alt="The loss falls."', "", "has no alternative text"),
    "empty alt": ("The loss falls.", " ", "has no alternative text"),
    "alt is a path": ("The loss falls.", "../_images/ab12.png", "is a file name"),
    "alt is a stem": ("The loss falls.", "plot", "is a file name"),
    "script": ("<body>", '<body><script src="https://cdn.org/a.js"></script>', "loads https://cdn.org/a.js"),
    "import": ("<body>", '<body><script>import "https://cdn.org/m.js"</script>', "loads https://cdn.org/m.js"),
    "style sheet": ('href="style.css"', 'href="//cdn.org/a.css"', "loads //cdn.org/a.css"),
    "icon": ("<body>", '<body><link rel="icon" href="http://cdn.org/i">', "loads http://cdn.org/i"),
    "frame": ("<body>", '<body><iframe src="https://cdn.org/f"></iframe>', "loads https://cdn.org/f"),
    "image": ('src="plot.png"', 'src="https://cdn.org/p.png"', "loads https://cdn.org/p.png"),
    "image set": ("<img ", '<img srcset="plot.png 1x, https://cdn.org/2.png 2x" ', "loads https://cdn.org/2.png"),
    "style": ("<body>", "<body><style>p { background: url('https://cdn.org/p') }</style>", "loads https://cdn.org/p"),
    "attribute": ("<body>", '<body style="background: url(https://cdn.org/q)">', "loads https://cdn.org/q"),
    "another repository": ("someone/else", "someone/other", "does not open"),
    "another notebook": ("lessons/01-a.ipynb", "lessons/02-b.ipynb", "does not open"),
    "no launch": (f'<a href="{COLAB}">Colab</a>', "", "no link opens"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_defect_is_found(problems, defect):
    old, new, sentence = BROKEN[defect]
    assert old in GOOD
    assert any(sentence in problem for problem in problems(GOOD.replace(old, new)))


@pytest.mark.parametrize("style", ["@import 'https://cdn.org/a.css';", "p { background: url(//cdn.org/a.png) }"])
def test_a_style_sheet_that_loads_from_elsewhere_is_found(problems, style):
    assert any("style.css loads" in problem for problem in problems(GOOD, style))


def test_the_program_says_what_is_wrong(tmp_path):
    command = [sys.executable, str(check_site.__file__), str(tmp_path), REPOSITORY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds no page" in done.stderr
