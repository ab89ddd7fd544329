"""The rehearsal's event queue against queues that have closed forms, Daly's formula and published optima, and its predictions against corpora and trainings that were measured."""
import json, math, random, statistics, subprocess, sys, time
from collections import Counter
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from arxiv_study.settings import StudyError
from arxiv_study.study import rehearsal as r
from arxiv_study.study.rehearsal import ARXIV, QUIET, STAGES, Constants, Disk, Fleet, Shape, Station, Troubles, daly_s, expected_wall_s, history, play, rehearse, train_through, young_s
from arxiv_study.tokens.devices import STORAGE_CLASSES, StorageClass

SMALL = Shape((500_000_000,)*200, 4e9, 2e9, 50_000, 60_000)
CLI = [sys.executable, "-c", "from arxiv_study.cli import main; main()"]


def steady(name, seconds, cores=1, **more):
    return Station(name, more.pop("nodes", 1), cores, lambda job, now_s, is_cold: now_s + seconds, **more)


@pytest.mark.parametrize("n, c", [(1, 1), (7, 3), (12, 4), (100, 16), (5, 8)])
def test_equal_jobs_take_rounds(n, c): assert play([steady("a", 2.5, c)], list(range(n)), random.Random(0)) == pytest.approx(math.ceil(n/c)*2.5)


@pytest.mark.parametrize("seconds", [(1, 2, 3), (3, 2, 1), (2, 5, 2)])
def test_a_pipeline_is_as_fast_as_its_slowest_stage(seconds):
    "A flow shop of equal jobs: the first passes through all, the others follow at the pace of the slowest"
    line = [steady(str(k), s) for k, s in enumerate(seconds)]
    assert play(line, list(range(40)), random.Random(0), overlapped=True) == pytest.approx(sum(seconds) + 39*max(seconds))
    one_by_one = [steady(str(k), s) for k, s in enumerate(seconds)]
    assert play(one_by_one, list(range(40)), random.Random(0)) == pytest.approx(40*sum(seconds))


def test_first_in_first_out_is_lindleys_recursion():
    "Two stations of one worker: waiting times of the second by Lindley (1952), from the same durations"
    rng = np.random.default_rng(0)
    first, second = rng.exponential(1, 3000), rng.exponential(.8, 3000)
    line = [Station("a", 1, 1, lambda job, now_s, is_cold: now_s + first[job]), Station("b", 1, 1, lambda job, now_s, is_cold: now_s + second[job])]
    play(line, list(range(3000)), random.Random(0), overlapped=True)
    arrived, free, left = np.cumsum(first), 0., []
    for a, s in zip(arrived, second): left.append(free := max(a, free) + s)
    assert [at for at, _ in line[1].done] == pytest.approx(left)


@pytest.mark.parametrize("c, load", [(1, .7), (4, .8)])
def test_waiting_is_erlangs(c, load):
    "M/M/c: arrivals of a Poisson process before c workers with exponential times; the mean wait is Erlang's C over c·mu - lambda"
    n, mu, rng = 60_000, 1., random.Random(3)
    rate, begun = load*c*mu, {}
    def serve(job, now_s, is_cold):
        begun[job] = now_s
        return now_s + rng.expovariate(mu)
    arrivals = steady("arrivals", 0.)
    arrivals.work = lambda job, now_s, is_cold: now_s + rng.expovariate(rate)
    line = [arrivals, Station("served", 1, c, serve)]
    play(line, list(range(n)), random.Random(0), overlapped=True)
    waits = [begun[job] - at for at, job in line[0].done]
    a = rate/mu
    erlang_c = (top := a**c/math.factorial(c)*c/(c - a))/(sum(a**k/math.factorial(k) for k in range(c)) + top)
    assert statistics.fmean(waits) == pytest.approx(erlang_c/(c*mu - rate), rel=.08)


def test_work_between_losses_has_its_closed_form():
    "One worker that loses a job of length s at rate 1/M and is back after R: M (e^(s/M) - 1) (1 + R/M) a job on average"
    s, m, back = 30., 60., 12.
    station = steady("a", s, loss_rate=1/m, replace_s=back)
    took = play([station], list(range(20_000)), random.Random(0))
    assert took/20_000 == pytest.approx(m*math.expm1(s/m)*(1 + back/m), rel=.03)
    assert station.busy_s - station.lost_s == pytest.approx(20_000*s)


def test_a_lost_node_takes_its_own_jobs_along_and_no_others():
    station = steady("a", 10., cores=4, nodes=5, loss_rate=1/40, replace_s=7.)
    play([station], list(range(500)), random.Random(2))
    assert Counter(job for _, job in station.done) == Counter(range(500))
    assert station.busy_s - station.lost_s == pytest.approx(5000) and station.losses > 0 and not station.running
    assert all(b >= a for (a, _), (b, _) in zip(station.done, station.done[1:]))
    assert sorted(station.idle) == sorted(set(station.idle)), "a worker is free twice"


def test_a_lost_node_comes_back_empty_and_cold():
    "Two nodes of two workers and one job: what is idle on a lost node is not handed any, and who comes back must load its tables again"
    cold, events = [], r.Events()
    station = Station("a", 2, 2, lambda job, now_s, is_cold: cold.append(is_cold) or now_s + 1)
    station.line.append("job")
    station.hand_out(0., events, 0)
    station.lose(.5, 0)
    assert list(station.line) == ["job"] and set(station.idle) == {2, 3} and (station.busy_s, station.lost_s, station.losses) == (.5, .5, 1)
    station.give_back(0)
    assert sorted(station.idle) == [0, 1, 2, 3]
    station.line.extend("abc")
    station.hand_out(1., events, 0)
    assert cold == [True]*5, "the worker of the first job has a new machine, and the others have not worked yet"
    for at_s, _, (_, worker, turn) in (events.take() for _ in range(5)): station.finish(at_s, worker, turn)
    assert sorted(job for _, job in station.done) == ["a", "b", "c", "job"], "the first report of the lost worker counts for nothing"
    station.line.append("d")
    station.hand_out(3., events, 0)
    assert cold[-1] is False


def test_a_disk_serves_one_at_a_time():
    disk, rng = Disk(StorageClass(50)), random.Random(0)
    sizes = [rng.randrange(1, 10**8) for _ in range(100)]
    assert [disk.take(0., n) for n in sizes] == pytest.approx(list(np.cumsum(sizes)/50e6))


def test_a_slow_disk_is_slow_for_its_share_of_the_time():
    "Slow stretches and the gaps between them alternate: the mean rate is that of the two shares"
    troubles = Troubles(slow_per_week=20, slow_s=3600, slow_factor=.25)
    disk = Disk(StorageClass(100), troubles, random.Random(0))
    horizon = 400*r.WEEK_S
    n = 0
    while disk.free_s < horizon: n, _ = n + 1, disk.take(disk.free_s, 3e9)
    gap = r.WEEK_S/20
    assert n*3e9/horizon/1e8 == pytest.approx((gap + 3600*.25)/(gap + 3600), rel=.01)
    assert troubles.slow_share() == pytest.approx(3600/(gap + 3600))


@pytest.mark.parametrize("every, save, restart, mtbf", [(3600, 60, 600, 86_400), (1800, 300, 600, 6*3600), (600, 120, 900, 3600)])
def test_training_takes_what_daly_says(every, save, restart, mtbf):
    work = 400*every
    played = statistics.fmean(train_through(work, every, save, restart, mtbf, random.Random(k)).wall_s for k in range(300))
    assert played == pytest.approx(expected_wall_s(work, every, save, restart, mtbf), rel=.01)


def test_without_failures_training_takes_its_work_and_its_checkpoints():
    t = train_through(10_000, 3000, 50, 600, math.inf, random.Random(0))
    assert (t.wall_s, t.saving_s, t.lost_s, t.failures) == (10_200, 200, 0, 0)
    assert expected_wall_s(9000, 3000, 50, 600, math.inf) == 9150


@pytest.mark.parametrize("mtbf_h, published_min", [(24, 117), (6, 57), (.25, 9.1)])
def test_the_best_interval_is_dalys(mtbf_h, published_min):
    "Figures 3 to 5 of Daly (2006), with a checkpoint of 5 minutes and a restart of 10; and the minimum of the exact mean, searched"
    best = daly_s(300, mtbf_h*3600)
    assert best/60 == pytest.approx(published_min, abs=.5)
    from scipy.optimize import minimize_scalar
    exact = minimize_scalar(lambda every: expected_wall_s(1e6, every, 300, 600, mtbf_h*3600), bounds=(10, 1e5), method="bounded").x
    assert best == pytest.approx(exact, rel=.01)


def test_young_is_daly_in_the_limit():
    assert daly_s(1, 1e9)/young_s(1, 1e9) == pytest.approx(1, rel=1e-4)


def test_the_overhead_of_the_best_interval_is_youngs():
    "For rare failures the share lost is √(2δ/M), played and by formula"
    save, mtbf = 30., 7*86_400.
    every = young_s(save, mtbf)
    walls = [train_through(40*86_400, every, save, 0., mtbf, random.Random(k)).wall_s for k in range(1500)]
    assert statistics.fmean(walls)/(40*86_400) - 1 == pytest.approx(math.sqrt(2*save/mtbf), rel=.05)


def test_rows_have_numpys_quantiles():
    done = rehearse(SMALL, histories=9)
    took = np.array([[(s.end_s - s.begin_s)/3600 for s in h] for h in done.histories])
    for row, values in zip(done.rows(), took.T): assert [row["hours_low"], row["hours"], row["hours_high"]] == pytest.approx(np.quantile(values, (.05, .5, .95)), abs=.0051)
    ends = [h[-1].end_s/3600 for h in done.histories]
    assert done.rows()[-1]["hours"] == pytest.approx(np.median(ends), abs=.0051)


@pytest.mark.parametrize("n, workers, start", [(8, 1, 0), (8, 2, 2), (9, 2, 2), (3, 4, 2)])
def test_a_corpus_takes_its_rounds_and_each_worker_its_tables(n, workers, start):
    "Equal tars: rounds of one tar, tables and processes once, what is done once, and what goes by the paper"
    constants = Constants(record_s=1e-3, core_s_per_raw_mb=.1, core_s_per_tex_mb=.5, warm_s=1.5, start_s=2., assembly_s_per_paper=1e-2, assembly_s_per_text_mb=0., once_s=.25)
    shape = Shape((10_000_000,)*n, 4e6*n, 3e6*n, 100*n, 200*n)
    assert r.corpus_s(shape, constants, workers) == pytest.approx(.25 + .2*n + n + 1.5 + start + math.ceil(n/workers)*(10*.1 + 4*.5))


def test_intervals_that_failures_never_let_end_are_left_out():
    table = r.checkpoint_table(Fleet(), Troubles(dead_per_week=100), histories=3)
    assert [row["every_min"] for row in table][:4] == [5, 15, 60, 240] and table[4]["note"] == "best after Young"
    assert [row["note"] for row in r.checkpoint_table(Fleet(), QUIET, histories=2)] == [""]*5


def test_one_seed_one_result():
    one, two, other = (rehearse(SMALL, histories=5, seed=s).rows() for s in (3, 3, 4))
    assert one == two and one != other


@pytest.mark.parametrize("seed", range(5))
def test_no_byte_is_lost(seed):
    "Whatever is lost on the way: each tar is fetched and worked on once, and what a stage reads lies there"
    troubles = Troubles(spot_per_h=60., replace_s=60)
    fetch, corpus, duplicates, tokenizer, pack, train = history(SMALL, Constants(), Fleet(nodes=3, cores=4), troubles, seed)
    assert fetch.bytes_in == fetch.bytes_out == corpus.bytes_in == sum(SMALL.tars)
    assert corpus.bytes_out == duplicates.bytes_in and duplicates.bytes_out == pack.bytes_in and corpus.lost_h > 0
    assert pack.bytes_out == pytest.approx(2*SMALL.text_bytes*28e9/93.8e9), "two bytes a token, at RedPajama's characters a token"
    assert max(s.disk_bytes for s in (fetch, corpus, duplicates)) < train.disk_bytes
    assert [s.begin_s for s in (corpus, duplicates, tokenizer, pack, train)] == [s.end_s for s in (fetch, corpus, duplicates, tokenizer, pack)]


def test_nothing_is_faster_than_its_bounds():
    "Bytes over bandwidth, core seconds over cores, and the planner's days"
    from arxiv_study.model.plan import DEVICES, RECIPES, days
    from arxiv_study.model.configuration import PRESETS, flops_per_token
    exact = Fleet(cores=4, mfu=(.4, .4), storage="nvme")
    off = dict(core=1., link=1., disk=1.)
    fetch, corpus = r.tars_rows(SMALL, Constants(), exact, QUIET, off, random.Random(0))
    raw_mb = sum(SMALL.tars)/1e6
    assert fetch.end_s > raw_mb/STORAGE_CLASSES["object"].mb_per_s
    core_s = raw_mb*Constants().core_s_per_raw_mb + SMALL.tex_bytes/1e6*Constants().core_s_per_tex_mb
    assert corpus.end_s - corpus.begin_s == pytest.approx(core_s/4, rel=.05) and corpus.end_s - corpus.begin_s > core_s/4
    train = r.train_row(exact, QUIET, off, 0., random.Random(0))
    planned = days(RECIPES["paper"].tokens*flops_per_token(PRESETS["paper"], RECIPES["paper"].context), DEVICES["a100-80gb"], 2, .4)
    assert planned < train.end_s/86_400 < planned*1.02, "checkpoints and evaluations take no more than two hundredths"


def hours(**changed):
    constants = Constants(**changed.pop("constants", {}))
    troubles = replace(QUIET, **changed.pop("troubles", {}))
    return {s.stage: s.end_s - s.begin_s for s in history(SMALL, constants, Fleet(**changed), troubles, 1)}


@pytest.mark.parametrize("stage, worse, better", [
    ("fetch", dict(streams=1), dict(streams=4)), ("corpus", dict(cores=2), dict(cores=4)), ("corpus", dict(storage="disk"), dict(storage="nvme")), ("train", dict(gpus=2), dict(gpus=8)),
    ("pack", dict(constants=dict(encoded_mb_per_s=5.)), dict()), ("corpus", dict(constants=dict(core_s_per_tex_mb=1.)), dict()), ("train", dict(gpu="a100-80gb"), dict(gpu="h100-80gb")),
    ("corpus", dict(troubles=dict(spot_per_h=60., replace_s=60.)), dict()), ("train", dict(troubles=dict(dead_per_week=10., restart_s=1800.)), dict()),
    ("corpus", dict(troubles=dict(slow_per_week=5000., slow_s=600.)), dict())])
def test_more_is_not_slower_and_trouble_is(stage, worse, better): assert hours(**worse)[stage] > hours(**better)[stage]*1.02


def test_what_binds_is_named():
    binds = lambda **fleet: {s.stage: s.binds for s in history(SMALL, Constants(), Fleet(**fleet), QUIET, 0)}
    assert binds(cores=1, storage="nvme")["corpus"] == "cores" and binds(cores=64, storage="disk")["corpus"] == "disk"
    assert binds()["fetch"] == "streams" and binds(streams=32, storage="nvme", link_mb_s=500.)["fetch"] == "link"
    assert binds()["train"] == "arithmetic"


def test_a_head_start_is_enough_and_no_more_than_needed():
    "Played second by second, GPUs that begin so late never lack a token, and do if they begin earlier"
    rng = random.Random(0)
    at, done = 0., []
    for _ in range(200): done.append((at := at + rng.expovariate(1.), rng.uniform(5, 15)))
    head = r.head_start_s(done, 12.)
    def waits(start):
        used = 0.
        for at_s, tokens in done:
            if start + used/12. < at_s - 1e-9: return True
            used += tokens
        return False
    assert not waits(head) and waits(head*.999)


def test_real_manifests_are_taken(tmp_path):
    from arxiv_study.corpus.miniature import write_miniature
    write_miniature(tmp_path/"arxiv", 30, 0, papers_per_tar=10)
    shape = r.shape_by(tmp_path/"arxiv"/"src"/"arXiv_src_manifest.xml")
    assert sorted(shape.tars) == sorted(p.stat().st_size for p in (tmp_path/"arxiv"/"src").glob("*.tar"))
    assert shape.tex_bytes/sum(shape.tars) == pytest.approx(ARXIV.tex_bytes/sum(ARXIV.tars))


def test_the_command(tmp_path):
    answer = subprocess.run([*CLI, "rehearse", "--json", "--quiet", "--histories", "3", "--usd-gpu-h", "2", "--html", str(tmp_path/"t.html")], capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0 and answer.stderr == "", answer.stderr
    rows = json.loads(answer.stdout)
    timeline = {row["stage"]: row for row in rows if row["part"] == "timeline"}
    assert list(timeline) == [*STAGES, "all"] and all(row["hours_low"] <= row["hours"] <= row["hours_high"] for row in timeline.values())
    assert 18.5 < timeline["train"]["hours"]/24 < 21.5, "18.5 to 21 days at 40 to 45 % MFU, with checkpoints and a failure or two"
    assert "waits for" in (tmp_path/"t.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments, word", [(["--scale", "desk"], "paper"), (["--storage", "floppy"], "nvme"), (["--gpu", "abacus"], "a100-80gb"), (["--corpus", "/nowhere"], "manifest.json"), (["--manifest", "/nowhere.xml"], "nowhere.xml"),
                                             (["--dead-per-week", "100000"], "--dead-per-week"), (["--spot-per-h", "100000"], "--spot-per-h"), (["--dead-per-week", "300", "--checkpoint-every-min", "300"], "--checkpoint-every-min")])
def test_wrong_arguments_get_one_sentence(arguments, word):
    answer = subprocess.run([*CLI, "rehearse", *arguments], capture_output=True, text=True, timeout=100)
    assert answer.returncode in (1, 2) and answer.stderr.startswith("arxiv-study: ") and answer.stderr.count("\n") == 1 and word in answer.stderr, answer.stderr
