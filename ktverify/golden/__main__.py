"""`python -m ktverify.golden`."""

from ktverify.cli.golden import app

if __name__ == "__main__":
    app(prog_name="python -m ktverify.golden")
