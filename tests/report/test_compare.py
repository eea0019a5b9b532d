def test_two_runs(command, maker):
    a = maker.run("QM", 14, reg=0.0, loss=1.5, error=0.10)
    b = maker.run("QM", 14, reg=0.1, loss=1.25, error=0.12)
    answer = command("compare", a, b)
    assert answer.status == 0
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert "reg 0.0 0.1" in lines
    assert "the same environment" in lines
    assert "training loss, after pruning 1.50000 1.25000 -0.25000" in lines
    assert "test error, best 10.00 % 12.00 % +2.00 points" in lines
    assert not any(line.startswith("training loss, before") for line in lines)


def test_the_same_run_twice(command, maker):
    path = maker.run()
    assert command("compare", path, path).out.splitlines()[3:] == [
        "the same settings",
        "",
        "the same environment",
        "",
        "the same outcome to the last bit",
    ]


def test_two_folders_pair_their_runs(command, maker):
    for seed in (1, 2):
        maker.run(seed=seed, loss=1.0, folder=f"a/{seed}")
        maker.run(seed=seed, loss=1.0 + seed / 10, folder=f"b/{seed}")
    maker.run(seed=3, folder="a/3")
    answer = command("compare", maker.root / "a", maker.root / "b")
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert "seed 1, 2, 3 1, 2" in lines
    assert "only in A: 1 run" in lines
    assert "2 pairs of runs; means over pairs" in lines
    assert (
        "training loss after pruning QM 14 exponential 2 0 1.00000 1.15000 +0.15000 +0.20000"
        in lines
    )
    assert "test error, best network: the same to the last bit in 2 pairs" in lines


def test_folders_that_differ_in_a_setting_as_a_whole_still_pair(command, maker):
    for seed in (1, 2):
        maker.run(seed=seed, epochs=4, error=0.10, folder=f"a/{seed}")
        maker.run(seed=seed, epochs=8, error=0.08, folder=f"b/{seed}")
    answer = command("compare", maker.root / "a", maker.root / "b")
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert "nepochs 4 8" in lines
    assert (
        "test error, best network QM 14 exponential 2 0 10.00 % 8.00 % -2.00 points -2.00 points"
        in lines
    )


def test_with_and_without_compensation_pair_by_their_criterion(command, maker):
    for criterion, loss in (("LM", 2.0), ("QM", 1.0)):
        maker.run(criterion, loss=loss, folder=f"a/{criterion}")
        maker.run(criterion, loss=loss / 2, compensate=True, folder=f"b/{criterion}")
    lines = command("compare", maker.root / "a", maker.root / "b").out.splitlines()
    (changed,) = [line.split() for line in lines if "compensate" in line]
    assert changed == ["compensate", "False", "True"]
    assert "2 pairs of runs; means over pairs" in lines
    assert any("LM" in line and "-1.00000" in line for line in lines)


def test_what_cannot_be_compared(command, maker, tmp_path):
    run = maker.run(folder="a/one")
    for arguments, told in (
        ((run,), "compare takes two runs or two folders of results, got 1"),
        ((run, maker.root), f"{run} is one run and {maker.root} is not"),
        ((run, tmp_path / "no"), f"no run and no folder of results at {tmp_path / 'no'}"),
    ):
        answer = command("compare", *arguments)
        assert answer.status == 2
        assert answer.err.startswith(f"error: {told}")
        assert answer.err.count("\n") == 1
