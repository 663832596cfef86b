"""Ways in from other systems. Nothing here is imported by fieldlab itself; each module says what it needs installed."""
