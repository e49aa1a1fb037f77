"""Records of what the engine did. Written to by all, imports nothing."""
