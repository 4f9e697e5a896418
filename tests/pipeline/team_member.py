"""One of several processes for ``test_distributed``: does what every member does, and writes what it found."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import nn

from pyrobc.batches import seeded
from pyrobc.compress import compress
from pyrobc.distributed import Team, joined
from pyrobc.errors import FitError, PyrobcError
from pyrobc.family import make_family
from pyrobc.fit import fit
from pyrobc.lift import lift
from pyrobc.objective import analytic_loss
from pyrobc.pruning import PruneEachEpoch


def make_rows(count=210):
    with seeded(3):
        x = torch.randn(count, 6)
        return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def make_model(family="group_normal_jeffreys", norm=False):
    with seeded(4):
        layers = [nn.Linear(6, 12), *([nn.BatchNorm1d(12)] if norm else []), nn.ReLU(), nn.Linear(12, 2)]
        net = nn.Sequential(*layers)
    return lift(net, make_family(family), "categorical", make_rows()[0][:1])


def fixed_noise_loss(model, guide, num_data):
    """The loss of ``fit`` with scales whose noise is a function of the row."""

    def log_likelihood(model, effective, inputs, targets, values):
        laws = guide.distributions()
        gates = {}
        for block in model.spec.blocks:
            law = laws[f"{block.name}.scale"].base_dist
            noise = torch.sin(37 * inputs.sum(1, keepdim=True) + torch.arange(block.size))
            gates[block.name] = law.loc + law.scale * noise
        means = {name: laws[name].base_dist.loc for name in model.spec.parameters}
        still = dataclasses.replace(effective, gates=gates, parameters=means, variances={})
        return model.likelihood.distribution(model.run(still, inputs), values).log_prob(targets)

    return analytic_loss(model, guide, num_data, log_likelihood)


def find_gradient(team, rows):
    """Value and gradient of one batch, summed over the team."""
    model = make_model()
    guide = model.new_guide()
    x, y = make_rows()
    inputs, targets = team.share(x[:rows], y[:rows])
    value = torch.zeros(())
    if len(targets):
        value = fixed_noise_loss(model, guide, 210)(inputs, targets, 0.7)
        value.backward()
    value = team.sum_(guide.parameters(), value, len(targets) / rows)
    return {"value": value.detach(), **{name: p.grad for name, p in guide.named_parameters()}}


def fit_still(epochs, checkpoint=None):
    """A fit without noise of its own, in batches that do not divide by two."""
    model = make_model()
    return fit(
        model, make_rows(), epochs=epochs, lr=1e-2, batch_size=75, path=fixed_noise_loss, checkpoint=checkpoint,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-6), progress=True,
    )  # fmt: skip


def main(folder: Path) -> None:
    with joined() as team:
        found = {f"gradient {rows}": find_gradient(team, rows) for rows in (1, 2, 75)}
        with team.noise(5, 1):
            found["noise"] = torch.rand(8)
        found["still"] = fit_still(3, folder / "from_two.pt").guide.state_dict()
        found["resumed"] = fit_still(4, folder / "from_one.pt").guide.state_dict()
        pruned = fit(
            make_model(norm=True), make_rows(), epochs=12, lr=5e-2, batch_size=50, progress=False,
            prune=PruneEachEpoch(), checkpoint=folder / "pruned.pt", validation=make_rows(60), patience=11,
        )  # fmt: skip
        found["pruned"] = pruned.guide.state_dict() | pruned.model.state_dict()
        with seeded(4):
            net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
        result = compress(
            net, make_rows(), family="group_normal_jeffreys", epochs=30, lr=3e-2, num_draws=50, keep_weights=0.5,
            test=make_rows(50), output=folder / "run", progress=False,
        )  # fmt: skip
        found["plan"], found["rows"] = result.plan.to_json(), len(result.table)
        found["compact"] = result.net.state_dict()

        def refuse():
            raise FitError("question", got="none", allowed="one", fix="ask")

        try:
            team.ask_first(refuse)
        except PyrobcError as error:
            found["refused"] = str(error)
        found["answer"] = team.ask_first(lambda: team.rank)
    torch.save(found, folder / f"found_{team.rank}.pt")
    (folder / f"done_{team.rank}.json").write_text(json.dumps(Team.__name__))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
