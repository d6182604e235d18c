"""Solvers: one a file, each seeing tensors, operators and priors only."""
