"""`python -m subnibble`: the `subnibble` command, for environments where it is not on the path."""

from subnibble.cli.main import run

if __name__ == "__main__":
    run()
