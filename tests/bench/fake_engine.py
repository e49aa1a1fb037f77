"""An engine for the runner's tests: started as a peer's interpreter would be, it ignores the driver it is told to run.

How it behaves is its environment's FAKE: a rate in tokens per second, or what goes wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

behaviour = os.environ["FAKE"]
print("a banner nobody asked for", file=sys.stderr)
json.loads(sys.stdin.readline())  # what to load
with Path(os.environ["FAKE_LOG"]).open("a") as log:
    log.write(f"{os.environ['FAKE_NAME']} starts\n")
if behaviour == "refuses":
    print(json.dumps({"error": "width: not here"}), flush=True)
    sys.exit(1)
if behaviour == "dies loading":
    sys.exit("no such library")
facts = {"version": "1.0"}
if behaviour == "has a child":
    facts["child"] = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL).pid
print(json.dumps({"ready": facts}), flush=True)
for line in sys.stdin:
    message = json.loads(line)
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(f"{os.environ['FAKE_NAME']} {len(message['requests'])}\n")
    if behaviour == "dies":
        sys.exit("segmentation fault, or nearly")
    if behaviour == "garbage":
        print("Processed prompts: 100%", flush=True)
        continue
    if behaviour == "lies":
        print(json.dumps({"timeline": {"wall_s": 1.0, "requests": []}}), flush=True)
        continue
    if behaviour == "hangs":
        time.sleep(60)
    per_s = float(behaviour)
    entries = [
        {"prompt_tokens": len(prompt), "sent_s": 0.0, "tokens": [prompt[0]] * output,
         "times_s": [(at + 1) / per_s for at in range(output)]}
        for prompt, output in message["requests"]
    ]  # fmt: skip
    wall = max(entry["times_s"][-1] for entry in entries)
    print(json.dumps({"timeline": {"wall_s": wall, "requests": entries}}), flush=True)
