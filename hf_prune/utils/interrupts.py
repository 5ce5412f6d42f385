"""Steps that an interrupt must not leave half done."""

from __future__ import annotations

from collections.abc import Callable


def run_to_the_end(step: Callable[[], None]) -> None:
    """Run a step that may be repeated; what interrupts it, such as Ctrl-C, is raised once the step is complete."""
    try:
        step()
    except KeyboardInterrupt:
        run_to_the_end(step)  # Ctrl-C may be pressed again
        raise
    except BaseException:
        step()
        raise
