"""`python -m subnibble`: the command, for where it is not on the path."""

from subnibble.cli.main import run

if __name__ == "__main__":
    run()
