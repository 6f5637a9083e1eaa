"""Which kernels a transcript runs on, and for how long: what PyTorch's profiler sees of this process.

    python -m reference.gpu_run.kernels --device gpu --model random:tiny --artifacts DIR --json kernels.json

On a GPU it sees every kernel, MAX's too, since CUDA tells it of all that a process launches. On a CPU it sees PyTorch's
operations alone.
"""

import argparse
import json
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile

from maxwhisper.compare.material import stored_model
from maxwhisper.engine.session import find_device
from maxwhisper.whisper import Whisper, load_model

SECONDS, TOKENS = 30, 64
"""How long the audio is, and how many tokens its text has: random ones where weights are random."""


def transcribe(model: Whisper, device: str) -> None:
    audio = np.random.default_rng(0).standard_normal(16000 * SECONDS).astype(np.float32) * 0.1
    model.transcribe(audio, language="en", temperature=0.0, sample_len=TOKENS, without_timestamps=True)
    find_device(device).synchronize()


def rows(found: profile, on_gpu: bool) -> list[dict[str, Any]]:
    """Returns what was run, the longest first: names, calls, and microseconds in all."""
    events = [event for event in found.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
    time = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    listed = [{"name": event.key, "calls": event.count, "microseconds": time(event)} for event in events]
    return sorted(listed, key=lambda row: -row["microseconds"])


def not_there(on_gpu: bool) -> list[str]:
    """Returns what this machine does not tell."""
    missing = [f"no {name}" for name in ("nsys", "ncu") if not shutil.which(name)]
    return missing if on_gpu else [*missing, "no GPU, and MAX's kernels on a CPU are in no profile of PyTorch's"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.gpu_run.kernels", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu")
    parser.add_argument("--model", required=True)
    parser.add_argument("--artifacts")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    on_gpu = given.device == "gpu"
    model = load_model(stored_model(given.model), given.device, artifacts=given.artifacts, dtype="float16")
    transcribe(model, given.device)  # what compiles and what is allocated once is not of interest
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        transcribe(model, given.device)
    report = {
        "model": given.model,
        "device": given.device,
        "of": "kernels by torch.profiler" if on_gpu else "operations by torch.profiler",
        "kernels": rows(found, on_gpu),
        "not_there": not_there(on_gpu),
    }
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["kernels"][:40]:
        print(f"{row['microseconds']:12.1f} us in {row['calls']:6}  {row['name'][:120]}")
    print("; ".join(report["not_there"]))


if __name__ == "__main__":
    main()
