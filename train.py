"""Train or distil a detector: ``python train.py distill=defeat model=frcnn_r50``. A thin door into ``distill.cli``."""

import sys

from distill.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
