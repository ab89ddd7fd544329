"""The corpus room against bounds and peers: `python -m benchmarks.corpus [ARXIV]`, an arXiv folder, else a miniature of 400 papers.

The engine first, on two cores by the clock; then all else on one core in processor seconds, the contestants taking turns.
Only the ratios mean something elsewhere. It takes about a quarter of an hour: the memory of the engine is measured on 10,000 papers."""
import contextlib, hashlib, io, json, os, random, re, sys, tarfile, tempfile, time
from pathlib import Path
import msgspec
from arxiv_study.corpus.archives import find_sources, read_source
from arxiv_study.corpus.latex import LatexRules, extract
from arxiv_study.corpus.main_file import find_main
from arxiv_study.corpus.metadata import MetadataRules, judge, read_snapshot
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.normalize import normalize
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus
from arxiv_study.corpus.quality import judge_text
from arxiv_study.storage import read_json, read_jsonl
from . import duplicates, engine, peers
from .interleaved import bars, medians, table, turns_by_item

# The least a cleaner can do: look at each character once, and stop where TeX means something.
SCAN = re.compile(r"%|\\(?:begin|end|input|include|verb|[a-zA-Z]+|.)|\$\$?|[{}]", re.S)
BOUND = "bare scan: one alternation over every character"
ARCHIVE_BYTES, TEX_BYTES = 9_547*500e6, 200e9 # of all arXiv: bulk tars of about 500 MB, mostly figures; TeX in them

def pin():
    "One core, so that nothing here profits from the other."
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def every(f, items):
    for item in items: f(item)

def turns(contestants, repeats=3): return medians(contestants, repeats, time.process_time)

def metadata(arxiv):
    snapshot = arxiv/"arxiv-metadata-oai-snapshot.json"
    lines, rules = snapshot.read_bytes().splitlines()*20, MetadataRules()
    with tempfile.TemporaryDirectory() as d: # twenty times the sample: long enough to be timed
        longer = Path(d)/"snapshot.json"
        longer.write_bytes(b"\n".join(lines))
        seconds = turns({"json.loads a line": lambda: every(json.loads, lines), "read_snapshot": lambda: every(bool, read_snapshot(longer)),
                         "read_snapshot and judge": lambda: [judge(r, rules) for r in read_snapshot(longer)],
                         "msgspec without a type": lambda: every(msgspec.json.decode, lines)})
        table(f"metadata: {len(lines):,} records, {longer.stat().st_size/1e6:.1f} MB", "MB/s", longer.stat().st_size/1e6, seconds, "json.loads a line")
    return [("metadata: read_snapshot, times json.loads a line", seconds["json.loads a line"]/seconds["read_snapshot"], 3)]

def text_of(source, **rules): return normalize(extract(source.files, LatexRules(**rules)).text)[0]

def from_folder(folder, **rules):
    files = {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*")) if p.is_file()}
    return normalize(extract(files, LatexRules(**rules)).text)[0]

def quiet(f, *args):
    "Run a peer without what it prints; whether it came to an end."
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try: f(*args)
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError): return False
    return True

def latex(sources, folders, n_mb):
    contestants = {BOUND: lambda i: [every(bool, SCAN.finditer(t)) for t in sources[i].files.values()],
                   "latex and normalize, macros kept": lambda i: text_of(sources[i]),
                   "the same, read from the peers' folders": lambda i: from_folder(folders[i]),
                   "latex and normalize, macros expanded": lambda i: text_of(sources[i], macros="expand")}
    if not peers.missing():
        contestants |= {"arxiv-to-prompt, macros kept": lambda i: peers.arxiv_to_prompt(folders[i]),
                        "arxiv-to-prompt, macros expanded": lambda i: peers.arxiv_to_prompt(folders[i], expand=True),
                        "arxiv-latex-cleaner": lambda i: quiet(peers.arxiv_latex_cleaner, folders[i])}
    seconds = turns_by_item(contestants, len(sources))
    table(f"TeX: {len(sources)} sources, {n_mb:.1f} MB", "MB/s", n_mb, seconds, BOUND)
    kept = seconds["latex and normalize, macros kept"]
    rows = [("latex and normalize, share of the bare scan (an aim)", seconds[BOUND]/kept, .7)]
    if peers.missing(): return rows
    return rows + [("latex and normalize, times arxiv-to-prompt", seconds["arxiv-to-prompt, macros kept"]/kept, 1),
                   ("the same, read from the peer's folders", seconds["arxiv-to-prompt, macros kept"]/seconds["the same, read from the peers' folders"], 1),
                   ("macros expanded, times arxiv-to-prompt with macros expanded", seconds["arxiv-to-prompt, macros expanded"]/seconds["latex and normalize, macros expanded"], 3),
                   ("latex and normalize, times arxiv-latex-cleaner", seconds["arxiv-latex-cleaner"]/kept, 8)]

def full_parse(sources, most_bytes=6_000):
    "A parser that builds a tree, on short papers only: its time grows faster than the text."
    short = [s for s in sources if sum(map(len, s.files.values())) < most_bytes][:40]
    if peers.missing() or not short: return
    n_mb = sum(len(t) for s in short for t in s.files.values())/1e6
    bodies = [t for s in short for t in s.files.values()]
    seconds = medians({"pylatexenc, to Unicode text": lambda: [quiet(peers.pylatexenc, t) for t in bodies], "latex and normalize, macros kept": lambda: every(text_of, short)}, 0, time.process_time)
    table(f"a full parse, of the {len(short)} shortest sources", "MB/s", n_mb, seconds, "pylatexenc, to Unicode text")

def faithful(arxiv, ids, sources, folders):
    "Main files against the labels, and what a peer loses; where the folder has labels."
    labels = {t["id"]: t for t in read_jsonl(arxiv/"truth.jsonl")} if (arxiv/"truth.jsonl").exists() else {}
    labelled = [(s, f, labels[i]["main"]) for i, s, f in zip(ids, sources, folders) if labels.get(i, {}).get("main") and s.container == "tar-gz"]
    if not labelled: return
    several = [(s, f, m) for s, f, m in labelled if len(s.files) > 1]
    print(f"\nthe main file, of {len(labelled)} labelled archives ({len(several)} with several files)")
    finders = {"find_main": lambda s, f: find_main(s.files)[0]} | ({} if peers.missing() else {"arxiv-to-prompt": lambda s, f: peers.arxiv_to_prompt_main(f)})
    for name, find in finders.items():
        print(f"  {name:58} {sum(find(s, f) == m for s, f, m in labelled):5} right, of several {sum(find(s, f) == m for s, f, m in several)}")

def hostile(n_mb=2):
    "What has no structure: the time for four times as much, which should be four times as long."
    heaps = ["{", "}", "$", "\\", "%", "\\begin{a}", "\\input{", "\\caption{", "\\iffalse ", "\\verb|", "\\def\\a{", "\\a", "[", "x", "\\begin{figure}", "\\[", "$$", "\\if\n"]
    print(f"\nheaps of one thing, {n_mb} and {4*n_mb} MB through latex, normalize and quality, macros expanded")
    worst = 0
    for heap in heaps:
        seconds = []
        for n in (n_mb, 4*n_mb):
            text = "\\documentclass{article}\\begin{document}" + heap*int(n*1e6/len(heap))
            start = time.process_time()
            judge_text(normalize(extract({"a.tex": text}, LatexRules(macros="expand")).text)[0])
            seconds.append(time.process_time() - start)
        worst = max(worst, seconds[1]/max(seconds[0], .05))
        print(f"  {heap!r:20} {seconds[0]:6.2f} s {seconds[1]:6.2f} s   {seconds[1]/max(seconds[0], .001):5.1f} times", flush=True)
    return [("hostile input: 8 over the growth for four times as much", 8/worst, 1)]

def figures_tar(path, n_papers=20, figure_bytes=5_000_000):
    "A bulk tar as most of arXiv is: a page of TeX, and figures of which half compress (numbers in PostScript) and half do not."
    rng = random.Random(0)
    with tarfile.open(path, "w") as bulk:
        for n in range(n_papers):
            e_print = io.BytesIO()
            with tarfile.open(fileobj=e_print, mode="w:gz", compresslevel=6) as tar:
                for name, data in (("main.tex", b"\\documentclass{article}\\begin{document}A page.\\end{document}"), ("a.pdf", b"%PDF-1.5\n" + rng.randbytes(figure_bytes)),
                                   ("b.eps", b"%!PS\n" + b" ".join(b"%d %d lineto\n" % (rng.randrange(10_000), rng.randrange(10_000)) for _ in range(figure_bytes//8)))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            member = tarfile.TarInfo(f"2301/2301.{n:05d}.gz")
            member.size = e_print.tell()
            e_print.seek(0)
            bulk.addfile(member, e_print)

def stages(payloads, sources, n_mb):
    texts = [e.text for e in (extract(s.files) for s in sources) if e.text]
    clean = []
    for t in texts:
        held = []
        clean.append((normalize(t, held=held)[0], held))
    with tempfile.TemporaryDirectory() as d:
        bulk = Path(d)/"src"/"arXiv_src_2301_001.tar"
        bulk.parent.mkdir()
        figures_tar(bulk)
        (sources_of_tar,) = find_sources(Path(d))
        seconds = turns({"figures": lambda: [read_source(payload) for _, payload in sources_of_tar.sources()], "MD5 of the tar": lambda: hashlib.md5(bulk.read_bytes(), usedforsecurity=False).digest()})
        raw_mb = bulk.stat().st_size/1e6
    table("archives that are mostly figures: every byte read and inflated", "MB/s of tar", raw_mb, seconds, "figures")
    table("stages, each by itself", "MB/s of TeX", n_mb, turns({"archives": lambda: every(read_source, payloads), "latex": lambda: [extract(s.files) for s in sources],
          "normalize": lambda: every(normalize, texts), "quality": lambda: [judge_text(t, held=held) for t, held in clean]}), "latex")
    return raw_mb/(seconds["figures"] + seconds["MD5 of the tar"])

def whole(arxiv, n_mb, archive_mb_per_s):
    def build():
        with tempfile.TemporaryDirectory() as d: return read_json(build_corpus(arxiv, Path(d)/"corpus", CorpusConfig(), workers=1)/"manifest.json")["cpu_s"]
    cpu_s = [build() for _ in range(2)][1]
    print("\nthe corpus stage from tars to Parquet, one worker, processor seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in cpu_s.items()) + f"; {n_mb/cpu_s['all']:.1f} MB/s of TeX")
    archive_h, tex_h = ARCHIVE_BYTES/1e6/archive_mb_per_s/3600, TEX_BYTES/1e6/(n_mb/cpu_s["all"])/3600
    print(f"\nall of arXiv, extrapolated: {archive_h:.1f} core-hours for {ARCHIVE_BYTES/1e12:.2f} TB of archives and {tex_h:.1f} for {TEX_BYTES/1e9:.0f} GB of TeX: {archive_h + tex_h:.0f} core-hours")

def main(arxiv=None):
    peers.quietly()
    if peers.missing(): print(f"without {', '.join(peers.missing())}, which the extra `bench` installs")
    with tempfile.TemporaryDirectory() as d:
        if arxiv is None:
            arxiv = Path(d)/"arxiv"
            write_miniature(arxiv, 400)
        arxiv = Path(arxiv)
        asked = engine.speed_up(arxiv, Path(d)/"engine") + engine.memory(Path(d)/"engine")
        pin()
        payloads = [(i, p) for s in find_sources(arxiv) for i, p in s.sources()]
        ids, sources = zip(*[(i, s) for i, s in ((i, read_source(p)) for i, p in payloads) if s.files])
        n_mb = sum(len(t.encode()) for s in sources for t in s.files.values())/1e6
        folders = [Path(d)/"sources"/i.replace("/", "_") for i in ids]
        for s, folder in zip(sources, folders): peers.lay_out(s.files, folder)
        asked += metadata(arxiv) + latex(sources, folders, n_mb)
        full_parse(sources)
        faithful(arxiv, ids, sources, folders)
        asked += hostile() + duplicates.compare(list(map(text_of, sources)))
        whole(arxiv, n_mb, stages([p for _, p in payloads], sources, n_mb))
        bars("what was asked for", asked)

if __name__ == "__main__":
    from benchmarks import corpus # workers import what they run, and `__main__` is no name for it
    corpus.main(*sys.argv[1:2])
