"""What several tests use: models, loops, references, and the scripts that every rank of a distributed test runs."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
