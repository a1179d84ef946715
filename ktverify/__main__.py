"""`python -m ktverify`."""

from ktverify.cli import main

if __name__ == "__main__":
    main()
