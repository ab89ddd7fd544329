"""The metadata snapshot and what rules cost: real records, planted statements, memory and speed, the yield table against its ledger."""
import json, re, statistics, subprocess, sys, tempfile, time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from itertools import product
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from arxiv_study.corpus.ledger import Reason
from arxiv_study.corpus.metadata import (MetadataRules, Record, broken_rules, categories_of, is_licensed, is_studied, is_withdrawn, judge, month_of,
                                         read_snapshot, year_of)
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus, open_ledger
from arxiv_study.corpus.yields import cost_of_changes, metadata_rules_of, parts_of, rejudged, what_if, what_if_figure, with_menu, year_floor_figure, yield_bars, yield_sankey
from arxiv_study.settings import StudyError

SHARED = Path(__file__).parents[1].parent/"shared"/"arxiv"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample of real sources, ../shared/arxiv, is absent")
SNAPSHOT = "arxiv-metadata-oai-snapshot.json"

@pytest.fixture(scope="module")
def records():
    "All records of the sample."
    return list(read_snapshot(SHARED/SNAPSHOT))

@pytest.fixture(scope="module")
def real(records):
    "Those that are arXiv's own: the sample's sources have ids of 9901 to 9906, a range arXiv never used."
    return [r for r in records if not re.match(r"990[1-6]\.", r.id)]


# Reading

@needs_shared
def test_every_field_is_what_json_reads(records):
    plain = [json.loads(line) for line in (SHARED/SNAPSHOT).read_bytes().splitlines()]
    assert len(plain) == len(records) == 1457
    for p, r in zip(plain, records):
        for name in ("id", "title", "comments", "categories", "license", "abstract", "update_date"): assert getattr(r, name) == p[name], (p["id"], name)
        assert [v.created for v in r.versions] == [v["created"] for v in p["versions"]]

text = st.text(st.characters(codec="utf-8"), max_size=60)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"id": text, "title": st.none() | text, "comments": st.none() | text, "padding": st.integers(0, 40_000)}), min_size=1, max_size=40),
       st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_any_text_survives_the_blocks(tmp_path_factory, made, escaped, end):
    path = tmp_path_factory.getbasetemp()/"any-text.json"
    lines = [json.dumps({**m, "authors": "x"*m.pop("padding")}, ensure_ascii=escaped) for m in (dict(m) for m in made)]
    path.write_bytes(end.join(lines).encode())
    assert [(r.id, r.title, r.comments) for r in read_snapshot(path)] == [(m["id"], m["title"], m["comments"]) for m in made]

@pytest.mark.parametrize("at", [0, 1, 999, 2999])
def test_a_bad_line_is_named_wherever_it_is(tmp_path, at):
    lines = [json.dumps({"id": f"{i}", "abstract": "word "*60}) for i in range(3000)]
    lines[at] = lines[at][:40]
    (tmp_path/SNAPSHOT).write_text("\n".join(lines))
    with pytest.raises(StudyError, match=rf"line {at + 1} is not"): list(read_snapshot(tmp_path/SNAPSHOT))

def test_a_file_without_lines_does_not_fill_the_memory(tmp_path):
    with open(tmp_path/SNAPSHOT, "wb") as f: f.truncate(1<<30) # sparse: a gigabyte of zero bytes
    with pytest.raises(StudyError, match="line 1 is not"): list(read_snapshot(tmp_path/SNAPSHOT))

MEASURE = """
import resource, sys
from arxiv_study.corpus.metadata import MetadataRules, broken_rules, read_snapshot
n = sum(1 for r in read_snapshot(sys.argv[1]) if broken_rules(r, MetadataRules(min_year=2005, licence_policy="cc")) is not None)
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(n, peak)
"""

def longer(path, source, n):
    "A snapshot of n records, those of the source again and again under other ids."
    lines = source.splitlines(keepends=True)
    with open(path, "wb") as f:
        for i in range(n): f.write(re.sub(rb'"id": "[^"]*"', b'"id": "%04d.%05d"' % (1000 + i//100_000, i % 100_000), lines[i % len(lines)], count=1))

@pytest.mark.slow
@needs_shared
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_snapshot(tmp_path):
    source, peaks = (SHARED/SNAPSHOT).read_bytes(), {}
    for n in (10_000, 200_000):
        longer(tmp_path/"snapshot.json", source, n)
        counted, kib = map(int, subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path/"snapshot.json")], capture_output=True, text=True, check=True).stdout.split())
        assert counted == n
        peaks[n] = kib
    assert peaks[200_000] - peaks[10_000] < 8192, peaks # 280 MB more to read

@pytest.mark.slow
@needs_shared
def test_three_times_as_fast_as_json(tmp_path):
    path = tmp_path/"snapshot.json"
    longer(path, (SHARED/SNAPSHOT).read_bytes(), 30_000)
    lines, rules, seconds = path.read_bytes().splitlines(), MetadataRules(), {}
    def every(f, items):
        for item in items: f(item)
    for _ in range(5):
        for name, f in (("json", lambda: every(json.loads, lines)), ("read", lambda: every(bool, read_snapshot(path))), ("judge", lambda: every(lambda r: judge(r, rules), read_snapshot(path)))):
            start = time.process_time()
            f()
            seconds.setdefault(name, []).append(time.process_time() - start)
    ratio = lambda name: statistics.median(seconds["json"])/statistics.median(seconds[name])
    assert ratio("read") >= 3, seconds
    assert ratio("judge") >= 1.3, seconds # all rules included


# Dates, ids and categories

@needs_shared
def test_years_agree_with_the_standard_library(records):
    for r in records:
        assert year_of(r) == parsedate_to_datetime(r.versions[0].created).year, r.id
        assert month_of(r.id) in r.id, r.id

@needs_shared
def test_categories_are_wholes(real):
    whole = re.compile(r"(?:^|\s)(?:math\.[A-Z]{2}|math-ph|cs\.[A-Z]{2}|hep-th|hep-ph|quant-ph|stat\.(?:ML|TH)|alg-geom|q-alg|dg-ga|funct-an|cmp-lg)(?=\s|$)")
    assert [r.id for r in real if is_studied(categories_of(r)) != bool(whole.search(r.categories))] == []
    parts = ("math", "cs", "hep-th", "hep-ph", "quant-ph", "stat")
    assert (sum(any(p in r.categories for p in parts) for r in real), sum(is_studied(categories_of(r)) for r in real)) == (675, 540) # what the chapter says
    old = {r.id: r for r in real if r.categories.split()[0] in ("alg-geom", "funct-an")}
    assert sorted(old) == ["alg-geom/9202001", "alg-geom/9311008", "funct-an/9301001"]
    assert all(is_studied(categories_of(r), match="primary") for r in old.values())

@pytest.mark.parametrize("categories", ["physics.acc-ph", "math", "cs", "mathx.AG", "stat.ME", "hep-theory", "xhep-th", "physics.hep-th", "econ.TH", "", "eess.SY", "nlin.CD chao-dyn"])
def test_lookalikes_are_not_studied(categories):
    assert is_studied(categories.split()) == (categories in ("math", "cs")) # a bare archive is all its classes

def test_missing_fields_break_rules_and_nothing_else():
    strict = MetadataRules(min_year=1991, licence_policy="cc", abstract_language="en")
    assert broken_rules(Record("x"), strict) == [Reason.no_studied_category, Reason.before_year, Reason.licence, Reason.abstract_too_short]
    assert broken_rules(Record("hep-th/9901001", categories=["hep-th"]), strict, has_source=True) == [Reason.licence]


# Withdrawn

WITHDRAWN = """This paper has been withdrawn
This paper has been withdrawn by the author due to a crucial sign error in equation (3)
Withdrawn.
withdrawn
paper withdrawn
Paper Withdrawn by Author
This submission has been withdrawn by arXiv administrators because it contains fictitious content
This article has been removed by arXiv administrators because the submitter did not have the rights
This manuscript has been temporarily withdrawn by the authors
The paper has been withdrawn due to an error in the proof of Theorem 1.2
Our paper is withdrawn, see comments
12 pages, 3 figures. This paper has been withdrawn by the authors
12 pages; withdrawn by the author because of an error in section 3
15 pages, 2 figures, withdrawn
20 pages (withdrawn)
LaTeX, 4 pages, paper withdrawn pending further work
v2: withdrawn due to an error in Lemma 4
Please note that this paper has been withdrawn
We have withdrawn this paper
I withdraw this paper since the main theorem is wrong
The author has withdrawn the paper due to a gap
The authors are withdrawing this manuscript
This preprint is hereby withdrawn
This work has been retracted by the authors
Retracted because of an error in the simulation code
We retract this paper
This has been withdrawn by the author
This note was withdrawn since the result is known
This e-print has now been withdrawn
Withdrawn from arXiv by the author""".splitlines()

IN_PASSING = """12 pages
12 pages; the claim about the case n=2 in v1 was withdrawn
Supersedes the withdrawn paper math/0102001
Replaces math/0102001, withdrawn
Replaces our earlier preprint arXiv:0704.0156, withdrawn by the authors
An earlier version of this paper was withdrawn
The previous version has been withdrawn
This paper was withdrawn from J. Algebra and submitted elsewhere
Withdrawn from PRL, now in PRA
Comment on the withdrawn paper hep-th/9901001
withdrawn lemma 3 replaced by a corrected one
Section 4 withdrawn
Theorem 2 has been withdrawn, the rest is unchanged
Theorem 2, withdrawn, is replaced
The companion paper, withdrawn in 2004, had a gap
We discuss money withdrawn from banks
The needle is withdrawn by a motor; 6 figures
9 pages, control rods withdrawn by hand in the experiment of Section 2
A counterexample to a withdrawn preprint
Part II, withdrawn, will be rewritten
Smooth neighbourhood retracts; 12 pages
On retracted articles and their citations
Uses data of the retracted study [3]
A remark on a paper that was withdrawn by its author
Removed a wrong remark; 12 pages
Removed by request: Figure 3
No part of this paper is withdrawn""".splitlines()

@pytest.mark.parametrize("comments", WITHDRAWN)
def test_a_statement_about_this_paper_counts(comments): assert is_withdrawn(comments) and is_withdrawn("  " + comments.replace(" ", "\n  ", 2)), comments

@pytest.mark.parametrize("comments", IN_PASSING)
def test_the_word_in_passing_does_not(comments): assert not is_withdrawn(comments), comments

def test_an_abstract_counts_where_it_opens_with_the_statement():
    assert is_withdrawn(None, "  This paper has been withdrawn by the authors\ndue to an error.\n")
    assert not is_withdrawn(None, "We study the spectrum. This paper has been withdrawn by the authors of [1].")
    assert not is_withdrawn(None, "A retract of a polytope is withdrawn. ")

@needs_shared
def test_withdrawn_among_real_records(records):
    "Each record of the sample that has one of the words in it was looked at: these eleven are withdrawn."
    words = {r.id for r in records if re.search(r"(?i)withdr|retract", f"{r.title} {r.comments} {r.abstract}")}
    topology = {"0704.0342", "0704.0989"} # deformation retracts; local retractions of groups
    found = {r.id for r in records if is_withdrawn(r.comments, r.abstract)}
    assert found == words - topology and len(found) == 11

@settings(max_examples=200, deadline=None)
@given(text, text)
def test_no_text_is_too_odd(comments, abstract): assert is_withdrawn(comments, abstract) in (True, False)

def test_long_comments_take_no_time():
    start = time.process_time()
    for heap in ("withdrawn ", "this paper has been ", "the authors have have ", "(", ", withdrawn lemma", "note that "): is_withdrawn(heap*20_000 + "withdr", heap*20_000)
    assert time.process_time() - start < 5


# Licences and languages

@needs_shared
def test_licences_of_real_records(real):
    count = lambda policy: sum(is_licensed(r.license, policy) for r in real)
    assert (len(real), count("any"), count("cc"), count("redistributable")) == (1130, 1130, 15, 10) # 1,022 without, 93 for arXiv alone, 5 of the 15 without derivatives

@needs_shared
def test_no_real_abstract_is_taken_for_foreign(records, real):
    english = MetadataRules(abstract_language="en")
    foreign = {r.id for r in records if Reason.abstract_not_english in broken_rules(r, english)}
    assert foreign & {r.id for r in real} == set()
    german = {"9903.00036", "9903.00037", "9903.00038", "9903.00039", "9903.00040", "9903.00045", "9903.00046", "9903.00047"}
    no_prose = {"9901.00021", "9901.00022", "9902.00060", "9906.00008"} # names of files, nothing else
    assert foreign == german | no_prose | {"9906.00010"} # Lorem ipsum

FOREIGN = ["Nous étudions les groupes de cohomologie d'une variété projective lisse sur un corps fini et nous démontrons qu'ils sont nuls.",
           "Wir untersuchen die Kohomologiegruppen einer glatten projektiven Varietät über einem endlichen Körper und zeigen, dass sie verschwinden.",
           "Estudiamos los grupos de cohomología de una variedad proyectiva lisa sobre un cuerpo finito y demostramos que son nulos.",
           "Мы изучаем группы когомологий гладкого проективного многообразия над конечным полем и доказываем, что они равны нулю.",
           "Studiamo i gruppi di coomologia di una varietà proiettiva liscia su un campo finito e dimostriamo che sono nulli.",
           "我们研究有限域上光滑射影簇的上同调群，并证明它们在所有正次数中都为零，从而推广了前人关于曲线与曲面的若干结果，还给出一个反例说明光滑性条件不可去掉。"]

@pytest.mark.parametrize("abstract", FOREIGN)
def test_foreign_abstracts_are_caught(abstract):
    rules = MetadataRules(abstract_language="en", min_abstract_words=0)
    assert broken_rules(Record("x", categories="math.AG", abstract=abstract), rules) == [Reason.abstract_not_english]
    assert broken_rules(Record("x", categories="math.AG", abstract=abstract), replace(rules, abstract_language=None)) == []


# Rules together

@needs_shared
def test_the_verdict_is_the_first_rule_broken(records):
    for year, policy, short in product((None, 2005), ("any", "cc"), ("source_decides", "drop")):
        rules = MetadataRules(min_year=year, licence_policy=policy, short_abstract=short)
        for r in records[::3]:
            for has_source in (False, True): assert judge(r, rules, has_source) == next(iter(broken_rules(r, rules, has_source)), None)


# What rules cost

@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    "A miniature arXiv and what was made of it by the default rules, and with a floor for the year."
    folder = tmp_path_factory.mktemp("yield")
    write_miniature(folder/"arxiv", n_papers=160, seed=8, papers_per_tar=20)
    build = lambda name, **change: build_corpus(folder/"arxiv", folder/name, CorpusConfig(**change), workers=1)
    return folder/"arxiv", build("whole"), build("late", min_year=2012)

def past_metadata(ledger): return {i for i, stage, box in ledger.select("id", "stage", "container").iter_rows() if stage != "metadata" and box is not None}

def test_in_order_is_the_ledger(miniature):
    arxiv, *corpora = miniature
    for corpus in corpora:
        counts = dict(open_ledger(corpus)["reason"].drop_nulls().value_counts().iter_rows())
        table = what_if(arxiv, corpus)
        assert dict(table.filter(pl.col("papers_in_order") > 0).select("rule", "papers_in_order").iter_rows()) == counts
        assert (table["papers_alone"] >= table["papers_in_order"]).all() and (table["papers_back"] <= table["papers_alone"]).all()

def test_what_would_come_back_comes_back(miniature):
    "The corpus without the rule is made, and compared."
    arxiv, whole, late = miniature
    row = what_if(arxiv, late).filter(pl.col("rule") == "before_year").row(0, named=True)
    without, with_it = open_ledger(whole), open_ledger(late)
    back = past_metadata(without) - past_metadata(with_it)
    assert row["papers_back"] == len(back) > 20
    gained = without.filter(pl.col("id").is_in(list(back)))["text_bytes"].sum()
    assert abs(row["text_bytes_back"]/gained - 1) < .25, row # an estimate, from the bytes of unopened archives

def test_a_rule_foreseen_is_a_rule_made(miniature):
    "What a floor for the year would cost, foreseen from the corpus without it, is what it does cost."
    arxiv, whole, late = miniature
    rules = replace(metadata_rules_of(whole), min_year=2012)
    row = cost_of_changes(arxiv, whole, {"late": rules}).row(0, named=True)
    early = open_ledger(whole).filter((pl.col("fate") == "kept") & (pl.col("year") < 2012))
    assert (row["papers_lost"], row["text_bytes_lost"], row["papers_back"]) == (len(early), early["text_bytes"].sum(), 0)
    assert rejudged(arxiv, whole, rules=rules).filter(pl.col("stage") == "metadata")["first"].null_count() == 0
    stopped = open_ledger(late).filter(pl.col("stage") == "metadata").select("id", "reason")
    foreseen = rejudged(arxiv, whole, rules=rules).filter(pl.col("first").is_in(stopped["reason"].unique().to_list())).select("id", reason="first")
    assert foreseen.sort("id").equals(stopped.sort("id"))

@pytest.mark.parametrize("by", ["domain", "year", "container"])
def test_parts_add_up(miniature, by):
    arxiv, whole, _ = miniature
    columns = ["papers_alone", "papers_in_order", "papers_back", "text_bytes_alone", "text_bytes_in_order", "text_bytes_back"]
    parts = what_if(arxiv, whole, by=by).group_by("rule").agg(pl.col(columns).sum()).sort("rule")
    assert parts.equals(what_if(arxiv, whole).select("rule", *columns).sort("rule"))

def test_worth_is_tokens_where_there_are_tokens(miniature, tmp_path):
    arxiv, whole, _ = miniature
    ledger = open_ledger(whole)
    made = ledger.filter(pl.col("fate") == "kept").select("id", n_tokens=pl.col("text_bytes")*2) # planted: two tokens a byte
    made.write_parquet(tmp_path/"papers.parquet")
    papers, as_bytes = rejudged(arxiv, whole, tmp_path), rejudged(arxiv, whole)
    assert (papers["worth"] - 2*as_bytes["worth"]).abs().max() <= 1 # rounding
    assert papers.filter(pl.col("basis") == "measured")["id"].to_list() == made["id"].to_list()
    assert "tokens_back" in what_if(arxiv, whole, tmp_path).columns

def test_figures_say_what_the_tables_say(miniature):
    arxiv, whole, _ = miniature
    ledger, papers = open_ledger(whole), rejudged(arxiv, whole)
    for figure in (what_if_figure(papers), year_floor_figure(ledger), yield_bars(ledger), with_menu({n: yield_sankey(p) for n, p in parts_of(ledger, "domain").items()})):
        assert figure.layout.title.text and figure.layout.meta["alt"].endswith(".")
        for choice in [b for m in figure.layout.updatemenus for b in m.buttons]: assert sum(choice.args[0]["visible"]) in (1, 3) and choice.args[1]["title.text"]
    kept = ledger.filter(pl.col("fate") == "kept")
    bars = year_floor_figure(ledger).data[0]
    assert sum(bars.y) == kept["text_bytes"].sum() and sum(bars.customdata) == len(kept)
    step = year_floor_figure(ledger).layout.sliders[0].steps[-1]
    last = kept["year"].max()
    assert f"costs {(kept['year'] < last).sum():,} of {len(kept):,}" in step.args[1]["title.text"] and step.label == str(last)

@pytest.mark.slow
@needs_shared
def test_each_later_drop_is_explained_in_the_chapter():
    "The chapter's table of later drops of labelled sources is what the ledger says."
    chapter = Path(__file__).parents[1]/"nbs"/"corpus"/"14_yield.ipynb"
    said = {}
    for cell in json.loads(chapter.read_text())["cells"]:
        for ids, reason in re.findall(r"^\| ([\d., ]+) \| (?:[^|]+) \| `(\w+)` \|", "".join(cell["source"]), flags=re.M): said |= {i: reason for i in ids.split(", ")}
    labelled = {t["id"] for t in map(json.loads, (SHARED/"truth.jsonl").read_text().splitlines()) if t["fate"] == "source"}
    with tempfile.TemporaryDirectory() as folder:
        ledger = open_ledger(build_corpus(SHARED, Path(folder)/"corpus", CorpusConfig(), workers=2))
    dropped = dict(ledger.filter(pl.col("id").is_in(list(labelled)) & (pl.col("fate") == "dropped")).select("id", "reason").iter_rows())
    assert said == dropped
