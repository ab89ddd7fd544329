"""Training as the product runs it against a bare PyTorch loop and the Hugging Face Trainer, what recomputation and a chunked loss cost, and the time to a first step: `python -m benchmarks.training [STEPS]`; the Trainer needs the extra `bench`."""
import contextlib, dataclasses, itertools, multiprocessing, os, statistics, sys, tempfile, time
from pathlib import Path
import torch
from arxiv_study.model.configuration import PRESETS, RunConfig, TrainingConfig, n_parameters
from arxiv_study.model.launch import launch
from arxiv_study.model.optimization import parameter_groups
from arxiv_study.model.train import Training
from arxiv_study.model.transformer import Transformer, summed_loss
from arxiv_study.storage import read_jsonl, write_json
from arxiv_study.tokens.batches import BatchConfig, Batches
from .batches import packed_miniature
from .interleaved import bars, table

PRESET, ROWS, CONTEXT = "desk-m", 8, 256

def run_config(d, tokens_dir, preset=PRESET, **training):
    "What one run is told; the miniature's vocabulary is smaller than the model's, which changes no matrix's size."
    return RunConfig(id="B", corpus_dir=str(Path(d)/"corpus"), tokens_dir=str(tokens_dir), eval=dict(corpus_dir=str(Path(d)/"corpus"), split="val", n_bytes=2000),
                     model=PRESETS[preset], batches=dict(context=CONTEXT, rows=ROWS), training=TrainingConfig(**{"steps": 10**6, "warmup_steps": 1, **training}))

def product_steps(config, out):
    "Each turn is one step of the trainer: its batch, forward, backward, update, guard and metrics."
    out.mkdir()
    training = Training(config, out)
    training.open_metrics()
    for step in itertools.count():
        training.remember(training.train_step(step, 1.))
        yield training.progress, training.seconds["wait"]

def bare_steps(config, batches, recompute):
    "The shortest loop that makes the same update."
    model = Transformer(config.model, seed=0)
    recipe = config.training
    model.recompute, model.loss_chunk = recompute, recipe.loss_chunk
    optimizer = torch.optim.AdamW(parameter_groups(model, config.model, recipe), betas=recipe.betas, eps=recipe.eps, fused=True)
    for ids_BT in itertools.cycle(batches):
        optimizer.zero_grad()
        loss = summed_loss(model, ids_BT[:, :-1], ids_BT[:, 1:].contiguous())/ids_BT[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        yield loss.item()

def llama(config, weights):
    "The same weights in the model of transformers."
    from transformers import LlamaConfig, LlamaForCausalLM
    c = config.model
    model = LlamaForCausalLM(LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ffn, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                                         max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tied))
    model.load_state_dict(weights)
    return model

def trainer_seconds(config, batches, n_steps, recompute, d):
    "Seconds of each step, taken by callbacks inside the Trainer's loop from one step's begin to the next, so that data and bookkeeping count and the start does not."
    from transformers import Trainer, TrainerCallback, TrainingArguments
    model, begun, c = llama(config, Transformer(config.model, seed=0).state_dict()), [], config.training
    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__): begun.append(time.perf_counter())
    arguments = TrainingArguments(output_dir=str(d), per_device_train_batch_size=ROWS, max_steps=n_steps + 1, lr_scheduler_type="constant", max_grad_norm=c.clip,
                                  adam_beta1=c.betas[0], adam_beta2=c.betas[1], adam_epsilon=c.eps, weight_decay=c.weight_decay, use_cpu=True, report_to=[], save_strategy="no",
                                  logging_strategy="no", disable_tqdm=True, gradient_checkpointing=recompute, dataloader_num_workers=0)
    rows = [dict(input_ids=row[:-1], labels=row[:-1]) for ids_BT in batches for row in ids_BT] # the model shifts the labels itself
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return [b - a for a, b in zip(begun[1:], begun[2:])]

def speed(d, tokens_dir, n_steps):
    "The contestants take turns in blocks of five steps; the Trainer's blocks are runs of its own."
    config = run_config(d, tokens_dir)
    ours = product_steps(config, Path(d)/"run")
    next(ours)
    source = Batches(tokens_dir, BatchConfig(context=CONTEXT, rows=ROWS))
    batches = [torch.from_numpy(source.batch(k).tokens[0]) for k in range(8)]
    source.close()
    recompute = config.training.activation_checkpointing
    bare, plain = bare_steps(config, batches, recompute), bare_steps(config, batches, "none")
    names = {"ours, as the product runs it": ours, "bare PyTorch, same recomputation": bare, "bare PyTorch, nothing computed again": plain}
    for steps in names.values(): next(steps)
    seconds = {name: [] for name in [*names, "Hugging Face Trainer, same recomputation"]}
    wait = []
    for _ in range(max(1, n_steps//5)):
        for _, (name, steps) in itertools.product(range(5), names.items()):
            start = time.perf_counter()
            got = next(steps)
            seconds[name].append(time.perf_counter() - start)
            if name.startswith("ours"): wait.append((seconds[name][-1], got[1]))
        assert torch.get_num_threads() == 1
        with contextlib.suppress(ImportError): seconds["Hugging Face Trainer, same recomputation"] += trainer_seconds(config, batches, 6, recompute != "none", d)
    assert torch.get_num_threads() == 1
    medians = {name: statistics.median(s) for name, s in seconds.items() if s}
    table(f"{PRESET}: {n_parameters(config.model):,} parameters, {ROWS} x {CONTEXT} tokens a step, one thread", "tokens/s", ROWS*CONTEXT, medians, "bare PyTorch, same recomputation")
    mine, bound = medians["ours, as the product runs it"], medians["bare PyTorch, same recomputation"]
    rows = [("training step, share of a bare PyTorch loop", bound/mine, .97)]
    if theirs := medians.get("Hugging Face Trainer, same recomputation"): rows.append(("training step, times the Hugging Face Trainer's speed", theirs/mine, 1))
    else: print("the Hugging Face Trainer is left out: install the extra `bench`")
    waited = (wait[-1][1] - wait[0][1])/sum(s for s, _ in wait[1:])
    return rows + [(f"data wait {100*waited:.2f} %: 1 % over the share measured", .01/max(waited, 1e-9), 1)]

def peak_kib():
    "The process's peak since it was last forgotten; getrusage would give that of the process it was started from."
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])

def memory_of(recompute, chunk, preset, n_steps, answer):
    "Peak memory over what the process held before, and seconds of a step: in a process of its own, since a peak never falls."
    torch.set_num_threads(1)
    config = PRESETS[preset]
    model = Transformer(config, seed=0)
    model.recompute, model.loss_chunk = recompute, chunk
    ids_BT = torch.randint(3, config.vocab_size, (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5") # forget the peak of the start
    before, seconds = peak_kib(), []
    for _ in range(n_steps):
        start = time.perf_counter()
        summed_loss(model, ids_BT[:, :-1], ids_BT[:, 1:].contiguous()).backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    answer.put(((peak_kib() - before)/2**10, statistics.median(seconds[1:])))

def memory(preset="desk-l", n_steps=4):
    "What recomputation and a chunked loss save, and cost."
    print(f"\n{preset}: forward and backward of {ROWS} x {CONTEXT} tokens, one thread")
    spawn = multiprocessing.get_context("spawn")
    for recompute, chunk in [(r, c) for c in (None, TrainingConfig.loss_chunk) for r in ("none", "selective", "full")]:
        answer = spawn.Queue()
        process = spawn.Process(target=memory_of, args=(recompute, chunk, preset, n_steps, answer))
        process.start()
        mib, seconds = answer.get(timeout=300)
        process.join()
        print(f"  {f'recomputation {recompute}, ' + ('whole loss' if chunk is None else f'loss of {chunk} tokens at a time'):58} {mib:8,.0f} MiB {seconds:8.3f} s", flush=True)

def first_step(d, tokens_dir):
    "Seconds from the call that starts two ranks until the first step stands in metrics.jsonl."
    config = run_config(d, tokens_dir, "smoke-m", steps=3)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=2048))
    write_json(Path(d)/"first.json", dataclasses.asdict(config))
    start, seen = time.perf_counter(), []
    launch(Path(d)/"first.json", Path(d)/"first", 2, on_line=lambda record: seen.append(time.perf_counter() - start) if "step" in record else None)
    started = next(r for r in read_jsonl(Path(d)/"first"/"metrics.jsonl") if r.get("event") == "started")
    parts = ", ".join(f"{k.removesuffix('_s').replace('_', ' ')} {v:.1f}" for k, v in started.items() if k.endswith("_s") and k != "total_s")
    print(f"\ntwo ranks, launcher to first step: {seen[0]:.1f} s, of which rank 0 spent {started['total_s']:.1f} ({parts})")
    return "launcher to first step in seconds: 12 s over the time it took", 12/seen[0], 1

def main(n_steps=20):
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") # accelerate would take all cores for the Trainer
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        tokens_dir = packed_miniature(d)
        rows = [*speed(d, tokens_dir, n_steps), first_step(d, tokens_dir)]
    memory()
    if not torch.cuda.is_available(): print("\nno GPU here: mixed precision and device memory are not measured")
    bars("what was asked for", rows)

if __name__ == "__main__":
    from benchmarks import training # the processes that measure memory import what they run, and `__main__` is no name for it
    training.main(*map(int, sys.argv[1:2]))
