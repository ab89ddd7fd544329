"""Near duplicates against datasketch, what all of arXiv would take, and the search for benchmarks: `python -m benchmarks.duplicates [ARXIV]`.

`python -m benchmarks.duplicates --full FOLDER` draws signatures of up to 290,000 texts into FOLDER, which takes minutes of a core and 1.3 GB, finds the planted copies among
ever more of them, and writes what that took to runs/results/rehearsal/duplicates.csv; with --worlds, 13 GB more, all 2.9 million, as ten times the 290,000 with nothing in common."""
import json, random, re, string, subprocess, sys, tempfile, time
from functools import lru_cache
from pathlib import Path
import numpy as np
import polars as pl
import rensa
from scipy.stats import hypergeom, t as student
from arxiv_study.corpus.duplicates import BAND, BOTTOM, N_BANDS, N_PERM, find_duplicates, near, nominated, overlap, plain, run_hashes, signature, sketch_runs
from arxiv_study.corpus.contamination import Contamination, ContaminationRules, find_hits
from arxiv_study.corpus.miniature import Writer
from arxiv_study.corpus.pipeline import part_path
from arxiv_study.storage import read_json, write_json
from arxiv_study.workers import process_pool
from .interleaved import bars, medians, table

def rensa_values(hashes): return np.array(rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, np.array([0, len(hashes)], np.uint64), N_PERM, 42).to_rows()[0])

def datasketch_of(hashes):
    "datasketch's MinHash of runs that are hashed already; it wants 32 bits."
    from datasketch import MinHash
    m = MinHash(N_PERM, hashfunc=int)
    m.update_batch((hashes>>np.uint64(32)).tolist())
    return m

def datasketch_of_text(text):
    "datasketch's MinHash as its documentation shows it: the runs as bytes, hashed by SHA-1."
    from datasketch import MinHash
    words, m = plain(text).split(), MinHash(N_PERM)
    m.update_batch({b" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))})
    return m

def speed(texts, n_mb=4):
    "Sketching a few megabytes: hashed runs alone, and from the text."
    texts = [t for t, total in zip(texts, np.cumsum([len(t.encode()) for t in texts])) if total < n_mb*1e6]
    runs, size = [run_hashes(plain(t)) for t in texts], sum(len(t.encode()) for t in texts)/1e6
    contestants = {"rensa: 128 values of hashed runs": lambda: [rensa_values(h) for h in runs],
                   "both our sketches of hashed runs": lambda: [sketch_runs(h) for h in runs],
                   "datasketch: 128 values of hashed runs": lambda: [datasketch_of(h) for h in runs],
                   "our hash and sketches from the text": lambda: [signature(t) for t in texts],
                   "datasketch: 128 values from the text": lambda: [datasketch_of_text(t) for t in texts]}
    seconds = medians(contestants, 3, time.process_time)
    table(f"sketches: {len(texts)} texts, {size:.1f} MB", "MB/s of text and CPU second", size, seconds, "datasketch: 128 values from the text")
    return size/seconds["our hash and sketches from the text"]

def planted(draw, J, union=20_000):
    "The hashed runs of two texts that share exactly J of all their runs."
    runs, common = draw.integers(0, 2**64, union, np.uint64, endpoint=False), round(J*union)
    half = common + (union - common)//2
    return runs[:half], np.concatenate([runs[:common], runs[half:]])

def errors(n_pairs=200, J=0.8):
    "Bias and spread of three estimates of one overlap."
    draw = np.random.default_rng(1)
    pairs = [planted(draw, J) for _ in range(n_pairs)]
    estimates = {f"rensa, {N_PERM} values": [(rensa_values(a) == rensa_values(b)).mean() for a, b in pairs],
                 f"datasketch, {N_PERM} values": [datasketch_of(a).jaccard(datasketch_of(b)) for a, b in pairs],
                 f"ours, the {BOTTOM} smallest": [overlap(*(sketch_runs(x)[N_BANDS:] for x in pair)) for pair in pairs]}
    print(f"\nestimates of an overlap of {J}, {n_pairs} planted pairs")
    for name, found in estimates.items():
        k = BOTTOM if name.startswith("ours") else N_PERM
        print(f"  {name:58} mean {np.mean(found):.4f}   standard error {np.std(found):.4f}   theory {(J*(1 - J)/k)**.5:.4f}")

def recall(n_pairs=200, overlaps=(0.5, 0.7, 0.8, 0.9)):
    "Which planted pairs each finds, all in one corpus, with the same bands."
    from datasketch import MinHashLSH
    draw, ours = np.random.default_rng(2), {}
    print(f"\npairs found out of {n_pairs}, {N_BANDS} bands of {BAND}; bands alone by closed form, the others measured")
    for J in overlaps:
        runs = [r for _ in range(n_pairs) for r in planted(draw, J)]
        index = MinHashLSH(num_perm=N_PERM, params=(N_BANDS, BAND))
        sketched = [datasketch_of(r) for r in runs]
        for i, m in enumerate(sketched): index.insert(i, m)
        theirs = sum(i ^ 1 in index.query(m) for i, m in enumerate(sketched))//2
        checked = sum(i ^ 1 in index.query(m) and m.jaccard(sketched[i ^ 1]) >= 0.8 for i, m in enumerate(sketched))//2
        ours[J] = len(find_duplicates([f"{i:05d}" for i in range(len(runs))], [str(i) for i in range(len(runs))], [sketch_runs(r) for r in runs], [0]*len(runs)))
        print(f"  overlap {J}: bands {nominated(J)*n_pairs:6.1f}   datasketch, bands alone {theirs:4}   and estimate of 0.8 {checked:4}   ours {ours[J]:4}", flush=True)
    return {J: n/n_pairs for J, n in ours.items()}

GROWTH = """
import re, sys, time, numpy as np, polars as pl
from pathlib import Path
from arxiv_study.corpus.duplicates import Sketches, find_duplicates
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])*1024
folder, n = Path(sys.argv[1]), int(sys.argv[2])
ids, hashes = (pl.Series([f"{i:{width}}" for i in range(n)]) for width in ("011d", "032x"))
before, start = peak(), time.process_time()
found = find_duplicates(ids, hashes, Sketches(sorted(folder.iterdir())[:n//1000]), pl.Series(np.arange(n)%1000))
print(peak() - before, time.process_time() - start, len(found))
"""

def write_rows(folder, n, near_share=0.05):
    "Files of 1,000 random rows; a share of each file repeats rows of the one before but for three bands."
    draw, last = np.random.default_rng(3), None
    for part in range(n//1000):
        rows = draw.integers(0, 2**32, (1000, N_BANDS + BOTTOM), np.uint32)
        rows[:, N_BANDS:] = np.sort(rows[:, N_BANDS:]>>np.uint32(4), axis=1)
        if last is not None:
            again = int(1000*near_share)
            rows[:again, 3:] = last[:again, 3:]
        np.save(Path(folder)/f"{part:04d}.npy", last := rows)

def growth(sizes=(10_000, 40_000, 100_000)):
    "Memory and time a paper in a process of its own, and what 2.9 million papers would take by the line through the sizes."
    with tempfile.TemporaryDirectory() as folder:
        write_rows(folder, max(sizes))
        told = [subprocess.run([sys.executable, "-c", GROWTH, folder, str(n)], check=True, capture_output=True, text=True).stdout.split() for n in sizes]
    print("\nfinding duplicates among rows in files, 5 % of them near copies")
    for n, (memory, seconds, found) in zip(sizes, told): print(f"  {n:9,} papers: memory {int(memory)/1e6:7.1f} MB   {float(seconds)/n*1e6:5.1f} µs a paper   {int(found):,} found")
    fit = {name: np.polyfit(sizes, [float(t[k]) for t in told], 1) for k, name in enumerate(("memory", "seconds"))}
    print(f"  2,900,000 papers, by the line: {fit['memory'][0]:.0f} bytes a paper, {np.polyval(fit['memory'], 2.9e6)/1e9:.2f} GB of memory, "
          f"{np.polyval(fit['seconds'], 2.9e6):.0f} s of one core, {2.9e6*4*(N_BANDS + BOTTOM)/1e9:.1f} GB of rows on disk", flush=True)
    return fit["memory"][0]

PART, EVERY, ALL = 290, 20, 2_900_000 # papers in a part, as 9,547 tars hold them; of so many papers one is planted; all of arXiv
SIZES = [round(2900*10**(k/2)/PART)*PART for k in range(5)] # to a tenth of all
PLANTED = ("exact", "near", "near", "near", "alike") # in turn: 1 % of the papers, 3 % and 1 %
MEASURED = Path(__file__).parents[1]/"runs"/"results"/"rehearsal"/"duplicates.csv"

@lru_cache
def written(n_topics=2500, each=40):
    "100,000 sentences by the miniature's writer, forty on each of 2,500 topics."
    sentences = []
    for topic in range(n_topics):
        rng = random.Random(f"topic/{topic}")
        writer = Writer(rng, rng.choices(("math", "cs", "physics", "stat"), cum_weights=(38, 66, 88, 100))[0]).plan()
        sentences += [writer.sentence(rng.choice(("motive", "aim", "fact", "special", "setup", "claim", "step"))) for _ in range(each)]
    return sentences

def drawn(paper):
    "A text of 80 to 220 such sentences."
    rng = random.Random(f"full/{paper}")
    return "\n".join(rng.choices(written(), k=rng.randint(80, 220)))

def spoilt(text, J, rng):
    "A text that shares about J of all runs with this one: words far from each other are replaced, each at the cost of five runs."
    words = text.split()
    n = round((len(words) - 4)*(1 - J)/(5*(1 + J)))
    for k in range(n): words[int((k + .5)*len(words)/n)] = f"{rng.getrandbits(40):010x}"
    return " ".join(words)

def origin_of(paper):
    "Of a planted paper the earlier one that it is made from, and how; no paper is copied twice."
    if paper % EVERY != EVERY - 1: return None
    twin = paper//EVERY
    return EVERY*(twin//2) + twin%2, PLANTED[twin % len(PLANTED)]

def text_and_truth(paper):
    "A text, and of a planted one its kind, the paper it was made from, and how many runs both have and either has."
    if (origin := origin_of(paper)) is None: return drawn(paper), None
    (original, kind), rng = origin, random.Random(f"twin/{paper}")
    text = drawn(original)
    copy = text.replace("\n", "\n\n") if kind == "exact" else spoilt(text, rng.uniform(.75, .99) if kind == "near" else rng.uniform(.4, .6), rng)
    a, b = (set(run_hashes(plain(t)).tolist()) for t in (text, copy))
    return copy, dict(kind=kind, pair=[original, paper], common=len(a & b), union=len(a | b))

def write_part(task):
    "The part files that a worker of the corpus room would leave of 290 papers, and what is true of them."
    folder, part = task
    if part_path(folder, part, "done").exists(): return
    texts, truths = zip(*map(text_and_truth, range(part*PART, (part + 1)*PART)))
    start = time.process_time()
    digests, rows = zip(*map(signature, texts))
    sketch_s = time.process_time() - start
    pl.DataFrame({"id": [f"{part*PART + k:09d}" for k in range(PART)], "digest": digests, "n_bytes": [len(t.encode()) for t in texts]}).write_parquet(part_path(folder, part, "text"))
    np.save(part_path(folder, part, "sketches"), np.stack(rows))
    write_json(part_path(folder, part, "done"), dict(sketch_s=sketch_s, truth=[t for t in truths if t]))

SEARCH = """
import json, sys, time, polars as pl
from arxiv_study.corpus import duplicates, pipeline
folder, n_parts, per_part, answer, compared = pipeline.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], 0
def counted(a, b, overlap=duplicates.overlap):
    global compared
    compared += 1
    return overlap(a, b)
duplicates.overlap = counted
def search(n_parts):
    index = pl.DataFrame({"id": [f"{i:09d}" for i in range(n_parts*per_part)], "task": pl.Series([i//per_part for i in range(n_parts*per_part)], dtype=pl.Int32)})
    return pipeline.find_copies(index, folder, [dict(index=i, n_parts=1) for i in range(n_parts)], pipeline.CorpusConfig())
search(1) # what libraries load once is loaded
base, compared, start, cpu = pipeline.peak_mb(), 0, time.perf_counter(), time.process_time()
found = search(n_parts)
told = dict(base_gib=base*1e6/2**30, peak_gib=pipeline.peak_mb()*1e6/2**30, search_s=time.perf_counter() - start, search_cpu_s=time.process_time() - cpu, compared=compared)
json.dump({id: stays for id, (_, stays) in found.items()}, open(answer, "w"))
print(json.dumps(told))
"""

def searched(folder, n_parts):
    "The search as the corpus room does it, in a process of its own: what it took, and what it found."
    with tempfile.TemporaryDirectory() as d:
        told = subprocess.run([sys.executable, "-c", SEARCH, str(folder), str(n_parts), str(PART), f"{d}/found"], check=True, capture_output=True, text=True).stdout
        return json.loads(told), read_json(Path(d)/"found")

def odds(pair):
    "The probability that a planted pair is found, by the closed form; that of a copy to the letter is 1."
    sample = min(BOTTOM, pair["union"])
    return 1. if pair["kind"] == "exact" else nominated(pair["common"]/pair["union"])*hypergeom(pair["union"], pair["common"], sample).sf(np.ceil(near(.8)*sample) - 1)

def judged(found, truth):
    "How many planted pairs there are, how many should be found and were, and how many papers go that should not: look-alikes, and whoever was not planted."
    names = lambda pair: {f"{paper:09d}" for paper in pair["pair"]}
    copies = [p for p in truth if p["kind"] != "alike"]
    pairs = {frozenset(names(p)) for p in copies}
    right = sum(frozenset(pair) in pairs for pair in found.items())
    return dict(planted=len(copies), expected=sum(map(odds, copies)), found=right, wrong=len(found) - right)

def measured_at(folder, n_papers, turn):
    "A line of the table: memory, disk, seconds, and what was found."
    n_parts, size = n_papers//PART, lambda kind, part: part_path(folder, part, kind).stat().st_size
    told, found = searched(folder, n_parts)
    done = [read_json(part_path(folder, part, "done")) for part in range(n_parts)]
    disk = sum(size(kind, part) for part in range(n_parts) for kind in ("text", "sketches"))/2**30
    return dict(papers=n_papers, turn=turn, **told, disk_gib=disk, sketch_cpu_s=sum(d["sketch_s"] for d in done), **judged(found, [t for d in done for t in d["truth"]]))

def power_law(x, y, at):
    "Least squares in logarithms: exponent, the value to expect there, and an interval that holds 95 % of further measurements, if the law goes on."
    u, v = np.log(x), np.log(y)
    (b, a), n, far = np.polyfit(u, v, 1), len(u), np.log(at)
    s = (np.sum((v - a - b*u)**2)/(n - 2))**.5
    half = student.ppf(.975, n - 2)*s*(1 + 1/n + (far - u.mean())**2/np.sum((u - u.mean())**2))**.5
    return b, *np.exp(a + b*far + np.array([0, -half, half]))

def full(folder, n_papers=SIZES[-1], turns=3, workers=2):
    "Draw the texts, search ever more of them, and say what all of arXiv would take."
    folder.mkdir(parents=True, exist_ok=True)
    with process_pool(workers) as pool: list(pool.map(write_part, [(str(folder), part) for part in range(n_papers//PART)]))
    rows = pl.DataFrame([measured_at(folder, n, turn) for turn in range(turns) for n in SIZES if n <= n_papers])
    told_in_full(rows)
    return rows

def told_in_full(rows):
    "The table of medians, and the extrapolation of each column."
    middle = rows.group_by("papers").median().sort("papers")
    print("\nfinding copies as the corpus room does it, 5 % of the papers planted; medians")
    for r in middle.iter_rows(named=True):
        print(f"  {r['papers']:9,} papers: peak {r['peak_gib']:.3f} GiB, of which {r['base_gib']:.3f} before the first paper; {r['disk_gib']:.3f} GiB on disk; sketches {r['sketch_cpu_s']:.1f} s of a core, search {r['search_cpu_s']:.1f} s ({r['search_s']:.1f} s by the clock); "
              f"{r['compared']:,.0f} pairs compared; {r['found']:,.0f} of {r['planted']:,.0f} copies found, {r['expected']:.1f} expected; {r['wrong']:.0f} wrong")
    if len(middle) < 3: return
    grown = middle.with_columns(grown_gib=pl.col("peak_gib") - pl.col("base_gib")) # turns at one size are no measurements of the law
    for name in ("grown_gib", "disk_gib", "sketch_cpu_s", "search_cpu_s", "compared"):
        b, value, low, high = power_law(grown["papers"].to_numpy(), grown[name].to_numpy(), ALL)
        print(f"  {ALL:,} papers: {name} {value:,.2f} (95 %: {low:,.2f} to {high:,.2f}), by the power {b:.3f} of the number of papers", flush=True)

def write_worlds(folder, out, n_worlds=10, n_parts=SIZES[-1]//PART):
    "The parts of all papers so many times: in each world other digests and other bands. The finer sketches stay, for they are compared only where bands bring papers together."
    out.mkdir(parents=True, exist_ok=True)
    for world in range(n_worlds):
        mask = np.zeros(N_BANDS + BOTTOM, np.uint32)
        mask[:N_BANDS] = np.random.default_rng(world).integers(0, 2**32, N_BANDS, np.uint32)
        for part in range(n_parts):
            place, texts = world*n_parts + part, pl.read_parquet(part_path(folder, part, "text"))
            np.save(part_path(out, place, "sketches"), np.load(part_path(folder, part, "sketches"))^mask)
            ids = pl.Series("id", [f"{place*PART + k:09d}" for k in range(PART)])
            texts.with_columns(ids, digest=pl.lit(str(world)) + pl.col("digest").str.slice(1)).write_parquet(part_path(out, place, "text"))

def all_worlds(folder, n_worlds=10, n_parts=SIZES[-1]//PART):
    "What the search takes among all worlds, and whether it finds in each what it finds in the first."
    write_worlds(folder, out := folder/"worlds", n_worlds, n_parts)
    told, found = searched(out, n_worlds*n_parts)
    _, alone = searched(folder, n_parts)
    there = lambda id, world: f"{int(id) + world*n_parts*PART:09d}"
    same = found == {there(id, w): there(stays, w) for w in range(n_worlds) for id, stays in alone.items()}
    return dict(papers=n_worlds*n_parts*PART, **told, disk_gib=sum(p.stat().st_size for p in out.iterdir())/2**30, found=len(found), same=same)

def write_benchmark(path, texts, n_mb=1):
    "A benchmark of random words of the texts, and of forty words in a row from every sixth text."
    draw, vocabulary = np.random.default_rng(4), np.array(" ".join(texts[::10]).split())
    strangers = [" ".join(draw.choice(vocabulary, 60)) for _ in range(int(n_mb*2500))]
    quoted = [" ".join(w[k:k + 40]) for w in map(str.split, texts[5::6]) for k in [int(draw.integers(max(1, len(w) - 40)))]]
    path.write_text("".join(json.dumps(dict(question=t)) + "\n" for t in strangers + quoted))
    return len(quoted)

def set_of_runs(text, n=13, deleted=str.maketrans("", "", string.punctuation)):
    "GPT-3's runs: words between white space, punctuation deleted."
    words = text.lower().translate(deleted).split()
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}

def contamination(texts):
    "The search for a benchmark of one megabyte, ours and by a set of tuples."
    size = sum(len(t.encode()) for t in texts)/1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"benchmark.jsonl"
        write_benchmark(path, texts)
        index, n_mb = Contamination.load(ContaminationRules((str(path),))), path.stat().st_size/1e6
        theirs = set.union(*(set_of_runs(json.loads(line)["question"]) for line in path.read_text().splitlines()))
    contestants = {"find_hits": lambda: [find_hits(t, index) for t in texts], "a set of tuples of words": lambda: [set_of_runs(t) & theirs for t in texts]}
    seconds = medians(contestants, 2, time.process_time)
    table(f"contamination: {len(texts)} texts, {size:.1f} MB, a benchmark of {n_mb:.1f} MB", "MB/s of text and CPU second", size, seconds, "a set of tuples of words")
    return size/seconds["find_hits"]

def compare(texts):
    "All tables; what was asked for."
    rate = speed(texts)
    errors()
    found = recall()
    growth()
    return [("MB/s of text searched for a benchmark of 1 MB", contamination(texts), 20),
            ("MB/s of text from text to hash and sketches", rate, 24), ("share found at an overlap of 0.8", found[0.8], 0.95), ("share not found at 0.5", 1 - found[0.5], 1)]

def main(arxiv=None):
    from arxiv_study.corpus.archives import find_sources, read_source
    from arxiv_study.corpus.latex import extract
    from arxiv_study.corpus.miniature import write_miniature
    from arxiv_study.corpus.normalize import normalize
    with tempfile.TemporaryDirectory() as d:
        if arxiv is None: write_miniature(arxiv := Path(d)/"arxiv", 200)
        sources = [s for source in find_sources(arxiv) for s in (read_source(p) for _, p in source.sources()) if s.files]
        bars("duplicates and contamination", compare([normalize(t)[0] for t in (extract(s.files).text for s in sources) if t]))

def main_full(folder, with_worlds):
    rows = full(folder)
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    rows.write_csv(MEASURED, float_precision=4)
    if with_worlds: write_json(MEASURED.with_name("duplicates_worlds.json"), told := all_worlds(folder)); print(told)

if __name__ == "__main__":
    from benchmarks import duplicates # workers import what they run, and `__main__` is no name for it
    arguments = [Path(a) for a in sys.argv[1:] if not a.startswith("--")]
    if "--full" in sys.argv: duplicates.main_full(arguments[0], "--worlds" in sys.argv)
    else: duplicates.main(*arguments[:1])
