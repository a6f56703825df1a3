"""The composition root: the command line, and the verbs that join the packages. Nothing imports it."""
