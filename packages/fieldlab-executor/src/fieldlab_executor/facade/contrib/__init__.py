"""``fieldlab.contrib`` on a node: names to import, so that modules load there as they do on the client."""
