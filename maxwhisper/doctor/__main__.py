"""Runs one probe alone: `python -m maxwhisper.doctor PROBE`."""

from .probes import main

main()
