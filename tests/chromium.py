"""Pages of the system's Chromium, driven by Playwright, which watch what they ask for and what they complain about."""
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium()->str|None: # path of a Chromium, or None
    return next((p for p in map(shutil.which, NAMES) if p), None)


@dataclass
class Watch:
    "What a page asked for, and what it complained about: errors of its console, exceptions, requests that failed."
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def follow(self, page:Page):
        page.on("request", lambda r: self.requests.append(r.url))
        page.on("requestfailed", lambda r: self.complaints.append(f"{r.url} failed: {r.failure}"))
        page.on("pageerror", lambda e: self.complaints.append(str(e)))
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("dialog", lambda d: d.accept()) # may the page be left? it may

    def clear(self): self.requests.clear(), self.complaints.clear()

    def asked_of_others(self)->list[str]: # requests that left the machine's own files
        return [r for r in self.requests if not r.startswith(("file:", "data:", "blob:"))]


@contextmanager
def chromium():
    "A browser for as long as the block lasts, with all that it started."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_chromium())
        try: yield browser
        finally: browser.close()


def watched_page(browser, width:int=1400, height:int=1000, **context)->Page: # `page.watch` follows it
    "A page in a context of its own; `color_scheme`, `has_touch` and the like are Playwright's."
    page = browser.new_context(viewport=dict(width=width, height=height), **context).new_page()
    page.watch = Watch()
    page.watch.follow(page)
    return page
