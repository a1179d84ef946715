"""`python -m ktverify`."""

from ktverify.cli.main import main

if __name__ == "__main__":
    main()
