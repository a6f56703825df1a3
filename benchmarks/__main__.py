"""`make bench`: `kcm bench edge`, with its options; it needs no data. The others: python -m benchmarks.clinc150 --help."""

import sys

from kcm.app.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "edge"]
    main()
