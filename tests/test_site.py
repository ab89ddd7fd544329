"""The docs site: what the build refuses, what a page holds, and how it behaves in Chromium without a network."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from chromium import chromium, find_chromium, watched_page

REPO = Path(__file__).parents[1]
in_chromium = [pytest.mark.browser, pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine")]

FIGURE = '''
fig = go.Figure(go.Scatter(x=[1, 2, 4], y=[2.5, 2.2, 2.0], name="smoke", line={"color": "#000000"}))
fig.update_layout(title="Loss falls with size, and <b>this title</b> is long enough to need a second line on a narrow page",
                  xaxis_title="parameters (millions)", yaxis_title="bits per byte")
fig.layout.meta = {"alt": "Bits per byte fall from 2.5 to 2.0 as parameters grow four times."}
fig
'''
SHOWCASE = [
    ("code", "#| default_exp corpus.showcase"),
    ("markdown", "# Showcase\n> What every kind of cell looks like\n\nSee `domain_of` and [the ledger](00_ledger.ipynb), with $e^{i\\pi}=-1$."),
    ("code", "#| export\nimport math"),
    ("code", "import plotly.graph_objects as go"),
    ("markdown", "## Halves"),
    ("code", '#| export\ndef half_of(n_bytes:int # how many\n           )->float: # half as many\n    "Half of `n_bytes`."\n    return n_bytes/2'),
    ("code", 'print(half_of(3), r"\\begin{equation} $x$ \\end{equation} </script>")'),
    ("code", "#| hide\nassert half_of(2) == 1  # nobody sees this"),
    ("markdown", "## A figure"),
    ("code", FIGURE.strip()),
]


def notebook(cells)->nbformat.NotebookNode:
    new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=[new[kind](source) for kind, source in cells], metadata={"kernelspec": kernel})

def small_repository(root:Path)->Path:
    "The home page, one real chapter and one made up; the builder is this checkout's."
    (root/"nbs"/"corpus").mkdir(parents=True)
    for name in ("settings.ini", "pyproject.toml", "nbs/index.ipynb", "nbs/corpus/index.ipynb", "nbs/corpus/00_ledger.ipynb"): shutil.copy2(REPO/name, root/name)
    nbformat.write(notebook(SHOWCASE), root/"nbs"/"corpus"/"01_showcase.ipynb")
    return root

def build(root:Path, *arguments)->subprocess.CompletedProcess:
    command = [sys.executable, str(REPO/"docs"/"build.py"), "--root", str(root), "--out", str(root/"_site"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=with_repository_on_path())

def with_repository_on_path()->dict:
    return {**os.environ, "PYTHONPATH": str(REPO)}

@pytest.fixture(scope="module")
def site(tmp_path_factory)->Path:
    "One build for all tests of this module."
    root = small_repository(tmp_path_factory.mktemp("repository"))
    built = build(root)
    assert built.returncode == 0, built.stdout + built.stderr
    return root/"_site"

def read(site:Path, page:str)->str: return (site/page).read_text(encoding="utf-8")


def test_readme_is_made_from_the_home_page():
    done = subprocess.run([sys.executable, str(REPO/"docs"/"build.py"), "--check-readme"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_a_function_has_anchor_signature_and_source(site):
    page = read(site, "corpus/showcase.html")
    assert 'id="half_of"' in page and "Source of half_of" in page
    text = re.sub(r"<[^>]+>", "", page)
    assert "# half as many" in text and "Half of" in text and "return n_bytes" in text.replace("\xa0", " ")

def test_names_and_notebooks_become_links(site):
    page = read(site, "corpus/showcase.html")
    assert '<a class="symbol" href="ledger.html#domain_of">' in page and 'href="ledger.html"' in page
    assert 'id="domain_of"' in read(site, "corpus/ledger.html")

def test_cells_for_nobody_stay_away(site):
    page = read(site, "corpus/showcase.html")
    assert "nobody sees this" not in page and "default_exp" not in page and "show_doc" not in page and "#|" not in page

def test_a_family_page_reads_the_scale_that_was_kept(monkeypatch):
    monkeypatch.syspath_prepend(REPO/"docs")
    from chapters import read_chapter, reading_only, with_documentation
    sources = [c.source for c in reading_only(with_documentation(read_chapter(REPO/"runs"/"size.ipynb", REPO, REPO)), "desk").cells]
    at = sources.index("scale = 'desk'")
    assert sources[at - 1].startswith('scale = ""') and any("open_family(" in s for s in sources[at + 1:])

def test_every_reason_has_its_row(site):
    from arxiv_study.corpus.ledger import Reason
    page = read(site, "corpus/reasons.html")
    assert [r.value for r in Reason if f'<tr id="{r.value}">' not in page] == []

def test_nothing_is_loaded_from_another_host(site):
    loads = re.compile(r'<(?:script|img|iframe|link|source)\b[^>]*?(?:src|href)="(?:https?:)?//', re.I)
    assert [p.name for p in site.rglob("*.html") if loads.search(p.read_text(encoding="utf-8"))] == []

def test_a_failing_notebook_fails_the_build_by_name_and_keeps_the_old_site(tmp_path):
    root = small_repository(tmp_path)
    nbformat.write(notebook([("markdown", "# Broken\n> It fails"), ("code", "x = 1"), ("code", "# comment\nx/0")]), root/"nbs"/"corpus"/"05_broken.ipynb")
    (root/"_site").mkdir()
    (root/"_site"/"old.html").write_text("old")
    built = build(root, "--only", "05_broken")
    assert built.returncode == 1 and "Traceback" not in built.stderr
    assert "nbs/corpus/05_broken.ipynb, cell 2" in built.stderr and "ZeroDivisionError" in built.stderr
    assert read(root/"_site", "old.html") == "old"

@pytest.mark.parametrize("cells, complaint", [
    ([("markdown", "# Lost\n> A link\n\nSee [nothing](09_nothing.ipynb).")], "09_nothing.ipynb, which does not exist"),
    ([("markdown", "# Steps\n> A skipped level\n\n### Too deep")], "header level"),
    ([("markdown", "No title at all")], "has no H1"),
])
def test_a_page_that_is_wrong_is_refused(tmp_path, cells, complaint):
    root = small_repository(tmp_path)
    nbformat.write(notebook(cells), root/"nbs"/"corpus"/"06_wrong.ipynb")
    built = build(root, "--only", "06_wrong")
    assert built.returncode == 1 and complaint in built.stderr and "06_wrong" in built.stderr.replace("corpus/wrong", "06_wrong")


@pytest.fixture(scope="module")
def page():
    "One page of Chromium for all tests of this module."
    with chromium() as b: yield watched_page(b)

def show(page, site:Path, name:str):
    page.watch.clear()
    name, _, query = name.partition("?")
    page.goto((site/name).as_uri() + (f"?{query}" if query else ""))

class TestInChromium:
    pytestmark = in_chromium

    def test_pages_ask_nobody_for_anything_and_complain_about_nothing(self, page, site):
        for name in ("index.html", "corpus/index.html", "corpus/ledger.html", "corpus/reasons.html", "corpus/showcase.html", "foundation.html"):
            show(page, site, name)
            if name == "corpus/showcase.html": page.wait_for_function("document.documentElement.dataset.figures === 'drawn'")
            assert page.watch.asked_of_others() == []
            assert page.watch.complaints == [], name

    def test_plotly_comes_only_where_there_is_a_figure(self, page, site):
        show(page, site, "corpus/ledger.html")
        assert not any("plotly" in r for r in page.watch.requests)
        show(page, site, "corpus/showcase.html")
        page.wait_for_function("document.documentElement.dataset.figures === 'drawn'")
        assert sum("plotly" in r for r in page.watch.requests) == 1

    def test_a_figure_speaks_follows_the_theme_and_shows_its_table(self, page, site):
        show(page, site, "corpus/showcase.html")
        page.wait_for_function("document.documentElement.dataset.figures === 'drawn'")
        assert page.evaluate("document.querySelector('figure.plot').getAttribute('aria-label')").startswith("Bits per byte fall")
        stroke = "getComputedStyle(document.querySelector('figure.plot .js-line')).stroke"
        assert page.evaluate("document.querySelectorAll('figure.plot [data-title*=Share], figure.plot .plotlyjsicon').length") == 0
        ink = {}
        for theme in ("light", "dark"):
            page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            page.wait_for_function(f"{stroke} === getComputedStyle(document.body).color")
            ink[theme] = page.evaluate(stroke)
        assert ink["light"] != ink["dark"]
        page.evaluate("document.querySelector('figure.plot summary').click()")
        page.wait_for_function("document.querySelector('figure.plot table')")
        rows = page.evaluate("[...document.querySelectorAll('figure.plot table tr')].map(r => [...r.cells].map(c => c.textContent))")
        assert rows == [["parameters (millions)", "bits per byte"], ["1", "2.5000"], ["2", "2.2000"], ["4", "2"]]

    def test_a_table_sorts_by_a_click(self, page, site):
        show(page, site, "corpus/reasons.html")
        column = "[...document.querySelectorAll('table.facts tbody tr')].map(r => r.cells[0].textContent)"
        before = page.evaluate(column)
        page.locator("table.facts button.sort").first.click()
        assert page.evaluate(column) == sorted(before) != before
        page.locator("table.facts button.sort").first.click()
        assert page.evaluate(column) == sorted(before, reverse=True)
        assert page.evaluate("document.querySelector('table.facts th').ariaSort") == "descending"

    def test_mathematics_is_typeset_in_prose_and_left_alone_in_output(self, page, site):
        show(page, site, "corpus/showcase.html")
        page.wait_for_function("document.querySelectorAll('mjx-container svg').length === 1")
        assert r"\begin{equation} $x$ \end{equation} </script>" in page.evaluate("document.querySelector('.cell_output pre').innerText")

    def test_search_works_without_a_server(self, page, site):
        show(page, site, "search.html?q=conservation")
        page.wait_for_function("document.querySelectorAll('#search-results li a').length > 0")
        assert page.evaluate("[...document.querySelectorAll('#search-results li a')].some(a => a.href.includes('corpus/ledger.html'))")

    def test_the_sidebar_lists_rooms_and_the_next_page_is_one_click_away(self, page, site):
        show(page, site, "corpus/ledger.html")
        assert page.evaluate("[...document.querySelectorAll('.bd-sidebar-primary a')].map(a => a.textContent.trim())")[:2] == ["Corpus", "The ledger"]
        assert page.evaluate("document.querySelector('a.right-next').getAttribute('href')") == "showcase.html"

    def test_a_page_fits_a_telephone(self, page, site):
        page.set_viewport_size(dict(width=390, height=800))
        for name in ("index.html", "corpus/ledger.html", "corpus/reasons.html", "corpus/showcase.html"):
            show(page, site, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= 391, name
        page.set_viewport_size(dict(width=1400, height=1000))
