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
    named["c-other"] = OTHER_COLOUR
    named |= {f"p-{place}": colour for place, colour in enumerate(METHOD_COLOURS)}
    light = " ".join(f"--{name}: {colour.light};" for name, colour in named.items())
    dark = " ".join(f"--{name}: {colour.dark};" for name, colour in named.items())
    return (
        f":root {{ {light} }}\n"
        f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}\n'
        f':root[data-theme="dark"] {{ {dark} }}\n'
    )
