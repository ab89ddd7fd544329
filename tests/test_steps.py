"""The optimizer step is what it says it is: every ZeRO stage and precision against bare PyTorch, steps that are dropped, nothing compiled, and every launcher."""
import json, multiprocessing, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from arxiv_study.model.launch import launch
from arxiv_study.storage import read_json, read_jsonl
from model_runs import TINY, asked, data, series


def plain_series(data, config_path, ranks, n_steps, dtype="float32"):
    "The same run in bare PyTorch on one process, weights and all in one precision: one batch of all ranks' rows, torch's own clipping"
    import torch
    from arxiv_study.model.configuration import read_run
    from arxiv_study.model.optimization import parameter_groups, rate_factor, segments, warmup_steps
    from arxiv_study.model.transformer import Transformer, summed_loss
    from arxiv_study.tokens.batches import BatchConfig, Batches
    torch.set_num_threads(1)
    run = read_run(config_path)
    model = Transformer(run.model, seed=run.training.seed).to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(parameter_groups(model, run.model, run.training), betas=run.training.betas, eps=run.training.eps)
    loaders = [Batches(data / "tokens", BatchConfig(**run.batches), r, ranks) for r in range(ranks)]
    plan, found = segments(run.training, n_steps, 1), []
    for step in range(n_steps):
        segment = next(s for s in plan if s.start <= step < s.stop)
        for g in optimizer.param_groups: g["lr"] = g["peak_lr"] * rate_factor(step, segment, run.training, warmup_steps(run.training, plan), n_steps)
        batches = [b.batch(step) for b in loaders]
        ids, targets = (torch.from_numpy(np.concatenate([x.reshape(-1, x.shape[-1]) for x in xs])) for xs in zip(*[(b.tokens[..., :-1], b.targets) for b in batches]))
        loss = summed_loss(model, ids, targets) / sum(b.n_tokens for b in batches)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.training.clip)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    for b in loaders: b.close()
    return found


UNTIED = replace(TINY, tied=False, qk_norm=True)
STAGES = dict(zero3=dict(zero_stage=3), zero2={}, zero1=dict(zero_stage=1, activation_checkpointing="selective"), zero0=dict(zero_stage=0, activation_checkpointing="none"),
              zero3_untied=dict(model=UNTIED, zero_stage=3, activation_checkpointing="none", loss_chunk=48), zero2_padded=dict(batches=dict(layout="padded")))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("zero1", "zero3_untied") else n for n in STAGES])
def test_zero_stages_agree_with_plain_pytorch(data, tmp_path, name):
    "R23's promise: every ZeRO stage, with and without recomputation, on 2 ranks with accumulation and clipping, against a bare loop on one for 50 steps"
    options = dict(STAGES[name])
    batches = dict(accumulation=2, layout="packed") | options.pop("batches", {})
    # a tenth of the rate: sums in another order differ in the last bit of fp32 (1.2e-7), and at the whole rate training makes that a thousand times larger
    config = asked(data, tmp_path / name, batches, steps=50, lr_multiplier=0.1, **options)
    launch(config, tmp_path / name, ranks=2)
    for (_, step, loss, norm), (loss_1, norm_1) in zip(series(tmp_path / name), plain_series(data, config, 2, 50), strict=True):
        assert loss == pytest.approx(loss_1, rel=1e-6), step
        assert norm == pytest.approx(norm_1, rel=4e-6), step
        assert norm > 1.2, "clipping is at work in every step"


@pytest.mark.parametrize("zero_stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_learns_as_fp32_does(data, tmp_path, zero_stage):
    """Weights in bf16, master weights in fp32: the loss stays within one rounding of bf16 of fp32's, which is 2^-9 of it, for 50 steps.

    Weights around 0.02 must change by 6e-5 for bf16 to notice, and at this rate a step changes matrices by 3e-5 and the rest by 6e-6: without master weights less than half is learned."""
    config = asked(data, tmp_path / "run", dict(accumulation=2), steps=50, precision="bf16", zero_stage=zero_stage, lr_multiplier=0.002)
    launch(config, tmp_path / "run", ranks=2)
    ours, fp32 = np.array([s[2:] for s in series(tmp_path / "run")]), np.array(plain_series(data, config, 2, 50))
    fall = lambda s: s[0, 0] - s[-1, 0]
    np.testing.assert_allclose(ours[:, 0], fp32[:, 0], rtol=2**-9)
    np.testing.assert_allclose(ours[:, 1], fp32[:, 1], rtol=4 * 2**-9)  # a gradient passes several roundings
    assert fall(ours) > 0.9 * fall(fp32) > 0.04
    if zero_stage == 0: assert fall(np.array(plain_series(data, config, 2, 50, "bfloat16"))) < 0.5 * fall(fp32)


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_fp16_learns_as_fp32_does(data, tmp_path, zero_stage):
    "A rounding of fp16 is 2^-11; the loss scale is taken out of gradient norms and updates"
    config = asked(data, tmp_path / "run", dict(accumulation=2), steps=20, precision="fp16", zero_stage=zero_stage, lr_multiplier=0.1)
    launch(config, tmp_path / "run", ranks=2)
    ours, fp32 = np.array([s[2:] for s in series(tmp_path / "run")]), np.array(plain_series(data, config, 2, 20))
    np.testing.assert_allclose(ours[:, 0], fp32[:, 0], rtol=2**-11)
    np.testing.assert_allclose(ours[:, 1], fp32[:, 1], rtol=4 * 2**-11)


def test_an_overflow_in_fp16_lowers_the_scale_and_the_run_goes_on(data, tmp_path):
    "Weights fifty times too large make gradients that 2^16 times themselves are no number in fp16"
    launch(asked(data, tmp_path / "run", model=replace(TINY, init_std=1.0), steps=10, precision="fp16", lr_multiplier=0.01), tmp_path / "run", ranks=2)
    overflows = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r.get("event") == "overflow"]
    assert [r["reason"].split()[-1] for r in overflows] == [str(2 ** (16 - k)) for k in range(len(overflows))] and len(overflows) >= 2
    taken = series(tmp_path / "run")
    assert sorted([s[1] for s in taken] + [r["step"] for r in overflows]) == list(range(10)) and all(np.isfinite(s[2:]).all() for s in taken)
    assert read_json(tmp_path / "run" / "status.json")["state"] == "done"


def rank_does(work, rank, folder, send, arguments):
    "One of two ranks, in a process of its own"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", RENDEZVOUS=f"file://{folder}/rendezvous")
    import torch
    from arxiv_study.model.engine import join_ranks
    torch.set_num_threads(1)
    join_ranks(60)
    send.send(work(rank, *arguments))
    os._exit(0)


def on_two_ranks(work, folder, *arguments):
    "What two ranks return from a function of the rank, in order"
    context, pipes, ranks = multiprocessing.get_context("spawn"), [], []
    for rank in range(2):
        receive, send = context.Pipe(duplex=False)
        ranks.append(context.Process(target=rank_does, args=(work, rank, folder, send, arguments), daemon=True))
        ranks[-1].start()
        send.close()  # so that a rank that dies ends the waiting
        pipes.append(receive)
    try:
        for pipe in pipes: assert pipe.poll(120), "a rank hangs"
        return [pipe.recv() for pipe in pipes]
    finally:
        for r in ranks: r.kill()
        for r in ranks: r.join()


def stepped(rank, stage, precision, plan):
    "Loss and gradient norm of each step, weights, and AdamW's counts of steps, after a plan of batches that are taken, dropped, or poisoned and dropped"
    import torch
    from arxiv_study.model.configuration import TrainingConfig
    from arxiv_study.model.engine import build_engine, drop_gradients, gradient_norm, update, whole_weights
    from arxiv_study.model.transformer import summed_loss
    engine, found = build_engine(TINY, TrainingConfig(steps=9, zero_stage=stage, precision=precision, loss_chunk=16), rows=2, accumulation=2), []
    for act, k in plan:
        loss = 0.0
        for m in range(2):
            ids_BT = torch.randint(0, 258, (2, 65), generator=torch.Generator().manual_seed(10 * k + 2 * m + rank))
            part = summed_loss(engine, ids_BT[:, :-1], ids_BT[:, 1:]) / (0 if act == "poison" else 128)
            engine.backward(part)
            if m == 0: engine.step()
            loss += part.item() / 2
        if act == "take": found.append((loss, update(engine, 1.0, gradient_norm(engine))))
        else: drop_gradients(engine)
    assert {x.dtype for p, moments in engine.basic_optimizer.state.items() for x in (p, *moments.values())} == {torch.float32}, "master weights, and their moments"
    with whole_weights(engine): weights = [p.detach().float().numpy().copy() for p in engine.module.parameters()]
    return found, weights, sorted({float(s["step"]) for s in engine.basic_optimizer.state.values()})


def dropped_and_not(rank, cases):
    "The same steps with and without batches that are dropped before, between and after them"
    seen, unseen = [("drop", 7), ("take", 0), ("poison", 5), ("drop", 6), ("take", 1), ("drop", 8)], [("take", 0), ("take", 1)]
    return [(stepped(rank, *case, seen), stepped(rank, *case, unseen)) for case in cases]


def test_a_dropped_step_leaves_no_trace(tmp_path):
    "At every ZeRO stage and precision: weights to the bit, losses, norms, and AdamW's count of steps"
    cases = [(stage, precision) for precision in ("fp32", "bf16", "fp16") for stage in range(4) if (stage, precision) != (0, "fp16")]
    for rank, results in enumerate(on_two_ranks(dropped_and_not, tmp_path, cases)):
        for case, (seen, unseen) in zip(cases, results, strict=True):
            assert seen[0] == unseen[0] and seen[2] == unseen[2] == [2.0], (rank, *case)
            assert all(np.array_equal(a, b) for a, b in zip(seen[1], unseen[1], strict=True)), (rank, *case)


def saved_and_loaded(rank, cases, folder):
    "Two steps after a checkpoint: at once, after loading it, and in a new engine after loading it"
    import torch
    from arxiv_study.model.checkpoints import load_checkpoint, save_checkpoint
    from arxiv_study.model.configuration import TrainingConfig
    from arxiv_study.model.engine import build_engine, loss_scale, rescale, update
    from arxiv_study.model.transformer import summed_loss
    def build(stage, precision): return build_engine(TINY, TrainingConfig(steps=9, zero_stage=stage, precision=precision), rows=2, accumulation=1)
    def step(engine, k, share=1 / 128):
        ids_BT = torch.randint(0, 258, (2, 65), generator=torch.Generator().manual_seed(10 * k + rank))
        loss = summed_loss(engine, ids_BT[:, :-1], ids_BT[:, 1:]) * share
        engine.backward(loss)
        return loss.item(), update(engine, 1.0) if share < 1 else rescale(engine)
    found = []
    for stage, precision in cases:
        engine, name = build(stage, precision), f"{precision}-{stage}"
        for k in range(3): step(engine, k)
        if precision == "fp16": step(engine, 9, share=100)  # the scale is part of the state
        save_checkpoint(engine, folder, name, {})
        at_once, other = [loss_scale(engine), step(engine, 3), step(engine, 4)], build(stage, precision)
        for loads in (engine, other): load_checkpoint(loads, folder / name)
        found.append((at_once, [loss_scale(engine), step(engine, 3), step(engine, 4)], [loss_scale(other), step(other, 3), step(other, 4)]))
    return found


def test_every_stage_and_precision_goes_on_from_its_checkpoint(tmp_path):
    "Loss, gradient norm and loss scale to the bit, in the same engine and in one that has just been built"
    cases = [(3, "fp32"), (3, "bf16"), (3, "fp16"), (2, "fp16"), (1, "bf16"), (0, "bf16")]
    for results in on_two_ranks(saved_and_loaded, tmp_path, cases, tmp_path / "checkpoints"):
        for case, (at_once, again, new) in zip(cases, results, strict=True):
            assert again == at_once and new == at_once, case
            assert at_once[0] == (2**15 if case[1] == "fp16" else 1), case


def test_a_zero3_run_is_measured_and_written_whole(data, tmp_path):
    "Branches, evaluations on the way, samples and weights on two ranks: as under ZeRO-2, where each rank has all weights anyhow"
    from safetensors.numpy import load_file
    for stage in (2, 3): launch(asked(data, tmp_path / f"{stage}", steps=8, zero_stage=stage, branch_tokens=[4 * 256], evaluate_every=3), tmp_path / f"{stage}", ranks=2)
    two, three = (read_json(tmp_path / stage / "result.json") for stage in "23")
    assert three["outcome"] == "trained" and three["samples"] == two["samples"] and len(three["branches"]) == 2
    for a, b in zip(three["branches"], two["branches"], strict=True): assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-5)
    weights = [load_file(tmp_path / stage / "model.safetensors") for stage in "23"]
    assert weights[0].keys() == weights[1].keys()
    for name, values in weights[0].items(): np.testing.assert_allclose(weights[1][name], values, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.peer
@pytest.mark.parametrize("total,warmup", [(100, 10), (50, 1), (33, 0), (240, 37)])
def test_schedules_are_those_of_transformers(total, warmup):
    "Cosine, linear and WSD, step by step; only that ours rises from 1/warmup, so that the first step is not wasted at a rate of 0"
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; the extra export has it")
    import torch
    from arxiv_study.model.configuration import TrainingConfig
    from arxiv_study.model.optimization import rate_factor, segments
    decay = round(0.2 * total)
    theirs = dict(cosine=lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, total), linear=lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, total),
                  wsd=lambda o: transformers.get_wsd_schedule(o, warmup, decay, num_training_steps=total, decay_type="linear"))
    for schedule, make in theirs.items():
        factor = make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)).lr_lambdas[0]
        training = TrainingConfig(steps=total, schedule=schedule, decay_fraction=0.2)
        ours = [rate_factor(k, s, training, warmup, total) for s in segments(training, total, 1) for k in range(s.start, s.stop)]
        assert ours == pytest.approx([factor(k + 1 if k < warmup else k) for k in range(total)], abs=1e-12), schedule


@pytest.mark.parametrize("zero_stage,precision", [(2, "fp32"), (3, "bf16")])
def test_nothing_is_compiled_in_an_empty_home(data, tmp_path, zero_stage, precision):
    "No C++ extension is built, no compiler is imported, and the ranks start without what a home directory may hold"
    home = tmp_path / "home"
    home.mkdir()
    code = ("import os, sys, json; from pathlib import Path; from arxiv_study.model import train as t; from arxiv_study.model.configuration import read_run; "
            "t.train(read_run(Path(sys.argv[1])), Path(sys.argv[2])); "
            "print(json.dumps([m for m in ('torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules])); sys.stdout.flush(); os._exit(0)")
    config = asked(data, tmp_path / "run", steps=2, zero_stage=zero_stage, precision=precision)
    env = {**os.environ, "HOME": str(home), "TORCH_EXTENSIONS_DIR": str(home / "extensions"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(config), str(tmp_path / "run")], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert not (home / "extensions").exists() and not list(home.rglob("*.so"))


def test_torch_distributed_run_starts_it_too(data, tmp_path):
    "The command of the docs, and of several machines"
    config = asked(data, tmp_path / "run", steps=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "arxiv_study.model.train", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "result.json")["ranks"] == 2
