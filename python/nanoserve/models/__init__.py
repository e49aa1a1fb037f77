"""Models as data: a config, a list of operations, a map of weight names."""
