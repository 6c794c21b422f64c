"""Tables in Markdown, as pages of results and the README have them."""

from __future__ import annotations

from collections.abc import Iterable


def markdown_table(heading: Iterable[str], rows: Iterable[Iterable[str]], figures: int) -> str:
    """A table, whose last so many columns are figures, set to the right."""
    heading = list(heading)
    rules = ["---"] * (len(heading) - figures) + ["---:"] * figures
    lines = [heading, rules, *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(percent: float | None, places: int = 1) -> str:
    """A change, with a minus that is as wide as the plus; a dash where there is none."""
    if percent is None:
        return "–"
    text = f"{percent:+.{places}f} %".replace("-", "−")
    return text[1:] if float(f"{percent:.{places}f}") == 0 else text
