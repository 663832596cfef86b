"""The database behind the director: tables, named statements, transactions, and the states' one way in.

``base`` is the seam; ``sqlite`` the engine; ``schema``, ``queries`` and ``rows`` what is stored and asked for;
``states`` sets states; ``migrations`` makes the tables.
"""
