"""The set criterion: slow loops from the papers' equations, and the losses of transformers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.assignment import Matches, SetTarget, assign, set_targets
from distill.detectors.set_criterion import (
    CornerBins,
    Denoising,
    QueryGroup,
    SetCriterion,
    SetLosses,
    union_matches,
)
from distill.types import DistillError, QueryLayer
from helpers.fake_view import batch
from helpers.slow_queries import sigmoid, slow_kl, slow_l1, slow_overlap, softmax
from helpers.two_processes import run_in_two_processes

pytest.importorskip("scipy", reason="the matching needs scipy")
CLASSES, BINS = 3, CornerBins(9)
WEIGHTS = {"classification": 1.0, "l1": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}


def layer(
    seed: int, images: int = 3, queries: int = 5, bins: int = BINS.count, dtype: Any = torch.float64
) -> QueryLayer:
    """Random outputs, image by image; half of the boxes are near the objects of `objects`."""
    parts = []
    for image in range(images):
        generator = torch.Generator().manual_seed(100 * seed + image)
        logits = torch.randn(queries, CLASSES, generator=generator, dtype=dtype)
        boxes = torch.rand(queries, 4, generator=generator, dtype=dtype) * 0.3 + 0.3
        near = objects(image).boxes.to(dtype)
        boxes[: len(near)] = near[:queries] + 0.05 * boxes[: len(near)]
        corners = torch.randn(queries, 4, bins, generator=generator, dtype=dtype)
        parts.append((logits, boxes, torch.zeros(queries, 2, dtype=dtype), corners))
    return QueryLayer(*(torch.stack(tensors).requires_grad_() for tensors in zip(*parts, strict=True)))


def objects(image: int, count: int | None = None) -> SetTarget:
    """Two objects in the first image, none in the second, three in the third."""
    count = (2, 0, 3)[image] if count is None else count
    generator = torch.Generator().manual_seed(image)
    boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.25
    return SetTarget(boxes, torch.arange(count) % CLASSES)


TARGETS = [objects(image) for image in range(3)]
FIXED = [  # two groups
    (torch.tensor([0, 2, 4, 5]), torch.tensor([0, 1, 0, 1])),
    (torch.zeros(0).long(), torch.zeros(0).long()),
    (torch.tensor([0, 1, 2, 4, 5, 6]), torch.tensor([0, 1, 2, 0, 1, 2])),
]


def groups() -> tuple[QueryGroup, QueryLayer, Denoising]:
    queries = QueryGroup([layer(1), layer(2), layer(3)], layer(4))
    return queries, layer(5), Denoising([layer(seed, queries=8) for seed in (6, 7, 8)], FIXED, layer(9, queries=8))


# -- slow loops


def slow_cost(logits: list[float], box: list[float], label: int, truth: list[float]) -> float:
    p = sigmoid(logits[label])
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    return 2 * focal + 5 * slow_l1(box, truth) - 2 * slow_overlap(box, truth)[1]


def slow_match(layer: QueryLayer, targets: list[SetTarget]) -> list[list[tuple[int, int]]]:
    """The cheapest of all assignments."""
    found = []
    for logits, boxes, target in zip(layer.logits.tolist(), layer.boxes.tolist(), targets, strict=True):
        truth, labels = target.boxes.tolist(), target.labels.tolist()
        size, best = min(len(boxes), len(truth)), (math.inf, [])
        for queries in itertools.permutations(range(len(boxes)), size):
            for chosen in itertools.combinations(range(len(truth)), size):
                pairs = list(zip(queries, chosen, strict=True))
                cost = sum(slow_cost(logits[q], boxes[q], labels[t], truth[t]) for q, t in pairs)
                best = min(best, (cost, pairs))
        found.append(sorted(best[1]))
    return found


def slow_classes(layer: QueryLayer, matches: list[list[tuple[int, int]]], kind: str) -> float:
    total = 0.0
    for image, pairs in enumerate(matches):
        for query, logits in enumerate(layer.logits[image].tolist()):
            for label, z in enumerate(logits):
                p = sigmoid(z)
                owner = [t for q, t in pairs if q == query and TARGETS[image].labels[t] == label]
                if owner:
                    truth = TARGETS[image].boxes[owner[0]].tolist()
                    q = slow_overlap(layer.boxes[image, query].tolist(), truth)[0]
                    targets = {"vfl": (q, q), "mal": (q**1.5, 1.0), "ia_bce": (max(p**0.25 * q**0.75, 0.01), 1.0)}
                    q, factor = targets[kind]
                    total -= factor * (q * math.log(p) + (1 - q) * math.log(1 - p))
                else:
                    total -= {"vfl": 0.75 * p**2, "mal": p**1.5, "ia_bce": p**2}[kind] * math.log(1 - p)
    return total


def slow_boxes(layer: QueryLayer, matches: list[list[tuple[int, int]]]) -> tuple[float, float]:
    l1 = giou = 0.0
    for image, pairs in enumerate(matches):
        for query, index in pairs:
            box, truth = layer.boxes[image, query].tolist(), TARGETS[image].boxes[index].tolist()
            l1 += slow_l1(box, truth)
            giou += 1 - slow_overlap(box, truth)[1]
    return l1, giou


def slow_offsets() -> list[float]:
    """W(n) for N = 8, a = 1/2, c = 1/4: a/c + 1 = 3."""
    inner = [0.25 * (3 ** (exponent / 6) - 1) for exponent in (2, 4, 6)]
    return [-1.0, -inner[2], -inner[1], -inner[0], 0.0, *inner, 1.0]


def slow_fgl(layer: QueryLayer, first: QueryLayer, matches: list[list[tuple[int, int]]]) -> float:
    total, offsets = 0.0, slow_offsets()
    for image, pairs in enumerate(matches):
        for query, index in pairs:
            x, y, w, h = TARGETS[image].boxes[index].tolist()
            cx, cy, sw, sh = first.boxes[image, query].tolist()
            ends = [(cx - x + w / 2) / sw, (cy - y + h / 2) / sh, (x + w / 2 - cx) / sw, (y + h / 2 - cy) / sh]
            iou = slow_overlap(layer.boxes[image, query].tolist(), [x, y, w, h])[0]
            for side, end in enumerate(ends):
                phi = min(max(end - 0.5, -1.0), 1.0)
                n = max(i for i in range(8) if offsets[i] <= phi)
                width = offsets[n + 1] - offsets[n]
                p = softmax(layer.corners[image, query, side].tolist())
                near, far = abs(phi - offsets[n + 1]) / width, abs(phi - offsets[n]) / width
                total -= iou * (near * math.log(p[n]) + far * math.log(p[n + 1]))
    return total


def slow_ddf(
    layer: QueryLayer,
    last: QueryLayer,
    matches: list[list[tuple[int, int]]],
    numbers: tuple[int, int] | None = None,
) -> float:
    """`numbers` of matched and other queries, whose roots weight the means; None: those of the layer."""
    values: dict[bool, list[float]] = {True: [], False: []}
    for image, pairs in enumerate(matches):
        for query in range(layer.logits.shape[1]):
            weight = max(map(sigmoid, last.logits[image, query].tolist()))
            for matched, index in pairs:
                if matched == query:
                    truth = TARGETS[image].boxes[index].tolist()
                    weight = slow_overlap(layer.boxes[image, query].tolist(), truth)[0]
            for side in range(4):
                rows = (x.corners[image, query, side].tolist() for x in (layer, last))
                values[query in dict(pairs)].append(weight * slow_kl(*rows, 5))
    numbers = numbers or (len(values[True]), len(values[False]))
    roots = {kind: math.sqrt(number) for kind, number in zip((True, False), numbers, strict=True)}
    return sum(roots[kind] * sum(rows) / len(rows) for kind, rows in values.items() if rows) / sum(roots.values())


def slow_union(matches: list[list[list[tuple[int, int]]]]) -> list[list[tuple[int, int]]]:
    union = []
    for image in zip(*matches, strict=True):
        votes = Counter(pair for part in image for pair in part)
        queries = sorted({query for query, _ in votes})
        union.append([max((n, -t, (q, t)) for (q, t), n in votes.items() if q == query)[2] for query in queries])
    return union


def slow_losses(kind: str, union: bool) -> dict[str, dict[str, float]]:
    queries, encoder, denoising = groups()
    parts = {f"layer_{i}": x for i, x in enumerate(queries.layers)} | {"first": queries.first, "encoder": encoder}
    matches = [slow_match(x, TARGETS) for x in parts.values()]
    shared, values = slow_union(matches), {}
    pairs = sum(len(image) for image in shared) if union else 5
    for (name, x), own in zip(parts.items(), matches, strict=True):
        located = shared if union else own
        l1, giou = slow_boxes(x, located)
        values[name] = {"classification": slow_classes(x, own, kind) / 5, "l1": l1 / pairs, "giou": giou / pairs}
        if name.startswith("layer"):
            fgl, ddf = slow_fgl(x, queries.first, located) / pairs, slow_ddf(x, queries.layers[-1], located)
            values[name] |= {"fgl": fgl, "ddf": ddf}
    fixed = [list(zip(q.tolist(), t.tolist(), strict=True)) for q, t in FIXED]
    positives = pairs if union else 5
    ordinary = positives, math.prod(queries.first.logits.shape[:2]) - positives
    parts = {f"denoising_{i}": x for i, x in enumerate(denoising.layers)} | {"denoising_first": denoising.first}
    for name, x in parts.items():
        l1, giou = slow_boxes(x, fixed)
        values[name] = {"classification": slow_classes(x, fixed, kind) / 10, "l1": l1 / 10, "giou": giou / 10}
        if name != "denoising_first":
            ddf = slow_ddf(x, denoising.layers[-1], fixed, ordinary)
            values[name] |= {"fgl": slow_fgl(x, denoising.first, fixed) / 10, "ddf": ddf}
    return values


# -- the matching


def listed(matches: Matches) -> list[list[tuple[int, int]]]:
    return [list(zip(q.tolist(), t.tolist(), strict=True)) for q, t in matches]


@pytest.mark.parametrize("queries", [5, 2], ids=["more queries", "more objects"])
def test_the_matching_has_the_least_cost(queries: int) -> None:
    layers = [layer(seed, queries=queries) for seed in (1, 2)]
    found = SetCriterion().match(layers, TARGETS)
    assert list(map(listed, found)) == [slow_match(x, TARGETS) for x in layers]
    assert [len(q) for q, _ in found[0]] == [2, 0, min(queries, 3)]


def test_pairs_of_infinite_cost_are_matched_last() -> None:
    costs = torch.tensor([[[math.nan, 1.0], [0.0, math.inf], [5.0, 2.0]]])
    assert listed(assign([costs], [2])[0]) == [[(0, 1), (1, 0)]]
    assert listed(assign([torch.full((1, 2, 1), math.nan)], [1])[0]) == [[(0, 0)]]


def test_the_union_takes_the_object_with_most_votes() -> None:
    votes = [[[(0, 1), (2, 0)]], [[(0, 0), (2, 1)]], [[(0, 1), (1, 0)]]]
    given = [[tuple(torch.tensor(column) for column in zip(*image, strict=True)) for image in part] for part in votes]
    assert listed(union_matches(given)) == slow_union(votes) == [[(0, 1), (1, 0), (2, 0)]]


# -- the losses


@pytest.mark.parametrize("union", [False, True], ids=["own", "union"])
@pytest.mark.parametrize("kind", ["vfl", "mal", "ia_bce"])
def test_losses_equal_slow_loops(kind: str, union: bool) -> None:
    criterion = SetCriterion(kind, BINS, union)
    queries, encoder, denoising = groups()
    losses = criterion(queries, TARGETS, encoder, denoising)
    expected = slow_losses(kind, union)
    assert losses.parts.keys() == expected.keys()
    for name, part in losses.parts.items():
        values = {term: value.item() for term, value in part.items()}
        assert values == pytest.approx(expected[name], rel=2e-6, abs=1e-12), name  # objects are float32
    assert list(losses.terms) == list(WEIGHTS) == criterion.names
    for term, value in losses.terms.items():
        assert value.item() == pytest.approx(sum(part.get(term, 0) for part in expected.values()), rel=2e-6), term
    assert list(map(listed, losses.matches)) == [slow_match(x, TARGETS) for x in queries.layers]


def total(losses: SetLosses) -> Tensor:
    return sum((WEIGHTS[name] * value for name, value in losses.terms.items()), torch.zeros(()))


def test_every_layer_gets_a_gradient_and_the_last_layer_none_from_ddf() -> None:
    queries, encoder, denoising = groups()
    losses = SetCriterion(bins=BINS)(queries, TARGETS, encoder, denoising)
    losses.terms["ddf"].backward(retain_graph=True)
    for group in (queries, denoising):
        assert not group.layers[-1].corners.grad.any()
        assert all(x.corners.grad.any() and x.logits.grad is None for x in group.layers[:-1])
    total(losses).backward()
    for x in [*queries.layers, *denoising.layers]:
        assert all(tensor.grad.any() for tensor in (x.logits, x.boxes, x.corners))
    assert all(x.boxes.grad.any() and x.logits.grad.any() for x in (queries.first, encoder))


@pytest.mark.parametrize("bins", [None, BINS])
def test_a_batch_without_objects_gives_attached_zeros(bins: CornerBins | None) -> None:
    queries, encoder, _ = groups()
    nothing = [objects(1)] * 3
    losses = SetCriterion(bins=bins, union=bool(bins))(queries, nothing, encoder)
    assert all(losses.terms[name] == 0 for name in {"l1", "giou", "fgl"} & losses.terms.keys())
    total(losses).backward()
    assert all(x.boxes.grad is not None and not x.boxes.grad.any() for x in (*queries.layers, encoder))
    assert all(x.logits.grad.any() for x in queries.layers)


def test_more_objects_than_queries() -> None:
    queries = QueryGroup([layer(1, images=1, queries=2)], layer(2, images=1, queries=2))
    losses = SetCriterion(bins=BINS, union=True)(queries, [objects(0, 7)])
    assert len(losses.matches[0][0][0]) == 2
    assert all(value.isfinite() for value in losses.terms.values())


def test_half_precision_is_computed_in_float32() -> None:
    def halved(x: QueryLayer) -> QueryLayer:
        return QueryLayer(x.logits.bfloat16(), x.boxes.float(), x.hidden, x.corners.bfloat16())

    queries = QueryGroup([halved(layer(seed)) for seed in (1, 2)], halved(layer(4)))
    exact = SetCriterion(bins=BINS)(queries, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = SetCriterion(bins=BINS)(queries, TARGETS)
    assert all(value.dtype == torch.float32 for value in losses.terms.values())
    assert all(torch.equal(losses.terms[name], exact.terms[name]) for name in exact.terms)


def test_targets_are_shares_of_the_padded_image() -> None:
    (target,) = set_targets(batch([[[16.0, 8.0, 48.0, 16.0]]], height=64, width=128))
    assert target.boxes.tolist() == [[0.25, 0.1875, 0.25, 0.125]]
    assert target.labels.tolist() == [0]


def test_bins_follow_the_equation() -> None:
    assert BINS.offsets() == pytest.approx(slow_offsets())
    assert BINS.offsets() == [-offset for offset in reversed(BINS.offsets())]
    start = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    offsets = torch.tensor(BINS.offsets())
    low, high = 0.5 - 0.2 * (0.5 + offsets[5]), 0.5 + 0.2 * (0.5 + offsets[6])
    truth = torch.tensor([[(low + high) / 2, 0.5, high - low, 2.0]])
    left, share = BINS.targets(start, truth)
    assert (left + share)[0].tolist() == pytest.approx([5, 8, 6, 8], abs=1e-4)  # beyond the last bin: the last bin


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(DistillError, match="classification: expected vfl, mal or ia_bce, got 'focal'"):
        SetCriterion("focal")
    plain = QueryGroup([layer(1)._replace(corners=None)])
    with pytest.raises(DistillError, match="expected corner distributions of every decoder layer"):
        SetCriterion(bins=BINS)(plain, TARGETS)


# -- several processes


def gradient(rows: slice) -> Tensor:
    """Of a number that all boxes, logits and corners are multiplied with."""
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def part(x: QueryLayer) -> QueryLayer:
        return QueryLayer(*(factor * tensor.detach()[rows] for tensor in x))

    queries, encoder, denoising = groups()
    queries = QueryGroup([part(x) for x in queries.layers], part(queries.first))
    noisy = Denoising([part(x) for x in denoising.layers], FIXED[rows], part(denoising.first))
    some = noisy if any(len(q) for q, _ in noisy.matches) else None
    total(SetCriterion(bins=BINS, union=True)(queries, TARGETS[rows], part(encoder), some)).backward()
    return factor.grad


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shared = gradient([slice(0, 1), slice(1, 3)][rank])
    dist.all_reduce(shared)
    if rank == 0:
        torch.save(shared / 2, f"{folder}/gradient.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_in_two_processes(one_rank, str(tmp_path))
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), gradient(slice(0, 3)), rtol=1e-6, atol=1e-9)


# -- transformers


COMPARED = ("5.18.0", "5.21.1", "5.24.0")
"""Versions with equal losses, to the last bit: the oldest one, the last one for Python 3.10, and a newer one."""


def library(module: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    if transformers.__version__ not in COMPARED:
        pytest.skip(f"compared with transformers {', '.join(COMPARED)}; {transformers.__version__} may differ")
    return __import__(f"transformers.loss.{module}", fromlist=["loss"])


def library_config() -> SimpleNamespace:
    """The defaults of RTDetrConfig and DFineConfig."""
    names = {"classification": "vfl", "l1": "bbox", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}
    return SimpleNamespace(
        **{f"weight_loss_{names[name]}": weight for name, weight in WEIGHTS.items()},
        **{"matcher_class_cost": 2.0, "matcher_bbox_cost": 5.0, "matcher_giou_cost": 2.0},
        **{"matcher_alpha": 0.25, "matcher_gamma": 2.0, "use_focal_loss": True, "auxiliary_loss": True},
        **{"focal_loss_alpha": 0.75, "focal_loss_gamma": 2.0, "num_labels": CLASSES, "eos_coefficient": 1e-4},
        **{"max_num_bins": BINS.count - 1, "reg_scale": BINS.scale, "up": BINS.limit},
    )


def library_inputs(first: bool) -> dict[str, Any]:
    """The arguments of transformers' loss function: the denoising queries come first, layers are stacked."""
    queries, encoder, denoising = groups()
    lead = [(queries.first, denoising.first)] if first else []
    rows = [*lead, *zip(queries.layers, denoising.layers, strict=True)]
    logits = torch.stack([torch.cat([noisy.logits, x.logits], dim=1) for x, noisy in rows], dim=1).float()
    boxes = torch.stack([torch.cat([noisy.boxes, x.boxes], dim=1) for x, noisy in rows], dim=1).float()
    meta = {"dn_num_split": [8, 5], "dn_num_group": 2, "dn_positive_idx": [q for q, _ in FIXED]}
    return {
        "logits": logits[:, -1],
        "pred_boxes": boxes[:, -1],
        "labels": [{"class_labels": target.labels, "boxes": target.boxes} for target in TARGETS],
        "device": "cpu",
        "config": library_config(),
        "outputs_class": logits,
        "outputs_coord": boxes,
        "enc_topk_logits": encoder.logits.float(),
        "enc_topk_bboxes": encoder.boxes.float(),
        "denoising_meta_values": meta,
    }


def unweighted(values: dict[str, Tensor], suffix: str) -> dict[str, float]:
    """transformers' terms of one part under our names; it numbers the encoder after the intermediate layers."""
    names = {"classification": "vfl", "l1": "bbox", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}
    found = {name: values.get(f"loss_{key}{suffix}") for name, key in names.items()}
    return {name: value.item() / WEIGHTS[name] for name, value in found.items() if value is not None}


def ours(first: bool) -> SetLosses:
    """The criterion on the tensors of `library_inputs`."""
    queries, encoder, denoising = groups()
    part = {"first": queries.first} if first else {}
    noisy = {"first": denoising.first} if first else {}
    criterion = SetCriterion(bins=BINS if first else None)
    return criterion(
        QueryGroup(queries.layers, **part), TARGETS, encoder, Denoising(denoising.layers, denoising.matches, **noisy)
    )


def test_rt_detr_equals_transformers() -> None:
    """Main, auxiliary and denoising terms on one process, where its local count is the count."""
    values = library("loss_rt_detr").RTDetrForObjectDetectionLoss(**library_inputs(first=False))[1]
    suffixes = {"layer_2": "", "layer_0": "_aux_0", "layer_1": "_aux_1", "encoder": "_aux_2"}
    suffixes |= {f"denoising_{index}": f"_dn_{index}" for index in range(3)}
    losses = ours(first=False)
    assert losses.parts.keys() == suffixes.keys()
    for name, part in losses.parts.items():
        expected = unweighted(values, suffixes[name])
        assert {term: value.item() for term, value in part.items()} == pytest.approx(expected, rel=1e-5), name


def corner_gradients(terms: list[Tensor], tensors: list[Tensor]) -> list[float]:
    total = sum(terms, torch.zeros(()))
    return [float(x.abs().sum()) for x in torch.autograd.grad(total, tensors, materialize_grads=True)]


def test_d_fine_differs_from_transformers_5_24() -> None:
    """Its L + 1 logits (before the first layer, layers) are zipped with the L corner tensors: each layer's corners meet
    the logits and boxes of the layer before, the last but one layer gets no loss, and the last one's corners no FGL."""
    module = library("loss_d_fine")
    inputs = library_inputs(first=True)
    queries, _, denoising = groups()
    rows = zip(queries.layers, denoising.layers, strict=True)
    corners = [torch.cat([noisy.corners, x.corners], dim=1).float().flatten(2) for x, noisy in rows]
    leaves = [x.detach().requires_grad_() for x in corners]
    start = torch.cat([denoising.first.boxes, queries.first.boxes], dim=1).float().detach()
    logits = [x.detach().requires_grad_() for x in inputs["outputs_class"].unbind(1)]
    inputs |= {"outputs_class": torch.stack(logits, dim=1), "logits": logits[-1]}
    inputs |= {"predicted_corners": torch.stack(leaves, dim=1)}
    inputs |= {"initial_reference_points": torch.stack([start] * 3, dim=1)}
    values = module.DFineForObjectDetectionLoss(**inputs)[1]
    plain = {name: value for name, value in values.items() if "_dn_" not in name}

    # Of 4 logits (first, layers 0 to 2) layer 1 gets no loss of the ordinary queries.
    by_logits = corner_gradients([value for name, value in plain.items() if "vfl" in name], logits)
    assert by_logits[2] == 0
    assert min(by_logits[0], by_logits[1], by_logits[3]) > 1
    # Layer 2's corners get no FGL.
    by_corners = corner_gradients([value for name, value in plain.items() if "fgl" in name], leaves)
    assert by_corners[2] == 0
    assert min(by_corners[:2]) > 0.1

    # With the pairs put right, one layer's FGL and DDF are ours.
    criterion, losses = module.DFineLoss(library_config()), ours(first=True)
    for index in (0, 1, 2):
        x, last = queries.layers[index], queries.layers[-1]
        outputs = {"pred_boxes": x.boxes.float(), "pred_corners": x.corners.float().flatten(2)}
        outputs |= {"ref_points": queries.first.boxes.float(), "teacher_logits": last.logits.float()}
        outputs |= {"teacher_corners": last.corners.float().flatten(2)}
        local = criterion.loss_local(outputs, inputs["labels"], losses.matches[index], 5)
        for term in ("fgl", "ddf"):
            assert losses.parts[f"layer_{index}"][term].item() == pytest.approx(local[f"loss_{term}"].item(), rel=1e-5)


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_mal_is_that_of_transformers_with_the_gamma_of_the_paper(gamma: float) -> None:
    """The default of Deimv2Config is the gamma of the focal loss, 2. As with D-FINE, the last layer but one gets no
    loss of the ordinary queries."""
    config = library_config()
    config.weight_loss_mal, config.mal_alpha, config.use_dense_one_to_one = 1.0, None, True
    config.focal_loss_gamma = gamma
    queries, encoder, denoising = groups()
    rows = list(zip(queries.layers, denoising.layers, strict=True))
    corners = [torch.cat([noisy.corners, x.corners], dim=1).float().flatten(2) for x, noisy in rows]
    start = torch.cat([denoising.first.boxes, queries.first.boxes], dim=1).float()
    inputs = library_inputs(first=True) | {"config": config, "predicted_corners": torch.stack(corners, dim=1)}
    inputs |= {"initial_reference_points": torch.stack([start] * 3, dim=1)}
    values = library("loss_deimv2").Deimv2ForObjectDetectionLoss(**inputs)[1]
    losses = SetCriterion("mal", BINS)(queries, TARGETS, encoder)
    suffixes = {"layer_2": "", "first": "_aux_0", "layer_0": "_aux_1", "encoder": "_aux_2"}
    assert {f"loss_mal{suffix}" for suffix in suffixes.values()} == {
        name for name in values if "mal" in name and "_dn_" not in name
    }
    for part, suffix in suffixes.items():
        found, expected = losses.parts[part]["classification"].item(), values[f"loss_mal{suffix}"].item()
        assert (found == pytest.approx(expected, rel=1e-5)) == (gamma == 1.5), part
