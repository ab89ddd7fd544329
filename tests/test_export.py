"""What an exported run is to other libraries."""
import json
from dataclasses import asdict, replace
import polars as pl
import pytest
from arxiv_study.model.configuration import ModelConfig
from arxiv_study.model.launch import launch
from arxiv_study.settings import StudyError
from arxiv_study.storage import write_json
from model_runs import asked, data

BPE = ModelConfig(n_layers=2, d_model=32, d_ffn=64, n_heads=2, vocab_size=328, context=64, tied=True, rope_theta=50_000.)


@pytest.fixture(scope="module")
def bpe_tokens(data):
    "The corpus packed with a BPE tokenizer"
    from arxiv_study.tokens.pack import pack
    from arxiv_study.tokens.tokenizer import TokenizerConfig, train_tokenizer
    word = lambda k: "".join(("ab", "el", "ri", "ton", "gum", "as", "ke")[(k * 31 + 5) // 7**j % 7] for j in range(3))
    (data / "words" / "text").mkdir(parents=True)
    rows = [dict(id=f"w{i}", domain="cs", split="train", text=" ".join(f"Let $x_{{{k}}}$ be {word(k)} in $X$." for k in range(i, i + 100))) for i in range(0, 3000, 100)]
    pl.DataFrame(rows).with_columns(n_bytes=pl.col("text").str.len_bytes()).write_parquet(data / "words" / "text" / "part-000.parquet")  # the corpus of counting supports no 300 entries
    train_tokenizer(data / "words", data / "bpe", TokenizerConfig(vocab_size=320))
    return pack(data / "corpus", data / "bpe", data / "bpe-tokens", workers=1)


def finished(folder, data, tokens, model, seed=0, **training):
    "The folder of a run whose weights are random, but far from equal: greedy choices then differ from token to token"
    from arxiv_study.model.checkpoints import save_model
    from arxiv_study.model.transformer import Transformer
    config = dict(id="T", corpus_dir=str(data / "corpus"), tokens_dir=str(tokens), model=asdict(model), training=dict(steps=1, **training), batches=dict(context=model.context),
                  eval=dict(corpus_dir=str(data / "corpus"), split="val", n_bytes=2000))
    write_json(folder / "config.json", config)
    write_json(folder / "result.json", dict(id="T", scale="smoke", n_params=1, tokens=1, bytes=1, steps=1, seed=seed, heldout=dict(bits_per_byte=2., by_domain=dict(cs=2., math=2.)), unigram_byte_bits=4., outcome="trained", reason=None))
    save_model(Transformer(replace(model, init_std=.3), seed=seed), folder)
    return folder


def greedy(folder, theirs, prompt, n):
    "Continuations of ours and of transformers"
    import torch
    from arxiv_study.model.checkpoints import load_model
    from arxiv_study.model.generate import continue_ids
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[0].tolist()[len(prompt):]
    return continue_ids(load_model(folder), prompt, n, end_id=prompt[0], temperature=0), out


@pytest.mark.peer
def test_export_opens_in_transformers(data, tmp_path):
    "A trained byte model: greedy continuations agree token by token"
    transformers = pytest.importorskip("transformers")
    from arxiv_study.model.export import export_run
    launch(asked(data, tmp_path / "run", steps=8), tmp_path / "run", ranks=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", tmp_path / "out"))
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ours, out = greedy(tmp_path / "run", theirs, [256, *b"Let $x"], 40)
    assert out == ours
    with pytest.raises(StudyError, match="exists already"): export_run(tmp_path / "run", tmp_path / "out")


@pytest.mark.peer
@pytest.mark.parametrize("tied", [True, False])
def test_bpe_export_agrees(data, bpe_tokens, tmp_path, tied):
    "Logits, ids and greedy continuations of a BPE model, its rotary base not the usual one"
    transformers = pytest.importorskip("transformers")
    import torch
    from arxiv_study.model.checkpoints import load_model
    from arxiv_study.model.export import export_run
    from arxiv_study.tokens.tokenizer import Tokenizer
    run = finished(tmp_path / "run", data, bpe_tokens, replace(BPE, tied=tied))
    out = export_run(run, tmp_path / "out")
    theirs, fast, own = transformers.AutoModelForCausalLM.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out), Tokenizer.load(bpe_tokens)
    text = "Let $x_{3}$ be in $X_{5}$. Then $x_{7}$."
    assert fast(text)["input_ids"] == own.encode(text).tolist()
    prompt = [own.end_id, *own.encode(text).tolist()][:20]
    with torch.no_grad(): torch.testing.assert_close(theirs(torch.tensor([prompt])).logits, load_model(run)(torch.tensor([prompt])), atol=1e-5, rtol=1e-5)
    ours, found = greedy(run, theirs, prompt, 40)
    assert found == ours and len(set(ours)) > 5


@pytest.mark.peer
def test_normed_queries_and_keys_are_qwen3(data, bpe_tokens, tmp_path):
    "Greedy continuations agree, and no weight is left over"
    transformers = pytest.importorskip("transformers")
    from arxiv_study.model.export import export_run
    from arxiv_study.tokens.tokenizer import Tokenizer
    run = finished(tmp_path / "run", data, bpe_tokens, replace(BPE, qk_norm=True))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(export_run(run, tmp_path / "out"), output_loading_info=True)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and not report["missing_keys"]
    ours, found = greedy(run, theirs, [Tokenizer.load(bpe_tokens).end_id, 40, 50], 40)
    assert found == ours


@pytest.mark.peer
def test_dtype_and_card(data, bpe_tokens, tmp_path):
    "Weights in the precision of training, and a card that Hugging Face's own reader accepts"
    hub, safetensors = pytest.importorskip("huggingface_hub"), pytest.importorskip("safetensors")
    from arxiv_study.model.export import export_run
    out = export_run(finished(tmp_path / "run", data, bpe_tokens, BPE, precision="bf16"), tmp_path / "out")
    with safetensors.safe_open(out / "model.safetensors", "pt") as f: assert {f.get_slice(n).get_dtype() for n in f.keys()} == {"BF16"}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    card = hub.ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name, card.data.language) == ("other", "transformers", ["en"])
    assert {r.metric_name: r.metric_value for r in card.data.eval_results}["bits per byte, all"] == 2.0
    papers = pl.read_parquet(data / "corpus" / "text" / "part-000.parquet").filter(pl.col("split") == "train").height
    assert f"| not stated | {papers} |" in card.text


@pytest.mark.peer
def test_lm_eval_finds_the_same_bits(data, bpe_tokens, tmp_path, monkeypatch):
    "lm-evaluation-harness, offline, on our texts and windows"
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"): monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager
    from arxiv_study.model.evaluate import evaluate_run, held_out_texts, write_lm_eval_task
    from arxiv_study.model.export import export_run
    out = export_run(finished(tmp_path / "run", data, bpe_tokens, BPE), tmp_path / "out")
    write_lm_eval_task(held_out_texts(data / "corpus", "val", 2000), tmp_path / "task")
    found = lm_eval.simple_evaluate(model="hf", model_args=dict(pretrained=str(out), dtype="float32", device="cpu"), tasks=["arxiv_held_out"], batch_size=1,
                                    task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False), bootstrap_iters=0)
    ours = evaluate_run(out, corpus_dir=data / "corpus", stride=BPE.context)[-1]["bits_per_byte"]
    assert found["results"]["arxiv_held_out"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-5)
