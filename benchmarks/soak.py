"""A corpus built again and again for half an hour, while its processes are killed, its disk fills up and its tars are damaged: `python -m benchmarks.soak [--papers 10000] [--minutes 30] [--seed 0]`.

Each build has several such faults and goes on where the fault left it. Whenever one is finished it must be the corpus of an uninterrupted build, byte for byte, with nothing
left beside it and no process left over; what the planted truth says of each paper is checked once, in the uninterrupted one. The resident memory of builder and workers is
read every second. Summary and memory are written to runs/results/rehearsal."""
import argparse, hashlib, os, random, select, shutil, signal, subprocess, sys, tempfile, threading, time
from collections import Counter
from contextlib import suppress
from pathlib import Path
import numpy as np
import polars as pl
import psutil
from arxiv_study.corpus.ledger import check_conservation
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import build_corpus, open_ledger
from arxiv_study.storage import read_json, read_jsonl, write_json

KEPT = Path(__file__).parents[1]/"runs"/"results"/"rehearsal"
FAULTS = ("worker", "parent", "group", "full disk", "truncated tar", "flipped byte")
MOST_MB_A_MINUTE, MOST_GROWTH = 1., .1 # of a worker; of the highest memory of builders and of workers, from the earlier half of the builds to the later one
YOUNG_S, FEWEST_OLD = 60, 60 # seconds in which a process still loads what it needs; samples of older ones without which there is no slope

BUILDER = """
import resource, sys
from arxiv_study.corpus.pipeline import build_corpus
from arxiv_study.settings import StudyError
arxiv, out = sys.argv[1:]
for line in sys.stdin: # the most bytes that a file may have; 0: any number
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(line) or resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try: build_corpus(arxiv, out, workers=2)
    except StudyError as e: print(f"stopped: {e}", flush=True)
    else: print("built", flush=True)
"""


# A builder, and what is done to it

class Builder:
    "A process that builds a corpus as often as it is asked to, in a group of its own: all that it starts can be killed with it."
    def __init__(self, arxiv, out): # what it says of its progress goes nowhere: in a file it would be under the limit, too
        self.process = subprocess.Popen([sys.executable, "-c", BUILDER, str(arxiv), str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)

    def ask(self, most_bytes=0): print(most_bytes, file=self.process.stdin, flush=True)

    def is_heard(self, seconds=0):
        "Whether it says something, or ends, in so many seconds; None: however long it takes."
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def answer(self, seconds=None):
        "What it says, empty when it has ended; None where it says nothing in so many seconds."
        return self.process.stdout.readline().strip() if self.is_heard(seconds) else None

    def workers(self):
        "Its worker processes."
        try: return [c for c in psutil.Process(self.process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        except psutil.NoSuchProcess: return []

    def is_gone(self):
        "Whether no process of its group is left."
        self.process.poll() # else it would stay as a zombie
        try: os.killpg(self.process.pid, 0)
        except ProcessLookupError: return True
        return False

    def end(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)

def strike(builder, kind, rng):
    "Kill a worker, the builder or all of them; whether there was something to kill."
    if kind == "group": os.killpg(builder.process.pid, signal.SIGKILL)
    if kind == "parent": builder.process.kill()
    if kind != "worker": return True
    try: rng.choice(builder.workers()).kill()
    except (IndexError, psutil.NoSuchProcess): return False
    return True

def damaged(tar, kind, rng):
    "Damage a tar; a function that mends it."
    whole = tar.read_bytes()
    at = rng.randrange(1, len(whole))
    if kind == "truncated tar": tar.write_bytes(whole[:at])
    else: tar.write_bytes(whole[:at] + bytes([whole[at]^1<<rng.randrange(8)]) + whole[at + 1:])
    return lambda: tar.write_bytes(whole)

def until(condition, seconds=60):
    "Whether something becomes so in time."
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end: time.sleep(.02)
    return bool(found)


# Memory

class Memory(threading.Thread):
    "The resident memory of a builder and its workers, read every second."
    def __init__(self, every_s=1.):
        super().__init__(daemon=True)
        self.every_s, self.builder, self.build, self.rows, self.ended, self.start_s = every_s, None, 1, [], threading.Event(), time.monotonic()

    def run(self):
        while not self.ended.wait(self.every_s):
            if (builder := self.builder) is None: continue
            for role, pid in [("builder", builder.process.pid), *(("worker", w.pid) for w in builder.workers())]:
                try: self.rows.append((round(time.monotonic() - self.start_s, 2), self.build, role, pid, psutil.Process(pid).memory_info().rss/1e6))
                except psutil.NoSuchProcess: pass

    def table(self): return pl.DataFrame(self.rows, schema={"s": pl.Float64, "build": pl.Int64, "role": pl.String, "pid": pl.Int64, "mb": pl.Float64}, orient="row")

def slope(memory):
    "Megabytes a minute that a process grows by once it is no longer young: one slope for all of them, each about its own mean; None where none grows old."
    own = lambda column: pl.col(column) - pl.col(column).mean().over("pid")
    old = memory.filter(pl.col("s") - pl.col("s").min().over("pid") > YOUNG_S).select(s=own("s"), mb=own("mb"))
    return round(float((old["s"]*old["mb"]).sum()/(old["s"]**2).sum()*60), 3) if len(old) > FEWEST_OLD else None

def growth(memory):
    "How much higher memory got in the later half of the builds than in the earlier one, as a share."
    highest = memory.group_by("build").agg(pl.col("mb").max()).sort("build")["mb"]
    half = max(1, len(highest)//2)
    return round(highest[half:].max()/highest[:half].max() - 1, 4) if len(highest) > 1 else 0.

def memory_told(memory):
    "Processes, highest, slope and growth of builders and workers."
    parts = {role: memory.filter(pl.col("role") == role) for role in ("builder", "worker")}
    return {role: dict(processes=m["pid"].n_unique(), samples=len(m), highest_mb=round(m["mb"].max(), 1), mb_a_minute=slope(m), growth=growth(m)) for role, m in parts.items() if len(m)}


# What must be so

def digests(corpus):
    "All files of a corpus but the manifest, which tells times."
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(corpus.rglob("*.parquet"))}

def notes(folder):
    "The notes of tars that are done, and when they were written; of a build that goes on, so that one may be gone again."
    found = {}
    for path in folder.glob("corpus.working-*/parts/[0-9]*-done-*.json"): # not those half written, which begin with a dot
        with suppress(FileNotFoundError): found[path.name] = path.stat().st_mtime_ns
    return found

def against_truth(arxiv, corpus):
    "What of a corpus is not as it was planted: each paper has one row, with the fate and the reason that the truth names."
    rows = open_ledger(corpus).select("id", "fate", "reason").rows()
    planted = {t["id"]: t["reason"] for t in read_jsonl(arxiv/"truth.jsonl")}
    found = {id: reason for id, _, reason in rows}
    wrong = [f"{len(rows)} rows for {len(planted)} papers"] if not len(rows) == len(found) == len(planted) else []
    wrong += [f"{id}: {reason} was planted, the ledger says {found.get(id, 'nothing')}" for id, reason in planted.items() if found.get(id, "nothing") != reason]
    return wrong + [f"{id}: bytes do not balance" for id in check_conservation(open_ledger(corpus))]

def against_reference(folder, expected, is_tidy=True):
    "What is wrong with a finished build and, where it could tidy up, with what lies beside it."
    wrong = [] if digests(folder/"corpus") == expected else ["the corpus differs from that of an uninterrupted build"]
    beside = [p.name for p in folder.iterdir() if is_tidy and p.name != "corpus"] + [p.name for p in (folder/"corpus").rglob(".*.part")]
    manifest = read_json(folder/"corpus"/"manifest.json")
    return wrong + [f"{name} is left over" for name in beside] + [f"the manifest lists {kind}" for kind in ("failures", "damaged_tars", "set_aside") if manifest[kind]]


# The soak

class Soak:
    "The builds of one folder, one after the other."
    def __init__(self, arxiv, folder, expected, reference_s, rng):
        self.arxiv, self.folder, self.expected, self.rng, self.n_tars = arxiv, folder, expected, rng, len(list((arxiv/"src").glob("*.tar")))
        self.tar_s = 2*reference_s/self.n_tars # of each of two workers
        self.faults, self.wrong, self.builds, self.resumed, self.is_tidy, self.memory = Counter(), [], 0, 0, True, Memory()

    def open(self):
        "The builder, a new one where there is none."
        if self.memory.builder is None: self.memory.builder = Builder(self.arxiv, self.folder/"corpus")
        return self.memory.builder

    def close(self, builder):
        "The builder has ended or been killed: nothing of it may be left."
        self.memory.builder = None
        if not until(builder.is_gone): self.wrong.append(f"processes of builder {builder.process.pid} are left over")

    def says(self, what, right):
        if not right: self.wrong.append(what)

def moment(soak, builder):
    "Wait for a random moment of a build: up to a quarter of all tars from now, by tars and not by the clock, for the machine may be busy or not; and up to the time of a tar, lest one is always just done."
    reached = min(soak.n_tars, len(notes(soak.folder)) + soak.rng.uniform(0, soak.n_tars/4))
    while len(notes(soak.folder)) < reached and not builder.is_heard(.05): pass
    builder.is_heard(soak.rng.uniform(0, soak.tar_s))

def killed(soak, kind):
    "A build that is struck at a random moment; its answer, empty where it was killed with its builder."
    (builder := soak.open()).ask()
    moment(soak, builder)
    if kind == "worker": until(lambda: builder.workers() or builder.is_heard())
    answer = builder.answer(0)
    struck = answer is None and strike(builder, kind, soak.rng)
    soak.faults[kind] += struck
    if answer is None: answer = builder.answer()
    soak.says(f"{kind} struck, and the build says {answer!r}", answer == "built" or kind != "worker" and answer == "")
    if not answer or struck and kind != "worker": soak.close(builder) # it may have said that all is built as it was killed
    return answer

def disk_full(soak):
    "A build in which no file may be longer than a random number of bytes."
    limit = int(2**soak.rng.uniform(11, 22))
    (builder := soak.open()).ask(limit)
    answer = builder.answer()
    soak.faults["full disk"] += answer != "built"
    soak.says(f"a full disk makes {answer!r}", answer == "built" or answer.startswith("stopped: ") and "File too large" in answer)
    if not answer: soak.close(builder)
    return answer

def with_damage(soak, kind):
    "A build with a damaged tar among those that are still to be read; then the tar is mended."
    done = {read_json(p)["name"] for p in soak.folder.glob("corpus.working-*/parts/[0-9]*-done-*.json")}
    left = [t for t in sorted((soak.arxiv/"src").glob("*.tar")) if t.name not in done]
    if not left: return None
    mend = damaged(tar := soak.rng.choice(left), kind, soak.rng)
    (builder := soak.open()).ask()
    answer = builder.answer()
    mend()
    soak.faults[kind] += 1
    soak.says(f"{kind} {tar.name} makes {answer!r}", answer.startswith("stopped: ") and tar.name in answer)
    return answer

def fault(soak, kind):
    "One fault; whether the corpus is finished nevertheless."
    before = notes(soak.folder)
    answer = disk_full(soak) if kind == "full disk" else with_damage(soak, kind) if kind in ("truncated tar", "flipped byte") else killed(soak, kind)
    soak.is_tidy = answer == "built"
    if answer == "built" or (soak.folder/"corpus").exists(): return True # killed when the corpus was there, and before it could tidy up
    after = notes(soak.folder)
    soak.says(f"{kind}: a tar that was done is done again", all(after.get(name) == when for name, when in before.items()))
    soak.resumed += len(after)
    return False

def build(soak, kinds):
    "A corpus with these faults on the way, the last of which it outlives; compared and removed."
    any(fault(soak, kind) for kind in kinds) # one that is stopped too late is finished before the others
    if not (soak.folder/"corpus").exists(): return soak.says(f"no corpus after {', '.join(kinds)}", False)
    soak.says("a finished build has workers left", soak.memory.builder is None or until(lambda: not soak.memory.builder.workers()))
    soak.wrong += against_reference(soak.folder, soak.expected, soak.is_tidy)
    shutil.rmtree(soak.folder/"corpus")
    soak.builds, soak.memory.build = soak.builds + 1, soak.memory.build + 1
    print(f"build {soak.builds}: {', '.join(kinds)}; in all {dict(soak.faults)}; {soak.wrong or 'all as it should be'}", flush=True)

def drawn(rng, n_builds):
    "Every third build only loses a worker, which it outlives; the others have five to ten faults that end them, in any order, and at last lose a worker, if any is left."
    return ["worker"] if n_builds%3 == 0 else [*rng.sample(FAULTS[1:]*2, rng.randint(5, 10)), "worker"]

def soak(place, papers=10_000, minutes=30., seed=0, papers_per_tar=100):
    "The whole soak in a folder that exists: its summary, and memory over time."
    arxiv, folder, rng = place/"arxiv", place/"builds", random.Random(seed)
    if not arxiv.exists(): write_miniature(arxiv, papers, seed=seed, papers_per_tar=papers_per_tar)
    tars, start = {p: hashlib.sha256(p.read_bytes()).digest() for p in (arxiv/"src").iterdir()}, time.monotonic()
    reference = build_corpus(arxiv, place/"reference", workers=2)
    reference_s, start = time.monotonic() - start, time.monotonic()
    folder.mkdir()
    run = Soak(arxiv, folder, digests(reference), reference_s, rng)
    run.wrong += against_truth(arxiv, reference)
    run.memory.start()
    while time.monotonic() - start < 60*minutes: build(run, drawn(rng, run.builds))
    run.memory.ended.set()
    if last := run.memory.builder: last.end(), run.close(last)
    memory = run.memory.table().filter(pl.col("build") <= run.builds) # not what came after the last one
    run.says("a tar is not what it was", all(hashlib.sha256(p.read_bytes()).digest() == d for p, d in tars.items()))
    told = dict(papers=papers, tars=run.n_tars, minutes=round((time.monotonic() - start)/60, 1), seed=seed, uninterrupted_s=round(reference_s, 1), builds=run.builds, faults=dict(run.faults),
                tars_not_done_again=run.resumed, wrong=run.wrong, memory=memory_told(memory))
    return told, memory

def is_flat(told):
    "Whether memory stays within what is asked; of a builder the slope means little, for it assembles at the end of each build."
    return (told["memory"].get("worker", {}).get("mb_a_minute") or 0) < MOST_MB_A_MINUTE and all(m["growth"] < MOST_GROWTH for m in told["memory"].values())

def show(told):
    "The summary as a table."
    print(f"\n{told['builds']} builds of {told['papers']:,} papers in {told['tars']} tars, in {told['minutes']} minutes; an uninterrupted one takes {told['uninterrupted_s']} s")
    for kind in FAULTS: print(f"  {kind:16} {told['faults'].get(kind, 0):5}")
    for role, m in told["memory"].items(): print(f"  {role}: {m['processes']} processes, highest {m['highest_mb']:.0f} MB, {m['mb_a_minute']} MB a minute, later builds over earlier ones {m['growth']:+.1%}")
    print(f"  {told['tars_not_done_again']} times a tar that was done was not done again; wrong: {told['wrong'] or 'nothing'}; memory {'is' if is_flat(told) else 'IS NOT'} flat")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--papers", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as d: told, memory = soak(Path(d), a.papers, a.minutes, a.seed)
    show(told)
    write_json(KEPT/"soak.json", told)
    memory.group_by("role", "pid", s=(pl.col("s")//10*10).cast(pl.Int64)).agg(pl.col("mb").max().round(1)).sort("s", "role", "pid").write_csv(KEPT/"soak_memory.csv")
    sys.exit(bool(told["wrong"]) or not is_flat(told))

if __name__ == "__main__": main()
