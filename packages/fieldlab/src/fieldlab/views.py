"""What results have in common: names with suggestions for a wrong one, and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldlab_common.drawing import Drawing, Svg
from fieldlab_common.errors import UnknownNameError

from fieldlab.text import clean, closest, listed

__all__ = ["Drawn", "Named"]


class Named(Mapping[str, Any]):
    """A mapping by name whose errors suggest the closest one."""

    _what = "entry"

    def _unknown(self, name: object) -> UnknownNameError:
        known = list(self)
        return UnknownNameError(
            f"There is no {self._what} {clean(name)!r}.{closest(str(name), known)}",
            advice=f"There are: {listed(known)}.",
        )


class Drawn:
    """What has a graph, and draws it with how its steps stand."""

    def _drawing(self) -> Drawing:
        raise NotImplementedError

    def to_svg(self) -> Svg:
        """A picture of its graph as an SVG document: how each step stands, and how long it took.

        Raises:
            ResultNotReady: it has no graph, because it was never resolved.
            UnsupportedError: it is too large for a picture that somebody could read.
        """
        return self._drawing().to_svg()

    def to_mermaid(self) -> str:
        """The same as a Mermaid flowchart, for Markdown."""
        return self._drawing().to_mermaid()

    def to_dot(self) -> str:
        """The same in the DOT language, for Graphviz."""
        return self._drawing().to_dot()
