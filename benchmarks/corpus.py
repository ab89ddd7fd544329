"""The corpus room on one core: `python -m benchmarks.corpus [ARXIV]`, an arXiv folder, else a miniature of 400 papers."""
import json, os, re, sys, tempfile
from pathlib import Path
import msgspec
from arxiv_study.corpus.archives import find_sources, read_source
from arxiv_study.corpus.latex import LatexRules, extract
from arxiv_study.corpus.metadata import MetadataRules, judge, read_snapshot
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.normalize import normalize
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus
from arxiv_study.corpus.quality import judge_text
from .interleaved import medians, table

# The least a cleaner can do: look at each character once, and stop where TeX means something.
SCAN = re.compile(r"%|\\(?:begin|end|input|include|verb|[a-zA-Z]+|.)|\$\$?|[{}]", re.S)

def pin():
    "One core, so that nothing here profits from the other."
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def every(f, items):
    for item in items: f(item)

def metadata(arxiv):
    snapshot = arxiv/"arxiv-metadata-oai-snapshot.json"
    lines, rules = snapshot.read_bytes().splitlines(), MetadataRules()
    contestants = {"json.loads a line": lambda: every(json.loads, lines),
                   "read_snapshot": lambda: every(bool, read_snapshot(snapshot)),
                   "read_snapshot and judge": lambda: [judge(r, rules) for r in read_snapshot(snapshot)],
                   "msgspec without a type": lambda: every(msgspec.json.decode, lines)}
    table(f"metadata: {len(lines):,} records, {snapshot.stat().st_size/1e6:.1f} MB", "MB/s", snapshot.stat().st_size/1e6, medians(contestants), "json.loads a line")

def latex(arxiv):
    payloads = [payload for source in find_sources(arxiv) for _, payload in source.sources()]
    sources = [s for s in map(read_source, payloads) if s.files]
    n_mb = sum(len(t.encode()) for s in sources for t in s.files.values())/1e6
    texts = [e.text for e in (extract(s.files) for s in sources) if e.text]
    clean = [normalize(t)[0] for t in texts]
    contestants = {"bare scan: one alternation over every character": lambda: [every(bool, SCAN.finditer(t)) for s in sources for t in s.files.values()],
                   "open the archives": lambda: every(read_source, payloads),
                   "latex and normalize, macros kept": lambda: [normalize(extract(s.files).text) for s in sources],
                   "latex and normalize, macros expanded": lambda: [normalize(extract(s.files, LatexRules(macros="expand")).text) for s in sources],
                   "quality": lambda: every(judge_text, clean)}
    table(f"TeX: {len(sources)} sources, {n_mb:.1f} MB", "MB/s", n_mb, medians(contestants, 3), "bare scan: one alternation over every character")
    return n_mb

def stage(arxiv, n_mb):
    def build():
        with tempfile.TemporaryDirectory() as d: build_corpus(arxiv, Path(d)/"corpus", CorpusConfig(), workers=1)
    table("the corpus stage from tars to Parquet, one worker, all of it", "MB/s of TeX", n_mb, medians({"build_corpus": build}, 2), "build_corpus")

def main(arxiv=None):
    pin()
    with tempfile.TemporaryDirectory() as d:
        if arxiv is None:
            arxiv = Path(d)/"arxiv"
            write_miniature(arxiv, 400)
        metadata(Path(arxiv))
        stage(Path(arxiv), latex(Path(arxiv)))

if __name__ == "__main__": main(*map(Path, sys.argv[1:2]))
