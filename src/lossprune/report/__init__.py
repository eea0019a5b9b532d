"""From records of runs to tables, figures, one page, and comparisons.

``read_results`` reads and checks; ``tables`` and ``series`` are pure functions of what was read;
``write_report`` and ``compare`` put it where people look.  ``draw_sensitivity`` draws what
``lossprune.sensitivity`` found.  All is imported on first use, so that the command line's help
needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossprune.report.build import Written as Written
    from lossprune.report.build import write_report as write_report
    from lossprune.report.comparison import compare as compare
    from lossprune.report.reading import Results as Results
    from lossprune.report.reading import read_results as read_results
    from lossprune.report.sensitivity_figure import draw_sensitivity as draw_sensitivity

_HOMES = {
    "Written": "build",
    "write_report": "build",
    "compare": "comparison",
    "Results": "reading",
    "read_results": "reading",
    "draw_sensitivity": "sensitivity_figure",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lossprune.report.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
