"""`make bench`: the benchmarks that need no development data. Others: python -m benchmarks.clinc150 --help."""

from benchmarks import hot_path

if __name__ == "__main__":
    hot_path.main()
