"""reference/perf/worker.py where nothing is timed: its decode loops are of a few tokens."""

from reference.perf import worker

if __name__ == "__main__":
    worker.N_TOKEN = 4
    worker.main()
