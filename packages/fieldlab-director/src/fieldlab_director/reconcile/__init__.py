"""The reconcile loop: it brings what is stored and what is on the nodes together, from any state, after any crash.

``apply`` has the transactions: lease a row, decide, note what a connector did. ``loop`` finds what is due, wakes when
something is, and carries each deployment from job to job; ``watch`` looks at one infrastructure: its executors, its
nodes. No connector is asked inside a transaction, and each infrastructure is waited for alone.
"""

from fieldlab_director.reconcile.loop import Reconciler

__all__ = ["Reconciler"]
