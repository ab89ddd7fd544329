"""How runs are started: one machine or several, and what the launcher says about every ending."""
import os, signal, socket, subprocess, sys
from pathlib import Path
import pytest
from arxiv_study.model.launch import launch
from model_runs import asked, data, ranks_alive, series

STEPS = 4


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def started_on_each_host(commands, log_folder):
    "Start one launcher a host and wait for all of them"
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    env = dict(os.environ, GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(cores), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    logs = [open(log_folder / f"host-{k}.log", "wb") for k in range(len(commands))]
    hosts = [subprocess.Popen(c, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) for c, log in zip(commands, logs)]
    try: codes = [h.wait(timeout=120) for h in hosts]
    finally:
        for h in hosts:
            if h.poll() is None: os.killpg(h.pid, signal.SIGKILL)
        for log in logs: log.close()
    assert codes == [0] * len(hosts), "\n".join(p.read_text()[-3000:] for p in sorted(log_folder.glob("host-*.log")))


@pytest.fixture(scope="module")
def on_one_host(data, tmp_path_factory):
    "Loss and gradient norm of each step of two ranks on one host"
    folder = tmp_path_factory.mktemp("one") / "run"
    launch(asked(data, folder, steps=STEPS), folder, ranks=2)
    assert len(series(folder)) == STEPS
    return series(folder)


def test_two_hosts_of_a_hostfile_compute_what_one_does(data, tmp_path, on_one_host):
    config, folder, port = asked(data, tmp_path / "run", steps=STEPS), tmp_path / "run", free_port()
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    started_on_each_host([["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--no_local_rank", "--node_rank", str(k), "--master_addr", "127.0.0.1", "--master_port", port,
                           "--module", "arxiv_study.model.train", str(config), "--out", str(folder)] for k in range(2)], tmp_path)
    assert series(folder) == on_one_host
    assert ranks_alive(folder) == []


def test_two_hosts_of_torch_distributed_run_compute_what_one_does(data, tmp_path, on_one_host):
    config, folder, port = asked(data, tmp_path / "run", steps=STEPS), tmp_path / "run", free_port()
    started_on_each_host([[sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(k), "--rdzv-backend", "c10d",
                           "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "T", "--local-addr", "127.0.0.1", "-m", "arxiv_study.model.train", str(config), "--out", str(folder)] for k in range(2)], tmp_path)
    assert series(folder) == on_one_host
    assert ranks_alive(folder) == []
