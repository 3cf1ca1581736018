"""The command line: the only rooms that know Hydra. Nothing heavy is imported before a configuration composes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from distill.cli.signals import EXIT_REASONS, RESTART_ADVICE, Terminated, stop_on_signals
from distill.types import DistillError

USAGE = """usage: distill <verb> [options]

  train [overrides]                     train or distil a detector (also: python train.py)
  evaluate RUN|CKPT [overrides]         AP of a run's student, on any split or data set
  predict RUN IMAGES... [--score 0.5]   pictures and COCO-format detections
  bench [overrides]                     what distillation costs here, and what is the bottleneck
  classifier FILE.pt [overrides]        train the image classifier that distill=dicod needs
  doctor [overrides of train]           a minute before a run: is all well with data, teacher and terms? how long?
  replay FILE                           do the step again that stopped a run

distill <verb> --help says more."""


def _verbs() -> dict[str, Callable[[Sequence[str]], int]]:
    from distill.cli import bench, classifier, doctor, evaluate, predict, replay, train

    return {
        "train": train.main,
        "evaluate": evaluate.main,
        "predict": predict.main,
        "bench": bench.main,
        "classifier": classifier.main,
        "doctor": doctor.main,
        "replay": replay.main,
    }


def main(argv: Sequence[str]) -> int:
    """Run a verb and return its exit code. A user's mistake ends in one message, not in a traceback."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        with stop_on_signals():
            return _run(argv[0], argv[1:])
    except DistillError as error:
        if os.environ.get("DISTILL_TRACEBACK"):
            traceback.print_exc()
        print(f"\ndistill: {_plain(str(error))}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stopped:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 0  # one process of a run speaks for all; Lightning kills the others where one fails
        how, number = next(end for kind, end in EXIT_REASONS.items() if isinstance(stopped, kind))
        print(f"\ndistill: {how}; {stopped or RESTART_ADVICE}", file=sys.stderr)
        return 128 + number


def _run(verb: str, words: Sequence[str]) -> int:
    verbs = _verbs()
    if verb not in verbs:
        from distill.cli.suggestions import nearest

        print(f"distill: there is no verb '{verb}'{nearest(verb, verbs)}\n\n{USAGE}", file=sys.stderr)
        return 2
    from distill.cli import target_policy

    target_policy.set_trusted(words)
    return verbs[verb](words)


def _plain(text: str) -> str:
    """A message in which nothing steers the terminal, for names in it may come from anywhere."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
