"""From which sparsity on a deployed network is faster than the best dense engine.

``python -m benchmarks.break_even --peers PYTHON`` prunes each network by magnitudes, every layer
alike, to rising sparsities, and times lossprune and DeepSparse, and once for a network and batch
the dense engines: torch, onnxruntime and OpenVINO, those of PYTHON's environment where it is given.
One thread, seconds of the processor, all of one sparsity in turn.  Break-even is where the line
through the speed-ups against log(1 − sparsity) crosses 1.  ``--out`` keeps the measurement, and
``--show FILE`` draws and prints an earlier one; ``--figure`` is the picture.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import lossprune
from benchmarks.engine_networks import built
from benchmarks.engines import is_wrong, started, written
from benchmarks.hardware import hardware, write_json
from lossprune.deployment.engines.process import OTHERS, Engine, EngineError, Ready, timed_in_turn

DENSE = ("torch", "onnxruntime", "openvino")
SPARSE = ("lossprune", "deepsparse")
SPARSITIES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
CASES = {"VGG11": 16, "PreActResNet18": 16, "MobileNet": 16, "encoder": 4, "ViT": 16, "MLP": 64}
FIGURE = Path("docs/figures/break-even.svg")
KEPT = (1, 0.5, 0.2, 0.1, 0.05, 0.02)
TIMES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
COLOURS = {"lossprune": "#0072b2", "deepsparse": "#d55e00"}


class Engines:
    """The engines that there are for one network; one that ends is started again when next used."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._going: dict[str, Engine] = {}

    def timed(self, problem: str, *, dense: bool) -> dict[str, Any]:
        """Time the engines on one problem, the dense ones too where told."""
        names = [*(DENSE if dense else ()), *SPARSE]
        with ThreadPoolExecutor(2) as pool:  # only timing has to be in turn
            ready = dict(
                zip(names, pool.map(lambda name: self._ready(name, problem), names), strict=True)
            )
        taking = {name: Ready(engine, problem) for name, engine in ready.items() if engine}
        taken, lost = timed_in_turn(taking, self._options.budget)
        for name, error in lost.items():
            self._drop(name, problem, error)
        return {name: {**taking[name].told, "seconds": seconds} for name, seconds in taken.items()}

    def _ready(self, name: str, problem: str) -> Engine | None:
        options = self._options
        try:
            if name not in self._going:
                self._going[name] = started(name, self._folder, 1, options.peers, options.patience)
            self._going[name].ready(problem)
        except EngineError as error:
            self._drop(name, problem, str(error))
        return self._going.get(name)

    def _drop(self, name: str, problem: str, error: str) -> None:
        told(f"{problem}: {name} is left out: {error}")
        if name in self._going:
            self._going.pop(name).end()

    def close(self) -> None:
        """End all processes."""
        for engine in self._going.values():
            engine.end()


def measured(
    name: str, batches: Sequence[int], options: argparse.Namespace
) -> Iterable[dict[str, Any]]:
    """Time one network at every sparsity and batch size."""
    with tempfile.TemporaryDirectory() as path, closing(Engines(Path(path), options)) as engines:
        for sparsity in options.sparsities:
            network = built(name)
            mask = lossprune.prune(network, "MP", sparsity=sparsity, scope="layer").mask
            mask.apply_(network)
            for batch in batches:
                problem = f"{name}-{sparsity}-{batch}"
                written(Path(path) / problem, name, network, mask, batch)
                first = sparsity == options.sparsities[0]
                yield {
                    "network": name,
                    "batch": batch,
                    "sparsity": mask.sparsity,
                    "engines": engines.timed(problem, dense=first),
                }


def told(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def speed_ups(rows: Sequence[dict[str, Any]], engine: str) -> dict[float, float]:
    """Return dense / engine by sparsity, for the rows of one network and batch."""
    dense = min(
        median(found["seconds"])
        for row in rows
        for name, found in row["engines"].items()
        if name in DENSE
    )
    return {
        row["sparsity"]: dense / median(row["engines"][engine]["seconds"])
        for row in rows
        if engine in row["engines"] and not is_wrong(row["engines"][engine])
    }


def break_even(ratios: dict[float, float]) -> float | None:
    """Return the sparsity from which on the ratio stays above 1; None: it is not, at the last.

    Between two measured sparsities log ratio is taken as linear in log(1 − sparsity).

    >>> round(break_even({0.0: 0.5, 0.75: 2.0}), 3)
    0.5
    """
    points = sorted(ratios.items())
    if not points or points[-1][1] < 1:
        return None
    below = [place for place, (_, ratio) in enumerate(points) if ratio < 1]
    if not below:
        return points[0][0]
    (low, slower), (high, faster) = points[below[-1]], points[below[-1] + 1]
    share = math.log(1 / slower) / math.log(faster / slower)
    kept = (1 - share) * math.log(1 - low) + share * math.log(1 - high)
    return 1 - math.exp(kept)


def grouped(rows: Iterable[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Return the rows by network and batch."""
    cases: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        cases.setdefault(row["network"], {}).setdefault(row["batch"], []).append(row)
    return cases


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print break-even and speed-ups as Markdown."""
    sparsities = sorted({round(row["sparsity"], 3) for row in rows})
    print(f"| network | batch | | break-even | {' | '.join(map('{:g}'.format, sparsities))} |")
    print(f"| --- | --: | --- | --: |{' --: |' * len(sparsities)}")
    for network, batches in grouped(rows).items():
        for batch, some in batches.items():
            for engine in SPARSE:
                ratios = speed_ups(some, engine)
                even = break_even(ratios)
                at = {round(sparsity, 3): f"{ratio:.2f}" for sparsity, ratio in ratios.items()}
                cells = [network, str(batch), engine, "–" if even is None else f"{even:.2f}"]
                cells += [at.get(sparsity, "–") for sparsity in sparsities]
                if ratios:
                    print(f"| {' | '.join(cells)} |")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed-ups against sparsity, a panel a network, with break-even marked."""
    from matplotlib.figure import Figure

    cases = grouped(rows)
    columns = min(3, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(8.4, 2.9 * lines + 0.5), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for axes, (network, batches) in zip(panels, cases.items(), strict=False):
        for place, some in enumerate(batches.values()):
            for engine in SPARSE:
                draw_line(axes, speed_ups(some, engine), engine, place)
        axes.axhline(1, color="0.4", linewidth=0.8)
        title = f"{network}, batches of {' and '.join(map(str, batches))}"
        axes.set_title(title, fontsize=10)
        axes.set(xscale="log", yscale="log", xlim=(1.1, 0.018))
        axes.set_xticks(KEPT, [f"{1 - kept:g}" for kept in KEPT])
        low, high = axes.get_ylim()
        ticks = [tick for tick in TIMES if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in panels[len(cases) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8.5, frameon=False)
    figure.supxlabel("sparsity")
    figure.supylabel("times as fast as the best dense engine")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"drawn in {path}")


def draw_line(axes: Any, ratios: dict[float, float], engine: str, place: int) -> None:
    """Draw one engine's line, and where lossprune breaks even."""
    if not ratios:
        return
    colour, style = COLOURS[engine], "-" if place == 0 else "--"
    kept = [1 - sparsity for sparsity in ratios]
    label = f"{engine}, {'larger' if place else 'smaller'} batch"
    axes.plot(kept, list(ratios.values()), style, marker=".", label=label, color=colour)
    even = break_even(ratios)
    if engine == "lossprune" and even:
        axes.plot([1 - even], [1], "o", color=colour, zorder=3)
        axes.annotate(
            f"{even:.2f}", (1 - even, 1), textcoords="offset points", fontsize=9,
            xytext=(6, -14) if place == 0 else (-6, 7), ha="left" if place == 0 else "right",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument(
        "--batches", nargs="+", type=int, help="of every network, not 1 and its own"
    )
    parser.add_argument("--budget", type=float, default=0.25, help="seconds an engine and point")
    parser.add_argument("--patience", type=float, default=180, help="seconds for an answer")
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment that has the others")
    parser.add_argument("--show", type=Path, metavar="FILE", help="of an earlier measurement")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--out", type=Path, default=Path("measurements/break_even.json"))
    options = parser.parse_args()
    options.engines = OTHERS
    if options.show:
        rows = json.loads(options.show.read_text())["rows"]
    else:
        print(hardware())
        rows, began = [], time.monotonic()
        for name in options.networks:
            for row in measured(name, options.batches or (1, CASES[name]), options):
                rows.append(row)
                taken = ", ".join(
                    f"{engine} {1e3 * median(found['seconds']):.3g} ms"
                    for engine, found in row["engines"].items()
                )
                so_far = f"{time.monotonic() - began:.0f} s"
                told(f"{so_far}: {name} {row['sparsity']:.2f}, batch {row['batch']}: {taken}")
        write_json(options.out, {"rows": rows})
    print_table(rows)
    draw(rows, options.figure)


if __name__ == "__main__":
    main()
