"""Does the quickstart keep its promises? `expect.py RUN SECONDS`"""

import json
import sys
from pathlib import Path

run, seconds = Path(sys.argv[1]), int(sys.argv[2])
metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
accuracy = metrics["scores"]["classify"]["accuracy"]
memory = max(metrics["peak_memory_bytes"].values()) / 2**30
kept = {
    "tuned is 0.3 above untrained": accuracy["tuned"] >= accuracy["base"] + 0.3,
    "tuned is 0.3 above blank pictures": accuracy["tuned"] >= accuracy["blank"] + 0.3,
    "at most 15 minutes": seconds <= 900,
    "at most 8 GiB": memory <= 8,
    "merged model is there": (run / "merged" / "model.safetensors").is_file() and (run / "certificate.json").is_file(),
    "plots are there": all((run / "plots" / name).is_file() for name in ("loss.png", "scores.png")),
}
print(accuracy, f"{seconds} s, {memory:.1f} GiB")
for promise, is_kept in kept.items():
    print("kept  " if is_kept else "BROKEN", promise)
sys.exit(0 if all(kept.values()) else 1)
