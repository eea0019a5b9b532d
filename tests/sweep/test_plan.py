"""Plans: axes, constraints, and what is said of wrong ones."""

import shlex
from pathlib import Path

import pytest

from lossprune.experiment import RunConfig
from lossprune.flags import parse
from lossprune.sweep import read_plan
from lossprune.sweep.board import label_runs
from lossprune.sweep.plan import select
from lossprune.sweep.plan_file import parse_choices, parse_plan

SMALL = """
arch = "MLP"
dataset = "digits"
seed = [1, 2]
pm = ["MP", "QM"]
pi = [1, 3]
lr = 0.1
[baseline]
nepochs = 7
[[drop]]
pm = "MP"
pi = 3
"""


def methods(runs) -> set[tuple]:
    """Criterion, π, λ and whether exponential, but for MP, which has one stage, of the runs."""
    configs = [run.config for run in runs]
    return {(c.criterion, c.stages, c.reg, c.exponential or c.criterion == "MP") for c in configs}


def test_the_plan_of_the_jpeg_copy_prunes_one_network_from_a_file(root):
    grid = read_plan(str(root / "docs/results/vgg11-cifar10jpeg/grid.toml")).expand()
    assert len(grid) == 82
    published = read_plan("vgg11-cifar10").expand()
    prunings = [run for run in published if run.baseline is not None and run.config.seed == 1111]
    assert methods(grid) == methods(prunings)
    for run in grid:
        assert run.baseline is None
        assert run.config.start == Path("vgg11-cifar10jpeg.safetensors")
        assert (run.config.dataset, run.config.seed) == ("folder", 1111)
        assert (run.config.examples, run.config.epochs) == (1000, 6)


def names(runs) -> list[tuple]:
    return [(run.config.seed, run.config.criterion, run.config.stages) for run in runs]


def test_lists_are_axes_and_constraints_drop_combinations():
    runs = parse_plan(SMALL, "small").expand()
    assert names(runs) == [
        (1, "MP", 1),
        (2, "MP", 1),
        *[(seed, *rest) for seed in (1, 2) for rest in (("MP", 1), ("QM", 1), ("QM", 3))],
    ]
    assert [run.config.prunes for run in runs] == [False] * 2 + [True] * 6


def test_a_plan_may_have_runs_with_and_without_compensation():
    text = SMALL.replace("lr = 0.1", "lr = 0.1\ncompensate = [false, true]")
    runs = parse_plan(text.replace("seed = [1, 2]", "seed = 1"), "both").expand()
    assert [run.config.compensate for run in runs if run.config.prunes] == [False, True] * 3
    labels = label_runs(runs)
    assert labels[runs[1]] == "compensate=False pi=1 pm=MP"
    assert labels[runs[-1]] == "compensate=True pi=3 pm=QM"


def test_keep_leaves_out_all_other_combinations():
    rules = '[[keep]]\npm = "QM"\npi = [1, 3]\n[[keep]]\npm = "MP"\npi = 3\nseed = 2\n'
    runs = parse_plan(SMALL + rules, "small").expand()
    pruned = [run.config for run in runs if run.config.prunes]
    assert {(c.criterion, c.stages, c.seed) for c in pruned} == {
        ("QM", 1, 1),
        ("QM", 1, 2),
        ("QM", 3, 1),
        ("QM", 3, 2),
    }  # fmt: skip  (what a [[drop]] names too is dropped)


def test_a_baseline_takes_over_the_training_flags_of_its_runs():
    baseline = parse_plan(SMALL, "small").expand()[0].config
    assert (baseline.lr, baseline.epochs, baseline.dataset) == (0.1, 7, "digits")
    assert (baseline.criterion, baseline.stages, baseline.sparsity) == ("MP", 1, 0.956)


def test_set_reaches_the_baselines_too():
    plan = parse_plan(SMALL, "small").changed(parse_choices("nepochs=2,pi=5", "set"))
    runs = plan.expand()
    assert {run.config.epochs for run in runs} == {2}
    assert {run.config.stages for run in runs if run.config.prunes} == {5}
    assert {run.config.stages for run in runs if not run.config.prunes} == {1}


def test_a_baseline_can_be_set_alone():
    choices = parse_choices("nepochs=0,baseline.nepochs=9", "set")
    runs = parse_plan(SMALL, "small").changed(choices).expand()
    assert [run.config.epochs for run in runs] == [9, 9, 0, 0, 0, 0, 0, 0]


def test_only_keeps_the_baselines_that_its_runs_need():
    runs = read_plan("mlp-mnist").expand()
    chosen = select(runs, [1112], parse_choices("pm=QM,pi=14", "only"))
    assert len(chosen) == 1 + 9
    assert not chosen[0].config.prunes
    assert {run.config.seed for run in chosen} == {1112}
    assert names(chosen[1:]) == [(1112, "QM", 14)] * 9
    twice = select(runs, [], parse_choices("pi=14,pi=140,reg=1e-3", "only"))
    assert len(twice) == 5 + 5 * 3 * 2


def test_a_start_network_can_be_given_instead_of_a_baseline():
    (run,) = parse_plan('model_0 = "here.pt"\nseed = 3', "own").expand()
    assert run.config.start == Path("here.pt")
    assert run.baseline is None


def test_a_start_network_that_is_set_takes_the_place_of_the_baselines():
    """Its path may hold commas, as the names of folders do."""
    choices = parse_choices('model_0="results/lr=0.1,pi=1/best_model.pt",nepochs=2', "set")
    runs = parse_plan(SMALL, "small").changed(choices).expand()
    assert {run.config.start for run in runs} == {Path("results/lr=0.1,pi=1/best_model.pt")}
    assert {run.config.epochs for run in runs} == {2}
    assert all(run.baseline is None and run.config.prunes for run in runs)
    assert len(runs) == 6


def test_every_command_says_its_own_run():
    for run in read_plan("vgg11-cifar10").expand()[::41]:
        assert parse(RunConfig, shlex.split(run.command)[2:]) == run.config


def test_a_dry_run_lists_folders_commands_and_the_count(command, tmp_path):
    answer = command("sweep", "mlp-mnist", "--dry-run", "--seeds", "1111", "--path", "here")
    lines = answer.out.splitlines()
    assert answer.status == 0
    assert lines[-1] == "83 runs: 1 baseline, 82 prunings"
    assert len(lines) == 2 * 83 + 1
    assert lines[0] == (
        "here/arch=MLP,dec=1.0,dec_every=1,exp=False,l2=0.0005,lr=0.01,model_0=None,nepochs=800,"
        "nex=1000,pe=-1,pi=1,pm=MP,pr=0.956,reg=0.0,seed=1111"
    )
    assert lines[1] == "  lossprune run --arch MLP --pe -1 --nepochs 800 --path here"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "sweep takes a PLAN: one of mlp-mnist, vgg11-cifar10, preactresnet18-cifar10, or"),
        (["mlp-minst"], "got 'mlp-minst'; did you mean mlp-mnist?"),
        (["mlp-mnist", "--only", "pm"], "--only must be flag=value,flag=value, got 'pm'"),
        (["mlp-mnist", "--only", "pm=QM,pi=2"], "leave no run of the plan: none has pm=QM, pi=2"),
        (["mlp-mnist", "--set", "pii=3"], "--set: unknown flag 'pii'; did you mean pi?"),
        (
            ["mlp-mnist", "--set", "pi=3.5"],
            "--set: pi must be a whole number or \"auto\", got '3.5'",
        ),
        (["mlp-mnist", "--set", "pr=1.5"], "--pr must be a number in [0, 1), got 1.5"),
        (
            ["mlp-mnist", "--set", 'model_0="a,b'],
            "--set has a double quote that is not closed: 'model_0=\"a,b'",
        ),
        (
            ["mlp-mnist", "--set", "model_0=a.pt,baseline.lr=1"],
            "--set baseline.lr=1.0: plan mlp-mnist has no baselines",
        ),
        (["mlp-mnist", "--set", "path=x"], "path is a flag of the sweep itself: give --path"),
        (["mlp-mnist", "--seeds", "a"], "--seeds must be whole numbers, such as 1111,1112"),
        (
            ["mlp-mnist", "--stack", "0"],
            "--stack must be auto or a whole number from 1 to 999,999,999, got '0'",
        ),
        (["mlp-mnist", "--stack", "all"], "--stack must be auto or a whole number from 1 to "),
        (["mlp-mnist", "--workers", "0"], "--workers must be a whole number from 1 to "),
        (["mlp-mnist", "--ray", "auto", "--workers", "2"], "two engines: give one of them"),
    ],
)
def test_a_wrong_command_is_told_in_one_sentence(command, tmp_path, arguments, said):
    answer = command("sweep", *arguments)
    assert answer.status == 2
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pm = [", "plan own is not TOML"),
        ("pm = []", "plan own: pm is an empty list"),
        ('pi = ["a"]', "plan own: pi must be a whole number or \"auto\", got 'a'"),
        ("pi = true", 'plan own: pi must be a whole number or "auto", got True'),
        ("exp = 1", "plan own: exp must be true or false, got 1"),
        ("[drop]\npi = 1", "drop must be written [[drop]]"),
        ("baseline = 1", "baseline must be a table"),
        ('model_0 = "x"\n[baseline]', "give model_0 or [baseline], not both"),
        ("pi = 1\n[[drop]]\npi = 1", "plan own stands for no runs"),
        (
            "pi = 1\n[other]\npe = 1",
            "unknown section [other]: it must be one of [baseline]",
        ),
        ("pi = 1\n[basline]\npe = 1", "unknown section [basline]: it must be one of [baseline], "),
        ("pi = 1\n[basline]\npe = 1", "; did you mean [baseline]?"),
        ("pi = 1\n[[kep]]\npe = 1", "; did you mean [[keep]]?"),
        ("", "plan own names no flag of lossprune run: give it one at least"),
        ("[baseline]\nnepochs = 3", "plan own names no flag of lossprune run"),
        ("pi = 1\n[baseline]\nlr = -1.0", "own [baseline]: --lr must be a number greater than 0"),
        ("pi = 1000000000", "own: --pi must be a whole number from 1 to 1,000,000, got 1000000000"),
        (
            "".join(f"{flag} = {list(range(1, 101))}\n" for flag in ("pi", "nex", "nepochs")),
            "plan own stands for 1,000,000 combinations: it may be at most 100,000",
        ),
        ("pi = " + "[" * 9999 + "]" * 9999, "plan own: its lists or tables are nested too deeply"),
        ("pi = " + "9" * 5000, "plan own is not TOML: Exceeds the limit"),
    ],
)
def test_a_wrong_plan_is_told_in_one_sentence(command, tmp_path, text, said):
    (tmp_path / "own.toml").write_text(text)
    answer = command("sweep", "own.toml", "--dry-run")
    assert answer.status == 2
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1
