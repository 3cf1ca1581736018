"""A script that takes one batch of a loader with a process of its own, and ends without letting it go."""

from distill import DetectionData, Shapes

if __name__ == "__main__":
    data = DetectionData(Shapes(train=8, val=8, test=0, size=64), batch_size=2, workers=1, min_size=64, max_size=64)
    data.setup("fit")
    left_open = iter(data.loader("val"))
    next(left_open)
    print("took one", flush=True)
