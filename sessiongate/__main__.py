"""`python -m sessiongate`: the same as the command `sessiongate`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
