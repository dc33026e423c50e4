"""The ``atoll`` command: a thin face, a file for each group of commands."""

# The help lists commands in the order in which they are made.
# isort: off
from atoll.cli import runs as runs
from atoll.cli import federations as federations
from atoll.cli import listings as listings
from atoll.cli.app import app as app
from atoll.cli.app import main as main
# isort: on
