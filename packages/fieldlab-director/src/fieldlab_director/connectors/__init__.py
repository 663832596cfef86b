"""Connectors: each is the code for one way to reach nodes, and never sees the store.

``base`` is what a connector is and what it is asked; ``host`` runs one in a process of its own; ``fleet`` has the
processes of all attached infrastructures; ``local`` is the connector for nodes on the director's own machine.
"""
