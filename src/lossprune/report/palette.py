"""The colours of figures and page: those of Okabe and Ito, told apart by colour-blind readers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """A colour on white, as in the figures' files, and its like on the page's dark ground."""

    light: str
    dark: str


_GREY = Colour("#767676", "#a8a8a8")
_BLUE = Colour("#0072b2", "#56b4e9")
_RED = Colour("#d55e00", "#ff9352")
_GREEN = Colour("#009e73", "#35c79a")

CRITERION_COLOURS = {"MP": _GREY, "LM": _BLUE, "QM": _RED, "OBD": _GREEN}
MOVED_COLOURS = {
    "MP": (
        Colour("#3d3d3d", "#dcdcdc"),
        Colour("#c4c4c4", "#7d7d7d"),
        Colour("#7a6f4a", "#b0a98a"),
    ),
    "LM": (
        Colour("#00405f", "#b3dcf5"),
        Colour("#8fcbee", "#2f7fae"),
        Colour("#4a55a8", "#8f9af0"),
    ),
    "QM": (
        Colour("#7d3600", "#ffc9a3"),
        Colour("#ffb27a", "#c0682a"),
        Colour("#a83a4a", "#ee7f8f"),
    ),
    "OBD": (
        Colour("#00543d", "#98ecd0"),
        Colour("#86dcbf", "#1f9570"),
        Colour("#6a8a00", "#a9cc3a"),
    ),
}
"""Of the same where weights or running statistics move beside the mask, in the order of names; then
from the first again."""
SHADES = 3
OTHER_COLOUR = Colour("#444444", "#d49be0")
"""Of every other criterion."""
METHOD_COLOURS = (
    *(Colour("#9a6fb0", "#c29ad6"), _BLUE, _RED, _GREEN),
    *(Colour("#b58900", "#e0c04f"), _GREY),
)
"""Of the numbers of stages and schedules of a figure, in their order; then from the first again."""


def style() -> str:
    """Return the colours as variables of CSS: ``--c-qm`` of a criterion, ``--p-0`` of a method."""
    named = {f"c-{name.lower()}": colour for name, colour in CRITERION_COLOURS.items()}
    named |= {
        f"c-{name.lower()}-{shade}": colour
        for name, colours in MOVED_COLOURS.items()
        for shade, colour in enumerate(colours)
    }
    named["c-other"] = OTHER_COLOUR
    named |= {f"p-{place}": colour for place, colour in enumerate(METHOD_COLOURS)}
    light = " ".join(f"--{name}: {colour.light};" for name, colour in named.items())
    dark = " ".join(f"--{name}: {colour.dark};" for name, colour in named.items())
    return (
        f":root {{ {light} }}\n"
        f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}\n'
        f':root[data-theme="dark"] {{ {dark} }}\n'
    )
