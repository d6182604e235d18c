"""Supervised networks of the `fastmri` package as methods, and a trainer that gives them the prior's data."""
