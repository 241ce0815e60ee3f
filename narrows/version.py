"""The version of narrows."""

VERSION = "0.1.0"
