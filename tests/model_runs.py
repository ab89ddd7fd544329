"""Runs that the tests of the model room train: a small corpus, a tiny model, and what a run leaves behind."""
import json
from dataclasses import asdict
import polars as pl
import pytest
from arxiv_study.model.configuration import ModelConfig
from arxiv_study.storage import read_jsonl

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


def asked(data, folder, batches=None, model=TINY, guard=None, **training):
    "Write a run's configuration beside its folder"
    config = dict(id="T", corpus_dir=str(data / "corpus"), tokens_dir=str(data / "tokens"), model=asdict(model), training=training, guard=guard or {},
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


def rank_of(pid):
    "RANK in a process's environment"
    import psutil
    return int(psutil.Process(pid).environ()["RANK"])
