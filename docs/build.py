#!/usr/bin/env python
"""Build the docs site from the notebooks, offline: `python docs/build.py --out _site`; README.md: `--readme`."""
import argparse, html, re, shutil, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import yaml
from arxiv_study.settings import StudyError, load_settings
from arxiv_study.workers import only_builder
from chapters import BuildError, Chapter, Links, execute, kept_scale, page, read_chapter
from readme import check_readme, write_readme

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("corpus", "tokens", "model", "study", "explore")
FAMILIES = ("study", "size", "data", "preprocessing", "tokenizer", "optimisation", "infrastructure")
MINIATURE_PAPERS = 200 # enough for every reason of the default configuration to occur
SMALL = ("runs/*/*/*/*.json", "runs/*/*/*/metrics.jsonl", "corpus/*/manifest.json", "corpus/*/ledger/*", "tokens/*/*.json", "tokens/*/papers.parquet")
LOCAL = ("settings.ini", "pyproject.toml", "runs", "README.md") # what notebooks may read, beside nbs/


def find_chapters(root:Path, # repository
                  only:str="*" # comma separated globs on file names or paths
                 )->list[Chapter]:
    "All notebooks that become pages, in reading order: nbs/, then the families of runs/."
    nbs = root/"nbs"
    files = [(f, nbs) for f in sorted(nbs.rglob("*.ipynb")) if f.relative_to(nbs).parts[0] in (*ROOMS, f.name)]
    files += [(f, root) for f in sorted((root/"runs").glob("*.ipynb"), key=lambda f: (*FAMILIES, f.stem).index(f.stem)) if f.name != "run.ipynb"]
    wanted = lambda f: any(fnmatch(f.relative_to(root).as_posix(), g) or fnmatch(f.stem, g) for g in only.split(","))
    found = [read_chapter(f, root, base) for f, base in files if ".ipynb_checkpoints" not in f.parts and wanted(f)]
    if not found: raise BuildError(f"No notebook under nbs/ matches {only}.")
    return found

def copy_tree(root:Path, work:Path):
    "Notebooks run in a copy, so that whatever they write beside themselves stays out of the repository."
    tree = work/"tree"
    shutil.rmtree(tree, ignore_errors=True)
    skip = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    shutil.copytree(root/"nbs", tree/"nbs", ignore=skip)
    for name in LOCAL:
        if (root/name).is_dir(): shutil.copytree(root/name, tree/name, ignore=skip)
        elif (root/name).exists(): shutil.copy2(root/name, tree/name)

def copy_results(root:Path, tree:Path):
    "What finished runs left in the workspace, without texts, shards and checkpoints: the run notebooks draw from it."
    workspace = load_settings(root/"settings.ini").workspace if (root/"settings.ini").exists() else root/"work"
    for f in (f for pattern in SMALL for f in workspace.glob(pattern)):
        target = tree/"work"/f.relative_to(workspace)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f, target)
    if (own := tree/"settings.ini").exists(): own.write_text(re.sub(r"^workspace\s*=.*$", "workspace = work", own.read_text(encoding="utf-8"), flags=re.M), encoding="utf-8")

def execute_all(chapters:list[Chapter], root:Path, work:Path, jobs:int, timeout_s:int)->dict[str, nbformat.NotebookNode]:
    "Executed notebooks by page; every failure is collected and named, not only the first."
    done, failures = {}, []
    def one(chapter):
        start = time.monotonic()
        try: done[chapter.page] = execute(chapter, root, work, timeout_s)
        except BuildError as e: failures.append(str(e))
        print(f"  {chapter.rel}  {time.monotonic() - start:.1f} s", flush=True)
    with ThreadPoolExecutor(jobs) as pool: list(pool.map(one, chapters))
    if failures: raise BuildError("\n".join(["These notebooks failed, so no site was written:", *sorted(failures)]))
    return done

def write_pages(chapters, executed, root:Path, site:Path):
    "One notebook a page, one index a room, and the root with the toctree."
    shutil.rmtree(site, ignore_errors=True)
    links = Links(chapters, root)
    for chapter in chapters:
        target = site/f"{chapter.page}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nb = page(chapter, executed[chapter.page], links)
        if (extra := contents(chapter, chapters, root)): nb.cells.append(nbformat.v4.new_markdown_cell(extra))
        nbformat.write(nb, target)
    for name, text in generated_pages(chapters, root, site.parent).items():
        (site/name).parent.mkdir(parents=True, exist_ok=True)
        (site/name).write_text(text, encoding="utf-8")

def contents(chapter:Chapter, chapters, root:Path)->str:
    "What an index page lists below its own text."
    if chapter.page == "index": return toctree(root_entries(chapters, root))
    room, _, name = chapter.page.rpartition("/")
    if chapter.page == "explore/index": return toctree([c.page.rpartition("/")[2] for c in chapters if c.page.startswith("explore/") and c is not chapter]) # it says itself what each is for
    return listing(room, chapters) if name == "index" else ""

def listing(room:str, chapters)->str:
    "The chapters of a room with their subtitles, and the toctree behind them."
    inside = [c for c in chapters if c.page.rpartition("/")[0] == room and not c.page.endswith("index")]
    names = [c.page.rpartition("/")[2] for c in inside]
    lines = [f"- [{c.title}]({n}.ipynb): {c.subtitle.rstrip('.')}." for c, n in zip(inside, names)]
    if room == "corpus":
        names.append("reasons")
        lines.append("- [Reasons](reasons.md): Why a paper is not in the corpus, one row a reason.")
    return "\n".join(["## Chapters" if lines else "", "", *lines, "", toctree(names)])

WRITTEN = ("clusters", "limits", "contributing") # pages that are not notebooks: docs/*.md

def root_entries(chapters, root:Path)->list[str]:
    rooms = [r for r in ROOMS if any(c.page.startswith(f"{r}/") for c in chapters)]
    if any((root/"runs").glob("R*.yaml")): rooms.append("runs")
    return [f"{r}/index" for r in rooms] + (["how_made"] if "runs" in rooms else []) + ["foundation", *WRITTEN]

def toctree(entries)->str: return "\n".join(["```{toctree}", ":hidden:", "", *entries, "```"]) if entries else ""

def generated_pages(chapters, root:Path, work:Path)->dict[str, str]:
    "Pages no notebook writes: index pages that are missing, the foundation, the table of reasons."
    have, pages = {c.page for c in chapters}, {}
    if "index" not in have: pages["index.md"] = f"# arxiv_study\n\n{toctree(root_entries(chapters, root))}\n"
    for entry in root_entries(chapters, root):
        room = entry.rpartition("/")[0]
        if room in ROOMS and entry not in have: pages[f"{entry}.md"] = f"# {room.capitalize()}\n\n{listing(room, chapters)}\n"
    if "runs/index" in root_entries(chapters, root) and "runs/index" not in have: pages["runs/index.md"] = runs_page(root, chapters)
    pages["foundation.md"] = (Path(__file__).parent/"foundation.md").read_text(encoding="utf-8") + "\n" + listing("", chapters)
    if "how_made" in root_entries(chapters, root): pages["how_made.md"] = how_made_page(root)
    for name in WRITTEN: pages[f"{name}.md"] = (Path(__file__).parent/f"{name}.md").read_text(encoding="utf-8")
    if any(c.page.startswith("corpus/") for c in chapters): pages["corpus/reasons.md"] = reasons_page(lost_in_miniature(work) if "corpus/pipeline" in have else None)
    return pages

def facts_table(rows:list[dict], # cells as text; `code` in backticks
                key:str # the column that gives a row its anchor
               )->str:
    "An HTML table with an anchor a row."
    cell = lambda v: re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(v)))
    head = "".join(f'<th scope="col">{html.escape(c.replace("_", " "))}</th>' for c in rows[0])
    body = [f'<tr id="{r[key]}">' + "".join(f"<td>{cell(f'`{v}`' if k == key else v)}</td>" for k, v in r.items()) + "</tr>" for r in rows]
    return "\n".join([f'<table class="facts"><thead><tr>{head}</tr></thead>', "<tbody>", *body, "</tbody></table>"])

def reasons_page(lost:dict|None # reason -> papers of the miniature, where it was counted
                )->str:
    "The ledger's whole vocabulary as the library defines it: docs and code can't drift."
    from arxiv_study.corpus.ledger import reasons_table
    rows = list(reasons_table().iter_rows(named=True))
    if lost is not None: rows = [{**r, "lost": lost.get(r["reason"], 0)} for r in rows]
    note = f"*Lost* counts papers of a generated miniature of {MINIATURE_PAPERS}, into which trouble is planted on purpose: it shows that a reason is found, not how common it is on arXiv." if lost is not None else ""
    return "\n\n".join(["# Reasons\n\n{.subtitle}\nWhy a paper is not in the corpus, one row a reason, as the ledger spells it.", note, facts_table(rows, "reason"), ""])

def lost_in_miniature(work:Path)->dict[str, int]:
    "The pipeline over a miniature arXiv, counted by reason; kept beside the executed notebooks."
    from arxiv_study.corpus.miniature import write_miniature
    from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus, open_ledger
    with TemporaryDirectory(dir=work) as folder:
        write_miniature(Path(folder)/"arxiv", n_papers=MINIATURE_PAPERS, seed=0, papers_per_tar=MINIATURE_PAPERS//2)
        ledger = open_ledger(build_corpus(Path(folder)/"arxiv", Path(folder)/"corpus", CorpusConfig(), workers=2)).lazy().collect()
    return dict(ledger.filter(ledger["fate"] == "dropped").group_by("reason").len().iter_rows())

def runs_page(root:Path, chapters)->str:
    "The run files as a table, then the notebooks that draw them."
    runs = [yaml.safe_load(f.read_text(encoding="utf-8")) for f in sorted((root/"runs").glob("R*.yaml"))]
    changed = lambda r: ", ".join(f"`{k}: {v}`" for k, v in (r["change"] or {}).items()) or "nothing: the baseline"
    rows = [{"run": r["id"], "family": r["family"], "question": r["question"], "compared_with": r["base"] or "", "change": changed(r)} for r in runs]
    head = "# Runs\n\n{.subtitle}\nTwenty-four runs in six families; each changes one thing against the run it is compared with."
    return "\n\n".join([head, listing("runs", chapters), facts_table(rows, "run"), ""])

def how_made_page(root:Path)->str:
    "The text of docs/how_made.md, and what the kept runs cost on which machine."
    text = (Path(__file__).parent/"how_made.md").read_text(encoding="utf-8")
    scale = kept_scale(root)
    return text + ("\n" + costs_of(root/"runs"/"results"/scale, scale) if scale else "")

def costs_of(folder:Path, scale:str)->str:
    "Seeds, tokens and minutes of each kept run, and the machines that made them."
    from arxiv_study.study.kept import read_kept
    kept, rows, middle = read_kept(folder), [], lambda values: sorted(values)[len(values)//2]
    for run in sorted({l["run"] for l in kept.lines}):
        done = [l["result"] for l in kept.lines if l["run"] == run and l["status"]["state"] == "done"]
        if not done: continue
        minutes = [r["time"]["total_s"]/60 for r in done]
        rows.append({"run": run, "seeds": len(done), "parameters": f"{done[0]['n_params']:,}", "tokens": f"{done[0]['tokens']:,}", "minutes, median": f"{middle(minutes):.1f}",
                     "tokens per second, median": f"{middle([r['tokens_per_s'] for r in done]):,.0f}", "most memory of a rank, GiB": f"{max(r['peak_rss_gib'] for r in done):.2f}"})
    machines = [{"machine": f"{n + 1}", "cores": p["environment"]["cores"], "memory, GiB": p["environment"]["memory_gib"], "system": p["environment"]["system"], "python": p["environment"]["python"],
                 "torch": p["environment"]["versions"]["torch"], "deepspeed": p["environment"]["versions"]["deepspeed"], "runs": len(p["runs"])} for n, p in enumerate(kept.about["pieces"])]
    total = sum(l["result"]["time"]["total_s"] for l in kept.lines if l["status"]["state"] == "done")/3600
    return "\n\n".join([f"## What the runs of {scale} scale cost", f"{sum(r['seeds'] for r in rows)} trainings took {total:.1f} hours of two processes, some of them beside other work: seconds are comparable within a run, not between runs.",
                        facts_table(rows, "run"), "They were made in these pieces:", facts_table(machines, "machine"), ""])

def run_sphinx(site:Path, out:Path, jobs:int):
    "Warnings are errors: a broken link or a skipped heading level fails the build."
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-b", "html", "-W", "--keep-going", "-j", str(jobs),
               "-c", str(Path(__file__).parent), "-d", str(out.parent/"doctrees"), str(site), str(out)]
    shutil.rmtree(out, ignore_errors=True)
    found = subprocess.run(command, text=True, stderr=subprocess.PIPE)
    if found.returncode: raise BuildError(f"Sphinx found something wrong:\n{found.stderr.replace(str(site) + '/', '').strip()}")

def mend_html(out:Path):
    "Accessible names that the theme leaves out: search button, folding rooms, empty header cells."
    for f in out.rglob("*.html"):
        text = f.read_text(encoding="utf-8")
        text = text.replace('title="Search" aria-label="Search" data-bs', 'aria-label="Search Ctrl+K" data-bs')
        text = re.sub(r'(<a [^>]*class="(?:current )?reference internal" href="[^"]*">)([^<]*)(</a>)<details([^>]*)><summary>', r'\1\2\3<details\4><summary aria-label="Chapters of \2">', text)
        text = re.sub(r"<th>\s*</th>", "<td></td>", text)
        f.write_text(text, encoding="utf-8")

def outside_requests(out:Path)->list[str]:
    "Pages that would load something from another host: there must be none."
    loads = re.compile(r'<(?:script|img|iframe|link|source|video|audio)\b[^>]*?\b(?:src|href)\s*=\s*["\']?(?:https?:)?//[^"\'> ]+', re.I)
    imports = re.compile(r'(?:@import\s+|url\(\s*)["\']?(?:https?:)?//[^"\')]+', re.I)
    found = [(f, m[0]) for f in sorted(out.rglob("*.html")) for m in loads.finditer(f.read_text(encoding="utf-8"))]
    found += [(f, m[0]) for f in sorted(out.rglob("*.css")) for m in imports.finditer(f.read_text(encoding="utf-8"))]
    return [f"{f.relative_to(out)}: {m}" for f, m in found]

def build(root:Path, # repository
          out:Path, # the site; replaced as a whole, or left alone when the build fails
          only:str="*", # globs of notebooks
          jobs:int=2, # kernels at a time
          timeout_s:int=180 # for one cell
         )->int: # pages
    "Execute, transform, render, check, and only then replace `out`."
    start, work = time.monotonic(), root/"_build"/"docs"
    copy_tree(root, work)
    copy_results(root, work/"tree")
    chapters = find_chapters(work/"tree", only)
    print(f"executing {len(chapters)} notebooks, {jobs} at a time", flush=True)
    executed = execute_all(chapters, root, work, jobs, timeout_s)
    print(f"rendering, {time.monotonic() - start:.0f} s so far", flush=True)
    write_pages(chapters, executed, root, work/"site")
    run_sphinx(work/"site", work/"html", jobs)
    mend_html(work/"html")
    if (outside := outside_requests(work/"html")): raise BuildError("\n".join(["Pages load from other hosts:", *outside]))
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work/"html", out)
    pages = len(list(out.rglob("*.html")))
    print(f"{pages} pages in {out}, {time.monotonic() - start:.0f} s: open {out/'index.html'}")
    return pages

def main(argv=None)->int:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--out", type=Path, default=Path("_site"), help="folder of the site (default _site)")
    cli.add_argument("--only", default="*", help="globs of notebooks, comma separated, for a quick look")
    cli.add_argument("--root", type=Path, default=ROOT, help="repository")
    cli.add_argument("--jobs", type=int, default=2, help="kernels at a time")
    cli.add_argument("--timeout", type=int, default=180, help="seconds for one cell")
    cli.add_argument("--readme", action="store_true", help="write README.md from nbs/index.ipynb and stop")
    cli.add_argument("--check-readme", action="store_true", help="fail when README.md differs from nbs/index.ipynb")
    a = cli.parse_args(argv)
    root = a.root.resolve()
    sys.path.insert(0, str(root)) # the library of the repository whose notebooks are shown
    try:
        if a.readme: write_readme(root)
        elif a.check_readme: check_readme(root)
        else:
            with only_builder(root/"_build"/"docs"): build(root, a.out.resolve(), a.only, a.jobs, a.timeout)
    except (BuildError, StudyError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
