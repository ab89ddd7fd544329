"""Training from shards that are read by address."""
import json
from arxiv_study.model.launch import launch
from model_runs import asked, data, series


def test_a_run_from_an_address_is_the_run_from_the_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where blocks are kept
    launch(asked(data, tmp_path / "near", steps=3), tmp_path / "near", ranks=1)
    config = asked(data, tmp_path / "far", steps=3)
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(tokens_dir=f"file://{data / 'tokens'}")))
    launch(config, tmp_path / "far", ranks=1)
    assert series(tmp_path / "far") == series(tmp_path / "near")
    assert list((tmp_path / ".cache" / "arxiv-study").glob("*/blocks/*/000000"))
