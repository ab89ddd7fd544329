"""Against other programs (extra bench): what they keep we keep, and what we cut beyond them is named by a rule."""
import re
from collections import Counter
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from arxiv_study.corpus.archives import find_sources, read_source
from arxiv_study.corpus.latex import LatexRules, extract
from arxiv_study.corpus.main_file import find_main
from arxiv_study.storage import read_jsonl
from benchmarks import peers

pytestmark = pytest.mark.peer
REAL = Path(__file__).parents[1].parent/"shared"/"arxiv"
KEEP_ALL = LatexRules(**{f.name: "keep" for f in fields(LatexRules) if f.default in ("remove", "caption") and f.name not in ("comments", "preamble")})
WORD = re.compile(r"[a-zA-Z]{4,}")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "Sources of the sample with their folders and labels."
    if find_spec("arxiv_to_prompt") is None: pytest.skip("the package arxiv-to-prompt is not installed (extra bench)")
    if not REAL.is_dir(): pytest.skip(f"no real sources at {REAL}")
    peers.quietly()
    labels, found = {t["id"]: t for t in read_jsonl(REAL/"truth.jsonl")}, []
    for sources in find_sources(REAL):
        for paper_id, payload in sources.sources():
            source, folder = read_source(payload), tmp_path_factory.mktemp("source")
            if not source.files: continue
            peers.lay_out(source.files, folder)
            found.append((source, folder, labels[paper_id].get("main") if source.container == "tar-gz" else None))
    return found


def test_the_labelled_main_file_is_found_where_a_peer_fails(real):
    labelled = [(s, f, main) for s, f, main in real if main]
    ours = sum(find_main(s.files)[0] == main for s, _, main in labelled)
    theirs = sum(peers.arxiv_to_prompt_main(f) == main for _, f, main in labelled)
    assert ours == len(labelled) >= 250 and theirs < ours


def test_words_that_a_peer_keeps_are_kept(real):
    "Of the words after \\begin{document}, with all policies on keep; what is cut beyond the peer stands after \\endinput, or in a branch not taken."
    words, lost, papers = 0, 0, 0
    for source, folder, _ in real:
        if peers.arxiv_to_prompt_main(folder) != find_main(source.files)[0]: continue
        theirs = peers.arxiv_to_prompt(folder)
        begin = re.search(r"\\begin\s*\{document\}", theirs)
        if not begin: continue
        made = extract(source.files, replace(KEEP_ALL, comments="keep")) # the peer leaves some comments in
        theirs, ours = Counter(WORD.findall(theirs[begin.end():])), Counter(WORD.findall(made.text))
        if not {"after_endinput", "conditionals", "iffalse"} & set(made.removed):
            words, lost, papers = words + sum(theirs.values()), lost + sum((theirs - ours).values()), papers + 1
    assert papers > 200 and words > 1_000_000 and lost < words/5_000, (lost, words)


pieces = st.lists(st.sampled_from(["alpha", "beta ", "\\%", "%", "\n", " ", "$x$", "\\alpha "]), max_size=40).map("".join)

@given(pieces)
@settings(max_examples=300, deadline=None)
def test_comments_are_what_the_cleaner_says_they_are(body):
    cleaner = pytest.importorskip("arxiv_latex_cleaner.arxiv_latex_cleaner", reason="the package arxiv-latex-cleaner is not installed (extra bench)")
    theirs = " ".join(cleaner._remove_comments_inline(line + "\n") for line in body.split("\n"))
    ours = extract({"a.tex": f"\\documentclass{{a}}\\begin{{document}}\n{body}\n\\end{{document}}"}, KEEP_ALL).text
    words = lambda text: "".join(re.findall(r"alpha|beta|\\%|\$x\$", text))
    assert words(ours) == words(theirs)
