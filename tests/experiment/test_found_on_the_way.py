"""Runs that find λ, stages and sparsity on their way: --reg auto, --pi auto, budgets."""

import json
import re
import shlex
from dataclasses import replace

import pytest
from torch import nn

import lossprune
from lossprune.cli import main
from lossprune.data import load
from lossprune.experiment import RunConfig
from lossprune.experiment.folder import MASK, RECORD
from lossprune.experiment.group import run_together
from lossprune.experiment.network_file import load_weights_, read_network
from lossprune.experiment.prepare import Cache
from lossprune.experiment.record import RunRecord
from lossprune.experiment.runner import run
from lossprune.experiment.stage_dict import stage_dict, stage_of
from lossprune.experiment.stage_examples import SplitBatches, StageExamples
from lossprune.pruning import Mask
from lossprune.sweep.board import label_runs
from lossprune.sweep.plan_file import parse_choices, parse_plan
from tests.experiment.test_resume import result, stop_before, the_run, without_times  # noqa: F401
from tests.processes import Processes, finish

ARCH = f"{__name__}:small"
FLAGS = shlex.split(
    f"run --arch {ARCH} --dataset digits --threads 1 --pm QM --nex 100 --nepochs 6 --pe 5 --lr 0.5"
)
FOUND = shlex.split(
    "--nex 1000 --reg auto --pi auto --tolerance 0.05 --max_examples 20000 --multiply_adds 0.1 "
    "--max_loss_increase 0.5"
)
CONFIG = RunConfig(
    arch=ARCH,
    dataset="digits",
    criterion="QM",
    examples=100,
    epochs=1,
    threads=1,
    sparsity=0.6,
    stages=2,
)


PLAIN = lossprune.Criterion("plain", lambda theta, g, h: theta.abs())


def small(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, classes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    assert main([*FLAGS, *FOUND, "--path", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The network that the runs prune."""
    path = tmp_path_factory.mktemp("dense")
    assert main([*FLAGS, "--nepochs", "5", "--pe", "-1", "--path", str(path)]) == 0
    model = small((1, 8, 8), 10)
    weights, metadata, _ = read_network(the_run(path) / "best_model.pt")
    load_weights_(model, ARCH, path, weights, metadata)
    return model


def record_of(path) -> RunRecord:
    return RunRecord.from_json((the_run(path) / RECORD).read_text())


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (
            "--reg auto --pi auto --tolerance 0.3 --max_loss_increase 1",
            {"reg": "auto", "stages": "auto", "tolerance": 0.3, "max_loss_increase": 1},
        ),
        (
            "--pi auto --max_examples 400 --pr 0.7 --average 0.5 --reg 0.001",
            {
                **{"stages": "auto", "max_examples": 400, "sparsity": 0.7},
                **{"average": 0.5, "reg": 0.001},
            },
        ),
        (
            "--pi 6 --exp --max_error_increase 5",
            {"stages": 6, "max_error_increase": 5, "reg": 0.0},
        ),
        (
            "--pi 3 --multiply_adds 0.2 --scope multiply-adds",
            {
                **{"stages": 3, "schedule": "linear", "reg": 0.0},
                **{"multiply_adds": 0.2, "scope": "multiply-adds"},
            },
        ),
    ],
)
def test_mask_and_stages_are_those_of_the_library(trained, tmp_path, flags, asked):
    assert main([*FLAGS, *shlex.split(flags), "--path", str(tmp_path)]) == 0
    data = load("digits", seed=1111)
    examples = StageExamples(data, 100, 1111)
    found = lossprune.prune(
        trained,
        "QM",
        data=examples,
        examples=100,
        seed=1111,
        validation=SplitBatches(data, data.valid) if "max" in str(asked) else None,
        on_stage=lambda _, stage: setattr(examples, "stage", stage.stage + 1),
        **asked,
    )
    record = record_of(tmp_path)
    assert Mask.load(the_run(tmp_path) / MASK) == found.mask
    points = "max_examples" not in asked and "multiply_adds" not in asked
    expected = [json.loads(json.dumps(stage_dict(stage))) for stage in found.stages]
    for stage in expected:
        stage.pop("points", None) if not points else None
    assert without_times(list(record.stages)) == without_times(expected)
    assert record.after_pruning is not None
    assert record.before_pruning is not None
    if "max_loss_increase" in asked:
        first, last = found.curve[0], record.after_pruning.scores
        assert record.before_pruning.scores.valid_loss == pytest.approx(first.loss, rel=1e-5)
        assert last.valid_loss - first.loss <= 1 + 1e-5
        assert len(found.stages) > 2


def test_killed_between_stages_it_ends_as_if_never_stopped(undisturbed, tmp_path):
    """Averages, λ and strides go on from the stage that was saved."""
    flags = [*FLAGS, *FOUND, "--path", str(tmp_path / "killed")]
    stages = len(record_of(undisturbed).stages)
    for stage in (2, 6):
        process = Processes(flags, tmp_path / str(stage))
        process.wait_for(f"stage {stage}:")
        process.kill()
        process.join(30)
        assert process.exitcode == 9, "it was done before it was killed"
        assert stage <= len(record_of(tmp_path / "killed").stages) < stages
    finish(flags, tmp_path / "last")
    assert result(tmp_path / "killed") == result(undisturbed)


@pytest.mark.parametrize("flags", ["--pi auto --max_loss_increase 0.1", "--pi 2 --pr 0.3"])
def test_killed_after_the_last_stage_nothing_more_is_pruned(tmp_path, stop_before, flags):  # noqa: F811
    """A budget that is spent, and one that is not when all stages are done."""
    flags = [*FLAGS, *shlex.split(flags), "--max_error_increase", "60", "--reg", "auto"]
    flags += ["--pe", "0", "--nepochs", "1"]
    assert main([*flags, "--path", str(tmp_path / "undisturbed")]) == 0
    expected = result(tmp_path / "undisturbed")
    seen = set()
    for stop in range(6, 40):
        path = tmp_path / f"stop-{stop}"
        stop_before(stop)
        status = main([*flags, "--path", str(path)])
        stop_before(0)
        if status == 0:
            break
        record = record_of(path)
        if record.is_pruning and len(record.stages) == len(expected["record"]["stages"]):
            assert main([*flags, "--path", str(path)]) == 0
            assert result(path) == expected, f"stopped before write {stop}"
            seen.add(stop)
        if record.after_pruning is not None:
            break
    assert seen


def test_runs_of_one_process_share_statistics_only_of_the_same_examples(tmp_path):
    """Where λ is chosen, a fifth of them is kept apart."""
    cache = Cache({"statistics": 4, "dataset": 1})
    for changes in ({"reg": 0.0}, {"reg": "auto"}, {"stages": "auto"}):
        config = replace(CONFIG, **changes, path=tmp_path / str(changes), epochs=0)
        run(config, cache=cache)
        alone = replace(config, path=tmp_path / f"{changes} alone")
        run(alone)
        assert result(config.path) == result(alone.path)


def test_runs_that_find_different_sparsities_are_trained_together(tmp_path):
    changes = [{}, {"reg": "auto"}, {"stages": "auto", "sparsity": None, "max_error_increase": 4.0}]
    configs = [replace(CONFIG, path=tmp_path, **asked) for asked in changes]
    records = run_together(configs)
    assert [record.training[-1]["mode"] for record in records] == ["stacked"] * 3
    for config, record in zip(configs, records, strict=True):
        weights, _, _ = read_network(config.folder / "last_model.pt")
        mask = Mask.load(config.folder / MASK)
        assert mask.sparsity == record.sparsity
        assert not any(weights[name][~kept].any() for name, kept in mask.items())


def test_a_stage_is_itself_again_after_its_record(trained):
    """Of a pruning with everything that a stage can say."""
    data = load("digits", seed=1111)
    found = lossprune.prune(
        trained,
        "QM",
        data=StageExamples(data, 100, 1111),
        examples=100,
        reg="auto",
        stages="auto",
        tolerance=0.1,
        max_examples=600,
        max_error_increase=9,
        compensate=True,
    )
    assert any(stage.taken_back for stage in found.stages)
    for stage in [*found.stages, lossprune.prune(trained, "MP", sparsity=0.5).stages[0]]:
        assert stage_of(json.loads(json.dumps(stage_dict(stage)))) == stage


def test_the_log_tells_what_was_found(undisturbed):
    record = record_of(undisturbed)
    log = (the_run(undisturbed) / "log.txt").read_text().splitlines()
    stages = [line for line in log if line.startswith("# stage ")]
    for line, stage in zip(stages, record.stages, strict=True):
        assert line.startswith(f"# stage {stage['stage']}: sparsity {stage['sparsity']:.5f} ")
        assert f" λ {stage['reg']:.3g}" in line
        assert (" taken back" in line) == bool(stage["taken_back"])
    back = sum(len(stage["taken_back"]) for stage in record.stages)
    assert back > 0
    assert f"# {len(stages)} stages, {back} longer ones taken back" in log
    points = [point for stage in record.stages for point in stage["points"]]
    (end,) = {p["loss"] for p in points if p["removed"] == record.removed}
    assert any(
        f"validation loss {points[0]['loss']:.4f} before pruning, {end:.4f}" in line for line in log
    )


def test_names_have_the_flags_only_where_they_are_asked_for():
    known = RunConfig(criterion="QM", sparsity=0.9, stages=14)
    later = {"average", "tolerance", "max_examples", "seconds", "max_loss_increase"}
    assert not later & known.settings.keys()
    found = replace(known, stages="auto", reg="auto", tolerance=0.2, pruning_seconds=5.0)
    assert found.settings == {
        **known.settings,
        **{"pi": "auto", "reg": "auto", "tolerance": 0.2, "seconds": 5.0},
    }
    assert ",pi=auto,pm=QM,pr=0.9,reg=auto,seconds=5.0,seed=1111,tolerance=0.2" in found.name
    # What is removed is what the budget leaves, unless it is said.
    budget = RunConfig(criterion="QM", max_error_increase=0.5)
    assert (budget.sparsity, budget.stages_in_all) == (None, None)
    assert ",max_error_increase=0.5," in budget.name
    assert ",pr=None," in budget.name
    assert replace(budget, sparsity=0.9, stages=3).stages_in_all == 3
    share = RunConfig(criterion="QM", multiply_adds=0.25, stages=3)
    assert (share.sparsity, share.stages_in_all) == (None, 3)
    assert ",multiply_adds=0.25," in share.name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--reg high", "--reg must be a number or auto, got 'high'"),
        ("--reg -1", r"--reg must be a number from 0 to 1e\+30, got -1.0"),
        ("--pi many", "--pi must be a whole number or auto, got 'many'"),
        ("--pm MP --reg auto", "--reg auto has nothing to choose for MP, which ranks"),
        ("--pm MP --pi auto", "--pi auto follows how well a model predicts .* MP has none"),
        (f"--pm {__name__}:PLAIN --pi auto", "--pi auto follows how .*:PLAIN has none"),
        (f"--pm {__name__}:PLAIN --reg auto", "--reg auto has nothing to choose for .*:PLAIN"),
        ("--nex 4 --reg auto", "--nex 4 with --reg auto: a fifth of the examples choose λ"),
        ("--nex 5 --reg auto --compensate", "--nex 5 with --reg auto and --compensate: .* takes 6"),
        ("--multiply_adds 0", "--multiply_adds must be a share that is left, a number"),
        ("--multiply_adds 0.5 --pr 0.5", "--multiply_adds is given instead of --pr and --pattern"),
        ("--average 1", r"--average must be a number in \[0, 1\), got 1.0"),
        ("--pm MP --average 0.5", "--average 0.5 is of gradient and curvature, which MP does not"),
        ("--tolerance 0.1", "--tolerance 0.1 is for --pi auto, got --pi 1"),
        ("--pi auto --tolerance 0", "--tolerance must be a number greater than 0, got 0.0"),
        ("--pi auto --seconds nan", "--seconds must be a number greater than 0, got nan"),
        ("--pi auto --max_examples 99", "--max_examples 99 with --nex 100: one stage reads more"),
        ("--pi auto --compensate --finish 2", "--finish 2 with --pi auto: these stages come after"),
        ("--max_loss_increase -1", "--max_loss_increase must be a number of at least 0, got -1.0"),
        ("--max_loss_increase 1 --pattern 2:4", "--max_loss_increase 1.0 with --pattern 2:4: "),
        (
            "--max_error_increase 1 --recalibrate end",
            "--max_error_increase 1.0 with --recalibrate end, .*: give --recalibrate stages",
        ),
        ("--pr None", "--pr None is for a pruning that --max_loss_increase or"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tmp_path, capfd, flags, said):
    assert main([*FLAGS, *shlex.split(flags), "--path", str(tmp_path)]) == 2
    (told,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(said, told), told
    assert not list(tmp_path.iterdir())


def test_so_little_is_to_be_removed_that_no_stage_is_needed(tmp_path):
    config = replace(CONFIG, stages="auto", sparsity=1e-5, path=tmp_path)
    record = run(config)
    assert (record.removed, record.stages) == (0, ())
    assert Mask.load(config.folder / MASK).sparsity == 0


def test_a_plan_compares_what_is_found_with_what_is_given():
    plan = """
    arch = "MLP"
    pm = "QM"
    pi = [14, "auto"]
    reg = [0.0, 1e-2, "auto"]
    max_error_increase = ["None", 0.5]
    """
    runs = parse_plan(plan, "mine").expand()
    assert [run.config.sparsity for run in runs] == [0.956, None] * 6
    assert [run.config.reg for run in runs] == [0.0, 0.0, 1e-2, 1e-2, "auto", "auto"] * 2
    assert len({run.config.folder for run in runs}) == 12
    assert "max_error_increase=0.5 pi=auto pr=None reg=auto" in label_runs(runs).values()
    assert runs[-1].command == (
        "lossprune run --arch MLP --pr None --pm QM --pi auto --reg auto --max_error_increase 0.5"
    )
    plan = parse_plan('pm = "QM"', "mine").changed(parse_choices("reg=auto,pi=auto", "set"))
    (only,) = plan.expand()
    assert (only.config.reg, only.config.stages) == ("auto", "auto")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('reg = "high"', "plan own: reg must be a number or \"auto\", got 'high'"),
        ('pi = [14, "AUTO"]', "plan own: pi must be a whole number or \"auto\", got 'AUTO'"),
        ('tolerance = "auto"', "plan own: tolerance must be a number or None, got 'auto'"),
    ],
)
def test_a_plan_with_another_word_is_told(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_plan(text, "own")
