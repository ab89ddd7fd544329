"""The corpus engine: `python -m benchmarks.engine [ARXIV] [--memory]`, an arXiv folder, else a miniature of 400 papers.

Two workers against two processes of a plain regex loop, each pinned to a core of its own, in turns; with --memory what workers and parent hold at 1,000 and at 10,000 papers."""
import os, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from arxiv_study.corpus.archives import find_sources, read_source
from arxiv_study.corpus.metadata import MetadataRules
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, Task, do_task, largest_first, lay_down_by_month
from arxiv_study.storage import read_json
from arxiv_study.workers import process_pool, run_tasks
from .interleaved import bars

WORD = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]+|.", re.S)
SNAPSHOT = "arxiv-metadata-oai-snapshot.json"
cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []

def pin(core):
    if cores: os.sched_setaffinity(0, {core})

def loop(job):
    "Scan a share of the texts on one core, from an agreed moment on; when it began and ended, and its processor seconds."
    folder, share, n_shares, begin = job
    pin(cores[share] if cores else None)
    texts = [p.read_text(encoding="utf-8") for p in sorted(Path(folder).iterdir())[share::n_shares]]
    time.sleep(max(0, begin - time.monotonic()))
    start, cpu = time.monotonic(), time.process_time()
    for text in texts:
        for _ in WORD.finditer(text): pass
    return start, time.monotonic(), time.process_time() - cpu

def task_on_core(task):
    "A tar, on the core of its worker; when it began and ended, and its processor seconds."
    if cores and len(os.sched_getaffinity(0)) > 1: pin(cores[claim(Path(task.out))])
    start, cpu = time.monotonic(), time.process_time()
    do_task(task)
    return start, time.monotonic(), time.process_time() - cpu

def claim(folder):
    "The first core that no other worker has claimed."
    for n in range(len(cores) - 1):
        try: (folder/f"core-{n}").touch(exist_ok=False)
        except FileExistsError: continue
        return n
    return len(cores) - 1

def span(times): return max(end for _, end, _ in times) - min(start for start, _, _ in times)

def undisturbed(one, two):
    "The speed-up as neighbours cannot change it: two, less what the work costs more on two cores, less the time in which one of them has none."
    more = sum(cpu for *_, cpu in two)/sum(cpu for *_, cpu in one)
    busy = sum(end - start for start, end, _ in two)/(2*span(two))
    return 2*busy/more

def regex_times(folder, n):
    with process_pool(n) as pool: return list(pool.map(loop, [(str(folder), k, n, time.monotonic() + 4) for k in range(n)]))

def tar_times(arxiv, months, n):
    "All tars on n workers: their times, and seconds with the start of the processes."
    with tempfile.TemporaryDirectory() as out:
        tasks = [Task(i, s, CorpusConfig(), str(months), out) for i, s in enumerate(find_sources(arxiv))]
        times, start = [], time.monotonic()
        def lost(task): raise RuntimeError(f"{task.sources.name} ended its worker")
        run_tasks(task_on_core, largest_first(tasks), process_pool, n, times.append, lost)
        return times, time.monotonic() - start

def repeated(arxiv, out, times):
    "The tars of a folder several times under other names, without their manifest: enough work to measure."
    (out/"src").mkdir(parents=True)
    (out/SNAPSHOT).symlink_to(arxiv/SNAPSHOT)
    for tar in (Path(s.path) for s in find_sources(arxiv)):
        for k in range(times): (out/"src"/f"{tar.stem}{k}.tar").symlink_to(tar)

def texts_of(arxiv, folder):
    "The TeX of a folder as plain files, for the loop."
    folder.mkdir()
    sources = [read_source(payload) for s in find_sources(arxiv) for _, payload in s.sources()]
    for n, text in enumerate(t for s in sources for t in s.files.values()): (folder/f"{n:06d}").write_text(text, encoding="utf-8")

def speed_up(arxiv, place, copies=3, rounds=3):
    arxiv = arxiv.resolve()
    repeated(arxiv, place/"repeated", copies)
    texts_of(arxiv, place/"texts")
    lay_down_by_month(arxiv/SNAPSHOT, place/"months", MetadataRules())
    rows = []
    for _ in range(rounds):
        loops = [regex_times(place/"texts", n) for n in (1, 2)]
        (one, one_s), (two, two_s) = (tar_times(place/"repeated", place/"months", n) for n in (1, 2))
        rows.append([span(loops[0])/span(loops[1]), span(one)/span(two), one_s/two_s, undisturbed(*loops), undisturbed(one, two)])
        print(f"  regex loop {span(loops[0]):.1f} s, on two {span(loops[1]):.1f} s; tars {span(one):.1f} s, on two {span(two):.1f} s, with the start of the processes {one_s:.1f} s and {two_s:.1f} s", flush=True)
    wall_loop, wall_tars, with_start, loop_up, tars_up = (statistics.median(r[k] for r in rows) for k in range(5))
    print(f"\nspeed-up on two cores by the clock: regex loop {wall_loop:.2f}, tars {wall_tars:.2f}, with the start of the processes {with_start:.2f}; undisturbed by neighbours: {loop_up:.2f} and {tars_up:.2f}")
    return [("two workers, share of the speed-up of a regex loop, by the clock", statistics.median(r[1]/r[0] for r in rows), .9),
            ("the same, undisturbed by neighbours", statistics.median(r[4]/r[3] for r in rows), .9)]

BUILD = """
import sys
from arxiv_study.corpus.pipeline import build_corpus, peak_mb
build_corpus(sys.argv[1], sys.argv[2], workers=2)
print(peak_mb())
"""

def memory(place, sizes=(1_000, 10_000)):
    "Peak memory of workers and parent for two miniatures with tars of the same size."
    workers, parents = [], []
    for n in sizes:
        arxiv = place/f"m{n}"
        if not arxiv.exists(): write_miniature(arxiv, n, seed=0, papers_per_tar=100)
        with tempfile.TemporaryDirectory() as d:
            answer = subprocess.run([sys.executable, "-c", BUILD, str(arxiv), str(Path(d)/"corpus")], capture_output=True, text=True, check=True)
            manifest = read_json(Path(d)/"corpus"/"manifest.json")
        workers.append(max(manifest["peak_mb_per_worker"]))
        parents.append(float(answer.stdout.split()[-1]))
        print(f"  {n:6,} papers: workers {manifest['peak_mb_per_worker']} MB, parent {parents[-1]:.0f} MB, wall {manifest['wall_s']}", flush=True)
    # 32 MB of text at a time are part of it: between 10,000 and 99,000 papers, those of 10,000 under other ids, it grew by 0.8 kB a paper
    print(f"\nthe parent grows by {(parents[1] - parents[0])*1e6/(sizes[1] - sizes[0]):,.0f} bytes a paper, the buffers of its first 10,000 included")
    return [("a worker's memory, smaller over larger corpus", workers[0]/workers[1], .9)]

def main(arxiv=None, with_memory=False):
    with tempfile.TemporaryDirectory() as d:
        place = Path(d)
        if arxiv is None: write_miniature(arxiv := place/"arxiv", 400, papers_per_tar=20)
        print("the engine, in turns")
        asked = speed_up(Path(arxiv), place)
        if with_memory: asked += memory(place)
        bars("what was asked for", asked)

if __name__ == "__main__":
    from benchmarks import engine # workers import what they run, and `__main__` is no name for it
    engine.main(*[Path(a) for a in sys.argv[1:] if a != "--memory"][:1], with_memory="--memory" in sys.argv)
