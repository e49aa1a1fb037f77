"""nanoserve beside other engines on this machine: `python -m bench.peers`. See README.md here."""
