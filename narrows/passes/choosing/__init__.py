"""Choosing what to keep: how channels are scored, by weights alone or by data."""
