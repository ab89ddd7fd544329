"""The guard at work on two ranks: poisoned batches, what is done about them, and kills in the middle of it."""
import math, os, signal, subprocess, sys
import pytest
from arxiv_study.model.launch import rank_environment
from arxiv_study.storage import read_json, read_jsonl
from model_runs import asked, data, series

GUARD = dict(window=16, fewest=8, threshold=4.0)
STEPS, BAD = 32, 24  # steps of a run, and the batch that is poisoned

RANK = """
import math, os, signal, sys
import numpy as np
from arxiv_study.model import checkpoints, train
from arxiv_study.tokens.batches import Batches
poison, kill, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
rank, read, judge, load, seal, step = int(os.environ["RANK"]), Batches._read, train.Training.judge, train.load_checkpoint, checkpoints.seal, train.Training.train_step

def poisoned(self, k):
    made = read(self, k)
    if str(k) not in poison.split(","): return made
    tokens = np.random.default_rng([k, self.rank]).integers(0, 256, made["tokens"].shape)
    return dict(made, tokens=tokens, targets=tokens[..., 1:])

def told(self, k, loss, norm):
    decision = judge(self, k, loss, norm)
    if decision.action != "take": print("decided", k, loss, norm, decision, flush=True)
    return decision

def die_if(it_is_time):
    if it_is_time and rank == 0: os.kill(os.getpid(), signal.SIGKILL)

def dying_load(engine, *rest, **more):
    die_if(kill == "load" and engine.global_steps > 0)
    return load(engine, *rest, **more)

def dying_seal(folder, *rest, **more):
    die_if(kill == "seal" and "back" in folder.name)
    return seal(folder, *rest, **more)

def dying_step(self, k, factor):
    die_if(kill == "after" and self.progress.rollbacks and k == self.progress.step == 22)
    return step(self, k, factor)

Batches._read, train.Training.judge, train.load_checkpoint, checkpoints.seal, train.Training.train_step = poisoned, told, dying_load, dying_seal, dying_step
code = train.main(arguments)
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""


def on_two_ranks(config, folder, *arguments, script, resume=False, killed=False):  # what each rank has printed
    "Run a script on two ranks; where one is killed, the other is ended too"
    folder.mkdir(exist_ok=True)
    said = [folder.parent / f"{folder.name}-{resume}-rank-{r}.log" for r in range(2)]
    command = [sys.executable, "-c", script, *map(str, arguments), str(config), "--out", str(folder), *["--resume"] * resume]
    ranks = [subprocess.Popen(command, env=rank_environment(r, 2, folder.parent / f"meeting-{folder.name}-{resume}"), stdout=open(said[r], "w"), stderr=subprocess.STDOUT) for r in range(2)]
    try:
        codes = [p.wait(timeout=180) for p in ranks]
        assert codes[0] == -signal.SIGKILL if killed else codes == [0, 0], said[0].read_text() + said[1].read_text()
    finally:
        for p in ranks: p.kill()
    return [p.read_text().splitlines() for p in said]


def train(config, folder, poison=(), kill="", resume=False):  # what each rank decided
    "Train with poisoned batches, up to a kill if one is asked for"
    said = on_two_ranks(config, folder, ",".join(map(str, poison)), kill, script=RANK, resume=resume, killed=bool(kill))
    return [[line for line in lines if line.startswith("decided")] for lines in said]


def events(folder, *names):
    return [r for r in read_jsonl(folder / "metrics.jsonl") if r.get("event") in names]


def plain(data, config_path, plan, poison=()):  # plan: schedule step and batch of each step that is taken
    "Losses and gradient norms of bare PyTorch on one process, given which batch each step learns from"
    import numpy as np, torch
    from arxiv_study.model.configuration import read_run
    from arxiv_study.model.optimization import parameter_groups, rate_factor, segments, warmup_steps
    from arxiv_study.model.transformer import Transformer, summed_loss
    from arxiv_study.tokens.batches import BatchConfig, Batches
    torch.set_num_threads(1)
    run = read_run(config_path)
    model = Transformer(run.model, seed=run.training.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, run.model, run.training), betas=run.training.betas, eps=run.training.eps)
    loaders, parts, found = [Batches(data / "tokens", BatchConfig(**run.batches), r, 2) for r in range(2)], segments(run.training, STEPS, 256), []
    for step, k in plan:
        part = next(s for s in parts if s.start <= step < s.stop)
        for g in optimizer.param_groups: g["lr"] = g["peak_lr"] * rate_factor(step, part, run.training, warmup_steps(run.training, parts), STEPS)
        rows = [b.batch(k).tokens if k not in poison else np.random.default_rng([k, r]).integers(0, 256, b.batch(k).tokens.shape) for r, b in enumerate(loaders)]
        rows_BT = torch.from_numpy(np.concatenate([x.reshape(-1, x.shape[-1]) for x in rows]))
        loss = summed_loss(model, rows_BT[:, :-1], rows_BT[:, 1:]) / rows_BT[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.training.clip)
        optimizer.step()
        found.append((step, loss.item(), norm.item()))
    for b in loaders: b.close()
    return found


def agree(found, expected):
    "Steps, losses and gradient norms, up to sums in another order"
    assert [s for _, s, *_ in found] == [s for s, *_ in expected]
    for (_, step, loss, norm), (_, loss_1, norm_1) in zip(found, expected, strict=True):
        assert loss == pytest.approx(loss_1, rel=3e-5), step
        assert norm == pytest.approx(norm_1, rel=5e-4), step


@pytest.mark.parametrize("on_spike,batches,training", [
    ("record", {}, {}), ("skip", {}, {}), ("rollback", {}, {}), ("skip", dict(accumulation=2), dict(zero_stage=0)), ("rollback", dict(accumulation=2), {}), ("rollback", {}, dict(zero_stage=3)), ("rollback", {}, dict(zero_stage=0))])
def test_a_poisoned_batch_against_plain_pytorch(data, tmp_path, on_spike, batches, training):
    "What each answer to a spike does to all later steps is what a bare loop does that is told which batches to learn from"
    config = asked(data, tmp_path / "run", batches, guard=dict(GUARD, on_spike=on_spike), steps=STEPS, checkpoint_every=10, **training)
    said = train(config, tmp_path / "run", poison=[BAD])
    assert said[0] == said[1] and len(said[0]) == (on_spike != "record")
    plan = {"record": [(k, k) for k in range(STEPS)], "skip": [(k, k) for k in range(STEPS) if k != BAD],
            "rollback": [(k, k if k < 20 else k + BAD + 1 - 20) for k in range(STEPS)]}[on_spike]
    found, expected = series(tmp_path / "run"), plain(data, config, plan, poison=[BAD])
    if on_spike == "rollback":  # the steps that were taken back stand in the file, too
        agree(found[20:BAD], plain(data, config, [(k, k) for k in range(BAD)])[20:])
        found = found[:20] + found[BAD:]
    agree(found, expected)
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["outcome"], result["spikes"], result["skipped"], result["rollbacks"]) == ("trained", 1, int(on_spike == "skip"), int(on_spike == "rollback"))
    assert [(r["event"], r["step"]) for r in events(tmp_path / "run", "spike", "skipped", "rolled_back")] == \
        [("spike", BAD), *{"record": [], "skip": [("skipped", BAD)], "rollback": [("rolled_back", BAD)]}[on_spike]]


@pytest.fixture(scope="module")
def rolled_back(data, tmp_path_factory):
    "A run with one rollback that nobody interrupts"
    root = tmp_path_factory.mktemp("whole")
    config = asked(data, root / "run", guard=dict(GUARD, on_spike="rollback"), steps=STEPS, checkpoint_every=10)
    train(config, root / "run", poison=[BAD])
    return config, root / "run"


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["load", "seal", "after"])
def test_a_kill_around_a_rollback_changes_nothing(rolled_back, tmp_path, kill):
    "SIGKILL as the old checkpoint is read, as the new one is written, and two steps later: resumed, the file of metrics is the uninterrupted one"
    config, whole = rolled_back
    train(config, tmp_path / "run", poison=[BAD], kill=kill)
    assert not (tmp_path / "run" / "result.json").exists()
    train(config, tmp_path / "run", poison=[BAD], resume=True)
    assert series(tmp_path / "run") == series(whole)
    counted = ("spike", "rolled_back", "checkpoint", "evaluation")
    assert events(tmp_path / "run", *counted) == events(whole, *counted) and len(events(whole, "rolled_back")) == 1
    [resumed] = events(tmp_path / "run", "resumed")
    assert resumed["step"] == 20
    results = [read_json(f / "result.json") for f in (tmp_path / "run", whole)]
    assert all(results[0][k] == results[1][k] for k in ("heldout", "spikes", "rollbacks", "skipped", "tokens", "train_loss"))


@pytest.mark.parametrize("on_spike,limit,poison,reason", [
    ("rollback", dict(most_rollbacks=1), [BAD, 27], "the loss of step 22 is a spike after 1 rollbacks"),
    ("skip", dict(most_skips=2), [BAD, BAD + 1, BAD + 2], "the loss of step 26 is a spike after 2 skipped steps in a row")])
def test_what_does_not_help_ends(data, tmp_path, on_spike, limit, poison, reason):
    "A spike after all rollbacks, or after as many skips in a row, and the run has diverged"
    config = asked(data, tmp_path / "run", guard=dict(GUARD, on_spike=on_spike, **limit), steps=STEPS, checkpoint_every=10)
    train(config, tmp_path / "run", poison=poison)
    assert read_json(tmp_path / "run" / "status.json") == dict(state="done", outcome="diverged", reason=reason)
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["rollbacks"], result["skipped"]) == ((1, 0) if on_spike == "rollback" else (0, 2)) and math.isfinite(result["heldout"]["bits_per_byte"])
    [diverged] = events(tmp_path / "run", "diverged")
    assert diverged["reason"] == reason


@pytest.mark.slow
def test_without_a_checkpoint_a_rollback_is_a_skip(data, tmp_path):
    "And says so"
    for on_spike in "rollback", "skip":
        config = asked(data, tmp_path / on_spike, guard=dict(GUARD, on_spike=on_spike), steps=STEPS)
        train(config, tmp_path / on_spike, poison=[BAD])
    assert series(tmp_path / "rollback") == series(tmp_path / "skip") and BAD not in [s for _, s, *_ in series(tmp_path / "skip")]
    assert [r["reason"] for f in ("rollback", "skip") for r in events(tmp_path / f, "skipped")] == ["there is no checkpoint yet to roll back to", None]


@pytest.mark.slow
def test_a_branch_that_rolled_back_leaves_no_trace_on_the_trunk(data, tmp_path):
    "The bad batch lies on a branch and on the trunk: both roll back to the fork, and the trunk is that of a run without branches"
    recipe = dict(guard=dict(GUARD, on_spike="rollback"), steps=40, warmup_steps=2)
    train(asked(data, tmp_path / "branched", branch_tokens=[26 * 256], **recipe), tmp_path / "branched", poison=[BAD])
    train(asked(data, tmp_path / "plain", checkpoint_every=21, **recipe), tmp_path / "plain", poison=[BAD])
    trunk = lambda folder: [s for s in series(folder) if s[0] in ("trunk", "branch-40")]
    assert [s[1:] for s in trunk(tmp_path / "branched")] == [s[1:] for s in trunk(tmp_path / "plain")]
    assert [(r["to"], r["rollbacks"], r["checkpoint"]) for r in events(tmp_path / "branched", "rolled_back")] == [(21, 1, "fork-000021")] * 2
    result = read_json(tmp_path / "branched" / "result.json")
    assert [b["tokens"] for b in result["branches"]] == [26 * 256, 40 * 256] and result["rollbacks"] == 1


NOT_FINITE = """
import os, sys
from arxiv_study.model import train
where, factor, arguments, made = sys.argv[1], float(sys.argv[2]), sys.argv[3:], train.summed_losses
def spoilt(engine, *batch):
    objective, nats = made(engine, *batch)
    if engine.global_steps != 3 or os.environ["RANK"] == "0": return objective, nats
    return objective * factor, nats * factor if where == "loss" else nats
train.summed_losses = spoilt
code = train.main(arguments)
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)
"""

def spoil(config, folder, where, factor):
    "A run in which the fourth batch of rank 1 is multiplied by a factor"
    on_two_ranks(config, folder, where, factor, script=NOT_FINITE)


@pytest.mark.parametrize("where,factor,on_spike", [("loss", "nan", "rollback"), ("loss", "inf", "skip"), ("gradient", "nan", "skip"), ("gradient", "inf", "rollback")])
def test_what_is_not_finite_on_one_rank_stops_both(data, tmp_path, where, factor, on_spike):
    "Whatever is done about spikes; the model that is left is the one that three steps gave"
    import torch
    from safetensors.torch import load_file
    recipe = dict(schedule="cosine", checkpoint_every=1, guard=dict(GUARD, on_spike=on_spike))
    spoil(asked(data, tmp_path / "run", steps=8, **recipe), tmp_path / "run", where, factor)
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["outcome"]) == ("done", "diverged") and "of step 3 is" in status["reason"]
    assert len(series(tmp_path / "run")) == 3 and events(tmp_path / "run", "spike", "skipped", "rolled_back") == []
    kept = torch.load(tmp_path / "run" / "checkpoints" / "trunk-000003" / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    left = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(left[k], kept[k]) for k in left) and read_json(tmp_path / "run" / "result.json")["steps"] == 3


def noise_by_hand(data, config_path, ranks=2):
    "Signal and variance of step 0 from the gradient of each micro-batch, each computed by itself"
    import torch
    from arxiv_study.model.configuration import read_run
    from arxiv_study.model.transformer import Transformer, summed_loss
    from arxiv_study.tokens.batches import BatchConfig, Batches
    run, gradients = read_run(config_path), []
    for r in range(ranks):
        loader = Batches(data / "tokens", BatchConfig(**run.batches), r, ranks)
        for rows in loader.batch(0).tokens:
            model, rows_BT = Transformer(run.model, seed=run.training.seed), torch.from_numpy(rows)
            (summed_loss(model, rows_BT[:, :-1], rows_BT[:, 1:]) / rows_BT[:, 1:].numel()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
        loader.close()
    g_ND, n = torch.stack(gradients), len(gradients)
    b = rows_BT[:, 1:].numel()  # targets of a micro-batch
    variance = b * (g_ND - g_ND.mean(0)).square().sum().item() / (n - 1)  # the unbiased estimate, from the scatter around the mean
    return g_ND.mean(0).square().sum().item() - variance / (b * n), variance


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage,accumulation", [(2, 1), (2, 2), (0, 2), (3, 1)])
def test_measuring_the_noise_changes_no_bit(data, tmp_path, zero_stage, accumulation):
    "The series with and without, and the first estimate against gradients taken one by one"
    recipe = dict(batches=dict(accumulation=accumulation), steps=9, zero_stage=zero_stage)
    for name, every in ("without", None), ("with", 4): train(asked(data, tmp_path / name, noise_every=every, **recipe), tmp_path / name)
    assert series(tmp_path / "with") == series(tmp_path / "without")
    found, signal_variance = events(tmp_path / "with", "noise"), noise_by_hand(data, tmp_path / "with.json")
    assert [r["step"] for r in found] == [0, 4, 8] and events(tmp_path / "without", "noise") == []
    assert (found[0]["signal"], found[0]["variance"]) == pytest.approx(signal_variance, rel=1e-4)
    noise, last = read_json(tmp_path / "with" / "result.json")["noise"], found[1:]
    assert noise["tokens"] == pytest.approx(sum(r["variance"] for r in last) / sum(r["signal"] for r in last)) and noise["steps"] == 2
    assert read_json(tmp_path / "without" / "result.json")["noise"] is None


def test_an_overflow_in_fp16_lowers_the_scale_and_is_survived(data, tmp_path):
    "The gradient of step 3 is made too large for fp16: its batch is lost, and nothing else"
    config = asked(data, tmp_path / "run", steps=8, precision="fp16", guard=dict(GUARD, on_spike="rollback"))
    spoil(config, tmp_path / "run", "gradient", "1e4")
    [overflow] = events(tmp_path / "run", "overflow")
    result = read_json(tmp_path / "run" / "result.json")
    assert (overflow["step"], overflow["grad_norm"]) == (3, None) and "overflowed at a loss scale of" in overflow["reason"]
    assert (result["outcome"], result["skipped"], result["spikes"], result["steps"]) == ("trained", 1, 0, 8)
    assert [s for _, s, *_ in series(tmp_path / "run")] == [0, 1, 2, 4, 5, 6, 7]


def test_evaluations_and_the_result_tell_domains_apart(data, tmp_path):
    "Bits per byte by domain, perplexity, and the table with standard errors, as evaluation of the finished run computes it"
    from arxiv_study.model.evaluate import evaluate_run
    train(asked(data, tmp_path / "run", steps=4, evaluate_every=2), tmp_path / "run")
    result, rows = read_json(tmp_path / "run" / "result.json"), evaluate_run(tmp_path / "run")
    assert [r["domain"] for r in result["heldout"]["rows"]] == ["cs", "math", "all"]
    for ours, theirs in zip(result["heldout"]["rows"], rows, strict=True):
        assert {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in theirs.items()} == ours
    at_2, at_4 = events(tmp_path / "run", "evaluation")
    assert at_4["by_domain"] == pytest.approx({r["domain"]: r["bits_per_byte"] for r in rows[:-1]}, rel=1e-5) and at_4["perplexity"] == pytest.approx(rows[-1]["perplexity"], rel=1e-5)
    assert at_2["perplexity"] > at_4["perplexity"] and set(at_2["by_domain"]) == {"cs", "math"}
    assert result["hfu"] > result["mfu"] > 0 and result["device_peak_gib"] is None
