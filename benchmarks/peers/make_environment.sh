#!/bin/sh
# Make the environment of the packages that the project is compared with: benchmarks/peers/make_environment.sh
# (`make peers`). PYTHON chooses the interpreter, VENV the folder; run it again after an interruption.
#
# They are kept out of .venv: their own requirements would replace torch by another build and bring trainers
# that are not needed. So they are installed without their requirements, at versions that were tried, and what
# they import is named here.
set -eu

cd "$(dirname "$0")/../.."
VENV=${VENV:-.venv-peers}

make --no-print-directory "$VENV/.test" VENV="$VENV" ${PYTHON:+PYTHON="$PYTHON"}

PIP="$VENV/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt"
# What they import, of which nothing replaces a version of constraints.txt.
$PIP 'einops>=0.8,<1' 'natsort>=8.4,<9' 'pandas>=2.2,<4' 'requests>=2.32,<3' 'tqdm>=4.66,<5'
# These two want torch, in whatever version; --no-deps leaves the one that is there.
$PIP --no-deps 'lightning-utilities>=0.11,<1' 'torchmetrics==1.9.0'
# torchvision is only imported, never computed with; where its binaries are for another build of torch,
# benchmarks/peers/environment.py declares its operators.
$PIP --no-deps torchvision==0.28.0 fastmri==0.3.0 deepinv==0.5.0

"$VENV/bin/python" -W ignore -m benchmarks.peers.environment
