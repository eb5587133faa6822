"""The sources of the price table, each read into the same form."""
