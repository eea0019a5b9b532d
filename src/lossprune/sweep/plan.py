"""From a plan to the runs it stands for.  Plans are data, and this is a pure function of them.

A plan is a TOML file whose keys are the flags of ``lossprune run``.  A list is an axis; the runs
are all combinations.  ``[baseline]`` names the network that each run starts from, ``[[drop]]``
leaves combinations out, ``[[keep]]`` all others.  ``docs/sweeps.md`` describes the format.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import BEST
from lossprune.flags import MOST_RUNS, declared_flags, words_of

Flags = Mapping[str, Any]
Choices = tuple[tuple[str, Any], ...]

FLAGS = declared_flags(RunConfig)
# What a baseline takes over from its runs: all that determines how a dense network is trained.
_TRAINING = (
    *("arch", "dataset", "image_size", "seed"),
    *("nepochs", "batch_size", "lr", "dec", "dec_every", "l2"),
)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan, and the run whose best network it starts from, if that is one of it."""

    config: RunConfig
    baseline: RunConfig | None = None

    @property
    def command(self) -> str:
        """The command that does this run alone."""
        return f"lossprune run {shlex.join(words_of(RunConfig, vars(self.config)))}"


@dataclass(frozen=True)
class Plan:
    """A grid of runs.

    Attributes:
        name: of the file or the bundled plan.
        axes: values by flag, in the order of the file; a value given alone is an axis of one.
        baseline: the flags in which the start network's run differs; None: none is trained.
        drop: runs that agree with one of these in every flag named are left out.
        keep: where given, only runs that agree with one of these in every flag named are done.
    """

    name: str
    axes: Mapping[str, tuple[Any, ...]]
    baseline: Flags | None = None
    drop: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    keep: tuple[Mapping[str, tuple[Any, ...]], ...] = ()

    def changed(self, changes: Choices) -> "Plan":
        """Return the plan with flags set, on baselines too; ``baseline.lr`` sets theirs alone.

        A start network, ``model_0``, takes the place of the baselines.

        Raises:
            ValueError: a ``baseline.`` flag where the plan has no baselines.
        """
        axes, baseline = dict(self.axes), None if self.baseline is None else dict(self.baseline)
        for name, value in changes:
            flag = name.removeprefix("baseline.")
            if flag == name:
                axes[name] = (value,)
                if name == "model_0":
                    baseline = None
                elif baseline is not None and name in _TRAINING:
                    baseline.pop(name, None)
            elif baseline is None:
                raise ValueError(f"--set {name}={value}: plan {self.name} has no baselines")
            else:
                baseline[flag] = value
        return replace(self, axes=axes, baseline=baseline)

    def expand(self, **common: Any) -> tuple[PlannedRun, ...]:
        """Return the runs, baselines first; ``common`` are fields of every ``RunConfig``.

        Raises:
            ValueError: a value that its flag does not accept, or a plan that stands for no runs.
        """
        baselines: dict[Path, PlannedRun] = {}
        runs: dict[Path, PlannedRun] = {}
        for flags in self._combinations():
            baseline = self._baseline_of(flags, common)
            config = make_config(flags, common, self.name)
            if baseline is not None:
                baselines.setdefault(baseline.folder, PlannedRun(baseline))
                config = replace(config, start=baseline.folder / BEST)
            known = runs.setdefault(config.folder, PlannedRun(config, baseline)).config
            if known.start != config.start:
                raise ValueError(
                    f"plan {self.name}: model_0 {known.start} and {config.start} give runs of the "
                    "same folder: do one sweep for each, with another --path"
                )
        if not runs:
            raise ValueError(
                f"plan {self.name} stands for no runs: [[keep]] and [[drop]] leave none"
            )
        return tuple({**runs, **baselines}[folder] for folder in {**baselines, **runs})

    def _combinations(self) -> Iterator[dict[str, Any]]:
        count = prod(len(values) for values in self.axes.values())
        if count > MOST_RUNS:
            raise ValueError(
                f"plan {self.name} stands for {count:,} combinations: it may be at most "
                f"{MOST_RUNS:,}, those that [[drop]] and [[keep]] leave out among them"
            )
        for values in product(*self.axes.values()):
            flags = dict(zip(self.axes, values, strict=True))
            kept = not self.keep or any(_matches(flags, rule) for rule in self.keep)
            if kept and not any(_matches(flags, rule) for rule in self.drop):
                yield flags

    def _baseline_of(self, flags: Flags, common: Flags) -> RunConfig | None:
        if self.baseline is None:
            return None
        inherited = {name: flags[name] for name in _TRAINING if name in flags}
        return make_config({**inherited, **self.baseline}, common, f"{self.name} [baseline]")


def select(
    runs: Sequence[PlannedRun], seeds: Sequence[int], only: Choices
) -> tuple[PlannedRun, ...]:
    """Return the runs asked for, and the baselines that they need.

    Args:
        runs: of a plan.
        seeds: the seeds to keep; none: all.
        only: flags and values to keep; a flag named twice keeps both of its values.

    Raises:
        ValueError: nothing is left.
    """
    wanted: dict[str, list[Any]] = {"seed": list(seeds)} if seeds else {}
    for name, value in only:
        wanted.setdefault(name, []).append(value)
    chosen = [run for run in runs if _matches(flags_of(run.config), wanted)]
    if not chosen:
        asked = ", ".join(f"{name}={value}" for name, values in wanted.items() for value in values)
        raise ValueError(f"--only and --seeds leave no run of the plan: none has {asked}")
    folders = {run.config.folder for run in chosen}
    folders |= {run.baseline.folder for run in chosen if run.baseline is not None}
    return tuple(run for run in runs if run.config.folder in folders)


def _matches(flags: Flags, rule: Mapping[str, Sequence[Any]]) -> bool:
    return all(flags.get(name, FLAGS[name].default) in values for name, values in rule.items())


def flags_of(config: RunConfig) -> dict[str, Any]:
    """Return a run's settings by flag."""
    return {name: getattr(config, flag.field) for name, flag in FLAGS.items()}


def make_config(flags: Flags, common: Flags, where: str) -> RunConfig:
    """Return the run of these flags; an error tells where they stand."""
    try:
        return RunConfig(**{FLAGS[name].field: value for name, value in flags.items()}, **common)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
