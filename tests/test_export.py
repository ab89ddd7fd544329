"""What an exported run is to other libraries."""
import pytest
from arxiv_study.model.launch import launch
from arxiv_study.settings import StudyError
from model_runs import asked, data


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
