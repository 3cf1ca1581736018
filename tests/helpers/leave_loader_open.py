"""Takes one batch of a loader with a worker process, and ends without closing the loader or its own child process."""

import multiprocessing
import signal
import sys
import time

from distill import DetectionData, Shapes


def own(ready) -> None:  # type: ignore[no-untyped-def]
    """Says its last word when it is asked to end; it would not if it were killed."""
    signal.signal(signal.SIGTERM, lambda *_: (print("asked to end", flush=True), sys.exit()))
    ready.set()
    time.sleep(600)


if __name__ == "__main__":
    ready = multiprocessing.Event()
    multiprocessing.Process(target=own, args=(ready,), daemon=True).start()
    ready.wait()
    data = DetectionData(Shapes(train=8, val=8, test=0, size=64), batch_size=2, workers=1, min_size=64, max_size=64)
    data.setup("fit")
    left_open = iter(data.eval_dataloader("val"))
    next(left_open)
    print("took one", flush=True)
