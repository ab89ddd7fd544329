"""The model against other libraries and the closed form."""
from dataclasses import replace
import pytest
from arxiv_study.model.configuration import PRESETS, n_parameters


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


def test_parameter_counts_on_the_meta_device():
    import torch
    from arxiv_study.model.transformer import Transformer
    for name, count in (("paper", 1_360_103_424), ("paper-released", 1_633_781_760)):
        with torch.device("meta"): model = Transformer(PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == n_parameters(PRESETS[name]) == count
