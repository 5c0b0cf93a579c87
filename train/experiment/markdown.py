"""Tables as Markdown."""

from collections.abc import Sequence

from tabulate import tabulate


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], align: str = "left"
) -> str:
    """A table, of which `align` says where all columns but the first are."""
    return tabulate(
        rows,
        heads,
        tablefmt="pipe" if align == "right" else "github",
        colalign=["left", *[align] * (len(heads) - 1)],
        disable_numparse=True,
    )
