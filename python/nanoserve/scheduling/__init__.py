"""Who computes what in each step: queues, budgets, pages, preemption."""
