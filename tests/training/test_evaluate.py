"""Scores are counted exactly."""

import pytest
import torch
from torch import nn

from iabn_hub.processes import Processes
from iabn_hub.training.data import Batch
from iabn_hub.training.evaluate import Score, evaluate

ALONE = Processes(torch.device("cpu"))
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


def score_of(batches, **options):
    return evaluate(FirstPixels(), batches, AsFloat(), ALONE, **options)


def test_figures_are_those_of_a_plain_loop():
    batches = [a_batch(20), a_batch(13, 20), a_batch(0, 33)]
    score = score_of(batches)
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
    assert (score.images, score.right, score.right_of_five) == (33, right, of_five)
    assert score.loss == pytest.approx(loss / 33, rel=1e-6)
    assert score.confusions == confusions
    assert score.per_class == {label: labels.count(label) for label in set(labels)}
    assert sum(score.right_per_class.values()) == right
    assert {m.index for m in score.mistakes} <= set(range(33))
    assert len(score.mistakes) == 33 - right
    assert [m.probability for m in score.mistakes] == sorted((m.probability for m in score.mistakes), reverse=True)


def test_ten_crops_count_by_the_mean_of_their_logits():
    batch = a_batch(9, crops=(10,))
    averaged = batch.images.double().mean(1)[:, 0, 0, :CLASSES]
    score = score_of([batch])
    assert score.images == 9
    assert score.right == (averaged.argmax(1) == batch.labels).sum()
    assert score.loss == pytest.approx(nn.functional.cross_entropy(averaged, batch.labels).item(), rel=1e-5)


def test_shares_add_up_to_the_whole():
    batches = [a_batch(8), a_batch(8, 8), a_batch(3, 16)]
    total = Score()
    for batch in batches:
        total.add(score_of([batch]))
    whole = score_of(batches)
    assert (total.images, total.right, total.right_of_five) == (whole.images, whole.right, whole.right_of_five)
    assert total.total_loss == pytest.approx(whole.total_loss)
    assert (total.per_class, total.confusions) == (whole.per_class, whole.confusions)
    assert total.mistakes == whole.mistakes


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_that_the_network_does_not_have_are_named(label):
    batch = a_batch(4)
    batch.labels[2] = label
    with pytest.raises(ValueError, match=f"the data has class {label}, the network has classes 0 to {CLASSES - 1}"):
        score_of([batch])


def test_the_network_comes_back_in_its_mode():
    network = FirstPixels().train()
    evaluate(network, [a_batch(2)], AsFloat(), ALONE)
    assert network.training
