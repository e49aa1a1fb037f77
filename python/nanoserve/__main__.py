"""`python -m nanoserve` is the `nanoserve` command."""

from nanoserve.cli import main

if __name__ == "__main__":
    main()
