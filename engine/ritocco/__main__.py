"""`python -m ritocco`."""

from ritocco.cli import main

if __name__ == "__main__":
    main()
