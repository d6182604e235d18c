"""How good and how fast, against others: every module here is a command that prints a table."""
