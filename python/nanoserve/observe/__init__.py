"""What happened, as typed records: written to by every part, depending on none."""

from nanoserve.observe.events import Event, EventLog

__all__ = ["Event", "EventLog"]
