"""Who computes what in which step: the request pool, the managers that pick, the scheduler, the batcher around it."""
