"""The services that users and executors talk to.

``fieldlab-director serve`` runs them; ``embedded`` runs them for one program, in a process beside it.
"""

from fieldlab_director.embedded import Embedded, embedded

__all__ = ["Embedded", "embedded"]
