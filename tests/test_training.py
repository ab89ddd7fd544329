"""How runs end: dead, silent and deaf ranks, stopped launchers, full disks, divergence; and what is left behind."""
import os, random, signal, subprocess, sys, threading, time
from pathlib import Path
import psutil, pytest
from arxiv_study.model import launch as launching
from arxiv_study.model.launch import launch, rank_environment
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json, read_jsonl
from model_runs import asked, data, rank_of, ranks_alive, series


def test_a_dead_rank_fails_the_run_and_leaves_no_process(data, tmp_path):
    config, folder = asked(data, tmp_path / "run", steps=100_000), tmp_path / "run"
    def kill_one(record):
        if record.get("step") == 3: os.kill(next(p for p in ranks_alive(folder) if rank_of(p) == 1), signal.SIGKILL)
    with pytest.raises(StudyError, match="failed") as e: launch(config, folder, ranks=2, on_line=kill_one)
    status = read_json(folder / "status.json")
    assert status["state"] == "failed" and status["reason"].startswith("rank 1 was killed by SIGKILL") and "launch again with resume" in status["reason"]
    assert status["reason"] in str(e.value) and not (folder / "result.json").exists()
    assert ranks_alive(folder) == [] and not list(folder.glob(".*"))


SERIES = dict(steps=24, branch_tokens=[10 * 256], checkpoint_every=3)

@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "Every step of a run that nothing disturbs"
    folder = tmp_path_factory.mktemp("whole") / "run"
    launch(asked(data, folder, **SERIES), folder, ranks=2)
    return series(folder)


def at_step(n, act):
    "Called with each line of metrics: acts once, when step n has been logged"
    once = []
    def on_line(record):
        if record.get("step") == n and "event" not in record and not once: once.append(act())
    return on_line


def signal_to(folder, number, *ranks):
    for p in ranks_alive(folder):
        if rank_of(p) in ranks: os.kill(p, number)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_the_run_goes_on_later(data, tmp_path, whole, rank):
    "Held by SIGSTOP in the middle of training: the run fails within a few seconds of its patience, and resumed is the uninterrupted one"
    config, folder, held_at = asked(data, tmp_path / "run", guard=dict(collective_timeout_s=4), **SERIES), tmp_path / "run", []
    def hold():
        signal_to(folder, signal.SIGSTOP, rank)
        held_at.append(time.monotonic())
    with pytest.raises(StudyError, match=f"rank {rank} was silent for over 4 s after step .*launch again with resume"): launch(config, folder, ranks=2, on_line=at_step(7, hold), poll_s=0.02)
    assert time.monotonic() - held_at[0] < 4 + 5 + 6  # patience, grace, and a busy machine
    status = read_json(folder / "status.json")
    assert status["state"] == "failed" and f"rank {rank} was silent" in status["reason"]
    assert ranks_alive(folder) == [] and not list(folder.glob(".*"))
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == whole


@pytest.mark.slow
def test_held_at_eight_moments_the_run_is_the_same(data, tmp_path):
    "Either rank is held after a random time, be it in a step, an evaluation or a checkpoint; each time the run ends by itself, and goes on"
    recipe, rng = dict(steps=120, branch_tokens=[40 * 256], checkpoint_every=2, evaluate_every=3), random.Random(os.environ.get("HOLD_SEED", "1"))
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "run", guard=dict(collective_timeout_s=4), **recipe), tmp_path / "run"
    for k in range(8):
        moments = iter([*[None] * rng.randrange(3, 12), time.sleep])
        def hold(record):
            if (wait := next(moments, None)): wait(rng.uniform(0, 0.1)), signal_to(folder, signal.SIGSTOP, k % 2)
        with pytest.raises(StudyError, match=f"rank {k % 2} was silent"): launch(config, folder, ranks=2, on_line=hold, poll_s=0.005, resume=k > 0)
        assert ranks_alive(folder) == []
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == series(tmp_path / "whole")


def test_a_dead_launcher_and_a_held_rank_leave_no_process(data, tmp_path):
    "The other rank finds that nobody gets on, says so, and ends the held one, which nobody else is left to do"
    config, folder = asked(data, tmp_path / "run", steps=100_000, guard=dict(collective_timeout_s=4)), tmp_path / "run"
    code = "import sys; from pathlib import Path; from arxiv_study.model.launch import launch; launch(Path(sys.argv[1]), Path(sys.argv[2]), 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code, str(config), str(folder)])
    until = time.monotonic() + 120
    while time.monotonic() < until and not ((folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size): time.sleep(0.05)
    signal_to(folder, signal.SIGSTOP, 1)
    time.sleep(0.5)  # until the other waits for it
    launcher.kill(), launcher.wait()
    until = time.monotonic() + 30
    while ranks_alive(folder) and time.monotonic() < until: time.sleep(0.1)
    left = ranks_alive(folder)
    for p in left: os.kill(p, signal.SIGKILL)
    assert left == [] and "rank 1 was silent for over 4 s" in read_json(folder / "status.json")["reason"]


def test_one_rank_that_is_stopped_at_the_start_takes_the_others_along(data, tmp_path, monkeypatch):
    "SIGTERM to one rank before the first step: the run is stopped, not failed, and within seconds"
    config, folder = asked(data, tmp_path / "run", steps=8), tmp_path / "run"
    started = with_script(monkeypatch, WAITING.format(act="pass").replace("code = t.main()", """
made_join = t.join_ranks
def join(*args):
    if rank == "1": os.kill(os.getpid(), 15)
    return made_join(*args)
t.join_ranks = join
code = t.main()"""))
    with pytest.raises(StudyError, match="stopped: interrupted by SIGTERM: launch it again with resume"): launch(config, folder, ranks=2)
    assert started[1].returncode == 0 and read_json(folder / "status.json")["state"] == "stopped"


def test_a_rank_that_leaves_without_a_word_does_not_leave_the_others_waiting(data, tmp_path, monkeypatch):
    "It ends with code 0 before the ranks have met, so that no collective and no exit code tells"
    config, folder = asked(data, tmp_path / "run", steps=8), tmp_path / "run"
    started = with_script(monkeypatch, WAITING.format(act="pass").replace("code = t.main()", "if rank == '1': os._exit(0)\ncode = t.main()"))
    begun = time.monotonic()
    with pytest.raises(StudyError, match="rank 1 ended before the run did: see rank-1.log, then launch again with resume"): launch(config, folder, ranks=2)
    assert time.monotonic() - begun < 60 and all(p.poll() is not None for p in started) and read_json(folder / "status.json")["state"] == "failed"


def test_a_slow_rank_does_not_unsay_that_another_was_stopped(data, tmp_path, monkeypatch):
    "Rank 1 is stopped before rank 0 has come to prepare the folder"
    config, folder = asked(data, tmp_path / "run", steps=8), tmp_path / "run"
    late = WAITING.format(act="pass").replace("code = t.main()", """
made_folder, made_join = t.prepare_folder, t.join_ranks
def prepare(*args):
    time.sleep(2)
    made_folder(*args)
def join(*args):
    if rank == "1": os.kill(os.getpid(), 15)
    return made_join(*args)
t.prepare_folder, t.join_ranks = prepare, join
code = t.main()""")
    with_script(monkeypatch, late)
    with pytest.raises(StudyError, match="stopped: interrupted by SIGTERM: launch it again with resume"): launch(config, folder, ranks=2, poll_s=6)  # looks when rank 0 has done so
    assert read_json(folder / "status.json")["state"] == "stopped"


def with_script(monkeypatch, script):
    "Ranks that run a script with the arguments of the trainer; their processes"
    started = []
    def start(config, folder, ranks, resume):
        for rank in range(ranks):
            with open(folder / f"rank-{rank}.log", "wb") as log:
                started.append(subprocess.Popen([sys.executable, "-c", script, str(config), "--out", str(folder), *["--resume"] * resume], stdout=log, stderr=subprocess.STDOUT,
                                                start_new_session=True, env=rank_environment(rank, ranks, folder.resolve() / ".meeting-0")))
        return started
    monkeypatch.setattr(launching, "start_ranks", start)
    return started


WAITING = """
import os, sys, threading, time
from arxiv_study.model import train as t
made, rank = t.Training.train_step, os.environ["RANK"]
def step(self, step, factor, *more):
    if step == 3 and rank == "1": {act}
    return made(self, step, factor, *more)
t.Training.train_step = step
code = t.main()
sys.stdout.flush(), os._exit(code)
"""

def test_ranks_that_wait_for_each_other_are_noticed(data, tmp_path, monkeypatch):
    "All run, but one waits outside of the collective that the other is in"
    config, folder = asked(data, tmp_path / "run", steps=8, guard=dict(collective_timeout_s=3)), tmp_path / "run"
    started = with_script(monkeypatch, WAITING.format(act="threading.Event().wait()"))
    with pytest.raises(StudyError, match=r"no rank got on for over 3 s after step 3 \(rank 0 in over_ranks.*rank 1 in .*launch again with resume"): launch(config, folder, ranks=2)
    assert all(p.poll() is not None for p in started)


def test_work_that_is_merely_long_raises_no_alarm(data, tmp_path, monkeypatch):
    "One rank works for three times the patience while the other waits for it"
    config, folder = asked(data, tmp_path / "run", steps=8, guard=dict(collective_timeout_s=3)), tmp_path / "run"
    with_script(monkeypatch, WAITING.format(act="""
        until, n = time.monotonic() + 9, 0
        while time.monotonic() < until: n = sum(range(1000))"""))
    assert launch(config, folder, ranks=2)["outcome"] == "trained"


@pytest.mark.parametrize("step", [None, 4], ids=["at the start", "at step 4"])
def test_sigterm_to_all_processes_at_once(data, tmp_path, whole, monkeypatch, step):
    "As Slurm ends a job: launcher and ranks hear it together, the ranks once more; the ranks end with code 0 and go on later"
    config, folder, started, made = asked(data, tmp_path / "run", **SERIES), tmp_path / "run", [], launching.start_ranks
    def start(*args):
        started.extend(made(*args))
        if step is None: threading.Timer(1.0, terminate).start()
        return started
    def terminate():
        for p in started: p.terminate()
        if step:
            time.sleep(0.05)  # or the second would be one with the first
            for p in started: p.terminate()
        os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m, pytest.raises(StudyError, match="stopped: .*SIGTERM.* launch it again with resume"):
        m.setattr(launching, "start_ranks", start)
        launch(config, folder, ranks=2, on_line=at_step(step, terminate), poll_s=0.005)
    assert read_json(folder / "status.json")["state"] == "stopped"
    if step: assert [p.returncode for p in started] == [0, 0] and "pre-empted by SIGTERM at step" in read_json(folder / "status.json")["reason"]
    assert ranks_alive(folder) == [] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == whole


def test_ranks_that_heed_nothing_are_killed_after_the_grace(data, tmp_path):
    "Both held by SIGSTOP, then the launcher is interrupted"
    config, folder = asked(data, tmp_path / "run", steps=100_000), tmp_path / "run"
    def interrupt():
        signal_to(folder, signal.SIGSTOP, 0, 1)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): launch(config, folder, ranks=2, on_line=at_step(3, interrupt), grace_s=1)
    assert ranks_alive(folder) == []
    assert read_json(folder / "status.json") == dict(state="failed", outcome=None, reason="stopped by KeyboardInterrupt and not saved within 1 s: launch it again with resume, which goes on from the newest checkpoint")


FLOOD = r"""
import os, sys
if os.environ["RANK"] == "1":
    for _ in range(100): sys.stdout.write("x" * (1 << 20))
    sys.stdout.write("\nthe last line\n"), sys.stdout.flush()
os._exit(int(os.environ["RANK"]))
"""

def test_a_flood_of_output_neither_blocks_nor_fills_the_launcher(data, tmp_path, monkeypatch):
    config, folder, started = asked(data, tmp_path / "run", steps=8), tmp_path / "run", with_script(monkeypatch, FLOOD)
    before = psutil.Process().memory_info().rss
    with pytest.raises(StudyError, match="rank 1 ended with code 1 before it could say why") as e: launch(config, folder, ranks=2)
    assert (folder / "rank-1.log").stat().st_size > 100 << 20 and "the last line" in str(e.value)
    assert len(str(e.value)) < 10_000 and psutil.Process().memory_info().rss - before < 20 << 20


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 24 MiB"
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a small disk takes root: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_fails_with_a_sentence_and_goes_on_later(data, tmp_path, small_disk, whole):
    config, folder = asked(data, tmp_path / "run", **SERIES), small_disk / "run"
    def fill():
        with open(small_disk / "filler", "wb", buffering=0) as f:
            try:
                while True: f.write(bytes(4096))
            except OSError: pass
    with pytest.raises(StudyError, match="free some space|see to the space there"): launch(config, folder, ranks=2, on_line=at_step(7, fill), poll_s=0.005)
    assert ranks_alive(folder) == [] and not (folder / "result.json").exists()
    (small_disk / "filler").unlink()
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_launcher_leaves_no_process_and_says_why(data, tmp_path, number):
    config, folder = asked(data, tmp_path / "run", steps=100_000), tmp_path / "run"
    code = "import sys; from pathlib import Path; from arxiv_study.model.launch import launch; launch(Path(sys.argv[1]), Path(sys.argv[2]), 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code, str(config), str(folder)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not ((folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size): time.sleep(0.05)
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    until = time.monotonic() + 20
    while ranks_alive(folder) and time.monotonic() < until: time.sleep(0.1)
    assert ranks_alive(folder) == []
    status = read_json(folder / "status.json")
    assert status["state"] == "stopped" and "pre-empted by SIGTERM at step" in status["reason"], status
    assert any("event" in r and r["event"] == "preempted" for r in read_jsonl(folder / "metrics.jsonl"))


def test_divergence_is_a_result(data, tmp_path):
    result = launch(asked(data, tmp_path / "run", steps=30, lr_multiplier=1e5, clip=None, warmup_fraction=0), tmp_path / "run", ranks=2)
    assert result["outcome"] == "diverged" and result["reason"]
    assert read_json(tmp_path / "run" / "status.json") == dict(state="done", outcome="diverged", reason=result["reason"])


def test_a_preempted_run_goes_on_where_it_stopped(data, tmp_path):
    "SIGTERM to one rank of two: both save the same step and end with code 0; resumed, the series is the uninterrupted one"
    recipe = dict(steps=24, branch_tokens=[10 * 256])
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "run", **recipe), tmp_path / "run"
    def preempt(record):
        if record.get("step") == 4 and "event" not in record: os.kill(next(p for p in ranks_alive(folder) if rank_of(p) == 1), signal.SIGTERM)
    with pytest.raises(StudyError, match="pre-empted by SIGTERM at step .* launch it again with resume"): launch(config, folder, ranks=2, on_line=preempt, poll_s=0.005)
    assert read_json(folder / "status.json")["state"] == "stopped" and ranks_alive(folder) == []
    stopped_at = int(read_json(folder / "status.json")["reason"].split("step ")[1].split()[0])
    passed_on = []
    result = launch(config, folder, ranks=2, resume=True, on_line=passed_on.append)
    assert passed_on == read_jsonl(folder / "metrics.jsonl")[-len(passed_on):] and passed_on[0]["event"] == "resumed"
    assert [r["step"] for r in passed_on if "event" not in r][0] == stopped_at
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl") if r.get("event") == "resumed"] == [stopped_at]
    assert series(folder) == series(tmp_path / "whole") and result["heldout"] == read_json(tmp_path / "whole" / "result.json")["heldout"]


POISONED = """
import os, sys
from pathlib import Path
from arxiv_study.model import train as t
from arxiv_study.model.configuration import read_run
factor, where, made = float(sys.argv[3]), sys.argv[4], t.summed_losses
def poisoned(engine, *batch):
    objective, nats = made(engine, *batch)
    if engine.global_steps != 3: return objective, nats
    return objective * factor, nats * factor if where == "loss" else nats
t.summed_losses = poisoned
t.train(read_run(Path(sys.argv[1])), Path(sys.argv[2]))
sys.stdout.flush(); os._exit(0)
"""

@pytest.mark.parametrize("value,where,zero_stage", [("nan", "loss", 2), ("inf", "gradient", 2), ("nan", "gradient", 0)])
def test_what_is_not_finite_changes_no_weight(data, tmp_path, value, where, zero_stage):
    "The fourth batch is poisoned: the run ends as diverged with the weights that three steps gave"
    from safetensors.torch import load_file
    import torch
    recipe = dict(steps=8, zero_stage=zero_stage, activation_checkpointing="none", schedule="cosine")
    config, folder = asked(data, tmp_path / "poisoned", **recipe), tmp_path / "poisoned"
    done = subprocess.run([sys.executable, "-c", POISONED, str(config), str(folder), value, where], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read_json(folder / "status.json")["outcome"] == "diverged" and "of step 3 is" in read_json(folder / "result.json")["reason"]
    limited = asked(data, tmp_path / "three", **recipe)
    done = subprocess.run([sys.executable, "-c", THREE, str(limited), str(tmp_path / "three")], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ours, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("poisoned", "three"))
    assert all(torch.equal(ours[k], expected[k]) for k in expected)


THREE = """
import os, sys
from pathlib import Path
from arxiv_study.model import train as t
from arxiv_study.model.configuration import read_run
from arxiv_study.model.checkpoints import save_model
training = t.Training(read_run(Path(sys.argv[1])), Path(sys.argv[2]))
for step in range(3): training.train_step(step, t.rate_factor(step, training.plan[0], training.recipe, training.warmup, training.total))
save_model(training.engine.module, Path(sys.argv[2]))
sys.stdout.flush(); os._exit(0)
"""
