"""README and docs match the code: commands compose; keys, options, files and links exist; the example method works."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

import distill
from distill import plugins
from distill.cli.commands.compare import take_own_keys
from distill.cli.config import compose, config_folders, override_checks, renamed_keys, target_policy
from distill.cli.config.data_paths import expand_data_paths
from distill.cli.config.prepared_sweeps import read_sweep
from distill.cli.config.teacher_words import expand_teacher_words
from distill.cli.main import main
from distill.detectors import description
from distill.types import DistillError, View
from helpers.grids import mostly_exhaustive
from helpers.methods import METHODS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
INLINE = re.compile(r"`([^`\n]+)`")
PLACEHOLDERS = re.compile(r"\[(?:overrides|--)[^\]]*\]")


def commands(program: str) -> list[str]:
    """The words after `program` in indented lines and in inline code, without placeholders and comments."""
    lines: list[str] = []
    for page in PAGES.values():
        text = re.sub(r" \\\n +", " ", page)  # a command may go on in the next line
        lines += re.findall(rf"^ {{4,}}{program} (.+?)(?:  +#.*)?$", text, re.MULTILINE)
        lines += [code.removeprefix(f"{program} ") for code in INLINE.findall(text) if code.startswith(f"{program} ")]
    return sorted({PLACEHOLDERS.sub("", line).strip() for line in lines})


COMMAND = "--config-dir my_conf distill=neck_mse trust=[neck_mse]"
"""Of the example method, which has a test of its own."""
TRAIN = [words for words in commands(r"python train\.py") if words != COMMAND]
READERS_OPTIONS = ("neck_mse", "mine", "my_loss", "my_fcos")
"""Options in examples, which the reader writes."""
VERBS = sorted({*commands("python -m distill"), *commands("distill")})


def test_commands_are_collected() -> None:
    assert len(TRAIN) > 15
    assert {words.split()[0] for words in VERBS} >= {"doctor", "bench", "evaluate", "predict", "replay", "classifier"}


DAILY = {words for words in TRAIN if words in README} | {*TRAIN[::2]}


@pytest.mark.parametrize("words", mostly_exhaustive(TRAIN, DAILY))
def test_train_commands_compose(words: str) -> None:
    named = [re.sub(r"data=(LARGER_)?DIR", "data=coco", word) for word in shlex.split(words) if word[0] != "-"]
    overrides = expand_teacher_words(expand_data_paths(named))
    plugins = ("hydra/", "hydra.sweeper.", "hydra.launcher.")  # of packages that may not be installed
    override_checks.validate_overrides([word for word in overrides if not word.startswith(plugins)])


@pytest.mark.parametrize("words", VERBS)
def test_commands_of_other_verbs_are_accepted(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = shlex.split(words.replace("--config-dir my_conf ", ""))  # a folder of the reader
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    usage = capsys.readouterr().out
    for word in rest:
        if word.startswith("--"):
            assert word in usage
    if verb == "compare":
        own, rest = take_own_keys(rest)
        if "sweep" in own:
            assert read_sweep(own["sweep"])
    settings = [word for word in rest if "=" in word and word.partition("=")[2] not in READERS_OPTIONS]
    known = [word.replace("data=DIR", "data=coco") for word in settings if not word.startswith("trust=")]
    override_checks.validate_overrides(expand_teacher_words(known))


# -- keys and options

OPTIONS = [*(method.option for method in METHODS.values()), "pad_fgfi"]
"""An option of each method; the variants of a method have the same keys."""


@functools.cache
def keys() -> set[str]:
    """Every key that some choice of options has."""
    found: set[str] = set()
    lines = [
        *(
            [f"model={option}", "distill=none"]
            for option in ("mask_rcnn", "retinanet", "fcos", "rtdetr", "dfine", "deimv2", "rfdetr")
        ),
        *([f"data={option}", "distill=none"] for option in ("coco", "voc")),
        [f"distill=[{','.join(OPTIONS)}]", "trainer=ddp", "logger=wandb", "callbacks=ema", "schedule=sgd"],
    ]

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            found.add(f"{prefix}{key}")
            walk(value, f"{prefix}{key}.")

    for overrides in lines:
        walk(OmegaConf.to_container(compose.compose_config(overrides)), "")
    return found


def is_public_name(dotted: str) -> bool:
    """Whether a dotted name is a module of the package, or something inside one."""
    module, _, name = dotted.rpartition(".")
    for importable in (dotted, module):
        try:
            found = importlib.import_module(importable)
        except ImportError:
            continue
        return importable == dotted or hasattr(found, name)
    return False


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_options_exist(page: str) -> None:
    groups = compose.config_groups()
    wrong = []
    for code in INLINE.findall(PAGES[page]):
        for word in re.findall(r"[\w./@]+=\S+|^[\w.]+$", code.strip("'")):
            key, _, value = word.partition("=")
            root = key.split(".")[0]
            if root in ("hydra", "hydra/launcher", "hydra/sweeper") or (root not in groups and root not in keys()):
                continue  # not a word of the configuration
            if re.search(r"\.(py|yaml|md|json|pt|csv|ckpt)$", key):
                continue  # a file
            if "." in key:
                if key not in keys() and not is_public_name(key):
                    wrong.append(word)
            elif key in groups and value:
                options = [option for option in value.strip("'[]").split(",") if option.islower()]
                wrong += [word for option in options if option not in (*groups[key], "none", "null", *READERS_OPTIONS)]
    assert not wrong


MODELS = sorted(
    name
    for name in compose.config_groups()["model"]
    if name != "base" and not name.startswith(("rtdetr", "dfine", "deimv2", "rfdetr"))
)
"""Models whose backbone has ImageNet weights of torchvision."""


@pytest.mark.parametrize("option", mostly_exhaustive(MODELS, MODELS[::6]))
def test_every_model_may_start_from_imagenet(option: str) -> None:
    cfg = compose.compose_config([f"model={option}", "start=imagenet", "paths.run=x", "name=x"])
    for node in (cfg.model.backbone, cfg.teacher.model.backbone):
        assert (node.weights, node.trainable_stages, node.norm) == ("IMAGENET1K_V1", 3, "batch_fixed_stats")


# -- files, links, names


EXAMPLES = {
    "data.yaml",
    "infer.py",  # written by the command export
    "load.py",  # written by the command export
    "mine.yaml",
    "neck_mse.py",
    "conf/distill/neck_mse.yaml",
    "conf/teachers.yaml",
    "config.yaml",
    "overrides.yaml",
    "my_detector.py",
    "torch.py",
}
"""Files of examples, beside those in the reader's folder my_conf, and files of a run's folder."""


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    package = ROOT / "src" / "distill"
    folders = [ROOT, package, *(path for path in package.iterdir() if path.is_dir()), ROOT / "conf" / "model"]
    named = [code for code in INLINE.findall(PAGES[page]) if re.fullmatch(r"[\w./-]+\.(py|yaml|ipynb|md|toml)", code)]
    others = [name for name in named if name not in EXAMPLES and not name.startswith("my_conf/")]
    wrong = [name for name in others if not any((folder / name).is_file() for folder in folders)]
    assert not wrong


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_relative_links_lead_to_files(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES.get(page, CHANGELOG), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    wrong = [
        target
        for target in targets
        if not re.match(r"[a-z]+://", target) and not (ROOT / page).parent.joinpath(target).exists()
    ]
    assert not wrong


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_citation_and_changelog_name_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == distill.__version__
    headings = re.findall(r"^## (\S+)", CHANGELOG, re.MULTILINE)
    assert headings[0] == distill.__version__


def test_changelog_names_every_renamed_key() -> None:
    targets = {f"distill.{old}": f"distill.{new}" for old, new in renamed_keys.TARGETS.items()}
    options = {f"model.{old}": f"model.{new}" for old, new in description.RENAMED_OPTIONS.items()}
    values = {
        f"model.{key}={old}": f"model.{key}={new}"
        for key, renamed in description.RENAMED_VALUES.items()
        for old, new in renamed.items()
    }
    named = {code for row in CHANGELOG.splitlines() if row.startswith("| `") for code in INLINE.findall(row)}
    old_and_new = [*(targets | options), *(targets | options).values(), *values.values()]
    assert [name for name in old_and_new if name not in named] == []


def test_api_reference_has_every_public_name() -> None:
    listed = re.findall(r"^\.\. auto\w+:: distill\.(\w+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert sorted(listed) == sorted(distill.__all__)


def test_methods_of_the_tables_are_the_options() -> None:
    options = {option for option in compose.config_groups()["distill"] if option != "none"}
    rows = [line for line in PAGES["docs/methods.md"].splitlines() if line.startswith("| ") and ".py`" in line]
    assert {code for row in rows for code in INLINE.findall(row) if not code.endswith(".py")} == options


def test_recipes_of_the_table_are_the_experiments() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGES["docs/recipes.md"], re.MULTILINE)
    assert sorted([*listed, "bccd", "demo"]) == sorted(compose.config_groups()["experiment"])


def test_helpers_of_the_guide_to_methods_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGES["docs/add-a-method.md"], re.MULTILINE)
    helpers = {module: text for module, text in rows if (ROOT / f"src/distill/losses/{module}.py").is_file()}
    assert len(helpers) > 3
    for module, text in helpers.items():
        names = INLINE.findall(text)
        assert [name for name in names if not hasattr(importlib.import_module(f"distill.losses.{module}"), name)] == []


def test_modules_of_the_architecture_exist() -> None:
    package = ROOT / "src" / "distill"
    rows = re.findall(r"^\| `([\w/]+/)` \| ([^|]+)", PAGES["docs/architecture.md"], re.MULTILINE)
    packages = [*package.glob("*/__init__.py"), *package.glob("cli/*/__init__.py")]
    assert {folder.strip("/") for folder, _ in rows} == {str(path.parent.relative_to(package)) for path in packages}
    for folder, modules in rows:
        for name in INLINE.findall(modules):
            assert (package / folder / name).is_dir() or (package / folder / f"{name}.py").is_file(), f"{folder}{name}"


def test_architecture_has_every_stage_of_the_view() -> None:
    names = {name for name in (*vars(View), *View.__annotations__) if not name.startswith("_")}
    table = PAGES["docs/architecture.md"].partition("| stage |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)(?:\([^)]*\))?`", table)) - {"DetectorSpec"} == names


def literals() -> list[str]:
    """Every string of the package, f-strings with a zero in the place of their values."""
    found: list[str] = []
    for file in (ROOT / "src" / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_those_of_the_code() -> None:
    """A quotation may leave out parts, marked by an ellipsis."""
    text = re.sub(r"\s+", " ", PAGES["docs/troubleshooting.md"])
    quoted = [quote for title in re.findall(r"\*\*(.+?)\*\*", text) for quote in re.findall(r'"(.+?)"', title)]
    known = literals()
    assert len(quoted) > 8
    missing = []
    for quote in quoted:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in quote.split("…")), re.DOTALL)
        if not any(pattern.search(literal) for literal in known):
            missing.append(quote)
    assert not missing


# -- the Python of the README


def test_the_python_of_the_readme_trains_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    classes = distill.Shapes(train=1, val=1, test=0).read_split("train")[0]
    code = block("python", "load_detector")
    build = re.search(r"^student = (.+)$", code, re.MULTILINE)
    assert build is not None
    teacher = eval(build[1], {"distill": distill, "data": SimpleNamespace(classes=classes)})
    distill.save_student(teacher, tmp_path / "teacher")
    for shown, used in {
        "distill.Shapes()": "distill.Shapes(train=4, val=2, test=0)",
        "outputs/teachers/…": "teacher",
        "epochs=8": "epochs=1",
        "image.jpg": "image.png",
    }.items():
        assert shown in code
        code = code.replace(shown, used)
    Image.new("RGB", (128, 128)).save("image.png")
    exec(code, {})
    assert distill.load_detector(tmp_path / "my_student").classes == tuple(classes)


def test_three_lines_load_a_student_into_plain_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand in the README and on the page of `export`."""
    monkeypatch.chdir(tmp_path)
    found = re.search(r"^    import torch, torchvision\n(?:    .+\n)+", README, re.MULTILINE)
    assert found is not None
    lines = [line.strip() for line in found[0].splitlines()]
    assert len(lines) == 3
    assert "\n\n".join([lines[0], "\n".join(lines[1:])]) in PAGES["docs/export.md"]
    student = distill.model("frcnn_r50", ["cat", "dog", "owl"])
    distill.save_student(student, tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    assert torch.equal(
        names["net"].roi_heads.box_predictor.cls_score.weight, student.net.roi_heads.box_predictor.cls_score.weight
    )


def test_the_python_of_the_documents_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    small = {
        "train=400": "train=40, val=2, test=1, size=64",
        "128": "64",
        "epochs=8": "epochs=1",
        "range(8)": "range(1)",
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.DOTALL)
    assert len(blocks) == 4
    text = "\n".join(blocks)
    for shown, used in small.items():
        assert shown in text
        text = text.replace(shown, used)
    exec(text, names)
    assert names["own"].classes == names["data"].classes
    assert names["small"].student.parameters_count < names["large"].student.parameters_count


# -- the method that the README adds


def block(language: str, word: str) -> str:
    """The code block of the README that has a word in it."""
    return next(text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in text)


@pytest.fixture
def method_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The README's module in the current folder, and its option in a folder beside it."""
    (tmp_path / "neck_mse.py").write_text(block("python", "class NeckMSE"), encoding="utf-8")
    home = tmp_path / "my_conf" / "distill"
    home.mkdir(parents=True)
    (home / "neck_mse.yaml").write_text(block("yaml", "NeckMSE"), encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield
    config_folders.set_config_dirs([])
    target_policy.set_trusted([])
    sys.modules.pop("neck_mse", None)


def own_class() -> Any:
    target_policy.set_trusted([COMMAND.split()[-1]])
    return plugins.import_trusted("neck_mse.NeckMSE")


def test_the_method_of_the_readme_runs(method_of_the_readme: None, tmp_path: Path) -> None:
    """Through the command line: composed, trusted, built and computed on a batch, with a gradient at the student."""
    report, small = tmp_path / "report.json", ["data.source.train=8", "data.source.val=4", "data.source.test=0"]
    assert f"    python train.py {COMMAND}\n" in README
    arguments = [*shlex.split(COMMAND), "trainer=cpu", *small, "--json", str(report)]
    assert main(["doctor", *arguments]) == 0
    term = json.loads(report.read_text())["terms"]["neck_mse/neck.all"]
    assert 0 < term["value"] < float("inf")
    assert term["reaches"]


def test_the_method_of_the_readme_needs_trust(method_of_the_readme: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *shlex.split(COMMAND)[:-1], "trainer=cpu"]) == 1
    assert "trust=[neck_mse" in capsys.readouterr().err
    assert "neck_mse" not in sys.modules


def test_the_method_of_the_readme_is_its_equation(method_of_the_readme: None) -> None:
    """The mean over levels of the mean of (A(S) - T)^2 over all that the batch holds."""
    kind = own_class()
    torch.manual_seed(0)
    student, teacher = ({8: torch.randn(2, channels, 8, 8), 16: torch.randn(2, channels, 4, 4)} for channels in (3, 5))
    specs = [SimpleNamespace(neck={stride: x.shape[1] for stride, x in maps.items()}) for maps in (student, teacher)]
    loss = kind(*specs)
    value = loss(SimpleNamespace(neck=student), SimpleNamespace(neck=teacher))["neck.all"]
    expected = []
    for stride, target in teacher.items():
        weight, bias = (
            x.detach().double() for x in (loss.adapters[str(stride)].weight, loss.adapters[str(stride)].bias)
        )
        adapted = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], student[stride].double()) + bias[:, None, None]
        expected.append(float(((adapted - target.double()) ** 2).mean()))
    assert float(value.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_method_of_the_readme_stays_finite_in_half_precision(method_of_the_readme: None) -> None:
    kind = own_class()
    maps = [{8: 1000 * torch.randn(2, 3, 8, 8)} for _ in range(2)]
    spec = SimpleNamespace(neck={8: 3})
    views = [SimpleNamespace(neck={stride: x.half() for stride, x in each.items()}) for each in maps]
    with torch.autocast("cpu", dtype=torch.float16):
        assert kind(spec, spec)(*views)["neck.all"].isfinite()


def test_an_unfit_pair_is_refused_by_the_method_of_the_readme(method_of_the_readme: None) -> None:
    kind = own_class()
    with pytest.raises(DistillError, match=r"neck\.levels"):
        kind(SimpleNamespace(neck={8: 3}), SimpleNamespace(neck={16: 3}))
