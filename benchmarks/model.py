"""What DeepSpeed costs on one rank against the same model in a bare PyTorch loop: `python -m benchmarks.model [PRESET]`."""
import sys
import torch
from arxiv_study.model.configuration import PRESETS, TrainingConfig, n_parameters
from arxiv_study.model.engine import build_engine, join_ranks, update
from arxiv_study.model.optimization import parameter_groups
from arxiv_study.model.transformer import Transformer, summed_loss
from .interleaved import medians, table

ROWS, CONTEXT = 8, 256

def deepspeed_step(config, ids_BT, **changes):
    engine = build_engine(config, TrainingConfig(steps=1, **changes), ROWS, 1)
    def step():
        loss = summed_loss(engine, ids_BT[:, :-1], ids_BT[:, 1:].contiguous())/ids_BT[:, 1:].numel()
        engine.backward(loss)
        update(engine, .1)
    return step

def bare_step(config, ids_BT, recompute):
    recipe = TrainingConfig(steps=1)
    model = Transformer(config, seed=0)
    model.recompute = recompute
    optimizer = torch.optim.AdamW(parameter_groups(model, config, recipe), betas=recipe.betas, eps=recipe.eps)
    for group in optimizer.param_groups: group["lr"] = group["peak_lr"]*.1
    def step():
        optimizer.zero_grad()
        (summed_loss(model, ids_BT[:, :-1], ids_BT[:, 1:].contiguous())/ids_BT[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
    return step

def main(preset="smoke-m"):
    torch.set_num_threads(1)
    join_ranks()
    config = PRESETS[preset]
    ids_BT = torch.randint(3, config.vocab_size, (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    contestants = {"bare PyTorch": bare_step(config, ids_BT, False), "bare PyTorch, activations computed again": bare_step(config, ids_BT, True),
                   "DeepSpeed ZeRO-2, activation checkpointing": deepspeed_step(config, ids_BT), "DeepSpeed ZeRO-0": deepspeed_step(config, ids_BT, zero_stage=0, activation_checkpointing="none")}
    table(f"{preset}: {n_parameters(config):,} parameters, {ROWS} x {CONTEXT} tokens a step, one thread", "tokens/s", ROWS*CONTEXT, medians(contestants, 15), "bare PyTorch")

if __name__ == "__main__": main(*sys.argv[1:2])
