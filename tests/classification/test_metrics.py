"""Metrics are counted exactly."""

import pytest
import torch
from torch import nn

from iabn_hub.classification.metrics import ClassificationMetrics
from iabn_hub.datasets.samples import Batch
from iabn_hub.evaluation import evaluate
from iabn_hub.world import World

ALONE = World(torch.device("cpu"))
CLASSES = 7


class AsFloat(nn.Module):
    def forward(self, images):
        return images.float()


class FirstPixels(nn.Module):
    """The logits are the first pixels of the first channel."""

    def forward(self, images):
        return images[:, 0, 0, :CLASSES]


def a_batch(count, first=0, crops=()):
    images = torch.randint(256, (count, *crops, 3, 8, 8), dtype=torch.uint8)
    return Batch(images, torch.randint(CLASSES, (count,)), torch.arange(first, first + count), ())


def metrics_of(batches):
    return evaluate(FirstPixels(), batches, AsFloat(), ALONE, ClassificationMetrics())


def test_figures_are_those_of_a_plain_loop():
    batches = [a_batch(20), a_batch(13, 20), a_batch(0, 33)]
    metrics = metrics_of(batches)
    images = torch.cat([batch.images for batch in batches]).double()
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    right, of_five, loss, confusions = 0, 0, 0.0, {}
    for image, label in zip(images, labels):
        logits = image[0, 0, :CLASSES]
        order = logits.argsort(descending=True).tolist()
        right += order[0] == label
        of_five += label in order[:5]
        loss -= logits.log_softmax(0)[label].item()
        if order[0] != label:
            confusions[label, order[0]] = confusions.get((label, order[0]), 0) + 1
    assert (metrics.images, metrics.correct, metrics.correct_top5) == (33, right, of_five)
    assert metrics.loss == pytest.approx(loss / 33, rel=1e-6)
    assert metrics.confusions == confusions
    assert metrics.per_class == {label: labels.count(label) for label in set(labels)}
    assert sum(metrics.correct_per_class.values()) == right
    assert {m.index for m in metrics.errors} <= set(range(33))
    assert len(metrics.errors) == 33 - right
    assert [m.probability for m in metrics.errors] == sorted((m.probability for m in metrics.errors), reverse=True)


def test_ten_crops_count_by_the_mean_of_their_logits():
    batch = a_batch(9, crops=(10,))
    averaged = batch.images.double().mean(1)[:, 0, 0, :CLASSES]
    metrics = metrics_of([batch])
    assert metrics.images == 9
    assert metrics.correct == (averaged.argmax(1) == batch.labels).sum()
    assert metrics.loss == pytest.approx(nn.functional.cross_entropy(averaged, batch.labels).item(), rel=1e-5)


def test_shares_add_up_to_the_whole():
    batches = [a_batch(8), a_batch(8, 8), a_batch(3, 16)]
    total = ClassificationMetrics()
    for batch in batches:
        total.add(metrics_of([batch]))
    whole = metrics_of(batches)
    assert (total.images, total.correct, total.correct_top5) == (whole.images, whole.correct, whole.correct_top5)
    assert total.total_loss == pytest.approx(whole.total_loss)
    assert (total.per_class, total.confusions) == (whole.per_class, whole.confusions)
    assert total.errors == whole.errors


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_that_the_network_does_not_have_are_named(label):
    batch = a_batch(4)
    batch.labels[2] = label
    with pytest.raises(ValueError, match=f"the data has class {label}, the network has classes 0 to {CLASSES - 1}"):
        metrics_of([batch])


def test_the_network_comes_back_in_its_mode():
    network = FirstPixels().train()
    evaluate(network, [a_batch(2)], AsFloat(), ALONE, ClassificationMetrics())
    assert network.training
