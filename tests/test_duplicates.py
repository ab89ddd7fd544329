"""Copies and contamination: planted pairs of exact overlap, order and files, memory, planted passages, a brute-force oracle, broken benchmark files."""
import csv, json, os, pickle, random, re, subprocess, sys, time, unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy.stats import binom, hypergeom

from arxiv_study.corpus import contamination
from arxiv_study.corpus.archives import find_sources, read_source
from arxiv_study.corpus.contamination import (Contamination, ContaminationRules, benchmark_inputs, contaminated, find_hits, hits_to_frame, lines_of,
                                              read_benchmark, words_of)
from arxiv_study.corpus.duplicates import (BOTTOM, MULTIPLIER, N_BANDS, Sketches, find_duplicates, near, nominated, overlap, plain, run_hashes,
                                           signature, sketch, sketch_runs, text_hash)
from arxiv_study.corpus.latex import extract
from arxiv_study.corpus.ledger import Reason
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.normalize import normalize
from arxiv_study.settings import StudyError

SHARED = Path(__file__).parents[1].parent/"shared"/"arxiv"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample of real sources, ../shared/arxiv, is absent")


def runs_of(text, n=5):
    w = text.lower().split()
    return {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}

def jaccard(a, b, n=5):
    a, b = runs_of(a, n), runs_of(b, n)
    return Fraction(len(a & b), len(a | b))

def texts_of(arxiv):
    "The normalised texts of all sources of an arXiv folder, but those that are too short to be papers."
    sources = ((id, read_source(payload)) for s in find_sources(arxiv) for id, payload in s.sources())
    texts = {id: normalize(extract(s.files).text or "")[0] for id, s in sources if s.reason is None}
    return {id: t for id, t in texts.items() if len(t) >= 500}

def columns(texts):
    "What `find_duplicates` is given of texts by id."
    signatures = [signature(t) for t in texts.values()]
    return [list(texts), [s[0] for s in signatures], [s[1] for s in signatures], [len(t.encode()) for t in texts.values()]]

@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    write_miniature(folder := tmp_path_factory.mktemp("miniature")/"arxiv", n_papers=60, seed=3)
    return texts_of(folder)


# Planted pairs

def pair(rng, n_runs, common):
    "Two texts of n_runs different runs of five words each, of which exactly `common` are in both."
    word = lambda: f"{rng.getrandbits(40):010x}"
    words = [word() for _ in range(n_runs + 4)]
    return " ".join(words), " ".join(words[:common + 4] + [word() for _ in range(n_runs - common)])

def found_among(pairs):
    "How many of the pairs are found, and how many papers go that are in no pair with the one that stays."
    texts = {f"{i:05d}": t for i, t in enumerate(t for p in pairs for t in p)}
    found = find_duplicates(*columns(texts))
    right = sum(int(a)//2 == int(b)//2 for a, (_, b) in found.items())
    return right, len(found) - right

@pytest.mark.parametrize("n_runs,common,overlap_", [(1800, 1600, Fraction(8, 10)), (900, 800, Fraction(8, 10)), (3800, 3600, Fraction(9, 10))], ids=["0.8", "0.8 short", "0.9"])
def test_planted_pairs_at_the_threshold_and_above_are_found(n_runs, common, overlap_):
    rng, n = random.Random(1), 200
    pairs = [pair(rng, n_runs, common) for _ in range(n)]
    assert jaccard(*pairs[0]) == overlap_ == Fraction(common, 2*n_runs - common)
    right, wrong = found_among(pairs)
    assert wrong == 0 and right >= 0.95*n
    union = 2*n_runs - common
    odds = nominated(float(overlap_))*hypergeom(union, common, min(BOTTOM, union)).sf(np.ceil(near(.8)*min(BOTTOM, union)) - 1)
    assert binom(n, odds).cdf(right) > 1e-4 # not fewer than the closed form lets expect

@pytest.mark.parametrize("n_runs,common", [(1500, 999), (1500, 800), (300, 199), (1500, 300)])
def test_no_pair_below_one_half_is_found(n_runs, common):
    rng = random.Random(2)
    pairs = [pair(rng, n_runs, common) for _ in range(200)]
    assert jaccard(*pairs[0]) == Fraction(common, 2*n_runs - common) < Fraction(1, 2)
    assert found_among(pairs) == (0, 0)

def test_the_decision_is_sharp():
    "At 0.7 a pair is four standard errors from being accepted."
    draw = np.random.default_rng(0)
    def rows(J, union=10_000):
        runs, common = draw.integers(0, 2**64, union, np.uint64, endpoint=False), round(J*union)
        half = common + (union - common)//2
        return sketch_runs(runs[:half]), sketch_runs(np.concatenate([runs[:common], runs[half:]]))
    for J, odds in ((.7, 0), (.8, 1)):
        many = [r for _ in range(300) for r in rows(J)]
        found = find_duplicates([f"{i:04d}" for i in range(600)], [str(i) for i in range(600)], many, [0]*600)
        assert abs(len(found)/300 - odds) < 0.02

@pytest.mark.peer
def test_datasketch_finds_the_same_copies():
    datasketch = pytest.importorskip("datasketch")
    rng = random.Random(3)
    pairs = [pair(rng, 1000, common) for common in [950]*20 + [400]*20]
    texts = {f"{i:05d}": t for i, t in enumerate(t for p in pairs for t in p)}
    lsh, sketched = datasketch.MinHashLSH(num_perm=128, params=(21, 6)), {}
    for id, t in texts.items():
        m = sketched[id] = datasketch.MinHash(128)
        m.update_batch([" ".join(r).encode() for r in runs_of(t)])
        lsh.insert(id, m)
    theirs = {tuple(sorted((a, b))) for a, m in sketched.items() for b in lsh.query(m) if a != b and m.jaccard(sketched[b]) >= 0.8}
    assert {tuple(sorted((a, b))) for a, (_, b) in find_duplicates(*columns(texts)).items()} == theirs


# Which one stays

def test_chains_are_cut_the_same_way_in_any_order(tmp_path):
    "Windows over one text: neighbours overlap by 0.83, the next but one by 0.69; the oracle takes them from the smallest id on."
    rng = random.Random(4)
    words = [f"{rng.getrandbits(40):010x}" for _ in range(2000 + 11*180)]
    windows = [" ".join(words[k*180:k*180 + 2000]) for k in range(12)]
    for order in range(5):
        rng.shuffle(windows)
        texts = {f"{i:02d}": w for i, w in enumerate(windows)}
        stays, expected = [], {}
        for id, t in texts.items():
            close = max(((jaccard(t, texts[s]), s) for s in stays), default=(0, ""))
            if close[0] >= Fraction(8, 10): expected[id] = Reason.near_duplicate, max((s for s in stays if jaccard(t, texts[s]) == close[0]), key=lambda s: -int(s))
            else: stays.append(id)
        found = find_duplicates(*columns(texts))
        assert set(found) == set(expected) and all(jaccard(texts[a], texts[b]) > Fraction(8, 10) and b not in found for a, (_, b) in found.items())
        shuffled = list(texts.items())
        rng.shuffle(shuffled)
        ids, hashes, rows, lengths = columns(dict(shuffled))
        assert find_duplicates(ids, hashes, rows, lengths) == found
        for k, part in enumerate((rows[:5], rows[5:6], rows[6:])): np.save(tmp_path/f"{k}.npy", np.stack(part))
        assert find_duplicates(ids, hashes, Sketches(sorted(tmp_path.iterdir())), lengths) == found

def test_files_give_any_choice_of_rows(tmp_path):
    rows = np.random.default_rng(0).integers(0, 2**32, (9, N_BANDS + BOTTOM), np.uint32)
    for k, (a, b) in enumerate([(0, 4), (4, 5), (5, 9)]): np.save(tmp_path/f"{k}.npy", rows[a:b])
    order = [8, 0, 4, 3]
    files = Sketches(sorted(tmp_path.iterdir()), order)
    assert len(files) == 4 and (files.bands() == rows[order, :N_BANDS]).all()
    assert all((files[i] == rows[o]).all() for i, o in enumerate(order))

def test_the_longest_stays_then_the_smallest_id():
    text = " ".join(f"w{i}" for i in range(500))
    texts = {"hep-th/9901001": text, "2101.00002": text, "2101.00001": text.replace(" ", "  ", 3), "2101.00003": text + " and more"}
    found = find_duplicates(*columns(texts))
    assert found == {id: (Reason.near_duplicate if id == "2101.00001" else Reason.exact_duplicate, "2101.00003") for id in ("hep-th/9901001", "2101.00001", "2101.00002")}

def test_copies_of_the_miniature(miniature):
    "Against all pairs by their exact overlap."
    found = find_duplicates(*columns(miniature))
    sets = {id: runs_of(t) for id, t in miniature.items()}
    ids = sorted(miniature, key=lambda id: (-len(miniature[id].encode()), id))
    stays, gone = [], set()
    for id in ids:
        if any(len(sets[id] & sets[s]) >= 0.8*len(sets[id] | sets[s]) for s in stays): gone.add(id)
        else: stays.append(id)
    assert gone and set(found) == gone

def test_a_threshold_that_the_bands_cannot_see_is_refused():
    for threshold in (0, 0.5, 0.7, 1.1):
        with pytest.raises(StudyError, match="choose a threshold"): find_duplicates([], [], [], [], threshold)
    assert near(1) == 1

@needs_shared
@pytest.mark.slow
def test_copies_among_real_sources():
    "What goes overlaps with what stays, and no two papers of one tree that stay overlap by more."
    texts = texts_of(SHARED)
    groups = dict(line.split(",") for line in (SHARED/"groups.csv").read_text().splitlines()[1:])
    found = find_duplicates(*columns(texts))
    exact = {id for id, (reason, _) in found.items() if reason == Reason.exact_duplicate}
    assert len(found) >= 40 and len(exact) >= 15
    assert all(b not in found and jaccard(texts[a], texts[b]) > 0.72 for a, (_, b) in found.items())
    assert sum(groups[a] == groups[b] for a, (_, b) in found.items()) >= len(found) - 10 # the hand-made archives are ten groups and one article
    sets = {id: runs_of(t) for id, t in texts.items() if id not in found}
    for a in sets:
        for b in sets:
            if a < b and groups[a] == groups[b]: assert len(sets[a] & sets[b]) < 0.8*len(sets[a] | sets[b]), (a, b)


# Sketches

odd_text = st.text(st.sampled_from("ab \n\t\r\x0b\x0cXÉ—\x00"), max_size=60)

@given(odd_text)
def test_layout_and_capitals_do_not_matter(text):
    assert plain(text) == b" ".join(text.encode().lower().split())
    assert text_hash(text) == text_hash(f"\n {text.replace(' ', '   ')}\t")

def run_hash(words, first, last):
    "The hash of a run by its formula."
    p, mask = int(MULTIPLIER), 2**64 - 1
    h = sum(c*pow(p, k, 2**64) for k, c in enumerate(words[first:min(last, first + 4096)])) & mask
    h = (h ^ h>>32)*p & mask
    return h ^ h>>29

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9) | st.sampled_from([5000, 70_000]), max_size=40), st.integers(1, 7), st.integers(0, 5))
def test_run_hashes_by_their_formula(sizes, n, seed):
    "Across the pieces of 64 kB, and for words longer than a piece."
    rng = random.Random(seed)
    words = b" ".join(bytes(rng.choices(range(33, 256), k=k)) for k in sizes)
    spans = [(m.start(), m.end()) for m in re.finditer(rb"[^ ]+", words)]
    m = min(n, len(spans)) or 1
    expected = [run_hash(words, spans[i][0], spans[i + m - 1][1]) for i in range(len(spans) - m + 1)]
    assert run_hashes(words, n).tolist() == expected

@settings(deadline=None)
@given(st.sets(st.integers(0, 2**64 - 1), max_size=400), st.sets(st.integers(0, 2**64 - 1), max_size=400), st.integers(0, 200))
def test_short_texts_have_their_exact_overlap(a, b, shared):
    b = b | set(sorted(a)[:shared])
    rows = [sketch_runs(np.array(sorted(x), np.uint64))[N_BANDS:] for x in (a, b)]
    high = [{h>>32 for h in x if h>>32 < 2**32 - 1} for x in (a, b)]
    assert overlap(*rows) == (len(high[0] & high[1])/len(high[0] | high[1]) if high[0] | high[1] else 0)

def test_every_process_makes_the_same_row():
    text = "Let $X$ be a compact space. " * 30 + "é"
    code = "import sys, hashlib; from arxiv_study.corpus.duplicates import signature; h, r = signature(sys.argv[1]); print(h, hashlib.sha256(r.tobytes()).hexdigest())"
    told = {subprocess.run([sys.executable, "-c", code, text], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True).stdout for seed in "12"}
    assert len(told) == 1 and told.pop().split()[0] == text_hash(text)

def test_odd_texts_have_a_row():
    for text in ("", "a", "a b c", "x"*300_000, "0 "*200_000, "\n"*1000): assert sketch(text).shape == (N_BANDS + BOTTOM,)

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc, which Linux has")
def test_memory_a_paper():
    "Under 400 bytes a paper: 2.9 million papers fit into 1.2 GB."
    from benchmarks.duplicates import growth
    assert growth((10_000, 60_000)) < 400


# All of arXiv

def test_no_paper_is_copied_twice_and_no_copy_is_copied():
    from benchmarks.duplicates import EVERY, origin_of
    made = {paper: origin_of(paper)[0] for paper in range(100_000) if origin_of(paper)}
    assert len(made) == len(set(made.values())) == 100_000//EVERY and not made.keys() & set(made.values())
    assert all(original < paper for paper, original in made.items())

def test_planted_texts_have_the_overlap_that_is_told():
    from benchmarks.duplicates import drawn, text_and_truth
    kinds = set()
    for paper in range(19, 200, 20):
        copy, truth = text_and_truth(paper)
        original, found = drawn(truth["pair"][0]), Fraction(truth["common"], truth["union"])
        assert jaccard(copy, original) == found
        assert (text_hash(copy) == text_hash(original)) == (truth["kind"] == "exact")
        assert {"exact": found == 1, "near": .73 < found < 1, "alike": .35 < found < .65}[truth["kind"]]
        kinds.add(truth["kind"])
    assert kinds == {"exact", "near", "alike"}

def test_the_fit_gives_back_a_power_and_its_interval_holds_what_it_says():
    from benchmarks.duplicates import power_law
    n, draw = np.repeat([3e3, 9e3, 29e3, 92e3, 290e3], 3), np.random.default_rng(0)
    assert np.allclose(power_law(n, 7*n**.9, 2.9e6), [.9, *[7*2.9e6**.9]*3])
    held = 0
    for _ in range(400):
        _, _, low, high = power_law(n, 7*n**.9*np.exp(draw.normal(0, .1, len(n))), 2.9e6)
        held += low < 7*2.9e6**.9*np.exp(draw.normal(0, .1)) < high
    assert abs(held/400 - .95) < 4*(.05*.95/400)**.5

@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_search_of_the_corpus_room_finds_what_is_planted(tmp_path):
    "Not more than four standard errors from the closed form, nothing else, and the same in each of two worlds."
    from benchmarks.duplicates import all_worlds, full
    (row,) = full(tmp_path, 2900, turns=1).iter_rows(named=True)
    assert row["planted"] == 116 and row["wrong"] == 0
    assert abs(row["found"] - row["expected"]) <= 4*(row["expected"]*(1 - row["expected"]/row["planted"]))**.5
    worlds = all_worlds(tmp_path, 2, 3)
    assert worlds["same"] and worlds["papers"] == 2*3*290 and worlds["found"] > 0


# Contamination

def words(text):
    "Words by definition: runs of letters and digits."
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())

def oracle(text, items, n, min_words):
    "Of each item: the places of the text at which they share a run, or at which it stands whole if it is short."
    w, found = words(text), {}
    for k, item in enumerate(map(words, items)):
        if len(item) < min_words: continue
        m = min(n, len(item))
        runs = {tuple(item[i:i + m]) for i in range(len(item) - m + 1)}
        if places := sum(tuple(w[i:i + m]) in runs for i in range(len(w) - m + 1)): found[k + 1] = places
    return found

def told(hits):
    "Runs by record."
    found = {}
    for h in hits: found[h.record] = found.get(h.record, 0) + h.n_grams
    return found

def write_items(path, items):
    path.write_text("".join(json.dumps(dict(question=t)) + "\n" for t in items))
    return str(path)

def test_planted_questions_are_found_and_nothing_else(miniature, tmp_path):
    "Each question goes into one paper, in the middle of a line, with other punctuation and capitals."
    rng = random.Random(5)
    questions = [" ".join(f"q{k}x{i}" for i in range(rng.randrange(8, 40))) for k in range(20)]
    index = Contamination.load(ContaminationRules((write_items(tmp_path/"q.jsonl", questions),)))
    texts, planted = dict(miniature), {}
    for k, id in enumerate(rng.sample(sorted(texts), 20)):
        lines = texts[id].split("\n")
        at = rng.randrange(len(lines))
        lines[at] += " $" + rng.choice([", ", "-", " \\; "]).join(questions[k].upper().split()) + "$"
        texts[id] = "\n".join(lines)
        planted[id] = [(k + 1, at + 1, max(1, len(questions[k].split()) - 12))]
    found = {id: [(h.record, h.line, h.n_grams) for h in hits] for id, t in texts.items() if (hits := find_hits(t, index))}
    assert found == planted

def test_shared_runs_by_brute_force(miniature, tmp_path):
    "Questions cut out of the papers stand in others, too: the miniature repeats phrases and copies papers."
    rng, texts = random.Random(6), list(miniature.values())
    items = []
    for t in rng.sample(texts, 25):
        w = t.split()
        at, n = rng.randrange(max(1, len(w) - 40)), rng.randrange(5, 40)
        items.append(" ".join(w[at:at + n]))
    index = Contamination.load(ContaminationRules((write_items(tmp_path/"cut.jsonl", items),), max_records=1000))
    expected = [oracle(t, items, 13, 8) for t in texts]
    assert sum(map(bool, expected)) >= 10
    assert [told(find_hits(t, index)) for t in texts] == expected

small = st.lists(st.sampled_from(["a", "B", "2", "\\frac", "x_1", "é", "E\u0301", "ﬁ", "—", "\n", "$", "a" * 5000]), max_size=30).map(" ".join)

@settings(max_examples=60, deadline=None)
@given(small, st.lists(small, min_size=1, max_size=5))
@example("a {0} a a".format("a"*5000), ["a {0} a {0} a a".format("a"*5000)]) # runs that differ past what is hashed
@example(" ".join(["a"*5000]*4), [" ".join(["a"*5000]*5)]) # and one that an item holds twice
def test_hits_are_what_brute_force_finds(tmp_path_factory, text, items):
    path = write_items(tmp_path_factory.mktemp("items")/"i.jsonl", items)
    rules = ContaminationRules((path,), n=4, min_words=2, max_records=100)
    if not any(len(words(i)) >= 2 for i in items):
        with pytest.raises(StudyError, match="no text of 2 words"): Contamination.load(rules)
        return
    assert told(find_hits(text, Contamination.load(rules))) == oracle(text, items, 4, 2)
    assert words_of(text).decode().split() == words(text)
    assert lines_of(text).tolist() == [n for n, line in enumerate(text.split("\n"), 1) for _ in words(line)]

def test_a_collision_of_hashes_is_no_hit(miniature, tmp_path, monkeypatch):
    monkeypatch.setattr(contamination, "run_hashes", lambda w, n: np.zeros(max(1, w.count(b" ") + 2 - n), np.uint64))
    index = Contamination.load(ContaminationRules((write_items(tmp_path/"c.jsonl", ["one two three four five six seven eight nine ten eleven twelve thirteen fourteen"]),)))
    text = next(iter(miniature.values()))
    assert find_hits(text, index) == []
    assert len(find_hits(text + " one two three four five six seven eight nine ten eleven twelve thirteen", index)) == 1

def test_all_kinds_of_file_say_the_same(tmp_path):
    items = ["What is the largest order of an element of the symmetric group on five letters, and why?", "Let a, \"b\" and c be primes.\nShow that one of them is odd unless all of them are equal to two."]
    (tmp_path/"a.txt").write_text("\n\n".join(items))
    write_items(tmp_path/"b.jsonl", items)
    with open(tmp_path/"c.csv", "w", newline="") as f: csv.writer(f).writerows([[t, "A"] for t in items])
    pl.DataFrame({"q": [[dict(text=t)] for t in items]}).write_parquet(tmp_path/"d.parquet")
    index = Contamination.load(ContaminationRules(tuple(map(str, sorted(tmp_path.iterdir())))))
    hits = find_hits("Recall this:\n" + "\n".join(items), index)
    assert {h.benchmark: sum(g.n_grams for g in hits if g.benchmark == h.benchmark) for h in hits} == dict.fromkeys(["a.txt", "b.jsonl", "c.csv", "d.parquet"], sum(len(words(t)) - 12 for t in items))
    assert {(h.benchmark, h.record, h.field) for h in hits} >= {("a.txt", 3, ""), ("b.jsonl", 2, "question"), ("c.csv", 1, "column 1"), ("d.parquet", 2, "q[0].text")}
    assert hits_to_frame([("x", h) for h in hits])["line"].to_list() == [h.line for h in hits]

@pytest.mark.parametrize("name,data,why", [("a.jsonl", None, "does not exist"), ("a.jsonl", b"", "is empty"), ("a.jsonl", b'{"q": "x"}\n{"q', "a.jsonl:2 is not valid JSON"),
    ("a.txt", b"caf\xe9 " * 20, "cannot be read"), ("a.parquet", b"PAR1nothing", "cannot be read"), ("a.csv", b"x" * 200_000, "cannot be read"), ("a.pdf", b"%PDF", "of no kind"),
    ("a.txt", b"too short", "no text of 8 words")])
def test_bad_benchmarks_are_named(tmp_path, name, data, why):
    if data is not None: (tmp_path/name).write_bytes(data)
    with pytest.raises(StudyError, match=why): Contamination.load(ContaminationRules((str(tmp_path/name),)))

@pytest.mark.parametrize("change", [dict(policy="mask"), dict(n=5), dict(min_hits=0), dict(benchmarks=("x/a.txt", "y/a.txt"))], ids=str)
def test_bad_rules_are_named(change):
    with pytest.raises(StudyError): Contamination.load(ContaminationRules(**change))

def test_identity_of_benchmarks(tmp_path):
    "By name and content, not by place; a file that changes is read again."
    for d in "xy": (tmp_path/d).mkdir()
    paths = [write_items(tmp_path/d/"b.jsonl", ["one two three four five six seven eight"]) for d in "xy"]
    first, second = (benchmark_inputs(ContaminationRules((p,))) for p in paths)
    assert first == second
    rules = ContaminationRules((paths[0],))
    assert len(find_hits("one two three four five six seven eight", Contamination.load(rules))) == 1
    write_items(tmp_path/"x"/"b.jsonl", ["one two three four five six seven eight nine"])
    assert find_hits("one two three four five six seven eight", Contamination.load(rules)) == []
    assert benchmark_inputs(rules) != second

def test_rules_decide(tmp_path):
    item = " ".join(f"w{i}" for i in range(20))
    rules = ContaminationRules((write_items(tmp_path/"b.jsonl", [item]),))
    index = pickle.loads(pickle.dumps(Contamination.load(rules)))
    hits = find_hits(f"x {item} y", index)
    assert [h.n_grams for h in hits] == [8] and hits[0].passage == item
    table = hits_to_frame([("x", h) for h in hits])
    assert [contaminated(table, ContaminationRules(min_hits=k)) for k in (1, 8, 9)] == [["x"], ["x"], []]
    assert contaminated(table, ContaminationRules(policy="report")) == []
    assert find_hits(item, Contamination.load(ContaminationRules())) == []

def test_frames_of_questions_are_no_hits(tmp_path):
    frame = "which one of the following statements about the function named in the text is true"
    items = [f"{frame} " + " ".join(f"k{k}w{i}" for i in range(20)) for k in range(12)]
    index = Contamination.load(ContaminationRules((write_items(tmp_path/"b.jsonl", items),)))
    assert index.counts["frames"] == 12*3
    assert find_hits(frame, index) == [] and len(find_hits(items[3], index)) == 1

def test_time_is_linear_in_the_worst_text(tmp_path):
    "A text and a question of one word again and again: every place is a hit, all of them are one passage."
    index = Contamination.load(ContaminationRules((write_items(tmp_path/"b.jsonl", ["0 "*1000]),)))
    def seconds(n):
        start = time.process_time()
        hits = find_hits("0 "*n, index)
        assert [(h.n_grams, len(h.passage.split())) for h in hits] == [(n - 12, 40)]
        return time.process_time() - start
    seconds(1000)
    assert seconds(400_000) < 8*seconds(100_000) + .1
    assert find_hits("x"*3_000_000, index) == []
