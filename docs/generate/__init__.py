"""The parts of the documents that are made from the code when the site is built."""
