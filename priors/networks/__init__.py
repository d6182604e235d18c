"""Networks of other code bases, one a file, with the names that their state dicts have there."""
