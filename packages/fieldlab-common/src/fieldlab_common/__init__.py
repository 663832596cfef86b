"""The shared nouns of fieldlab and its wire: no input or output, pure Python."""
