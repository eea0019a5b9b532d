"""The Ray engine on a cluster of two nodes on this machine, one of which is lost."""

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


def running(grid, part):
    """The runs under way with this in their name; there is no more than one on a node."""
    return [name for name, it in grid.runs.items() if part in name and it["status"] == "running"]


PLAN = """
arch = "MLP"
dataset = "digits"
seed = [1, 2]
nepochs = 0
pe = 0
pr = 0.95
nex = 200
exp = true
pm = ["LM", "QM"]
pi = 100
[baseline]
nepochs = 100
"""


@pytest.mark.slow
def test_lost_nodes_lose_no_run_and_none_of_a_group(new_grid, cluster, tmp_path):
    """Two baselines on the one node there is, which is lost; then prunings on two, one lost."""
    grid, node = new_grid, add_node(cluster)
    grid.plan.write_text(PLAN)
    process = grid.start_on_ray(cluster.address)
    grid.wait_until(lambda: [it for it in grid.runs.values() if it["epochs"]])
    cluster.remove_node(node, allow_graceful=False)
    node = add_node(cluster)  # nodes come and go
    add_node(cluster)
    grid.wait_until(lambda: running(grid, "pe=0") if len(running(grid, "pe=0")) == 2 else [])
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)
    _, said = process.communicate(timeout=150)
    assert process.returncode == 0, said
    assert "training together: baseline seed=1; baseline seed=2" in said
    assert "they go on elsewhere" in said
    assert "its node or process was lost" in said
    assert "6 of 6 finished" in said
    (tmp_path / "quiet").mkdir()
    quiet = type(grid)(tmp_path / "quiet")
    quiet.plan.write_text(PLAN)
    quiet.finish("--workers", "1", "--threads", "1")
    assert grid.networks() == quiet.networks()
    assert grid.masks() == quiet.masks()
    for name, record in quiet.runs.items():
        found = grid.runs[name]
        assert found["epochs"] == record["epochs"]
        assert found["stages"] == record["stages"]
        assert found["status"] == "finished"


def test_no_cluster_is_told_in_one_sentence(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("127.0.0.1:1", "auto"):
        assert main(["sweep", "mlp-mnist", "--ray", address]) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: --ray {address}: there is no cluster to join: ")
