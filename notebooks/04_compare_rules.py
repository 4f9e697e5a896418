# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# %% [markdown]
# # One posterior, many rules
#
# A rule turns scores and evidence into keep, prune or abstain, group by group. Here all rules of `bc.rules` decide on
# *one* fitted posterior of a network whose truth is known: three hidden units and six of twenty inputs made the data.
# What does each keep, where do they differ, and how much hangs on a rule's own setting?

# %%
import os
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads would wait more than they work

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import nn

import pyrobc as bc
from pyrobc.rules import BeyondCut, Budget, FalsePruneRate, HighestDensity, PosteriorOdds, Predictive

SMOKE = "SMOKE_TEST" in os.environ
EPOCHS, DRAWS = (10, 50) if SMOKE else (300, 200)
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})

# %% [markdown]
# ## The truth and the fit
#
# A 6-3-1 tanh network makes the targets; the student is 20-16-1. Fourteen of its inputs are pure noise.

# %%
generator = torch.Generator().manual_seed(0)
teacher = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).requires_grad_(False)
for parameter in teacher.parameters():
    parameter.copy_(1.2 * torch.randn(parameter.shape, generator=generator))


def make_rows(count):
    """Inputs, of which the first six matter, and noisy targets."""
    x = torch.randn(count, 20, generator=generator)
    return x, teacher(x[:, :6]) + 0.3 * torch.randn(count, 1, generator=generator)


train, test = make_rows(400), make_rows(1000)


def fit(family):
    """The student, fitted with its learning rate annealed to zero; then its scores and its evidence."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1))
    model = bc.lift(net, family, bc.Normal(), example_inputs=train[0][:1])
    posterior = bc.fit(
        model, train, epochs=EPOCHS, lr=0.02, batch_size=100, seed=0, progress=False,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
    )  # fmt: skip
    score = bc.score(posterior)
    return posterior, score, bc.evidence(posterior, score, train, num_draws=DRAWS, num_candidates=4 if SMOKE else 6)


posterior, score, evidence = fit(bc.families.LogUniform(gate_lr=10.0))
score.to_frame().sort_values("log_odds")[["delta_f", "log_odds", "mean_scale"]].iloc[::4].round(3)

# %% [markdown]
# ## All rules on it
#
# `lost` counts planted inputs that a rule pruned, `spare` noise inputs that it left in. Test rows are read for this
# table alone; no rule has seen them. The network is not re-adapted after the cut.

# %%
magnitude = bc.score(posterior, "magnitude")
RULES = {
    "posterior odds (default)": PosteriorOdds(),
    "odds, learned prior odds": PosteriorOdds(prior_odds="learned"),
    "false-prune rate 10%": FalsePruneRate(0.10),
    "false-prune rate 5%": FalsePruneRate(0.05),
    "false-prune rate 1%": FalsePruneRate(0.01),
    "HDI 95% against the ROPE": HighestDensity(0.95),
    "HDI 50% against the ROPE": HighestDensity(0.50),
    "predictive, 2 SE": Predictive(2.0),
    "predictive, 0 SE": Predictive(0.0),
    "odds & HDI 95%": PosteriorOdds() & HighestDensity(0.95),
    "odds | at most 25 parameters": PosteriorOdds() | Budget(parameters=25),
    "magnitude beyond its gap": BeyondCut().on(magnitude),
}


def describe(rule, posterior, score, evidence):
    """What one rule keeps, and what that costs."""
    plan = bc.decide(score, evidence, rule)
    inputs, hidden = plan.kept().values()
    with torch.no_grad():
        error = (bc.apply(plan, posterior)(test[0]) - test[1]).square().mean().sqrt()
    return {
        "inputs": len(inputs), "lost": 6 - len({*range(6)} & {*inputs}), "spare": len({*range(6, 20)} & {*inputs}),
        "hidden": len(hidden), "undecided": plan.num_abstained, "parameters": plan.parameters[1],
        "test RMSE": float(error),
    }  # fmt: skip


table = pd.DataFrame({name: describe(rule, posterior, score, evidence) for name, rule in RULES.items()}).T
table = table.astype({name: int for name in table.columns if name != "test RMSE"}).round(3)
print(table.to_string())

# %% [markdown]
# Reading it:
#
# - **Posterior odds** take the more probable side of every group. Nothing is undecided, as this score has no Monte
#   Carlo error.
# - **The false-prune rate** bounds the *average* probability of being needed over what is pruned. Where no group is
#   surer than the level, nothing leaves at all: the rule would rather do nothing than break its promise.
# - **HDI against the ROPE** wants a margin on either side, so it leaves more undecided, and undecided groups stay.
# - **Predictive** looks at whole networks on the nested path and says nothing of what lies beyond the one it chose.
# - **Learned prior odds** ask how many groups of a layer are needed before they ask which. Here the evidence for
#   removal is a fraction of a nat a group, so that the groups that are needed for sure speak for the rest: all stay.
#
# Whoever asks a plan gets the answer with its reason:

# %%
for name in ("odds & HDI 95%", "false-prune rate 1%"):
    print(bc.decide(score, evidence, RULES[name]).explain("input[10]"), end="\n\n")

# %% [markdown]
# ## How much hangs on a setting?
#
# Each curve moves one number of one rule. Flat is good: the choice does not depend on it.


# %%
def count_kept(rule, scored=score):
    """Groups that stay."""
    return sum(len(groups) for groups in bc.decide(scored, evidence, rule).kept().values())


levels, widths = np.geomspace(0.005, 0.4, 12 if SMOKE else 40), np.linspace(0.05, 0.99, 8 if SMOKE else 30)
priors = np.linspace(0.05, 0.95, 8 if SMOKE else 31)
epsilons = np.geomspace(1e-4, 0.3, 6 if SMOKE else 25)
kept = {
    "prior probability of being negligible": (priors, [count_kept(PosteriorOdds(float(p))) for p in priors]),
    "level of the false-prune rate": (levels, [count_kept(FalsePruneRate(float(a))) for a in levels]),
    "mass of the HDI": (widths, [count_kept(HighestDensity(float(p))) for p in widths]),
    "epsilon of the ROPE (posterior odds)": (
        epsilons, [count_kept(PosteriorOdds(), bc.score(posterior, epsilon=float(e))) for e in epsilons],
    ),
}  # fmt: skip
figure, axes = plt.subplots(2, 2, figsize=(8.5, 4.6), sharey=True, layout="constrained")
for axis, (name, (values, counts)) in zip(axes.flat, kept.items(), strict=True):
    axis.axhspan(9, 10, color=GREY, alpha=0.2, lw=0)
    axis.plot(values, counts, color=BLUE, lw=1.6, drawstyle="steps-mid" if "level" in name else "default")
    axis.set(xlabel=name, ylim=(0, 38), xscale="log" if values.min() < 0.01 else "linear")
for axis in axes[:, 0]:
    axis.set_ylabel("groups that stay, of 36")
figure.suptitle("Grey: 6 inputs and the 3 units of the teacher, or one more", fontsize=9)
plt.show()

# %% [markdown]
# ## `&` and `|`
#
# With keep < abstain < prune, `&` takes the lower and `|` the higher of two outcomes. So `&` prunes what *both* would,
# and `|` what *either* would:

# %%
first, second = HighestDensity(0.95), FalsePruneRate(0.05)
outcomes = {
    text: [outcome for block in bc.decide(score, evidence, rule).blocks for outcome in block.outcomes]
    for text, rule in {"HDI": first, "FPR": second, "HDI & FPR": first & second, "HDI | FPR": first | second}.items()
}
pd.DataFrame(outcomes).value_counts().rename("groups").reset_index()

# %% [markdown]
# In a run file the same is written as `rule: {all: [highest_density, {false_prune_rate: {level: 0.05}}]}`.
#
# ## A budget is not a decision
#
# A budget removes the least needed groups until it is met, whatever their odds. Its curve shows what each size costs:
# flat down to what is needed, then a cliff. Rules should stop at its edge.

# %%
sizes = [300, 200, 120, 80, 60, 45, 33, 27, 22, 17, 13, 9]
budgets = [describe(Budget(parameters=size), posterior, score, evidence) for size in (sizes[::3] if SMOKE else sizes)]
figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
axis.plot(
    [row["parameters"] for row in budgets],
    [row["test RMSE"] for row in budgets],
    "-o",
    ms=3,
    color=GREY,
    label="budgets",
)
for number, (name, row) in enumerate(table.iterrows()):
    axis.plot(
        row["parameters"], row["test RMSE"], "o", mfc="none", ms=7 + 0.7 * number, color=f"C{number % 10}", label=name
    )
axis.axhline(0.3, color="black", lw=0.6, ls=":")
axis.set(xscale="log", xlabel="parameters", ylabel="test RMSE (dotted: the noise)")
axis.legend(fontsize=7, ncols=1, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
plt.show()

# %% [markdown]
# ## When rules agree
#
# Rules differ where posteriors are undecided. Fitted with a prior on scales whose posterior is bimodal, the same
# student leaves nothing to argue about:

# %%
posterior, score, evidence = fit(bc.families.GroupNormalJeffreys(scale_lr=3.0))
own = {name: rule for name, rule in RULES.items() if "magnitude" not in name}
agreed = pd.DataFrame({name: describe(rule, posterior, score, evidence) for name, rule in own.items()}).T
agreed = agreed.astype({name: int for name in agreed.columns if name != "test RMSE"}).round(3)
print(agreed.to_string())
odds = score.to_frame()["log_odds"]
print(f"log odds between -5 and 5 nats: {odds.between(-5, 5).sum()} of {len(odds)} groups")

# %% [markdown]
# If the choice of the rule matters, the fit is not finished, or the data do not tell. Change the family, the schedule
# or the data before you shop for a rule; and if a promise is needed, take the rule that makes it: `FalsePruneRate` for
# the groups, `Predictive` for the network, `Budget` for the device.
