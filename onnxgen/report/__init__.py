"""What happened, as values; rendered as text and JSON."""
