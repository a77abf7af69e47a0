"""What a benchmark finds: figures, each beside its peer's."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: was measured, such as "decode, batch 1".
        unit: of both figures, such as "tokens/s".
        here: this codebase's figure.
        peer: the same of what it stands beside, or None where there is nothing.
        name: of the peer.
        more: whether larger is better.
    """

    what: str
    unit: str
    here: float
    peer: float | None = None
    name: str = ""
    more: bool = True

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; below 1: worse."""
        if self.peer is None:
            return None
        better, worse = (self.here, self.peer) if self.more else (self.peer, self.here)
        return better / worse if worse else float("inf")

    @property
    def cells(self) -> list[str]:
        """What a table says of it: what, unit, here, peer, its name, ratio."""
        beside = ["", "", ""]
        if self.peer is not None:
            beside = [_short(self.peer), self.name, f"{self.ratio:.2f}"]
        return [self.what, self.unit, _short(self.here), *beside]

    def __str__(self) -> str:
        line = f"{self.what}: {_short(self.here)} {self.unit}"
        if self.peer is None:
            return line
        return f"{line}; {self.name} {_short(self.peer)} ({self.ratio:.2f} times as good)"


def _short(value: float) -> str:
    """Four digits, and no exponent where that can be avoided."""
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.1e}"
