"""The battery before and after, against scikit-learn, scipy and counting by hand."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor, nn

from pyrobc.batches import seeded
from pyrobc.diagnose import BINS, diagnose
from pyrobc.errors import ConfigError, DataError
from pyrobc.shifts import SHIFTS, Shift


def build(seed: int, hidden: int = 6, features: int = 5) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 3))


def rows() -> tuple[Tensor, Tensor]:
    with seeded(5):
        return torch.randn(200, 5), torch.randint(0, 3, (200,))


def images() -> tuple[Tensor, Tensor]:
    with seeded(6):
        return torch.rand(40, 2, 8, 8), torch.randint(0, 3, (40,))


def test_measures_are_those_of_independent_code() -> None:
    x, y = rows()
    before, after = build(0), build(1)
    found = diagnose(before, after, (x, y))
    for net, measured in ((before, found.before), (after, found.after)):
        p = net.eval()(x).detach().double().softmax(1).numpy()
        confidence, hit = p.max(1), p.argmax(1) == y.numpy()
        edges = np.digitize(confidence, np.linspace(0, 1, BINS + 1)) - 1
        ece = sum(abs(hit[edges == b].mean() - confidence[edges == b].mean()) * (edges == b).mean() for b in set(edges))
        assert measured["error"] == pytest.approx(1 - accuracy_score(y, p.argmax(1)))
        assert measured["nll"] == pytest.approx(log_loss(y, p, labels=[0, 1, 2]), rel=1e-6)
        assert measured["brier"] == pytest.approx(
            brier_score_loss(y, p, labels=[0, 1, 2], scale_by_half=False), rel=1e-6
        )
        assert measured["entropy"] == pytest.approx(entropy(p, axis=1).mean(), rel=1e-6)
        assert measured["ece"] == pytest.approx(ece, rel=1e-6)
    a, b = (net(x).softmax(1).detach() for net in (before, after))
    assert found.after["agreement"] == pytest.approx(float((a.argmax(1) == b.argmax(1)).float().mean()))
    assert found.after["distance"] == pytest.approx(float((a - b).norm(dim=1).mean()), rel=1e-5)
    assert sum(b.rows for b in found.calibration[0]) == 200


def test_excess_error_is_the_difference_of_differences() -> None:
    x, y = rows()
    before, after = build(0).eval(), build(1).eval()
    shift = Shift("sign", 0.0, "", lambda values, level: -values)
    found = diagnose(before, after, (x, y), shifts=[shift])
    e = [[float((net(z).argmax(1) != y).double().mean()) for z in (x, -x)] for net in (before, after)]
    row = found.shifts[1]
    assert (row.before, row.after) == pytest.approx((e[0][1], e[1][1]))
    assert row.excess == pytest.approx((e[1][1] - e[1][0]) - (e[0][1] - e[0][0]))
    wrong = [[(net(z).argmax(1) != y).double() for z in (x, -x)] for net in (before, after)]
    each = (wrong[1][1] - wrong[1][0]) - (wrong[0][1] - wrong[0][0])
    assert row.excess_se == pytest.approx(float(each.std(unbiased=False)) / 200**0.5)


def test_a_network_is_its_own_equal() -> None:
    net = build(0)
    found = diagnose(net, copy.deepcopy(net), rows())
    assert found.after["agreement"] == 1.0 and found.after["distance"] == 0.0 and found.removed == 0.0
    assert all(shift.excess == 0.0 and shift.potential == 0.0 for shift in found.shifts)
    assert found.left_out == tuple(s.label for s in SHIFTS if s.needs_images)


def test_prune_potential_is_that_of_the_smallest_network_within_delta() -> None:
    """The smallest errs on every row, the middle one never does: only on the middle one does one count."""
    x, y = rows()
    teacher = build(0).eval()
    y = teacher(x).argmax(1)
    middle, smallest = copy.deepcopy(teacher), copy.deepcopy(teacher)
    with torch.no_grad():
        middle[3].bias[:] = middle[3].bias + 1e-9
        middle[0].weight[:, 4] = 0.0
        smallest[0].weight[:] = 0.0
        smallest[3].bias[:] = 50 * torch.eye(3)[int(y.bincount(minlength=3).argmin())]
    nothing = Shift("nothing", 0.0, "", lambda values, level: np.where(np.arange(5) == 4, 0.0, values))
    found = diagnose(teacher, [middle, smallest], (x, y), shifts=[nothing])
    dense = sum(p.numel() for p in teacher.parameters())
    assert found.removed == pytest.approx(32 / dense)  # two biases are zero as well
    assert found.shifts[1].potential == pytest.approx(6 / dense)  # with the fifth input at zero both agree
    assert found.min_potential == pytest.approx(min(s.potential for s in found.shifts))
    assert "Prune potential at 0.5%" in found.to_markdown()


def test_nothing_is_changed_in_the_networks() -> None:
    before, after = build(0).train(), build(1).eval()
    states = copy.deepcopy((before.state_dict(), after.state_dict()))
    diagnose(before, after, rows())
    assert before.training and not after.training
    for state, net in zip(states, (before, after), strict=True):
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.label)
def test_shifts_keep_shape_and_type_and_are_the_same_twice(shift: Shift) -> None:
    x, _ = images()
    changed = shift(x)
    assert changed.shape == x.shape and changed.dtype == x.dtype and not torch.equal(changed, x)
    assert torch.equal(changed, shift(x)) and torch.equal(x, images()[0])
    if shift.name == "contrast":
        assert changed[3].std().item() == pytest.approx(shift.level * x[3].std().item(), rel=1e-4)
        assert changed[3].mean().item() == pytest.approx(x[3].mean().item(), rel=1e-4)
    if shift.name == "noise":
        assert (changed - x).std().item() == pytest.approx(shift.level * x.std().item(), rel=0.05)
    if shift.name == "rotation":  # about the centre, and a turn back nearly undoes it there
        back = Shift("back", -shift.level, "", shift.change)(changed)
        assert float((back - x)[:, :, 3:5, 3:5].abs().mean()) < 0.2
    if shift.name == "blur":
        assert float(changed.diff(dim=-1).abs().mean()) < float(x.diff(dim=-1).abs().mean())


def test_what_cannot_be_diagnosed_is_refused() -> None:
    x, y = rows()
    net = build(0)
    with pytest.raises(ConfigError, match="networks after: got none"):
        diagnose(net, [], (x, y))
    with pytest.raises(ConfigError, match=r"networks to compare: got \[2, 3\] classes"):
        diagnose(net, nn.Linear(5, 2), (x, y))
    with pytest.raises(DataError, match="no class labels"):
        diagnose(net, net, (x, torch.full((200,), 3)))
    with pytest.raises(DataError, match="no class labels"):
        diagnose(net, net, (x, torch.randn(200)))
    words = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(15, 3))
    with pytest.raises(DataError, match="inputs for the shift 'noise 0.1 sd': got torch.int64"):
        diagnose(words, words, (torch.randint(0, 4, (200, 5)), y))


def test_one_logit_is_two_classes() -> None:
    x, _ = rows()
    net = nn.Linear(5, 1).eval()
    logits = net(x)[:, 0].detach()
    y = (logits > 0).float()
    found = diagnose(net, net, (x, y))
    assert found.before["error"] == 0.0
    assert found.before["nll"] == pytest.approx(float(nn.functional.binary_cross_entropy_with_logits(logits, y)))
