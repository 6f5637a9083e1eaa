"""python -m reference.perf.serve: what `maxwhisper serve` does under load, beside the same model without a server.

Eight clips of one window each, one after the other and at once, rounds of all ways in turn. Then /health while eight
requests are always running, asked by another process than those who load the server; and a short clip while an hour of
audio is being transcribed. Other servers with OpenAI's interface, which run already, are asked for the eight clips too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.compare.run import machine
from maxwhisper.whisper import load_model

from ..activations import CLIPS
from ..fixtures import FIXTURES, NANO

EIGHT = [FIXTURES / clip["file"] for clip in CLIPS if clip["duration"] < 30 and not clip["no_speech"]][:8]
HOUR = 3600


def main() -> None:
    """Measures, prints the figures, and writes them to `--json`."""
    parser = argparse.ArgumentParser("python -m reference.perf.serve", description="Load `maxwhisper serve`.")
    parser.add_argument("--model", default=str(NANO), help="as of serve (default: the trained fixture)")
    parser.add_argument("--rounds", type=int, default=7, help="how often to transcribe the eight clips (default: 7)")
    parser.add_argument("--seconds", type=int, default=20, help="how long to ask for /health (default: 20)")
    parser.add_argument(
        "--beside",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "URL", "MODEL"),
        help="another server that runs, by the address before /v1 and its name of the same model; any number of times",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    with serving(options.model) as server, tempfile.TemporaryDirectory() as folder:
        figures: dict[str, Any] = {"machine": machine(), "model": Path(options.model).name}
        others = {name: Server(url, model=model) for name, url, model in options.beside}
        clips = [write_wav(Path(folder, f"{clip.stem}.wav"), load_audio(clip)) for clip in EIGHT]
        figures |= throughput(server, options.model, clips, options.rounds, others)
        figures |= health_under_load(server, options.seconds)
        figures |= beside_an_hour(server)
    for name, value in figures.items():
        print(f"{name:36} {value:.3f}" if isinstance(value, float) else f"{name:36} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


@contextmanager
def serving(model: str) -> Iterator["Server"]:
    """Starts a server, as users do."""
    command = [sys.executable, "-m", "maxwhisper", "serve", "--model", model, "--port", "0", "--max_file_mb", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield Server(process.stdout.readline().split()[-1].removesuffix("/v1"))
        finally:
            process.terminate()


@dataclass(frozen=True)
class Server:
    """An address to ask at, a key if it wants one, and its name of the model."""

    url: str
    key: str = "none"
    model: str = "whisper-1"

    def client(self) -> httpx.Client:
        certificates = self.url.startswith("https:")  # to read them takes 20 ms, which no clip is to be timed with
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=None, verify=certificates)

    def ask(self, clip: Path) -> float:
        """Has a clip transcribed, and returns the seconds that it took."""
        start = time.perf_counter()
        with self.client() as client, clip.open("rb") as file:
            answer = client.post("/v1/audio/transcriptions", files={"file": file}, data={"model": self.model})
        answer.raise_for_status()
        return time.perf_counter() - start

    def running(self) -> float:
        """Returns how many requests it says that it serves."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("maxwhisper_requests_running ")).split()[1])


def throughput(
    server: Server, model: str, clips: Sequence[Path], rounds: int, others: Mapping[str, Server]
) -> dict[str, float | str]:
    """Returns the median seconds for eight clips of the server, of the model alone, and of other servers by name, one
    after the other and at once."""
    alone = load_model(model)
    with ThreadPoolExecutor(8) as pool:
        ways: dict[str, Callable[[], object]] = {
            **asking("server", server, clips, pool),
            "transcribe, one after the other, s": lambda: [alone.transcribe(clip) for clip in clips],
            "transcribe_many, eight at once, s": lambda: list(alone.transcribe_many(clips, 8)),
        }
        for name, other in others.items():
            ways |= asking(name, other, clips, pool)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                taken[name].append(time.perf_counter() - start)
    found = {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}  # the first round warms up
    one, at_once, one_alone, at_once_alone, *_ = found.values()
    return {**found, "server, gain": one / at_once, "transcribe_many, gain": one_alone / at_once_alone}


def asking(
    name: str, server: Server, clips: Sequence[Path], pool: ThreadPoolExecutor
) -> dict[str, Callable[[], object]]:
    return {
        f"{name}, one after the other, s": lambda: [server.ask(clip) for clip in clips],
        f"{name}, eight at once, s": lambda: list(pool.map(server.ask, clips)),
    }


def keep_asking(server: Server, n_thread: int) -> None:
    with ThreadPoolExecutor(n_thread) as pool:
        while True:
            list(pool.map(server.ask, EIGHT * n_thread))


@contextmanager
def load(server: Server, n_thread: int) -> Iterator[None]:
    """Has a process keep as many requests running."""
    process = get_context("spawn").Process(target=keep_asking, args=(server, n_thread), daemon=True)
    process.start()
    try:
        while server.running() < n_thread:
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.join()


def health_under_load(server: Server, seconds: float) -> dict[str, float | int]:
    """Returns how long /health takes while eight requests run, in milliseconds."""
    taken = []
    with load(server, 8), server.client() as client:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            client.get("/health").raise_for_status()
            taken.append(1000 * (time.perf_counter() - start))
            time.sleep(0.01)
    return {
        "/health under load, requests": len(taken),
        "/health under load, median, ms": statistics.median(taken),
        "/health under load, 99th percentile, ms": float(np.percentile(taken, 99)),
    }


def beside_an_hour(server: Server) -> dict[str, float]:
    """Returns how long a short clip takes alone, and while an hour of audio is transcribed."""
    short = EIGHT[0]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        speech = np.concatenate([load_audio(clip) for clip in EIGHT])
        hour = write_wav(Path(folder, "hour.wav"), np.resize(speech, HOUR * SAMPLE_RATE))
        alone = [server.ask(short) for _ in range(5)]
        asked = pool.submit(server.ask, hour)
        beside = []
        while not asked.done():
            beside.append(server.ask(short))
            time.sleep(0.2)
    return {
        "a short clip alone, median, s": statistics.median(alone),
        "a short clip beside an hour, median, s": statistics.median(beside),
        "a short clip beside an hour, longest, s": max(beside),
        "the hour, s": asked.result(),
    }


def write_wav(path: Path, samples: np.ndarray) -> Path:
    """Writes what every server reads, from samples (sample,) in [-1, 1] at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32767).astype(np.int16).tobytes())
    return path


if __name__ == "__main__":
    main()
