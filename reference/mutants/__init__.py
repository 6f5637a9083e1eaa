"""Mutants: small faults that a machine puts into our own sources, by which the suite is measured.

`python -m reference.mutants` (`make test-mutants`) copies the sources with every mutant behind a switch, so that one
compilation serves them all, runs the suite's own tests over each, and prints what stayed green.
"""
