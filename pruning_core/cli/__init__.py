"""The verbs of ``pruning-core``: inspect, export, unpack, verify, slim."""

from pruning_core.cli.main import main as main
