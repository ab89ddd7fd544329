"""Every page of the built site, as a reader meets it: `make docs`, then `make test-pages` (SITE=DIR for another folder, SCREENSHOTS=DIR to look at each page)."""
import os
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from chromium import chromium, find_chromium, watched_page

SITE = Path(os.environ.get("SITE") or Path(__file__).parents[1]/"_site").resolve()
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.parts) if SITE.is_dir() else []
LARGEST = 1_500_000 # bytes of a page, without what all pages share
pytestmark = pytest.mark.skipif("SITE" not in os.environ, reason="which built site? make docs, then make test-pages")
in_chromium = [pytest.mark.browser, pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine")]


class Links(HTMLParser):
    "What a page offers as a target, and where it leads."
    def __init__(self, text:str):
        super().__init__()
        self.ids, self.targets = Counter(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if a.get("id"): self.ids[a["id"]] += 1
        if target := a.get("href") or a.get("src"): self.targets.append(target)


@pytest.fixture(scope="module")
def links()->dict[Path, Links]:
    return {SITE/p: Links((SITE/p).read_text(encoding="utf-8")) for p in PAGES}

def test_there_is_a_site():
    assert len(PAGES) > 60 and {"index.html", "search.html", "limits.html", "contributing.html", "corpus/reasons.html", "runs/index.html", "runs/study.html"} <= set(PAGES), f"{SITE} is not the whole site"

def test_every_link_leads_somewhere(links):
    lost = []
    for page, found in links.items():
        for target in found.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc: continue
            path = (page.parent/unquote(url.path)).resolve() if url.path else page
            if not path.is_file(): lost.append(f"{page.relative_to(SITE)}: {target}")
            elif url.fragment and path in links and unquote(url.fragment) not in links[path].ids: lost.append(f"{page.relative_to(SITE)}: {target} has no such anchor")
    assert not lost

def test_an_id_is_there_once(links):
    assert not {f"{page.relative_to(SITE)}#{name}" for page, found in links.items() for name, n in found.ids.items() if n > 1}

def test_no_page_is_heavy():
    assert not {p: size for p in PAGES if (size := (SITE/p).stat().st_size) > LARGEST}


FIGURES = "document.querySelectorAll('figure.plot').length"
DRAWN = f"!{FIGURES} || document.documentElement.dataset.figures === 'drawn'"
# where a value of a figure is on the screen: a mark of its own, or else the middle of the plot
MARK = """n => { const plots = [...document.querySelectorAll('figure.plot')], figure = plots[n % plots.length];
  const marks = [...figure.querySelectorAll('.points path, .point path, .sankey-node rect, .slice path, .trace.bars path, .heatmaplayer image, .cartesianlayer .trace')]
    .filter(e => e.getBoundingClientRect().width > 0);
  if (!marks.length) return null;
  const mark = marks[Math.floor(marks.length / 2)];
  mark.scrollIntoView({block: 'center'});
  return new Promise(done => setTimeout(() => { const r = mark.getBoundingClientRect(); done([r.x + r.width / 2, r.y + r.height / 2]) }, 50)) }"""
HOVERED = "n => document.querySelectorAll('figure.plot')[n].querySelectorAll('.hoverlayer .hovertext, .hoverlayer .axistext').length > 0"
UNNAMED = """[...document.querySelectorAll('figure.plot')].filter(f => !(f.getAttribute('aria-label') || '').trim().endsWith('.') || !f.querySelector('details summary')
  || !f.querySelector('.gtitle, .g-gtitle text')?.textContent.trim()).map(f => f.getAttribute('aria-label') || 'a figure without a sentence')"""

@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b

@pytest.fixture(scope="module")
def views(browser)->dict:
    "The four ways in which a page is looked at."
    return {(scheme, width): watched_page(browser, width, 900, color_scheme=scheme) for scheme in ("light", "dark") for width in (1280, 380)}

@pytest.fixture(scope="module")
def axe():
    from axe_playwright_python.sync_playwright import Axe
    return Axe()

def show(page, name:str):
    "A page, with its figures drawn and its mathematics set."
    page.watch.clear()
    page.goto((SITE/name).as_uri())
    page.wait_for_function(DRAWN)
    page.wait_for_function("!window.MathJax?.startup?.promise || window.MathJax.startup.promise.then(() => true)")

def serious(axe, page, rules:list|None=None)->list[str]: # a sentence a violation
    "What axe-core calls serious or critical."
    options = dict(resultTypes=["violations"]) | (dict(runOnly=rules) if rules else {})
    found = axe.run(page, options=options).response["violations"]
    return [f"{v['id']}: {n['target'][0]} {n['html'][:120]}" for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]]

def shoot(page, name:str, scheme:str, width:int):
    "For a person to look at."
    if folder := os.environ.get("SCREENSHOTS"):
        path = Path(folder)/f"{name.removesuffix('.html').replace('/', '-')}-{scheme}-{width}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, full_page=True)

class TestInChromium:
    pytestmark = in_chromium

    @pytest.mark.parametrize("name", PAGES)
    def test_a_page_is_quiet_readable_and_fits(self, name, views, axe):
        wrong = []
        for (scheme, width), page in views.items():
            show(page, name)
            shoot(page, name, scheme, width)
            seen = f"{scheme}, {width} pixels"
            wrong += [f"{seen}: {c}" for c in page.watch.complaints] + [f"{seen} asks {r}" for r in page.watch.asked_of_others()]
            wrong += [f"{seen}: {v}" for v in serious(axe, page, None if scheme == "light" else ["color-contrast"])] # the other rules don't see colours
            if (wide := page.evaluate("document.documentElement.scrollWidth")) > width + 1: wrong.append(f"{seen}: it is {wide} wide")
            if (titles := page.evaluate("document.querySelectorAll('h1').length")) != 1: wrong.append(f"{seen}: {titles} titles")
        wrong += [f"no title, sentence or table: {f}" for f in page.evaluate(UNNAMED)]
        assert not wrong

    @pytest.mark.parametrize("name", [p for p in PAGES if 'class="plot"' in (SITE/p).read_text(encoding="utf-8")])
    def test_figures_answer_the_pointer(self, name, views):
        page, silent = views["light", 1280], []
        show(page, name)
        for n in range(page.evaluate(FIGURES)):
            if not (place := page.evaluate(MARK, n)): silent.append((n, "no mark")); continue
            page.mouse.move(place[0] - 2, place[1]), page.mouse.move(*place)
            try: page.wait_for_function(HOVERED, arg=n, timeout=3000)
            except Exception as e: silent.append((n, type(e).__name__))
            page.mouse.move(0, 0)
        assert not silent

    @pytest.mark.parametrize("wanted, page_name", [("flatten", "corpus/flatten.html"), ("gradient noise", "model/noise"), ("Muennighoff", "study/scaling.html"), ("ZeRO", "model/")])
    def test_search_finds(self, wanted, page_name, views):
        page = views["light", 1280]
        page.goto((SITE/"search.html").as_uri() + f"?q={wanted}")
        page.wait_for_function("document.querySelectorAll('#search-results li a').length > 0")
        assert page.evaluate("n => [...document.querySelectorAll('#search-results li a')].slice(0, 10).some(a => a.href.includes(n))", page_name)
