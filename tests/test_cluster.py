"""The corpus on a real scheduler whose workers are processes of their own, started by their command lines as a user starts them: killed, paused, woken, added and orphaned during the build, and the
same bytes come out as on one machine."""
import ast, inspect, os, random, re, shlex, socket, subprocess, sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from arxiv_study.corpus.ledger import check_conservation
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import build_corpus, open_ledger
from test_engine import areas, digests, notes, wait_for

pytest.importorskip("distributed", reason="Dask is not installed; the extra dask has it")
pytestmark = pytest.mark.peer
CLI = [sys.executable, "-c", "from arxiv_study.cli import main; main()"]
TTL_S = 5  # Dask waits for ten heartbeats at least, which are five seconds
until = partial(wait_for, seconds=150)  # a busy machine takes a minute to start four workers


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    "A miniature arXiv in forty tars."
    folder = tmp_path_factory.mktemp("miniature")/"arxiv"
    write_miniature(folder, n_papers=320, seed=5, papers_per_tar=8)
    return folder

@pytest.fixture(scope="module")
def reference(miniature, tmp_path_factory): return build_corpus(miniature, tmp_path_factory.mktemp("one")/"corpus", workers=1)

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

class Cluster:
    "A scheduler and workers, each a process with a log of its own."
    def __init__(self, folder, **settings):
        self.folder, self.port, self.started = folder, free_port(), []
        self.settings = {f"DASK_DISTRIBUTED__{k.upper()}": str(v) for k, v in settings.items()}

    engine = property(lambda self: f"dask://127.0.0.1:{self.port}")

    def start(self, *command):
        "Start a process of Dask's command line."
        with open(self.folder/f"dask-{len(self.started)}.log", "wb") as log:
            self.started.append(psutil.Popen([sys.executable, "-m", "dask", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env={**os.environ, **self.settings}))
        return self.started[-1]

    def scheduler(self): return self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")

    def worker(self, *more): return self.start("worker", f"tcp://127.0.0.1:{self.port}", "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder), *more)

    def meets(self, n):
        "Wait until so many workers are there."
        from distributed import Client
        with Client(f"tcp://127.0.0.1:{self.port}", timeout="150s") as client: client.wait_for_workers(n, timeout=150)

    def end(self):
        "End what was started and what that has started."
        own = [q for p in self.started if p.is_running() for q in (*p.children(recursive=True), p)]
        for p in own:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        for p in self.started: p.wait()

@pytest.fixture
def cluster(tmp_path):
    "A scheduler that misses a silent worker after five seconds, not after Dask's five minutes."
    (tmp_path/"dask").mkdir()
    found = Cluster(tmp_path/"dask", scheduler__worker_ttl=f"{TTL_S}s")
    found.scheduler()
    try: yield found
    finally: found.end()

def start_build(arxiv, out, engine):
    "The command a user gives."
    return subprocess.Popen([*CLI, "corpus", "--arxiv", arxiv, "--out", out, "--engine", engine, "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out.parent)

def ends_well(build, out, reference, timeout=150):
    "Wait for a build; it made the bytes that one process makes, lost no paper and left nothing beside them."
    _, said = build.communicate(timeout=timeout)
    assert build.returncode == 0, said[-3000:]
    assert digests(out) == digests(reference)
    ledger = open_ledger(out)
    assert sorted(ledger["id"]) == sorted(open_ledger(reference)["id"]) and check_conservation(ledger) == []
    assert nothing_beside(out)
    return said

def nothing_beside(out): return {p.name for p in out.parent.iterdir()} == {out.name, "dask"}

def in_hand(folder): return [p for a in areas(folder) for p in a.glob("parts/*-hand-*")]

def has_paused(process): return all(p.status() == psutil.STATUS_STOPPED for p in (process, *process.children(recursive=True)))

def pause(process):
    "Hold a process and all that it has started, as a machine that hangs."
    for p in (process, *process.children(recursive=True)): p.suspend()
    until(lambda: has_paused(process))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_workers_are_killed_paused_and_added(miniature, reference, tmp_path, cluster, seed):
    rng, out = random.Random(seed), tmp_path/"corpus"
    workers = [cluster.worker(*["--no-nanny"]*(n != 1)) for n in range(4)]
    cluster.meets(4)
    rng.shuffle(workers)
    build = start_build(miniature, out, cluster.engine)
    until(lambda: len(notes(tmp_path)) >= rng.randint(2, 4))
    pause(workers[0])  # and never woken
    until(lambda: len(notes(tmp_path)) >= rng.randint(5, 9))
    for p in (*workers[1].children(recursive=True), workers[1]): p.kill()
    cluster.worker("--no-nanny")
    assert build.poll() is None and len(notes(tmp_path)) < 36  # all that happened during the build
    ends_well(build, out, reference)
    assert has_paused(workers[0]) and workers[1].poll() is not None

@pytest.mark.slow
def test_a_paused_worker_that_wakes_when_all_is_done(miniature, reference, tmp_path, cluster):
    "Its part of the work was given to another; what it still writes must not bring the working area back."
    out, sleeper = tmp_path/"corpus", cluster.worker("--no-nanny")
    cluster.meets(1)
    build = start_build(miniature, out, cluster.engine)
    while True:
        until(lambda: len(notes(tmp_path)) >= 2 and in_hand(tmp_path))
        pause(sleeper)
        if in_hand(tmp_path): break
        sleeper.resume()
    cluster.worker("--no-nanny")
    ends_well(build, out, reference)
    sleeper.resume()
    sleeper.wait(150)  # the scheduler has told it to go
    assert nothing_beside(out), list(tmp_path.iterdir())

@pytest.mark.slow
def test_the_scheduler_dies(miniature, reference, tmp_path, cluster):
    out = tmp_path/"corpus"
    for _ in range(2): cluster.worker("--death-timeout", "60")
    cluster.meets(2)
    build = start_build(miniature, out, cluster.engine)
    until(lambda: len(notes(tmp_path)) >= 3)
    cluster.started[0].kill()
    _, said = build.communicate(timeout=150)
    assert build.returncode == 1 and "Traceback" not in said and "has gone; start it again, and give the same command" in said, said[-3000:]
    done = notes(tmp_path)
    again = start_build(miniature, out, cluster.engine)
    _, said = again.communicate(timeout=150)
    assert again.returncode == 1 and "no Dask scheduler answers" in said and "Traceback" not in said, said[-3000:]
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in cluster.started[1:]))  # workers go with their scheduler
    cluster.scheduler()
    cluster.worker("--no-nanny")
    cluster.meets(1)
    build = start_build(miniature, out, cluster.engine)
    until(lambda: len(notes(tmp_path)) > len(done) or build.poll() is not None)
    assert all(notes(tmp_path).get(name, when) == when for name, when in done.items())  # nothing is done twice
    ends_well(build, out, reference)

@pytest.mark.slow
def test_all_workers_go_and_one_comes(miniature, reference, tmp_path, cluster):
    out, only = tmp_path/"corpus", cluster.worker("--no-nanny")
    cluster.meets(1)
    build = start_build(miniature, out, cluster.engine)
    until(lambda: len(notes(tmp_path)) >= 2)
    only.kill()
    said = next(line for line in build.stderr if line.startswith("warning: "))
    assert f"the Dask scheduler of {cluster.engine} has no workers left" in said
    assert build.poll() is None
    cluster.worker("--no-nanny")
    ends_well(build, out, reference)

@pytest.mark.slow
def test_the_scheduler_hangs(miniature, tmp_path, cluster):
    "Nobody can tell a hanging scheduler from a busy one; the user is told after half a minute, and what the warning promises is so."
    cluster.worker("--no-nanny")
    cluster.meets(1)
    build = start_build(miniature, tmp_path/"corpus", cluster.engine)
    until(lambda: len(notes(tmp_path)) >= 2)
    pause(cluster.started[0])
    said = next(line for line in build.stderr if line.startswith("warning: "))
    assert f"the Dask scheduler of {cluster.engine} does not answer" in said and build.poll() is None
    cluster.started[0].kill()
    _, said = build.communicate(timeout=150)
    assert build.returncode == 1 and "has gone; start it again, and give the same command" in said and "Traceback" not in said and notes(tmp_path)


# What docs/clusters.md says

PAGE = Path(__file__).parents[1]/"docs"/"clusters.md"

def blocks(language):
    "The code blocks of the page in a language."
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)

def commands(program):
    "The commands of the page by their words; what follows # is said to the reader."
    return [words for block in blocks("sh") for line in block.splitlines() if (words := shlex.split(line, comments=True))[:1] == [program]]

def test_the_commands_of_the_page_exist():
    import typer
    from arxiv_study.cli import app
    own = typer.main.get_command(app).commands
    assert {words[1] for words in commands("arxiv-study")} == {"corpus", "train"}
    for words in commands("arxiv-study"): own[words[1]].make_context(words[1], words[2:])

def test_the_commands_of_dask_exist():
    from distributed.cli import dask_scheduler, dask_worker
    mains = dict(scheduler=dask_scheduler.main, worker=dask_worker.main)
    assert {words[1] for words in commands("dask")} == set(mains)
    for words in commands("dask"): mains[words[1]].make_context(words[1], words[2:])

def test_the_scripts_of_the_page_call_what_there_is():
    "Our functions take the arguments that the page gives them."
    from arxiv_study.corpus.elsewhere import build_anywhere
    called = [node for block in blocks("python") for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    ours = dict(build_corpus=build_corpus, build_anywhere=build_anywhere)
    found = [(ours[node.func.id], node) for node in called if getattr(node.func, "id", None) in ours]
    for function, node in found: inspect.signature(function).bind(*node.args, **{k.arg: k.value for k in node.keywords})
    assert {function for function, _ in found} == set(ours.values())

def test_five_minutes_are_what_dask_waits():
    "The page and 03_workers name Dask's own default."
    import dask, distributed
    from dask.utils import parse_timedelta
    assert parse_timedelta(dask.config.get("distributed.scheduler.worker-ttl")) == 300 and "after five minutes" in PAGE.read_text(encoding="utf-8")

def test_the_cluster_of_the_page_is_one():
    "Workers have one thread, the scheduler the port of the engine, and the names that the operator gives are used."
    cluster, = (yaml.safe_load(block) for block in blocks("yaml"))
    worker, scheduler = (cluster["spec"][kind]["spec"]["containers"][0] for kind in ("worker", "scheduler"))
    from distributed.cli import dask_worker
    assert worker["args"][:2] == ["dask", "worker"] and dask_worker.main.make_context("worker", [str(a) for a in worker["args"][2:]]).params["nthreads"] == 1
    ports = {p["name"]: p["containerPort"] for p in scheduler["ports"]}
    assert {p["targetPort"]: p["port"] for p in cluster["spec"]["scheduler"]["service"]["ports"]} == ports
    engine = next(words[words.index("--engine") + 1] for words in commands("arxiv-study") if "scheduler" in " ".join(words))
    assert engine == f"dask://{cluster['metadata']['name']}-scheduler:{ports['tcp-comm']}"
