"""The model against other libraries and the closed form, and the memory of its loss."""
from dataclasses import replace
import pytest
from arxiv_study.model.configuration import PRESETS, n_parameters


def peer_of(c):
    "The model of transformers that has the same parameters"
    transformers = pytest.importorskip("transformers")
    fields = dict(vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ffn, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_heads,
                  head_dim=c.d_model // c.n_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, max_position_embeddings=c.context, tie_word_embeddings=c.tied, attention_bias=False)
    if c.qk_norm: return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))


@pytest.mark.peer
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_of_llama_and_qwen(tied, qk_norm):
    "To 1e-5 in fp32, with our loss in pieces that do not divide the tokens, and with every way of computing blocks again"
    import torch
    from arxiv_study.model.transformer import Transformer, summed_losses
    torch.set_num_threads(1)
    c = replace(PRESETS["smoke-l"], tied=tied, qk_norm=qk_norm)
    ours, theirs = Transformer(c, seed=0), peer_of(c)
    if qk_norm:  # weights of the norms that a mistake in their place would show
        for name, p in ours.named_parameters():
            if "q_norm" in name or "k_norm" in name: torch.nn.init.uniform_(p, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    ids = torch.randint(0, c.vocab_size, (2, 257), generator=torch.Generator().manual_seed(1))
    a, b = ours(ids[:, :-1]), theirs(ids[:, :-1]).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(b.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for recompute, chunk in (("none", None), ("selective", 100), ("full", 100)):
        ours.recompute, ours.loss_chunk = recompute, chunk
        ours.zero_grad()
        objective, nats = summed_losses(ours, ids[:, :-1], ids[:, 1:])
        assert nats.item() / 512 == pytest.approx(expected.item(), rel=1e-6)
        (objective / 512).backward()
        for name, p in ours.named_parameters(): torch.testing.assert_close(p.grad, grads[name], atol=1e-5, rtol=1e-4, msg=f"{name}, {recompute}")


def test_documents_side_by_side_are_separate():
    "Losses and gradients of three documents in a row are those of three forwards, whose positions start at 0 each"
    import torch
    from arxiv_study.model.transformer import Transformer, summed_losses
    torch.set_num_threads(1)
    joined, apart = (Transformer(replace(PRESETS["smoke-m"], qk_norm=True), seed=0) for _ in range(2))
    ids = torch.randint(0, 1024, (1, 201), generator=torch.Generator().manual_seed(1))
    bounds = [0, 61, 62, 200]  # one document has a single token
    documents = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(zip(bounds, bounds[1:]))], 1)
    joined.recompute = "full"
    objective, _ = summed_losses(joined, ids[:, :-1], ids[:, 1:], documents)
    pieces = [summed_losses(apart, ids[:, a:b], ids[:, a + 1:b + 1])[0] for a, b in zip(bounds, bounds[1:])]
    torch.testing.assert_close(objective, sum(pieces), rtol=1e-6, atol=0)
    for x in (objective, sum(pieces)): (x / 200).backward()
    for p, q in zip(joined.parameters(), apart.parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def whole_losses(model, ids, targets, z_loss):
    "Cross-entropy by PyTorch, and z-loss by its definition"
    import torch
    logits = model(ids).float().flatten(0, 1)
    log_z = torch.logsumexp(logits, -1)[targets.flatten() != -100]
    return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") + z_loss * log_z.square().sum()


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_pieces_is_the_whole_loss(tied):
    "Value and gradients in fp32, with padding and z-loss, at a vocabulary of 102,400; logits are never held whole"
    import torch
    from arxiv_study.model.loss import peak_bytes
    from arxiv_study.model.transformer import Transformer, summed_losses
    torch.set_num_threads(1)
    c = replace(PRESETS["smoke-xs"], vocab_size=102_400, tied=tied)
    ids = torch.randint(0, c.vocab_size, (2, 129), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, 50:] = -100
    models = Transformer(c, seed=0), Transformer(c, seed=0)
    models[0].loss_chunk, models[0].z_loss = 24, 1e-3
    found = []
    losses = [lambda: summed_losses(models[0], ids[:, :-1], targets)[0], lambda: whole_losses(models[1], ids[:, :-1], targets, 1e-3)]
    peaks = [peak_bytes(lambda: (found.append(loss()), (found[-1] / 178).backward())) for loss in losses]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-4, msg=name)
    logits = 4 * 256 * c.vocab_size
    matrix = 4 * c.vocab_size * c.d_model
    assert peaks[1] > 3 * logits
    assert peaks[0] < 2 * logits * 24 / 256 + 3 * matrix + 2**22, [p / logits for p in peaks]  # two copies of a piece, the output matrix's gradient before and after scaling, the embedding's


def test_parameter_counts_on_the_meta_device():
    import torch
    from arxiv_study.model.transformer import Transformer
    for name, count in (("paper", 1_360_103_424), ("paper-released", 1_633_781_760)):
        with torch.device("meta"): model = Transformer(PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == n_parameters(PRESETS[name]) == count
