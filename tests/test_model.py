"""What the chapters of the model room cannot show: several ranks, kills, damage, and other libraries."""
import csv, json, math, os, random, signal, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np
import polars as pl
import pytest
from arxiv_study.model.configuration import PRESETS, ModelConfig, flops_per_token, n_parameters
from arxiv_study.model.launch import launch, rank_environment, start_ranks, stop
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json, read_jsonl

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference"
TINY = ModelConfig(n_layers=2, d_model=32, d_ffn=64, n_heads=2, vocab_size=258, context=64, tied=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A small corpus packed as bytes"
    from arxiv_study.tokens.pack import pack
    from arxiv_study.tokens.tokenizer import TokenizerConfig, train_tokenizer
    root = tmp_path_factory.mktemp("data")
    def paper(domain, i):
        text = " ".join(f"Let $x_{{{k}}}$ be in $X_{{{k % 7}}}$." for k in range(i, i + 40))
        return dict(id=f"{domain}{i:03d}", title="", domain=domain, categories=domain, year=2020, license="", formula_density=0.2, n_bytes=len(text),
                    split="val" if i % 8 == 0 else "train", text=text)
    (root / "corpus" / "text").mkdir(parents=True)
    pl.DataFrame([paper(d, i) for d in ("cs", "math") for i in range(40)]).write_parquet(root / "corpus" / "text" / "part-000.parquet")
    (root / "corpus" / "manifest.json").write_text('{"fingerprint": "00000000"}')
    train_tokenizer(root / "corpus", root / "tokenizer", TokenizerConfig(kind="bytes"))
    pack(root / "corpus", root / "tokenizer", root / "tokens")
    return root


def asked(data, folder, batches=None, model=TINY, **training):
    "Write a run's configuration beside its folder"
    config = dict(id="T", corpus_dir=str(data / "corpus"), tokens_dir=str(data / "tokens"), model=asdict(model), training=training,
                  eval=dict(corpus_dir=str(data / "corpus"), split="val", n_bytes=2000), batches=dict(context=64, rows=2, **(batches or {})))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps(config))
    return path


def series(folder):
    "Loss and gradient norm of each step, in the order in which they stand in the file"
    return [(r["segment"], r["step"], r["loss"], r["grad_norm"]) for r in read_jsonl(folder / "metrics.jsonl") if "event" not in r]


def ranks_alive(folder):
    "Training processes that still name the folder"
    import psutil
    return [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or []) and "arxiv_study.model.train" in " ".join(p.info["cmdline"])]


# ---- the step is what it says it is ----

def plain_series(data, config_path, ranks, n_steps):
    "The same run in bare PyTorch on one process: one batch of all ranks' rows, torch's own clipping"
    import torch
    from arxiv_study.model.configuration import read_run
    from arxiv_study.model.optimization import parameter_groups, rate_factor, segments, warmup_steps
    from arxiv_study.model.transformer import Transformer, summed_loss
    from arxiv_study.tokens.batches import BatchConfig, Batches
    torch.set_num_threads(1)
    run = read_run(config_path)
    model = Transformer(run.model, seed=run.training.seed)
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


@pytest.mark.parametrize("name,layout,training", [
    ("zero2", "packed", {}), ("zero0", "packed", dict(zero_stage=0, activation_checkpointing=False)), ("padded", "padded", {})])
def test_zero_stages_agree_with_plain_pytorch(data, tmp_path, name, layout, training):
    "R23's promise: ZeRO-0 without recomputation, and ZeRO-2 with it, on 2 ranks with accumulation, against a bare loop on one"
    config = asked(data, tmp_path / name, dict(accumulation=2, layout=layout), steps=10, **training)
    launch(config, tmp_path / name, ranks=2)
    for (_, step, loss, norm), (loss_1, norm_1) in zip(series(tmp_path / name), plain_series(data, config, 2, 10), strict=True):
        assert loss == pytest.approx(loss_1, rel=2e-5), step
        assert norm == pytest.approx(norm_1, rel=2e-4), step


def test_nothing_is_compiled_in_an_empty_home(data, tmp_path):
    "No C++ extension is built, no compiler is imported, and the ranks start without what a home directory may hold"
    home = tmp_path / "home"
    home.mkdir()
    code = ("import os, sys, json; from pathlib import Path; from arxiv_study.model import train as t; from arxiv_study.model.configuration import read_run; "
            "t.train(read_run(Path(sys.argv[1])), Path(sys.argv[2])); "
            "print(json.dumps([m for m in ('torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules])); sys.stdout.flush(); os._exit(0)")
    config = asked(data, tmp_path / "run", steps=2)
    env = {**os.environ, "HOME": str(home), "TORCH_EXTENSIONS_DIR": str(home / "extensions"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(config), str(tmp_path / "run")], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert not (home / "extensions").exists() and not list(home.rglob("*.so"))


# ---- kills and damage ----

def kill_at(config, folder, step, ranks=2):
    "Start a run and kill all ranks outright as soon as a step is logged"
    processes = start_ranks(config, folder, ranks, resume=False)
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < until and all(p.poll() is None for p in processes):
        if metrics.is_file() and metrics.read_bytes().count(b'"loss"') > step: break
        time.sleep(0.002)
    for p in processes: p.kill()
    for p in processes: p.wait()


def test_resume_after_a_kill_is_bit_identical(data, tmp_path):
    "Killed at a random step of trunk or branch, twice, and resumed: the same series to the last bit"
    recipe = dict(steps=24, branch_tokens=[10 * 256], checkpoint_every=3)
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, rng = asked(data, tmp_path / "killed", **recipe), random.Random(os.environ.get("KILL_SEED", "1"))
    kill_at(config, tmp_path / "killed", rng.randrange(4, 24))
    assert read_json(tmp_path / "killed" / "status.json")["state"] == "running"
    result = launch(config, tmp_path / "killed", ranks=2, resume=True)
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    expected = read_json(tmp_path / "whole" / "result.json")
    for key in ("heldout", "branches", "train_loss", "grad_norm", "tokens", "samples"): assert result[key] == expected[key], key


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
    with pytest.raises(StudyError, match="another training"):
        prepare_folder(read_run(asked(data, folder, steps=10, checkpoint_every=3)), folder, resume=True)


def test_a_dead_rank_fails_the_run_and_leaves_no_process(data, tmp_path):
    config, folder = asked(data, tmp_path / "run", steps=100_000), tmp_path / "run"
    def kill_one(record):
        if record.get("step") == 3: os.kill(next(p for p in ranks_alive(folder) if _rank_of(p) == 1), signal.SIGKILL)
    with pytest.raises(StudyError, match="failed") as e: launch(config, folder, ranks=2, on_line=kill_one)
    assert read_json(folder / "status.json")["state"] == "failed"
    assert "rank" in str(e.value) and not (folder / "result.json").exists()
    assert ranks_alive(folder) == []


def _rank_of(pid):
    "RANK in a process's environment"
    import psutil
    return int(psutil.Process(pid).environ()["RANK"])


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
    assert status["state"] == "failed" and "interrupted" in status["reason"], status


def test_divergence_is_a_result(data, tmp_path):
    result = launch(asked(data, tmp_path / "run", steps=30, lr_multiplier=1e5, clip=None, warmup_fraction=0), tmp_path / "run", ranks=2)
    assert result["outcome"] == "diverged" and result["reason"]
    assert read_json(tmp_path / "run" / "status.json") == dict(state="done", outcome="diverged", reason=result["reason"])


def test_torch_distributed_run_starts_it_too(data, tmp_path):
    "The command of the docs, and of several machines"
    config = asked(data, tmp_path / "run", steps=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "arxiv_study.model.train", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "result.json")["ranks"] == 2


# ---- peers and published numbers ----

@pytest.mark.peer
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_of_llama(tied):
    transformers = pytest.importorskip("transformers")
    import torch
    from arxiv_study.model.transformer import Transformer, summed_loss
    torch.set_num_threads(1)
    c = replace(PRESETS["smoke-l"], tied=tied)
    ours = Transformer(c, seed=0)
    llama = transformers.LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ffn, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                                     rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, max_position_embeddings=c.context, tie_word_embeddings=tied)
    theirs = transformers.LlamaForCausalLM(llama)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    ids = torch.randint(0, c.vocab_size, (2, 257), generator=torch.Generator().manual_seed(1))
    a, b = ours(ids[:, :-1]), theirs(ids[:, :-1]).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for logits in (a, b): torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters(): torch.testing.assert_close(p.grad, grads[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.peer
def test_export_opens_in_transformers(data, tmp_path):
    "Greedy continuations agree token by token"
    transformers = pytest.importorskip("transformers")
    import torch
    from arxiv_study.model.checkpoints import load_model
    from arxiv_study.model.export import export_run
    from arxiv_study.model.generate import continue_ids
    launch(asked(data, tmp_path / "run", steps=8), tmp_path / "run", ranks=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", tmp_path / "out"))
    assert type(theirs).__name__ == "LlamaForCausalLM"
    prompt = [256, *b"Let $x"]
    ours = continue_ids(load_model(tmp_path / "run"), prompt, 40, end_id=256, temperature=0)
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0].tolist()[len(prompt):]
    assert out == ours
    with pytest.raises(StudyError, match="exists already"): export_run(tmp_path / "run", tmp_path / "out")


def test_parameter_counts_on_the_meta_device():
    import torch
    from arxiv_study.model.transformer import Transformer
    for name, count in (("paper", 1_360_103_424), ("paper-released", 1_633_781_760)):
        with torch.device("meta"): model = Transformer(PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == n_parameters(PRESETS[name]) == count


def test_published_mfu():
    "135 A100 rows of llm-foundry's table, to 0.05 points"
    table = REFERENCE / "llm_foundry_throughput.csv"
    if not table.is_file(): pytest.skip(f"{table.name} is not beside this repository")
    shapes = {"125m": (12, 768), "350m": (24, 1024), "760m": (24, 1536), "1b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "13b": (40, 5120), "30b": (48, 7168)}
    from arxiv_study.model.plan import mfu
    rows = [r for r in csv.DictReader(table.open()) if "a100" in r["GPU"].lower() and r["Model"] in shapes]
    for r in rows:
        layers, width = shapes[r["Model"]]
        ours = 100 * mfu(int(r["NumParams"]), layers, width, int(r["SeqLen (T)"]), float(r["Throughput (T/s/GPU)"]), 312e12)
        assert ours == pytest.approx(float(r["MFU"]), abs=0.05), r
    assert len(rows) == 135
