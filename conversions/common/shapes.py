"""Names and shapes of common layers, for the header functions of recipes."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    """A linear layer `columns` → `rows`."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def conv(name: str, rows: int, columns: int, *kernel: int, bias: bool = True) -> Shapes:
    """A convolution of `columns` channels into `rows`, with one kernel size for each dim."""
    return {f"{name}.weight": (rows, columns, *kernel)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    """A norm with a weight, and a bias unless it is an RMS norm."""
    shapes: Shapes = {f"{name}.weight": (width,)}
    return shapes | ({f"{name}.bias": (width,)} if bias else {})
