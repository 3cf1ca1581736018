"""The files in examples/."""

from __future__ import annotations

from pathlib import Path

import yaml

from distill.cli.config.compose import compose_config

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_words_of_wandbs_agent_compose() -> None:
    """W&B's own function makes the words of a job."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((EXAMPLES / "wandb_sweep.yaml").read_text())
    assert sweep["command"][-1] == "${args_no_hyphens}"
    chosen = {
        name: {"value": part.get("value", part.get("values", [None])[-1])} for name, part in sweep["parameters"].items()
    }
    words = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    config = compose_config([*words, "hydra.run.dir=."])
    assert config.distill.losses.defeat.neck == {
        **config.distill.losses.defeat.neck,
        "foreground": 16,
        "background": 16,
    }
    assert config.seed == 2
    assert config.logger.wandb._target_ == "distill.WandbRun"
    assert config.metric == sweep["metric"]["name"]
