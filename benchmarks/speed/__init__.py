"""How fast, and what the time goes to: ``python -m benchmarks.speed``, a section a module."""
