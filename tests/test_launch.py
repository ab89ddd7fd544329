"""How runs are started: one machine or several, by our launcher, PyTorch's or DeepSpeed's, and how those end that have none of ours."""
import os, signal, socket, subprocess, sys, time, uuid
from pathlib import Path
import psutil, pytest
from arxiv_study.model.launch import launch
from arxiv_study.storage import read_json
from model_runs import asked, data, rank_of, ranks_alive, series

STEPS = 4


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(interface="lo"):
    "Of one of two hosts that share the cores"
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    return dict(os.environ, GLOO_SOCKET_IFNAME=interface, DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(cores), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def end(process):
    "End a launcher and what it has started"
    for p in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else ():
        try: p.kill()
        except psutil.NoSuchProcess: pass
    process.wait()


def started_on_each_host(commands, log_folder, interface="lo"):
    "Start one launcher a host and wait for all of them"
    logs = [open(log_folder / f"host-{k}.log", "wb") for k in range(len(commands))]
    hosts = [subprocess.Popen(c, env=environment(interface), stdout=log, stderr=subprocess.STDOUT, start_new_session=True) for c, log in zip(commands, logs)]
    try: codes = [h.wait(timeout=120) for h in hosts]
    finally:
        for h in hosts: end(h)
        for log in logs: log.close()
    assert codes == [0] * len(hosts), "\n".join(p.read_text()[-3000:] for p in sorted(log_folder.glob("host-*.log")))


def by_deepspeed(tmp_path, addresses, k, port, config, folder):
    "The documented command on host k of a hostfile"
    (tmp_path / "hostfile").write_text("".join(f"{a} slots=1\n" for a in addresses))
    return ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--no_local_rank", "--node_rank", str(k), "--master_addr", addresses[0], "--master_port", port,
            "--module", "arxiv_study.model.train", str(config), "--out", str(folder)]


def by_torch(addresses, k, port, config, folder):
    "The documented command on host k, with what it takes where a host's address is not its name"
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(k), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{addresses[0]}:{port}",
            "--rdzv-conf", f"is_host={k == 0}", "--local-addr", addresses[k], "--rdzv-id", "study", "-m", "arxiv_study.model.train", str(config), "--out", str(folder)]


def by_torch_alone(config, folder):
    "The documented command of one machine"
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "arxiv_study.model.train", str(config), "--out", str(folder)]


@pytest.fixture(scope="module")
def on_one_host(data, tmp_path_factory):
    "Loss and gradient norm of each step of two ranks on one host"
    folder = tmp_path_factory.mktemp("one") / "run"
    launch(asked(data, folder, steps=STEPS), folder, ranks=2)
    assert len(series(folder)) == STEPS
    return series(folder)


def test_two_hosts_of_a_hostfile_compute_what_one_does(data, tmp_path, on_one_host):
    "Two loopback addresses"
    config, folder, port = asked(data, tmp_path / "run", steps=STEPS), tmp_path / "run", free_port()
    started_on_each_host([by_deepspeed(tmp_path, ["127.0.0.1", "127.0.0.2"], k, port, config, folder) for k in range(2)], tmp_path)
    assert series(folder) == on_one_host
    assert ranks_alive(folder) == []


def test_two_hosts_of_torch_distributed_run_compute_what_one_does(data, tmp_path, on_one_host):
    config, folder, port = asked(data, tmp_path / "run", steps=STEPS), tmp_path / "run", free_port()
    started_on_each_host([by_torch(["127.0.0.1", "127.0.0.1"], k, port, config, folder) for k in range(2)], tmp_path)
    assert series(folder) == on_one_host
    assert ranks_alive(folder) == []


@pytest.fixture
def two_hosts():
    "Two network namespaces joined by a cable; their names and addresses"
    names, prefix = [f"study{uuid.uuid4().hex[:6]}" for _ in range(2)], "10.211.57"
    def ip(*args): return subprocess.run(["ip", *args], capture_output=True, text=True)
    done = ip("netns", "add", names[0])
    if done.returncode: pytest.skip(f"network namespaces take root: {done.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        steps = [ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])]
        for k, name in enumerate(names):
            steps += [ip("-n", name, "addr", "add", f"{prefix}.{k + 1}/24", "dev", "cable"), ip("-n", name, "link", "set", "cable", "up"), ip("-n", name, "link", "set", "lo", "up")]
        if bad := [s.stderr.strip() for s in steps if s.returncode]: pytest.skip(f"the namespaces cannot be joined: {bad[0]}")
        yield names, [f"{prefix}.{k + 1}" for k in range(2)]
    finally:
        for name in names: ip("netns", "del", name)


@pytest.mark.parametrize("launcher", ["deepspeed", "torch"])
def test_two_network_namespaces_compute_what_one_host_does(data, tmp_path, on_one_host, two_hosts, launcher):
    "Each host has its own network stack and sees the other only through the cable"
    config, folder, (names, addresses) = asked(data, tmp_path / "run", steps=STEPS), tmp_path / "run", two_hosts
    command = lambda k: by_deepspeed(tmp_path, addresses, k, "29500", config, folder) if launcher == "deepspeed" else by_torch(addresses, k, "29500", config, folder)
    started_on_each_host([["ip", "netns", "exec", names[k], *command(k)] for k in range(2)], tmp_path, interface="cable")
    assert series(folder) == on_one_host
    assert ranks_alive(folder) == []


def test_torch_distributed_run_on_one_machine(data, tmp_path, on_one_host):
    config, folder = asked(data, tmp_path / "run", steps=STEPS), tmp_path / "run"
    started_on_each_host([by_torch_alone(config, folder)], tmp_path)
    assert series(folder) == on_one_host
    assert ranks_alive(folder) == []


SERIES = dict(steps=24, checkpoint_every=3)

def begun(command, folder, log_path, step):
    "A launcher of others, started, when a step has been logged"
    with open(log_path, "wb") as log: process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    until, metrics = time.monotonic() + 120, folder / "metrics.jsonl"
    while time.monotonic() < until and process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b'"loss"') > step): time.sleep(0.01)
    return process


def launchers(tmp_path, config, folder):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=2\n")
    return dict(torch=by_torch_alone(config, folder),
                deepspeed=["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--no_local_rank", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", free_port(),
                           "--module", "arxiv_study.model.train", str(config), "--out", str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("launcher,held", [("torch", 1), ("deepspeed", 0)])
def test_a_rank_that_hangs_ends_the_run_without_our_launcher(data, tmp_path, launcher, held):
    "The other rank notices, writes the reason and ends; its launcher then ends the held one; and the run goes on later"
    launch(asked(data, tmp_path / "whole", **SERIES), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "run", guard=dict(collective_timeout_s=4), **SERIES), tmp_path / "run"
    process = begun(launchers(tmp_path, config, folder)[launcher], folder, tmp_path / "log", step=7)
    try:
        for p in ranks_alive(folder):
            if not psutil.Process(p).children() and rank_of(p) == held: os.kill(p, signal.SIGSTOP)
        assert process.wait(timeout=120) != 0
    finally: end(process)
    status = read_json(folder / "status.json")
    assert status["state"] == "failed" and status["reason"].startswith(f"rank {held} was silent for over 4 s after step"), status
    assert ranks_alive(folder) == []
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == series(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch", "deepspeed"])
def test_sigterm_to_a_launcher_of_others_saves_the_run(data, tmp_path, launcher):
    "To all of its processes at once, as Slurm does"
    launch(asked(data, tmp_path / "whole", **SERIES), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "run", **SERIES), tmp_path / "run"
    process = begun(launchers(tmp_path, config, folder)[launcher], folder, tmp_path / "log", step=4)
    try:
        for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]: p.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        until = time.monotonic() + 30
        while ranks_alive(folder) and time.monotonic() < until: time.sleep(0.1)
    finally: end(process)
    assert ranks_alive(folder) == []
    assert read_json(folder / "status.json")["state"] == "stopped", (tmp_path / "log").read_text()[-2000:]
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == series(tmp_path / "whole")
