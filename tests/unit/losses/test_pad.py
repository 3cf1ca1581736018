"""PAD: slow oracles with variances that are not 0, the start, the warm-up, and which losses can be wrapped."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cli.config import compose, instantiate
from distill.losses.base import DistillLoss
from distill.losses.chen import Chen
from distill.losses.defeat import DeFeat
from distill.losses.dsig import DSIG
from distill.losses.fgfi import FGFI
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.imitation import MapImitation
from distill.losses.mimic import Mimic
from distill.losses.pad import PAD, Variance, reweighed
from distill.losses.ssim import SSIM
from distill.losses.tadf import TADF
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, equal_views, random_view, spec
from helpers.loss_grid import OBJECTS, AnchorsFollowMaps, LossGrid
from helpers.loss_states import randomize_variances, variance_modules
from helpers.slow_oracles import slow_fine_grained

NONE = {"kernel": None}
BOTH: dict[str, Any] = {"neck": {"all": 2}}


def slow_v(part: Variance, cell: list[float]) -> float:
    return part.bias.item() + sum(w * x for w, x in zip(part.weight.flatten().tolist(), cell, strict=True))


def slow_error(student: list[float], teacher: list[float]) -> float:
    return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)


def slow_weighed(error: float, v: float) -> float:
    return error / (1e-6 + math.exp(v)) + v


def slow_map(part: Variance, student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    """Half the mean over the cells that are on."""
    values = []
    for image, row, column in mask.nonzero().tolist():
        s, t = student[image, :, row, column].tolist(), teacher[image, :, row, column].tolist()
        values.append(slow_weighed(slow_error(s, t), slow_v(part, s)))
    return sum(values) / 2 / max(1, len(values))


def slow_region(part: Variance, student: Tensor, teacher: Tensor) -> float:
    cells = student.flatten(1).T.tolist()
    error = slow_error(student.flatten().tolist(), teacher.flatten().tolist())
    return slow_weighed(error, sum(slow_v(part, cell) for cell in cells) / len(cells)) / 2


class TestPADOfMimic(LossGrid):
    """At its start, where its minimum is the wrapped loss's."""

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return PAD(student, teacher, partial(Mimic, **BOTH, adapter=NONE))

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return PAD(student, teacher, partial(Mimic, **BOTH))

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        maps, pooled = (
            variance_modules(loss.get_submodule("of.maps")),
            variance_modules(loss.get_submodule("of.regions"))["reweigh"],
        )
        levels = [
            slow_map(maps[f"reweigh.{s}"], x, teacher.neck[s], torch.ones_like(x[:, 0]))
            for s, x in student.neck.items()
        ]
        features = zip(student.roi_features([]), teacher.roi_features([]), strict=True)
        regions = [slow_region(pooled, s, t) for s, t in features]
        return {"regions.all": sum(regions) / max(1, len(regions)), "neck.all": sum(levels) / 5}


class TestPADOfMimicOnItsWay(TestPADOfMimic):
    """With variances that are not 0: equal features leave the mean of v / 2, which the features decide."""

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return randomize_variances(super().loss(student, teacher))

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return randomize_variances(super().adapted(student, teacher))

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, _ = self.views(OBJECTS)
        loss = self.loss(self.student, self.student)
        values = self.run(loss, student, equal_views(student))
        part = variance_modules(loss)["of.regions.reweigh"]
        v = [slow_v(part, cell) for region in student.roi_features([]) for cell in region.flatten(1).T.tolist()]
        assert values["regions.all"].item() == pytest.approx(sum(v) / len(v) / 2)


class TestPADOfFGFI(AnchorsFollowMaps):
    student = teacher = spec(two_stage=False, strides=(8, 16, 32, 64, 128), anchors=2)

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return PAD(student, teacher, partial(FGFI, adapter=NONE))

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return randomize_variances(PAD(student, teacher, FGFI))

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        grid = {stride: (x.shape[2], x.shape[3]) for stride, x in student.neck.items()}
        boxes = [target.boxes for target in student.batch.targets]
        masks = slow_fine_grained(boxes, student.anchors, grid, 0.5)
        parts = variance_modules(loss.get_submodule("of.maps"))
        levels = [slow_map(parts[f"reweigh.{s}"], student.neck[s], teacher.neck[s], masks[s]) for s in grid]
        return {"neck.foreground": sum(levels) / 5}


def pair(dtype: torch.dtype = torch.float32) -> tuple[FakeView, FakeView]:
    return random_view(batch(OBJECTS), spec(), 1, dtype=dtype), random_view(batch(OBJECTS), spec(), 2, dtype=dtype)


WRAPPED = {
    "mimic": partial(Mimic, **BOTH),
    "fgfi": FGFI,
    "original": partial(FGFI, normalization="half_l2", adapter={"relu": True}),
    "defeat": partial(DeFeat, proposals={"positive": 1, "negative": 2}, backbone={"foreground": 1}),
    "dsig": DSIG,
    "graph": partial(DSIG, neck={"all": 0}),
    "hints": Chen,
    "tadf": TADF,
    "global knowledge": GlobalKnowledge,
    "squares": partial(SSIM, error="l2"),
}
PLACES = {"mimic": 5 + 1, "defeat": 5 + 3, "dsig": 5 + 1, "graph": 1}
"""Where there is one besides a level of the neck each."""


@pytest.mark.parametrize("name", WRAPPED)
def test_starts_as_the_wrapped_loss_and_keeps_its_terms(name: str) -> None:
    of: Any = WRAPPED[name]
    plain, padded = of(student=spec(), teacher=spec(), seed=3), PAD(spec(), spec(), partial(of, seed=3))
    assert padded.weights == plain.weights
    assert padded.ramp == plain.ramp
    expected = plain(*pair())
    for term, value in padded(*pair()).items():
        assert value.item() == pytest.approx(expected[term].item(), rel=2e-6), term
    assert not list(variance_modules(plain))
    assert len(variance_modules(padded)) == PLACES.get(name, 5)


def uneven_pair() -> tuple[FakeView, FakeView]:
    """Six regions in the first image, four in the second."""
    views = pair(torch.float64)
    for view in views:
        view.stages["rois"] = type(view.rois)(*([one, other[:4]] for one, other in view.rois))
        view.stages["roi_features"] = view.stages["roi_features"][:10]
        view.stages["roi_logits"] = tuple(x[:10] for x in view.stages["roi_logits"])
    return views


def test_nodes_of_a_graph_are_weighed_region_by_region_and_its_edges_left_alone() -> None:
    student, teacher = uneven_pair()
    plain = DSIG(spec(), spec())(student, teacher)
    loss = randomize_variances(PAD(spec(), spec(), DSIG))
    part, values = variance_modules(loss)["of.nodes.reweigh"], loss(student, teacher)
    features = list(zip(student.roi_features([]), teacher.roi_features([]), strict=True))
    expected = {"foreground": 0.0, "background": 0.0}
    for labels, rows in zip(student.rois.labels, (slice(0, 6), slice(6, 10)), strict=True):
        nodes = [2 * slow_region(part, s, t) for s, t in features[rows]]
        kinds = [bool(label) for label in labels.tolist()]
        front = [node for node, positive in zip(nodes, kinds, strict=True) if positive]
        back = [node for node, positive in zip(nodes, kinds, strict=True) if not positive]
        assert front
        expected["foreground"] += sum(front) / len(front)
        expected["background"] += 7.5 * len(front) / len(back) * sum(back) / len(back)
    for kind, value in expected.items():  # twice the mean over two images
        assert values[f"nodes.{kind}"].item() == pytest.approx(value)
        assert values[f"nodes.{kind}"].item() != pytest.approx(plain[f"nodes.{kind}"].item(), rel=1e-3)
    for term in ("edges.all", "logits.classes", "logits.boxes"):
        assert torch.equal(values[term], plain[term])


def test_squares_of_rescaled_maps_are_weighed_by_the_feature_as_it_is() -> None:
    student, teacher = pair(torch.float64)
    loss = randomize_variances(PAD(spec(), spec(), partial(SSIM, error="l2", adapter=NONE)))
    expected = 0.0
    for stride, x in student.neck.items():
        part = variance_modules(loss)[f"of.maps.reweigh.{stride}"]
        scaled = []
        for maps in (x, teacher.neck[stride]):
            low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
            scaled.append((maps - low) / (high - low + 1e-6))
        cells = [(image, i, j) for image in range(2) for i in range(x.shape[2]) for j in range(x.shape[3])]
        for image, i, j in cells:
            error = slow_error(*(maps[image, :, i, j].tolist() for maps in scaled))
            expected += slow_weighed(error, slow_v(part, x[image, :, i, j].tolist())) / len(cells)
    assert loss(student, teacher)["neck.foreground"].item() == pytest.approx(expected)


def test_variances_are_trained_with_the_loss_and_forgotten_by_no_checkpoint() -> None:
    loss = randomize_variances(PAD(spec(), spec(), FGFI))
    state = loss.state_dict()
    assert sum("reweigh" in name for name in state) == 2 * 5
    again = PAD(spec(), spec(), FGFI)
    again.load_state_dict(state)
    assert again(*pair())["neck.foreground"].item() == loss(*pair())["neck.foreground"].item()


def test_the_best_variance_is_the_error_itself() -> None:
    """d/dv (e / exp(v) + v) = 0 at v = log e, where the value is 1 + log e: the scale of the error does not matter."""
    for error in (0.01, 1.0, 50.0):
        v = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for _ in range(400):
            (gradient,) = torch.autograd.grad(reweighed(torch.tensor(error), v), v)
            with torch.no_grad():
                v -= 0.05 * gradient
        assert v.item() == pytest.approx(math.log(error), abs=0.01)
        assert reweighed(torch.tensor(error), v).item() == pytest.approx(1 + math.log(error), abs=0.01)


@pytest.mark.parametrize("v", [-300.0, -20.0, 0.0, 20.0, 90.0, 1000.0])
def test_extreme_variances_stay_finite_with_their_gradients(v: float) -> None:
    variance, error = torch.tensor(v, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    value = reweighed(error, variance)
    gradients = torch.autograd.grad(value, (variance, error))
    assert value.isfinite()
    assert all(gradient.isfinite() for gradient in gradients)
    expected = v if v > 500 else 3.0 / (1e-6 + math.exp(v)) + v
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_during_the_warmup_it_is_the_plain_loss_and_still_attached() -> None:
    plain = FGFI(spec(), spec())(*pair())["neck.foreground"].item()
    loss = randomize_variances(PAD(spec(), spec(), FGFI, warmup=2))
    values = {}
    for epoch in (0, 1, 2, 0):
        loss.on_epoch_start(epoch, None, None, None)
        values[epoch] = loss(*pair())["neck.foreground"]
        loss.zero_grad()
        values[epoch].backward()
        gradients = [parameter.grad for part in variance_modules(loss).values() for parameter in part.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients if gradient is not None) == (epoch == 2)
    assert values[0].item() == values[1].item() == pytest.approx(plain, rel=2e-6)
    assert values[2].item() != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(("warmup", "epoch", "on"), [(0.5, 0, False), (0.5, 1, True), (0, 0, True), (2, 1, False)])
def test_the_epoch_alone_says_whether_the_warmup_goes_on(warmup: float, epoch: int, on: bool) -> None:
    """As of a loss that was just made, or just loaded inside an epoch, whose start it is never told."""
    loss = randomize_variances(PAD(spec(), spec(), FGFI, warmup))
    loss.epoch = epoch
    loss(*pair())["neck.foreground"].backward()
    weighed = [
        bool(parameter.grad.any()) for part in variance_modules(loss).values() for parameter in part.parameters()
    ]  # type: ignore[union-attr]
    assert any(weighed) == on


def test_the_wrapped_loss_hears_of_epochs_and_keeps_its_factors() -> None:
    class Factored(FGFI):
        heard: Any = None

        def __init__(self, **options: Any) -> None:
            super().__init__(**options, ramp={"shape": "linear"})
            self.supervised = {"loss_classifier": 0.5}

        def on_epoch_start(self, epoch: int, data: Any, student: Any, teacher: Any) -> None:
            super().on_epoch_start(epoch, data, student, teacher)
            self.heard = epoch, data, student, teacher

    loss = PAD(spec(), spec(), Factored)
    assert loss.of.heard is None
    loss.on_epoch_start(4, "data", "student", "teacher")
    assert loss.of.heard == (4, "data", "student", "teacher")
    assert loss.epoch == loss.of.epoch == 4
    assert loss.supervised == {"loss_classifier": 0.5}
    assert loss.ramp(0.5, 12) == 0.5


def test_falls_when_it_alone_is_minimised_and_below_what_the_plain_loss_can_reach() -> None:
    student, teacher = pair()
    small = teacher.mapped(lambda x: 0.1 * x)  # errors well below 1, so their logarithms are negative
    student = student.mapped(lambda x: 0.1 * x)
    loss = PAD(spec(), spec(), partial(Mimic, **BOTH))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.02)
    values = []
    for _ in range(100):
        terms = loss(student, small)
        optimizer.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        values.append({name: value.item() for name, value in terms.items()})
    assert all(values[-1][name] < 0 < values[0][name] for name in values[0])


# -- what can be wrapped


class Angles(DistillLoss):
    """Compares maps, but not by their squared error."""

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__({"neck.all": 1.0})
        self.maps = MapImitation("neck", student.neck, teacher.neck, error=lambda s, t: 1 - (s * t).sum(1))


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (Angles, "expected squared errors, but Angles compares the neck by another error"),
        (SSIM, "SSIM compares the neck by another error.*SSIM with error=l2"),
        (partial(Chen, hint={"distance": "l1"}), "Chen compares the hint by another error.*hint with distance=l2"),
        (
            partial(DSIG, nodes={"foreground": 0, "background": 0}, neck={"all": 0}),
            r"got DSIG with \['edges.all', 'logits.classes', 'logits.boxes'\]. Wrap .*DSIG's nodes or neck",
        ),
        (
            partial(DeFeat, neck={"foreground": 0, "background": 0}, proposals={"all": 1}),
            r"compares feature maps or pooled regions, got DeFeat with \['proposals.all'\]",
        ),
        (partial(PAD, of=FGFI), "PAD's neck is already weighed"),
        ({"_target_": "distill.FGFI"}, "got a dict. In YAML give `of` a _target_ and _partial_"),
        (partial(FGFI, neck={"levels": [2]}), "neck.levels"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(of: Any, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        PAD(spec(), spec(), of)


@pytest.mark.parametrize("warmup", [-1, math.inf, math.nan, "long"])
def test_a_warmup_is_a_number_of_epochs(warmup: Any) -> None:
    with pytest.raises(DistillError, match=r"PAD.warmup: expected a number of epochs, 0 or more"):
        PAD(spec(), spec(), FGFI, warmup)


def test_a_wrapped_loss_without_weights_is_nothing() -> None:
    loss = PAD(spec(), spec(), partial(FGFI, neck={"foreground": 0}))
    assert loss(*pair()) == {}
    assert not list(loss.parameters())


# -- configuration


@pytest.mark.parametrize(
    ("wrapper", "plain", "name"),
    [("pad_mimic", "mimic_neck", "mimic"), ("pad_fgfi", "fgfi", "fgfi"), ("pad_fgfi_voc", "fgfi_voc", "fgfi")],
)
def test_options_wrap_just_what_the_plain_option_says(wrapper: str, plain: str, name: str) -> None:
    options = instantiate.to_containers(compose.compose_config([f"distill={wrapper}"]).distill)["losses"][
        f"pad_{name}"
    ]["of"]
    assert options.pop("_partial_") is True
    assert options == instantiate.to_containers(compose.compose_config([f"distill={plain}"]).distill)["losses"][name]


def test_builds_from_its_option_takes_overrides_and_adds_up_with_defeat() -> None:
    place = "distill.losses.pad_fgfi"
    lines = ["distill=[defeat,pad_fgfi]", f"{place}.of.neck.foreground=2", f"{place}.warmup=1"]
    losses = compose.compose_config(lines).distill.losses
    built = {str(name): instantiate.build_node(node, student=spec(), teacher=spec()) for name, node in losses.items()}
    assert built["pad_fgfi"].weights == {"neck.foreground": 2}
    assert built["pad_fgfi"].warmup == 1
    assert [list(loss(*pair())) for loss in built.values()] == [
        ["neck.foreground", "neck.background"],
        ["neck.foreground"],
    ]
    node = compose.compose_config(["distill=pad_fgfi", f"{place}.of.mask.kind=nothing"]).distill.losses.pad_fgfi
    with pytest.raises(DistillError, match=r"mask.kind: expected one of"):
        instantiate.build_node(node, student=spec(), teacher=spec())


def test_the_wrapped_loss_keeps_its_own_ramp_of_some_terms() -> None:
    ramp = {"shape": "linear", "terms": ["neck"]}
    make = partial(DeFeat, proposals={"positive": 1}, ramp=ramp)
    plain, wrapped = make(spec(), spec()), PAD(spec(), spec(), make)
    factors = {term: wrapped.factor(term, 0.5, 10) for term in wrapped.weights}
    assert factors == {term: plain.factor(term, 0.5, 10) for term in plain.weights}
    assert set(factors.values()) == {0.5, 1.0}
