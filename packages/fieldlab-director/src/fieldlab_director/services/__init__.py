"""What the director does when it is asked: a command is a synchronous function of one transaction.

``identity`` who asks; ``experiments``, ``journals``, ``events``, ``records``, ``blobs``, ``infrastructures``,
``secrets`` what for; ``outcome`` the one way in which a deployment's state changes; ``vault`` what is kept from readers
of the database.
"""
