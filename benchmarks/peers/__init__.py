"""Other software on the same data, with the same prior, in the same process."""
