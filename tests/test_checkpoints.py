"""Kills, damage and full disks: what a resumed run has is what the uninterrupted one had."""
import json, math, os, random, resource, shutil, signal, subprocess, sys, time
from contextlib import contextmanager
import pytest, torch
from arxiv_study.model.launch import launch, rank_environment, start_ranks, stop
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json, read_jsonl
from model_runs import asked, data, ranks_alive, series


def kill_at(config, folder, step, ranks=2):
    "Start a run and kill all ranks outright as soon as a step is logged"
    processes = start_ranks(config, folder, ranks, resume=False)
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < until and all(p.poll() is None for p in processes):
        if metrics.is_file() and metrics.read_bytes().count(b'"loss"') > step: break
        time.sleep(0.002)
    for p in processes: p.kill()
    for p in processes: p.wait()


SLOWLY = [(0, "fp32"), (1, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16"), (2, "fp16"), (3, "fp16")]

@pytest.mark.parametrize("stage, precision", [(2, "fp32"), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOWLY)])
def test_resume_after_a_kill_is_bit_identical(data, tmp_path, stage, precision):
    "Killed at a random step of trunk or branch and resumed: the same series to the last bit, at every stage and with the scale that fp16 has found"
    recipe = dict(steps=24, branch_tokens=[10 * 256], checkpoint_every=3, zero_stage=stage, precision=precision)
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, rng = asked(data, tmp_path / "killed", **recipe), random.Random(os.environ.get("KILL_SEED", "1"))
    kill_at(config, tmp_path / "killed", rng.randrange(4, 24))
    assert read_json(tmp_path / "killed" / "status.json")["state"] == "running"
    result = launch(config, tmp_path / "killed", ranks=2, resume=True)
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    expected = read_json(tmp_path / "whole" / "result.json")
    for key in ("heldout", "branches", "train_loss", "grad_norm", "tokens", "samples"): assert result[key] == expected[key], key


def die(config, folder, resume, rng, inside):
    "Run, and kill all ranks outright a moment after the first new step, or while a checkpoint is being written; whether it was"
    processes = start_ranks(config, folder, 2, resume)
    metrics, size, until = folder / "metrics.jsonl", 0, time.monotonic() + 120
    while time.monotonic() < until and all(p.poll() is None for p in processes):
        now = metrics.stat().st_size if metrics.is_file() else 0
        if now > size and size and not inside: break
        if inside and list((folder / "checkpoints").glob(".*.part/*")): break
        size = now or 1
        time.sleep(0.001)
    if not inside: time.sleep(rng.uniform(0, 0.1))
    for p in processes: p.kill()
    for p in processes: p.wait()
    return bool(list((folder / "checkpoints").glob(".*.part/*")))


@pytest.mark.slow
def test_twenty_kills_change_nothing(data, tmp_path):
    "One run killed outright twenty times, every third time inside a checkpoint write: its series and its result are the uninterrupted run's to the last bit"
    recipe, rng = dict(steps=160, branch_tokens=[60 * 256], checkpoint_every=2), random.Random(os.environ.get("KILL_SEED", "1"))
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder, inside = asked(data, tmp_path / "killed", **recipe), tmp_path / "killed", 0
    for k in range(20):
        inside += die(config, folder, k > 0, rng, inside=k % 3 == 2)
        assert read_json(folder / "status.json")["state"] == "running", k  # it was killed before its end
    result, expected = launch(config, folder, ranks=2, resume=True), read_json(tmp_path / "whole" / "result.json")
    assert inside >= 3
    assert series(folder) == series(tmp_path / "whole")
    for key in ("heldout", "branches", "train_loss", "grad_norm", "tokens", "samples"): assert result[key] == expected[key], key
    assert not list((folder / "checkpoints").glob(".*.part"))


LIMITED = """
import resource, sys
from pathlib import Path
from arxiv_study.model.launch import launch
from arxiv_study.settings import StudyError
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # a file that outgrows it cannot be written, as on a full disk
try: launch(Path(sys.argv[1]), Path(sys.argv[2]), 2, resume=True)
except StudyError as e: sys.exit(str(e))
"""

def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(data, tmp_path):
    "The run fails with a sentence, leaves no process, and goes on from the checkpoint before when there is space again"
    recipe = dict(steps=12, checkpoint_every=3)
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "full", **recipe), tmp_path / "full"
    kill_at(config, folder, 5)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(config), str(folder)], capture_output=True, text=True, timeout=120)
    status = read_json(folder / "status.json")
    assert done.returncode == 1 and status["state"] == "failed" and ranks_alive(folder) == []
    assert "could not be written" in status["reason"] and "--resume" in status["reason"], status
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == series(tmp_path / "whole")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(data, tmp_path):
    from arxiv_study.model.configuration import read_run
    from arxiv_study.model.train import prepare_folder
    config, folder = asked(data, tmp_path / "run", steps=9, checkpoint_every=3), tmp_path / "run"
    launch(config, folder, ranks=1)
    before, result = series(folder), read_json(folder / "result.json")
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().split()[-1]
    victim = next(newest.rglob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-10])
    assert launch(config, folder, ranks=1, resume=True)["heldout"] == result["heldout"]
    assert series(folder) == before
    assert "is missing or is not what was written" in (folder / "rank-0.log").read_text()
    with pytest.raises(StudyError, match=r"start it anew, without --resume.*\ntraining.steps: was 9, now 10$"):
        prepare_folder(read_run(asked(data, folder, steps=10, checkpoint_every=4)), folder, resume=True)


def three_checkpoints(folder, n_bytes=300):
    "Three sealed folders with two files each, without an engine"
    from arxiv_study.model.checkpoints import seal
    for number, name in enumerate(("trunk-000002", "fork-000003", "trunk-000004"), 1):
        (folder / name / "deepspeed").mkdir(parents=True)
        for rank in range(2): (folder / name / "deepspeed" / f"rank_{rank}.pt").write_bytes(random.Random(rank).randbytes(n_bytes))
        seal(folder / name, dict(step=number, losses=[0.1 * number]), "R03-s0", number, 2)
    (folder / "latest").write_text("trunk-000004\n")


def damages(whole, rng):
    "What a byte string may become: empty, cut anywhere, with any one byte changed, with bytes added"
    yield from (whole[:n] for n in range(len(whole)))
    yield from (bytes([*whole[:n], rng.randrange(256), *whole[n + 1:]]) for n in range(len(whole)))
    yield from (whole + b"\0", b"\0" * len(whole), b"[]", b"{}", b"null", b"[" * 100_000, b"\xff\xfe")


@pytest.mark.parametrize("victim", ["manifest.json", "deepspeed/rank_1.pt"])
def test_whatever_happens_to_a_file_the_one_before_is_used(tmp_path, victim):
    "Every cut and a change of every byte, of a manifest and of a rank's file: either the newest still says what it said, or it is warned of and the one before is used"
    from arxiv_study.model.checkpoints import newest_whole, verified_state
    three_checkpoints(tmp_path)
    path, refused = tmp_path / "trunk-000004" / victim, 0
    whole = path.read_bytes()
    for n, changed in enumerate(damages(whole, random.Random(1))):
        path.write_bytes(changed)
        name, warnings = newest_whole(tmp_path, "R03-s0")
        if name == "trunk-000004": assert verified_state(tmp_path / name) == dict(step=3, losses=[0.1 * 3]), n
        else:
            assert name == "fork-000003" and len(warnings) == 1 and "this checkpoint cannot be used" in warnings[0], (n, name, warnings)
            refused += 1
    assert refused > 1.9 * len(whole)


def test_a_name_that_is_missing_or_one_too_many_is_refused(tmp_path):
    from arxiv_study.model.checkpoints import newest_whole
    three_checkpoints(tmp_path)
    newest = tmp_path / "trunk-000004" / "deepspeed"
    (newest / "more.pt").write_bytes(b"1")
    assert newest_whole(tmp_path)[0] == "fork-000003"
    (newest / "more.pt").unlink()
    assert newest_whole(tmp_path) == ("trunk-000004", [])
    moved = tmp_path.parent / "elsewhere.pt"
    (newest / "rank_0.pt").rename(moved)
    assert newest_whole(tmp_path)[0] == "fork-000003"
    (newest / "rank_0.pt").symlink_to(moved)  # the same bytes, but of a file that may change
    assert newest_whole(tmp_path)[0] == "fork-000003"
    (tmp_path / "fork-000003" / "manifest.json").unlink()
    assert newest_whole(tmp_path)[0] == "trunk-000002"


def test_latest_is_a_note_and_no_more(tmp_path):
    "Missing, empty, cut, or naming what is not there: the folders are found by their manifests, in the order in which they were written"
    from arxiv_study.model.checkpoints import newest_whole, saved_names
    three_checkpoints(tmp_path)
    for text in (b"", b"trunk-0000", b"trunk-000099\n", b"trunk-000002\n", b"\xff\xfe", b"../../etc\n"):
        (tmp_path / "latest").write_bytes(text)
        name, [warning] = newest_whole(tmp_path)
        assert name == "trunk-000004" and "latest does not name trunk-000004" in warning
    (tmp_path / "latest").unlink()
    assert newest_whole(tmp_path)[0] == "trunk-000004" and saved_names(tmp_path) == ["trunk-000002", "fork-000003", "trunk-000004"]


def test_a_branch_is_not_resumed_without_its_fork(tmp_path):
    "A checkpoint on a branch is of no use when the fork to which the run must come back is damaged"
    from arxiv_study.model.checkpoints import newest_whole, seal
    three_checkpoints(tmp_path)
    (tmp_path / "trunk-000004" / "manifest.json").unlink()
    seal(tmp_path / "trunk-000004", {}, "R03-s0", 3, 2, needs=("fork-000003",))
    assert newest_whole(tmp_path)[0] == "trunk-000004"
    (tmp_path / "fork-000003" / "deepspeed" / "rank_1.pt").write_bytes(b"")
    assert newest_whole(tmp_path)[0] == "trunk-000002"


def test_another_runs_checkpoint_is_refused(tmp_path):
    from arxiv_study.model.checkpoints import newest_whole
    three_checkpoints(tmp_path)
    with pytest.raises(StudyError, match="belongs to the run R03-s0 and this is R03-s1"): newest_whole(tmp_path, "R03-s1")


def test_a_disk_that_is_full_for_one_rank_ends_all_with_one_reason(data, tmp_path):
    "Only rank 1 cannot write: both end at once, with its reason, and the run goes on from the checkpoint before"
    recipe = dict(steps=12, checkpoint_every=3)
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "full", **recipe), tmp_path / "full"
    processes = start_ranks(config, folder, 2, resume=False)
    try:
        wait_for(lambda: (folder / "checkpoints" / "latest").is_file(), processes)
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
        begun = time.monotonic()
        codes = [p.wait(timeout=60) for p in processes]
    finally: stop(processes)
    assert codes == [1, 1] and time.monotonic() - begun < 30  # a collective would have waited for ten minutes
    reason = read_json(folder / "status.json")["reason"]
    assert "could not be written" in reason and "rank 1: " in reason and "--resume" in reason, reason
    for rank in range(2): assert reason in (folder / f"rank-{rank}.log").read_text()
    assert ranks_alive(folder) == [] and not list((folder / "checkpoints").glob(".*"))
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == series(tmp_path / "whole")


def wait_for(true, processes, seconds=90):
    "Until something holds, while processes run"
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until and any(p.poll() is None for p in processes), "it did not happen in time"
        time.sleep(0.002)


@contextmanager
def small_disk(folder, size):
    "A file system of so many bytes, or a skipped test where none may be mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode: pytest.skip("a small file system cannot be mounted here")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_without_room_is_noticed_before_anything_is_written(data, tmp_path):
    "On a real small disk: the sentence says what is needed and what is free, and with more room the run goes on"
    with small_disk(tmp_path / "disk", 900_000) as disk:
        recipe = dict(steps=12, checkpoint_every=3)
        config = asked(data, tmp_path / "run", **recipe)
        with pytest.raises(StudyError, match=r"could not be written to .* \(rank 0: it takes \d+ kB and [\d.]+ kB are free\): see to the space there"): launch(config, disk / "run", ranks=2)
        left = sorted(p.name for p in (disk / "run" / "checkpoints").iterdir())
        assert left == ["latest", left[1]] and left[1].startswith("trunk-0000"), left
        subprocess.run(["mount", "-o", "remount,size=9000000", str(disk)], check=True)
        launch(config, disk / "run", ranks=2, resume=True)
        launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
        assert series(disk / "run") == series(tmp_path / "whole")


class Planted:
    "What pickle would turn into a call of os.mkdir"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind, sealed", [("torch.save", False), ("torch.save", True), ("pickle", True), ("among tensors", True)])
def test_a_planted_pickle_is_not_executed(data, tmp_path, kind, sealed, trained):
    "In the file of rank 1, with and without its checksum in the manifest: nothing of it runs, and the resume that finds nothing else says why"
    import pickle
    from arxiv_study.model.checkpoints import read_manifest, seal
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config, path, executed = asked(data, folder, **TRAINED), folder / "checkpoints" / "trunk-000006", tmp_path / "executed"
    victim = next(path.rglob("*zero_pp_rank_1_*optim_states.pt"))
    planted = Planted(executed)
    if kind == "among tensors": planted = {**torch.load(victim, weights_only=False), "extra": planted}
    victim.write_bytes(pickle.dumps(planted)) if kind == "pickle" else torch.save(planted, victim)
    manifest = read_manifest(path)
    if sealed:
        (path / "manifest.json").unlink()
        seal(path, manifest["state"], manifest["run"], manifest["number"], manifest["ranks"])
        with pytest.raises(StudyError, match="trunk-000006 cannot be loaded .rank [01]: .*zero_pp_rank_1_.*optim_states.pt (would call posix.mkdir|is no file of PyTorch)"): launch(config, folder, ranks=2, resume=True)
        assert ranks_alive(folder) == []
    else:
        launch(config, folder, ranks=2, resume=True)  # there is none before: it starts with step 0
        assert "is missing or is not what was written" in (folder / "rank-0.log").read_text()
        assert series(folder) == series(trained.parent / "whole")
    assert not executed.exists()


TRAINED = dict(steps=10, checkpoint_every=6)

@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    "A run of two ranks whose last checkpoint is that of step 6, as if it had been killed then; beside it the whole run"
    root = tmp_path_factory.mktemp("trained")
    return stopped_at_6(data, root, ranks=2)


def stopped_at_6(data, root, ranks, **more):
    "Train ten steps, and take back what came after the sixth"
    launch(asked(data, root / "whole", **TRAINED, **more), root / "whole", ranks=ranks)
    shutil.copytree(root / "whole", root / "stopped")
    (root / "stopped" / "result.json").unlink()
    assert [p.name for p in (root / "stopped" / "checkpoints").iterdir() if p.is_dir()] == ["trunk-000006"]
    return root / "stopped"


ONLY_LOAD = """
import os, sys, torch
from pathlib import Path
from arxiv_study.model.configuration import read_run
from arxiv_study.model.train import Training
training = Training(read_run(Path(sys.argv[1])), Path(sys.argv[2]))
training.restore()
training.metrics = open("/dev/null", "a")
training.checkpoint("loaded")
torch.distributed.barrier()
os._exit(0)  # as a rank of a run ends: while threads of gloo live, the interpreter's own end may abort
"""

def load_and_save(config, folder, ranks):
    "What so many ranks hold right after loading, saved again as the checkpoint `loaded`"
    meeting = folder / ".meeting"
    processes = [subprocess.Popen([sys.executable, "-c", ONLY_LOAD, str(config), str(folder)], env=rank_environment(r, ranks, meeting), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for r in range(ranks)]
    try: said = [p.communicate(timeout=120)[0] for p in processes]
    finally: stop(processes)
    assert not any(p.returncode for p in processes), ([p.returncode for p in processes], *(s[-1500:] for s in said))
    meeting.unlink(missing_ok=True)


def moments(path, key, sizes):
    "A group's moment or fp32 weights over all ranks' files, put together by hand, without the padding that fills the last rank's part up"
    files = sorted(path.rglob("*optim_states.pt"), key=lambda p: int(p.name.split("rank_")[1].split("_")[0]))
    held = [torch.load(f, weights_only=False)["optimizer_state_dict"] for f in files]
    of = lambda sd, g: sd["single_partition_of_fp32_groups"][g] if key == "fp32" else sd["base_optimizer_state"]["state"][g][key]
    whole = [torch.cat([of(sd, g) for sd in held]) for g in range(len(sizes))]
    for g, n in enumerate(sizes): assert len(whole[g]) - n < 64 and not whole[g][n:].any()
    return [w[:n] for w, n in zip(whole, sizes)]


def rebatched(config, **batches):
    "The same configuration file with other rows or accumulation"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "batches": {**raw["batches"], **batches}}))
    return config


def group_sizes():
    "Elements of the two groups of AdamW: hidden matrices, and the rest"
    from arxiv_study.model.configuration import TrainingConfig
    from arxiv_study.model.optimization import parameter_groups
    from arxiv_study.model.transformer import Transformer
    from model_runs import TINY
    return [sum(p.numel() for p in g["params"]) for g in parameter_groups(Transformer(TINY), TINY, TrainingConfig(steps=1))]


def close(series, expected):
    "Losses and gradient norms to the accuracy of fp32 sums in another order"
    assert [x[:2] for x in series] == [x[:2] for x in expected]
    for (_, _, loss, norm), (_, step, loss_, norm_) in zip(series, expected):
        assert math.isclose(loss, loss_, rel_tol=2e-6) and math.isclose(norm, norm_, rel_tol=1e-4), (step, loss, loss_, norm, norm_)


@pytest.mark.parametrize("ranks, batches", [pytest.param(1, dict(rows=4), id="2 to 1"), pytest.param(1, dict(rows=2, accumulation=2), id="2 to 1, accumulated", marks=pytest.mark.slow),
                                            pytest.param(4, dict(rows=1), id="2 to 4", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(data, tmp_path, trained, ranks, batches):
    "Weights and moments of every parameter exactly those of the checkpoint, the next steps those of the uninterrupted run to fp32 accuracy"
    folder, expected, sizes = tmp_path / "run", series(trained.parent / "whole"), group_sizes()
    shutil.copytree(trained, folder)
    config = rebatched(asked(data, folder, **TRAINED), **batches)
    load_and_save(config, folder, ranks)
    for key in ("exp_avg", "exp_avg_sq", "fp32"):
        source, loaded = (moments(folder / "checkpoints" / name, key, sizes) for name in ("trunk-000006", "loaded"))
        assert all(torch.equal(a, b) for a, b in zip(source, loaded)) and all(x.any() for x in source), key
    shutil.rmtree(folder / "checkpoints" / "loaded")
    result = launch(config, folder, ranks=ranks, resume=True)
    assert series(folder)[:6] == expected[:6]
    close(series(folder)[6:], expected[6:])
    assert result["ranks"] == ranks and result["tokens"] == read_json(trained.parent / "whole" / "result.json")["tokens"]
    assert [(r["checkpoint"], r["ranks"]) for r in read_jsonl(folder / "metrics.jsonl") if r.get("event") == "resumed"] == [("trunk-000006", ranks)]
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize("stage, precision", [pytest.param(0, "fp32", marks=pytest.mark.slow), pytest.param(1, "fp32", marks=pytest.mark.slow), (3, "fp32"), pytest.param(2, "bf16", marks=pytest.mark.slow), pytest.param(2, "fp16", marks=pytest.mark.slow)])
def test_ranks_change_at_every_stage(data, tmp_path, stage, precision):
    "One rank's checkpoint on two; in bf16 a sum in another order is another rounding of it"
    more = dict(zero_stage=stage, precision=precision, lr_multiplier=0.5)
    stopped = stopped_at_6_of(data, tmp_path, more)
    config, expected = asked(data, stopped, **TRAINED, **more), series(tmp_path / "whole")
    launch(config, stopped, ranks=2, resume=True)
    assert series(stopped)[:6] == expected[:6]
    if precision == "fp32": close(series(stopped)[6:], expected[6:])
    else:
        assert abs(series(stopped)[6][2] - expected[6][2]) < 2e-3
        assert all(abs(a[2] - b[2]) < 2e-2 for a, b in zip(series(stopped), expected))


def stopped_at_6_of(data, root, more):
    "The same on one rank, with its rows of both"
    launch(rebatched(asked(data, root / "whole", **TRAINED, **more), rows=4), root / "whole", ranks=1)
    shutil.copytree(root / "whole", root / "stopped")
    return root / "stopped"


def test_a_batch_of_another_size_is_refused(data, tmp_path, trained):
    "The same rows on one rank would serve half the tokens a step"
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*.pt")}
    with pytest.raises(StudyError, match="rows x accumulation x ranks: was 4, now 2"): launch(asked(data, folder, **TRAINED), folder, ranks=1, resume=True)
    assert {p: p.read_bytes() for p in folder.rglob("*.pt")} == before
    launch(asked(data, folder, **TRAINED), folder, ranks=2, resume=True)
    assert series(folder) == series(trained.parent / "whole")


def test_what_a_resume_may_change(data, tmp_path, trained):
    "Cadences, trackers and timeouts: the same series to the bit. Other shards under the same path: refused"
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    config = asked(data, folder, guard=dict(collective_timeout_s=300.0), **{**TRAINED, "checkpoint_every": 2, "evaluate_every": 2, "keep_best": True, "keep_checkpoints": 3})
    raw = json.loads(config.read_text())
    moved = tmp_path / "moved"
    shutil.copytree(data / "tokens", moved)
    config.write_text(json.dumps({**raw, "tokens_dir": str(moved)}))
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == series(trained.parent / "whole")
    assert read_json(folder / "config.json")["training"]["checkpoint_every"] == 2
    shards = read_json(moved / "shards.json")
    (moved / "shards.json").write_text(json.dumps({**shards, "fingerprint": "0badc0de"}))
    with pytest.raises(StudyError, match=f"shards: was {shards['fingerprint']}, now 0badc0de"): launch(config, folder, ranks=2, resume=True)


def test_the_best_checkpoint_is_kept(data, tmp_path, monkeypatch):
    "A rate that unlearns after a few steps: the checkpoint with the lowest of the logged measurements outlives the last two, and its model measures the same again"
    from arxiv_study.model import evaluate
    from arxiv_study.model.checkpoints import load_model
    recipe = dict(steps=12, schedule="linear", warmup_steps=6, lr_multiplier=1000.0, clip=None, checkpoint_every=2, evaluate_every=2, keep_best=True)
    guard = dict(fewest=100)
    config, folder = asked(data, tmp_path / "run", guard=guard, **recipe), tmp_path / "run"
    launch(config, folder, ranks=2)
    measured = {r["step"]: r["bits_per_byte"] for r in read_jsonl(folder / "metrics.jsonl") if r.get("event") == "evaluation" and r["step"] < 12}
    best = min(measured, key=measured.get)
    assert best < 10 and sorted(p.name for p in (folder / "checkpoints").iterdir() if p.is_dir()) == [f"trunk-{k:06d}" for k in (best, 10, 12)]
    state = read_json(folder / "checkpoints" / "trunk-000012" / "manifest.json")["state"]
    assert state["progress"]["best"] == dict(name=f"trunk-{best:06d}", step=best, bits_per_byte=measured[best])
    monkeypatch.setattr(evaluate, "load_model", lambda folder: load_model(folder, f"trunk-{best:06d}"))
    assert math.isclose(evaluate.evaluate_run(folder)[-1]["bits_per_byte"], measured[best], rel_tol=1e-5)


def test_what_happened_to_a_run_stays_in_its_log(data, tmp_path):
    "Pre-empted twice and resumed twice: each of it is there, and each step once"
    config, folder = asked(data, tmp_path / "run", steps=60, checkpoint_every=10), tmp_path / "run"
    for k in range(2):
        processes, metrics = start_ranks(config, folder, 2, resume=k > 0), folder / "metrics.jsonl"
        try:
            wait_for(lambda: metrics.is_file() and f'"step": {8 + 20 * k},' in metrics.read_text(), processes)
            processes[1].send_signal(signal.SIGTERM)
            assert [p.wait(timeout=60) for p in processes] == [0, 0]
        finally: stop(processes)
    launch(config, folder, ranks=2, resume=True)
    lines = read_jsonl(folder / "metrics.jsonl")
    life = [(r["event"], r["step"]) for r in lines if r.get("event") in ("preempted", "resumed")]
    assert [e for e, _ in life] == ["preempted", "resumed"] * 2 and life[0][1] == life[1][1] and life[2][1] == life[3][1], life
    assert [r["step"] for r in lines if "event" not in r] == list(range(60))
    written = [(r["step"], r["name"]) for r in lines if r.get("event") == "checkpoint"]
    assert len(written) == len(set(written)) and {k for k, _ in written} >= {10, 20, 30, 40, 50, 60}
