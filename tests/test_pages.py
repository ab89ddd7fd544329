"""Every page of the built site, as a reader meets it: `make docs`, then `make test-pages` (SITE=DIR for another folder, SCREENSHOTS=DIR to look at each page).

VIEWS=1 looks at each page in one of the four views, by turns, which takes a third of the time.
"""
import os, re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from chromium import chromium, find_chromium, watched_page
from playwright.sync_api import TimeoutError

SITE = Path(os.environ.get("SITE") or Path(__file__).parents[1]/"_site").resolve()
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if "_static" not in p.parts) if SITE.is_dir() else []
VIEWS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 380)]
WITH_ALL_CODE = {"contributing.html", "settings.html", "corpus/normalize.html", "runs/index.html"} # elsewhere code, whose colours are the same, is left out: it is most of a page
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
# places of values on the screen: points of curves and bars by their axes; of what has no axes, its marks
PLACES = """n => { const figure = document.querySelectorAll('figure.plot')[n], plot = figure.querySelector('.js-plotly-plot');
  figure.scrollIntoView({block: 'center'});
  return new Promise(done => setTimeout(() => {
    const box = plot.getBoundingClientRect(), places = [];
    for (const t of plot._fullData.filter(t => t.visible === true && t.hoverinfo !== 'skip')) {
      const at = (plot.calcdata[t._expandedIndex ?? t.index] || []), x = plot._fullLayout[(t.xaxis || 'x').replace('x', 'xaxis')], y = plot._fullLayout[(t.yaxis || 'y').replace('y', 'yaxis')];
      if (!x?.c2p || !y?.c2p) continue;
      const seen = at.map(p => ['bar', 'waterfall'].includes(t.type) ? (t.orientation === 'h' ? [x.c2p(p.s1) - 2, y.c2p(p.p)] : [x.c2p(p.p), y.c2p(p.s1) + 2]) : [x.c2p(p.x), y.c2p(p.y)])
        .filter(([a, b]) => a >= 0 && a <= x._length && b >= 0 && b <= y._length).map(([a, b]) => [box.x + x._offset + a, box.y + y._offset + b]);
      for (const share of [.5, 0, .9]) if (seen.length) places.push(seen[Math.floor(seen.length * share)]);
    }
    for (const e of figure.querySelectorAll('.sankey-node rect, .slice path, .heatmaplayer image')) { const r = e.getBoundingClientRect(); places.push([r.x + r.width / 2, r.y + r.height / 2]) }
    done(places.slice(0, 12)) }, 50)) }"""
HOVERED = "n => document.querySelectorAll('figure.plot')[n].querySelectorAll('.hoverlayer .hovertext, .hoverlayer .axistext, .hoverlayer .legend').length > 0"
# what a figure shows: its title, and of each curve whether it is there and where it lies
SHOWN = """n => { const p = document.querySelectorAll('figure.plot')[n].querySelector('.js-plotly-plot');
  return JSON.stringify([p._fullLayout.title.text, p._fullData.map(t => [t.visible, Array.from(t.x ?? []).slice(0, 50), Array.from(t.y ?? []).slice(0, 50), t.node?.label])]) }"""
UNNAMED = """[...document.querySelectorAll('figure.plot')].filter(f => !(f.getAttribute('aria-label') || '').trim().endsWith('.') || !f.querySelector('details summary')
  || !f.querySelector('.gtitle, .g-gtitle text')?.textContent.trim()).map(f => f.getAttribute('aria-label') || 'a figure without a sentence')"""

@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b

@pytest.fixture(scope="module")
def views(browser)->dict:
    "The four ways in which a page is looked at."
    return {(scheme, width): watched_page(browser, width, 900, color_scheme=scheme) for scheme, width in VIEWS}

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

def serious(axe, page, code:bool)->list[str]: # a sentence a violation
    "What axe-core calls serious or critical."
    found = axe.run(page, context={} if code else {"exclude": [["div.highlight pre"]]}, options=dict(resultTypes=["violations"])).response["violations"]
    return [f"{v['id']}: {n['target'][0]} {n['html'][:120]}" for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]]

def looks(name:str)->list[tuple]: # scheme, width, whether axe-core reads it, too
    "Four views, of which two show axe-core each scheme and each width; or one of the four, by turns."
    turn = PAGES.index(name)
    if os.environ.get("VIEWS") == "1": return [(*VIEWS[turn % 4], True)]
    read = (VIEWS[0], VIEWS[3]) if turn % 2 else (VIEWS[1], VIEWS[2])
    return [(*view, view in read) for view in VIEWS]

def shoot(page, name:str, scheme:str, width:int):
    "For a person to look at."
    if folder := os.environ.get("SCREENSHOTS"):
        path = Path(folder)/f"{name.removesuffix('.html').replace('/', '-')}-{scheme}-{width}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, full_page=True)

def answers(page, n:int, x:float, y:float)->bool:
    "Whether figure n names a value when the pointer comes to it."
    page.mouse.move(x - 2, y), page.mouse.move(x, y)
    try: page.wait_for_function(HOVERED, arg=n, timeout=1000)
    except TimeoutError: return False
    finally: page.mouse.move(0, 0)
    return True

def drag_slider(page, figure)->bool:
    "Move a figure's slider to nine tenths, if it has one."
    rail = figure.locator(".slider-rail-touch-rect")
    if not rail.count(): return False
    rail.first.scroll_into_view_if_needed()
    box = rail.first.bounding_box()
    page.mouse.move(box["x"] + .1*box["width"], box["y"] + box["height"]/2), page.mouse.down(), page.mouse.move(box["x"] + .9*box["width"], box["y"] + box["height"]/2, steps=3), page.mouse.up()
    return True

def choose_last(page, figure)->bool:
    "Choose the last entry of a figure's menu, if it has one."
    header = figure.locator(".updatemenu-header")
    if not header.count(): return False
    header.first.scroll_into_view_if_needed()
    header.first.click()
    figure.locator(".updatemenu-dropdown-button").last.click()
    return True

class TestInChromium:
    pytestmark = in_chromium

    @pytest.mark.parametrize("name", PAGES)
    def test_a_page_is_quiet_readable_and_fits(self, name, views, axe):
        wrong = []
        for scheme, width, reads in looks(name):
            show(page := views[scheme, width], name)
            shoot(page, name, scheme, width)
            seen = f"{scheme}, {width} pixels"
            wrong += [f"{seen}: {c}" for c in page.watch.complaints] + [f"{seen} asks {r}" for r in page.watch.asked_of_others()]
            if reads: wrong += [f"{seen}: {v}" for v in serious(axe, page, name in WITH_ALL_CODE)]
            if (wide := page.evaluate("document.documentElement.scrollWidth")) > width + 1: wrong.append(f"{seen}: it is {wide} wide")
            if (titles := page.evaluate("document.querySelectorAll('h1').length")) != 1: wrong.append(f"{seen}: {titles} titles")
        wrong += [f"no title, sentence or table: {f}" for f in page.evaluate(UNNAMED)]
        assert not wrong

    @pytest.mark.parametrize("name", [p for p in PAGES if 'class="plot"' in (SITE/p).read_text(encoding="utf-8")])
    def test_figures_answer_the_pointer(self, name, views):
        page, silent = views["light", 1280], []
        show(page, name)
        for n in range(page.evaluate(FIGURES)):
            if not any(answers(page, n, *place) for place in page.evaluate(PLACES, n)): silent.append(n)
        assert not silent

    @pytest.mark.parametrize("name", [p for p in PAGES if re.search(r'"(sliders|updatemenus)"', (SITE/p).read_text(encoding="utf-8"))])
    def test_sliders_and_menus_change_what_is_shown(self, name, views):
        page, idle = views["light", 1280], []
        show(page, name)
        for n in range(page.evaluate(FIGURES)):
            for control in (drag_slider, choose_last):
                before = page.evaluate(SHOWN, n)
                if not control(page, page.locator("figure.plot").nth(n)): continue
                try: page.wait_for_function(f"([n, before]) => ({SHOWN})(n) !== before", arg=[n, before], timeout=3000)
                except TimeoutError: idle.append((n, control.__name__))
        assert not idle

    @pytest.mark.parametrize("wanted, page_name", [("flatten", "corpus/latex.html"), ("gradient noise", "model/noise"), ("Muennighoff", "study/scaling.html"), ("ZeRO", "model/")])
    def test_search_finds(self, wanted, page_name, views):
        page = views["light", 1280]
        page.goto((SITE/"search.html").as_uri() + f"?q={wanted}")
        page.wait_for_function("document.querySelectorAll('#search-results li a').length > 0")
        assert page.evaluate("n => [...document.querySelectorAll('#search-results li a')].slice(0, 10).some(a => a.href.includes(n))", page_name)
