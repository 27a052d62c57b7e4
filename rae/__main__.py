"""``python -m rae COMMAND …``: the commands where their scripts are not on the path."""

from rae.cli.main import rae

if __name__ == "__main__":
    rae()
