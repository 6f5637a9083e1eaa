#!/bin/sh
# Installs the package from a checkout into a new environment, as both images do.
#
#     scripts/container/install.sh SOURCE DESTINATION EXTRAS
#
# What runs needs neither pip nor the sources afterwards, and compiles kernels for the machine that it is on.
set -eu
source=$1 destination=$2 extras=$3

python3 -m venv "$destination"
"$destination/bin/pip" install --quiet --no-cache-dir --constraint "$source/constraints.txt" "$source[$extras]"
"$destination/bin/maxwhisper" --version
