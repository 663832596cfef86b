"""The task that does nothing, in a module of its own: a node imports it, and nothing else of what is here."""

import fieldlab as fl


@fl.task
def nothing() -> None:
    pass
