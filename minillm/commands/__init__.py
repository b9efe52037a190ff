"""Commands that have a file of their own; `minillm.cli` has the others, and puts them together."""
