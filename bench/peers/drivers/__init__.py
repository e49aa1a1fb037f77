"""One program per engine, run in that engine's own environment: `python -m bench.peers.drivers.NAME`.

A driver is a server for nanoserve.workloads.play: it adds requests and steps. Everything else is channel.py's. Which module
drives which engine, and in which environment, is engines.json's.
"""
