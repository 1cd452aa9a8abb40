"""``python -m remix_bids`` is ``remix-bids``."""

from remix_bids.cli.app import main

if __name__ == "__main__":
    main()
