import json
import math
from dataclasses import replace

import pytest

from lossprune.experiment.log import log_text, summarise
from lossprune.experiment.record import EpochRecord, RunRecord, Scores, Start


def scores(base: float) -> Scores:
    return Scores(base, base / 10, base + 1, base / 20, base + 2, base / 30)


@pytest.fixture
def record() -> RunRecord:
    rows = tuple(EpochRecord(n, scores(1 / n), 0.5) for n in (1, 2, 3))
    stage = {
        "stage": 1,
        "sparsity": 0.5,
        "removed": 5,
        "loss_before": 0.25,
        "loss_after": 0.75,
        "predicted_change": 0.125,
        "realised_change": 0.5,
        "seconds": 0.1,
    }
    return RunRecord(
        config={"pe": 2, "pi": 1, "seed": 1111},
        environment={"torch": "2.13.0"},
        start=Start(None, None, "ab" * 32),
        status="finished",
        before_pruning=rows[1],
        after_pruning=EpochRecord(2, scores(2.0)),
        best=rows[2],
        last=rows[2],
        stages=(stage,),
        removed=5,
        prunable=10,
        epochs=rows,
        seconds=2.0,
    )


def test_the_log_has_the_published_format(record):
    assert log_text(record).splitlines() == [
        "# pe=2",
        "# pi=1",
        "# seed=1111",
        "# start weights sha256 " + "ab" * 32,
        "# row n, counted from 0, is the network after epoch n + 1",
        "# train_l and train_m are evaluations of it, as the other columns, without augmentation: "
        "not means over the epoch's batches in training mode",
        "n\ttrain_l\ttrain_m\tvalid_l\tvalid_m\ttest_l\ttest_m\ttime",
        "0\t1.00000\t0.10000\t2.00000\t0.05000\t3.00000\t0.03333\t0.50",
        "1\t0.50000\t0.05000\t1.50000\t0.02500\t2.50000\t0.01667\t0.50",
        "# before pruning: train_l 0.50000 train_m 0.05000 valid_l 1.50000 valid_m 0.02500 "
        "test_l 2.50000 test_m 0.01667",
        "# stage 1/1: sparsity 0.50000 loss 0.25000 -> 0.75000 predicted change 0.12500",
        "# after pruning: train_l 2.00000 train_m 0.20000 valid_l 3.00000 valid_m 0.10000 "
        "test_l 4.00000 test_m 0.06667",
        "# removed 5 of 10: sparsity 0.5000000",
        "2\t0.33333\t0.03333\t1.33333\t0.01667\t2.33333\t0.01111\t0.50",
        "# finished",
        "# best epoch 3 (n 2): train_l 0.33333 train_m 0.03333 valid_l 1.33333 valid_m 0.01667 "
        "test_l 2.33333 test_m 0.01111",
    ]


def test_the_log_names_the_row_of_an_epoch_where_it_has_one(record):
    training = ({"from_epoch": 3, "mode": "dense", "reason": "asked for"},)
    log = log_text(replace(record, best=record.after_pruning, training=training))
    assert "# training from epoch 3 (n 2): dense, asked for\n" in log
    unpruned = replace(record, best=EpochRecord(0, scores(1.0)), epochs=())
    assert "# best epoch 0: train_l" in log_text(unpruned)


def test_a_record_survives_json_to_the_last_bit(record):
    assert RunRecord.from_json(record.to_json()) == record


def test_what_is_not_finite_is_null_in_json_and_nan_when_read(record):
    broken = EpochRecord(3, Scores(math.nan, 0.9, math.inf, 0.9, 1.0, 0.9))
    values = {**record.to_dict(), "last": RunRecord.to_dict(record)["last"]}
    values["last"]["scores"] = broken.scores.__dict__
    text = RunRecord.from_dict(values).to_json()
    assert json.loads(text)["last"]["scores"]["train_loss"] is None
    last = RunRecord.from_json(text).last
    assert last is not None
    assert math.isnan(last.scores.valid_loss)
    assert not last.scores.finite
    assert last.scores.test_loss == 1.0


def test_the_summary_says_what_pruning_and_fine_tuning_did(record):
    assert summarise(record).splitlines() == [
        "finished in 2.0 s",
        "pruned 5 of 10 weights (sparsity 0.50000): training loss 0.5000 -> 2.0000, "
        "test error 1.67% -> 6.67%",
        "best epoch 3: training loss 0.3333, validation error 1.67%, test error 1.11%",
    ]
