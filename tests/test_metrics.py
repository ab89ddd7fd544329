"""What a step's numbers mean: published utilisation, and trackers read back by their own readers."""
import csv, json, os, signal
from pathlib import Path
import pytest
from arxiv_study.model.configuration import PRESETS, flops_per_token, n_parameters
from arxiv_study.model.launch import launch
from arxiv_study.model.metrics import METRICS, TensorBoard, hardware_flops_per_token, mfu
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_jsonl
from model_runs import asked, data, ranks_alive

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference"


def published():
    table = REFERENCE / "llm_foundry_throughput.csv"
    if not table.is_file(): pytest.skip(f"{table.name} is not beside this repository")
    return list(csv.DictReader(table.open()))


def test_published_mfu_by_the_schemas_formula():
    shapes = {"125m": (12, 768), "350m": (24, 1024), "760m": (24, 1536), "1b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "13b": (40, 5120), "30b": (48, 7168)}
    rows = [r for r in published() if "a100" in r["GPU"].lower() and r["Model"] in shapes]
    for r in rows:
        ours = 100 * mfu(int(r["NumParams"]), *shapes[r["Model"]], int(r["SeqLen (T)"]), float(r["Throughput (T/s/GPU)"]), 312e12)
        assert ours == pytest.approx(float(r["MFU"]), abs=0.05), r
    assert len(rows) == 135


def test_published_hfu_is_four_thirds_where_all_is_computed_again():
    "The table counts a whole second forward, output layer included; ours leaves out what is not run again"
    rows = [r for r in published() if r["Activation Checkpointing"] == "True"]
    assert rows and all(float(r["HFU"]) == pytest.approx(float(r["MFU"]) * 4 / 3, abs=0.05) for r in rows)
    c = PRESETS["paper"]
    again = hardware_flops_per_token(c, 768, "full") / flops_per_token(c, 768)
    left_out = 2 * (n_parameters(c) - c.n_layers * (4 * c.d_model**2 + 3 * c.d_model * c.d_ffn + 2 * c.d_model)) / flops_per_token(c, 768)
    assert again == pytest.approx(4 / 3 - left_out, abs=1e-6)


def test_every_name_of_a_step_is_in_the_schema(data, tmp_path):
    launch(asked(data, tmp_path / "run", steps=3, checkpoint_every=1), tmp_path / "run", ranks=2)
    steps = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "event" not in r]
    assert all(set(r) <= {m.name for m in METRICS} | {"segment"} for r in steps)
    for r in steps:
        assert r["mfu"] < r["hfu"] < 1.5  # full recomputation; a noisy machine may beat the peak it was measured at
        assert r["tokens_per_s"] * r["step_s"] == pytest.approx(2 * 2 * 64, rel=1e-3)
        assert sum(r[k] for k in ("wait_s", "forward_s", "backward_s", "communication_s", "optimizer_s")) <= r["step_s"] * 1.001
    assert steps[1]["checkpoint_s"] > 0


def tracked(data, folder, tracker, **training):
    "The configuration of a run that a tracker follows"
    path = asked(data, folder, **training)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(trackers=[tracker])))
    return path


def logged(folder):
    "Steps as they stand in metrics.jsonl"
    return [r for r in read_jsonl(folder / "metrics.jsonl") if "event" not in r]


def on_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("loss")]


def once_each(records):
    "Step and loss, where a step that is taken again counts by its last time"
    return [(k, pytest.approx(v, rel=1e-6)) for k, v in sorted({r["step"]: r["loss"] for r in records}.items())]


@pytest.mark.peer
def test_tensorboard_draws_each_step_once_after_kills_and_branches(data, tmp_path):
    "Killed at step 8, three steps after its newest checkpoint, and resumed; branches take steps that the trunk takes again"
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed; the extra tracking has it")
    config, folder = tracked(data, tmp_path / "run", "tensorboard", steps=14, branch_tokens=[10 * 256], checkpoint_every=5), tmp_path / "run"
    def kill(record):
        if record.get("step") == 8 and "event" not in record: [os.kill(p, signal.SIGKILL) for p in ranks_alive(folder)]
    with pytest.raises(StudyError, match="killed by SIGKILL"): launch(config, folder, ranks=2, on_line=kill, poll_s=0.005)
    launch(config, folder, ranks=2, resume=True)
    files, steps = list((folder / "tensorboard").iterdir()), logged(folder)
    assert len(files) == 2 and len(steps) > 14  # the branch's steps are among them
    assert on_tensorboard(folder) == once_each(steps)


@pytest.mark.peer
def test_tensorboard_forgets_what_a_kill_has_undone(tmp_path):
    "Two writers of one run: the second begins at step 3, and what the first had written from there is gone, as with PyTorch's own writer"
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed; the extra tracking has it")
    torch_writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    for steps, value in ((range(6), 1.0), (range(3, 5), 2.0)):
        theirs, ours = torch_writer(str(tmp_path / "theirs" / "tensorboard"), purge_step=steps[0]), TensorBoard(tmp_path / "ours", {})
        for k in steps: theirs.add_scalar("loss", value, k), ours.log(dict(loss=value), k)
        theirs.close(), ours.close()
    assert on_tensorboard(tmp_path / "ours") == on_tensorboard(tmp_path / "theirs") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


WANDB = """
import atexit, json, os
file = open(os.environ["SEEN"], "a")
def write(**what): print(json.dumps(what), file=file, flush=True)
def init(entity=None, project=None, dir=None, id=None, name=None, config=None, mode=None, resume=None): write(project=project, name=name, mode=mode, dir=dir, steps=config["training"]["steps"])
def define_metric(name, step_metric=None): write(axis=step_metric, of=name)
def log(data, step=None, commit=None): write(data=data, step=step)
def finish(exit_code=None, quiet=None): write(finished=True)
"""

def test_a_module_with_the_interface_of_wandb_gets_every_line(data, tmp_path, monkeypatch):
    "A stand-in on the path, with the signatures of wandb 0.31: one start, each step in order, one end; and nothing goes online unasked"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.jsonl"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    launch(tracked(data, tmp_path / "run", "wandb", steps=8, branch_tokens=[4 * 256]), tmp_path / "run", ranks=2)
    start, axis, *lines, end = read_jsonl(tmp_path / "seen.jsonl")
    assert start == dict(project="arxiv-study", name="smoke-T-0", mode="offline", dir=str(tmp_path / "run"), steps=8)
    assert axis == dict(axis="train_step", of="*") and end == dict(finished=True)
    assert [(line["data"]["train_step"], line["data"]["loss"]) for line in lines] == [(r["step"], r["loss"]) for r in logged(tmp_path / "run")]
    assert all(line["step"] is None for line in lines)  # W&B would refuse a step of the trunk that a branch has taken


def records_of_wandb(file):
    "A .wandb file is a LevelDB log: after 7 bytes, blocks of 32 KiB of pieces, each with checksum, length and whether it is whole (1), first, middle or last"
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, pieces = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        n, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        pieces, at = pieces + data[at + 7:at + 7 + n], at + 7 + n
        if kind in (1, 4): yield Record.FromString(pieces)
        if kind in (1, 4): pieces = b""


@pytest.mark.peer
def test_wandb_itself_keeps_every_line_offline(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    launch(tracked(data, tmp_path / "run", "wandb", steps=8, branch_tokens=[4 * 256]), tmp_path / "run", ranks=1)
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    lines = [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records_of_wandb(file) if r.HasField("history")]
    assert [(line["train_step"], line["loss"]) for line in lines] == [(r["step"], r["loss"]) for r in logged(tmp_path / "run")]
