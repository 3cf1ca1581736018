"""The command line of distill. torch is imported only after the configuration has been composed."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from distill.cli.signals import EXIT_REASONS, RESTART_ADVICE, Terminated, stop_on_signals
from distill.types import DistillError

USAGE = """usage: distill <command> [options]

  train [overrides]                     train a detector, alone or by distillation (also: python train.py)
  resume RUN [overrides]                continue a stopped run from its last checkpoint
  evaluate RUN [overrides]              measure the AP of a run's student, on any split or data set
  export RUN --to FORMAT [overrides]    write a run's student as a file for another program, and measure its AP
  card RUN [--license TEXT]             print AP and costs, and write a model card with the student's weights
  compare [overrides] [seeds=3]         train with and without distillation for several seeds, and compare
  compare RUN RUN...                    compare finished runs
  predict RUN IMAGES... [--score 0.5]   draw detections on images, and write them in COCO's format
  label RUN FOLDER --out FILE.json      write a detector's boxes for images without labels, in COCO's format
  analyze RUN [--against RUN]           report the errors of a run's student, its teacher and a baseline, by kind
  report DIR [--wandb ENTITY/PROJECT]   write the comparison of a sweep as an HTML page and a W&B report
  bench [overrides]                     measure the cost of distillation on this machine, part by part
  classifier FILE.pt [overrides]        train the image classifier that distill=dicod needs
  doctor [overrides of train]           check data, teacher and loss terms before a run, and estimate its time
  import FILE [--out DIR]               convert a detector of Detectron2 or MMDetection to a folder like that of a run
  methods [NAME...]                     list the distillation methods with their terms, detectors and papers
  replay FILE                           repeat the step that stopped a run

RUN is the folder of a run; every run prints its folder. An override is KEY=VALUE (seed=1) or GROUP=OPTION
(distill=defeat). With every command, --config-dir DIR adds a folder of your own options, and trust=[PACKAGE] allows
imports from your own package.
distill <command> --help shows the options of a command. distill --version shows the versions of distill and its
libraries.
eval "$(distill -sc install=bash)" completes commands, groups and keys in this shell; also for zsh and fish."""


def _commands() -> dict[str, Callable[[Sequence[str]], int]]:
    from distill.cli.commands import (
        analyze,
        bench,
        card,
        classifier,
        compare,
        doctor,
        evaluate,
        export,
        import_detector,
        label,
        methods,
        predict,
        replay,
        report,
        resume,
        train,
    )

    return {
        "train": train.main,
        "resume": resume.main,
        "evaluate": evaluate.main,
        "export": export.main,
        "compare": compare.main,
        "predict": predict.main,
        "analyze": analyze.main,
        "report": report.main,
        "bench": bench.main,
        "card": card.main,
        "classifier": classifier.main,
        "doctor": doctor.main,
        "import": import_detector.main,
        "label": label.main,
        "methods": methods.main,
        "replay": replay.main,
    }


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit code. Invalid input ends with one message and without a traceback."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] in ("-V", "--version"):
        print(version_line())
        return 0
    try:
        with stop_on_signals():
            return _run(argv[0], argv[1:])
    except DistillError as error:
        if os.environ.get("DISTILL_TRACEBACK"):
            traceback.print_exc()
        print(f"\ndistill: {_printable(str(error))}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as stopped:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 0  # only the first process of a run reports; if one fails, Lightning kills the others
        reason, number = next(end for kind, end in EXIT_REASONS.items() if isinstance(stopped, kind))
        print(f"\ndistill: {reason}; {stopped or RESTART_ADVICE}", file=sys.stderr)
        return 128 + number


def _run(command: str, words: Sequence[str]) -> int:
    commands = _commands()
    if {command, *words} & {"-sc", "--shell-completion"}:
        from distill.cli.commands import completion

        return completion.main([command, *words] if command.startswith("-") else words, commands)
    if command not in commands:
        from distill.cli.config.suggestions import nearest

        print(f"distill: there is no command '{command}'{nearest(command, commands)}\n\n{USAGE}", file=sys.stderr)
        return 2
    from distill.cli.config import compose, config_folders, target_policy
    from distill.cli.config.data_paths import expand_data_paths
    from distill.cli.config.teacher_words import expand_teacher_words

    words = config_folders.expand_config_dirs(words)
    config_folders.set_config_dirs(words)
    compose.refuse_hidden_options()
    target_policy.set_trusted(words)
    return commands[command](expand_teacher_words(expand_data_paths(words)))


def version_line() -> str:
    """The versions of distill, Python and the libraries that decide about results."""
    import platform
    from importlib.metadata import version

    from distill import __version__

    libraries = [f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "hydra-core")]
    return ", ".join([f"distill {__version__}", f"Python {platform.python_version()}", *libraries])


def _printable(text: str) -> str:
    """A message without control characters, because names in the message may come from files of unknown origin."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
