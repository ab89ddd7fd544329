"""Near duplicates against datasketch, what all of arXiv would take, and the search for benchmarks: `python -m benchmarks.duplicates [ARXIV]`."""
import json, re, string, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import rensa
from arxiv_study.corpus.duplicates import BAND, BOTTOM, N_BANDS, N_PERM, find_duplicates, nominated, overlap, plain, run_hashes, signature, sketch_runs
from arxiv_study.corpus.contamination import Contamination, ContaminationRules, find_hits
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

if __name__ == "__main__": main(*map(Path, sys.argv[1:2]))
