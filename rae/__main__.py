"""``python -m rae COMMAND …``: runs a command where its script is not on the path."""

from rae.cli.main import rae

if __name__ == "__main__":
    rae()
