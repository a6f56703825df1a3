"""python -m kcm.app VERB: the same as `kcm VERB`, for processes that kcm itself starts."""

from kcm.app.cli import main

if __name__ == "__main__":
    main()
