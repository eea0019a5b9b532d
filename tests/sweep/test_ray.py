"""The Ray engine on a cluster of two nodes on this machine, one of which is lost."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from lossprune.cli import main

ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")


@pytest.fixture
def cluster():
    """A head without CPUs, so that all runs are on the two nodes that can be lost."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000}
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80_000_000)


def lose(cluster, node):
    """All that runs on the node ends at once, as when a machine loses its power.

    Without their raylet its workers would only notice after seconds, and may be done by then.
    """
    (raylet,) = node.all_processes["raylet"]
    pid = raylet.process.pid
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for worker in workers:
        os.kill(int(worker), signal.SIGSTOP)
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(int(worker), signal.SIGKILL)


def running(grid):
    """The runs under way; there is no more than one on a node."""
    return [it for it in grid.runs.values() if it["status"] == "running"]


@pytest.mark.slow
@pytest.mark.full("a cluster that loses a node of single runs")
def test_a_lost_node_loses_no_run(grid, check_same, cluster):
    nodes = [add_node(cluster), add_node(cluster)]
    process = grid.start_on_ray(cluster.address)
    grid.wait_until(lambda: running(grid) if len(running(grid)) == 2 else [])
    lose(cluster, nodes[0])
    _, said = process.communicate(timeout=150)
    assert process.returncode == 0, said
    assert "its node or process was lost" in said
    assert "5 of 5 finished" in said
    check_same(grid)


GROUP = """
arch = "MLP"
dataset = "digits"
pe = -1
nepochs = 100
seed = [1, 2]
"""


@pytest.mark.slow
def test_a_lost_node_loses_none_of_a_group(new_grid, cluster, tmp_path):
    """Two baselines on the one node there is; another one goes on to the same bits."""
    grid, node = new_grid, add_node(cluster)
    grid.plan.write_text(GROUP)
    process = grid.start_on_ray(cluster.address)
    grid.wait_until(lambda: [it for it in grid.runs.values() if it["epochs"]])
    lose(cluster, node)
    add_node(cluster)
    _, said = process.communicate(timeout=150)
    assert process.returncode == 0, said
    assert "training together: baseline seed=1; baseline seed=2" in said
    assert "they go on elsewhere" in said
    assert "2 of 2 finished" in said
    (tmp_path / "quiet").mkdir()
    quiet = type(grid)(tmp_path / "quiet", "--threads", "1")
    quiet.plan.write_text(GROUP)
    quiet.finish("--workers", "1")
    assert grid.networks() == quiet.networks()
    for name, run in quiet.runs.items():
        assert [row["epoch"] for row in run["epochs"]] == list(range(1, 101))
        assert grid.runs[name]["epochs"] == run["epochs"]


def test_no_cluster_is_told_in_one_sentence(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("127.0.0.1:1", "auto"):
        assert main(["sweep", "mlp-mnist", "--ray", address]) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: --ray {address}: there is no cluster to join: ")
