"""Choosing what to keep: how channels are scored."""
