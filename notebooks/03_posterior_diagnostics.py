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
# # How far can the posterior be trusted?
#
# Every decision of this package rests on a fitted guide $q$, which is not the posterior. Four diagnostics ask how far
# it can be trusted, and each sees something the others do not:
#
# | diagnostic | question | says no when |
# |---|---|---|
# | k-hat of the whole fit | do the weights $p(\theta \mid y)/q(\theta)$ behave where $q$ has draws? | above about 0.6 |
# | k-hat of each row | can leave-one-out be computed from these draws? | the same |
# | k-hat of each group | would draws have found the price of its removal? | the same; a closed form needs none |
# | R-hat and ESS across seeds | do fits from other starts end in the same place? | R-hat above 1.05, small ESS |
#
# Three cases: one where all say yes, one where the k-hat of the fit stands at its limit and only R-hat names the input,
# one where the k-hat of the fit says no.

# %%
import os
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads would wait more than they work

with warnings.catch_warnings():  # ArviZ announces its next version
    warnings.simplefilter("ignore")
    import arviz as az

import matplotlib.pyplot as plt
import torch
from torch import nn

import pyrobc as bc

SMOKE = "SMOKE_TEST" in os.environ
SEEDS = range(2 if SMOKE else 4)
EPOCHS, DRAWS = (10, 50) if SMOKE else (150, 400)
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})

# %% [markdown]
# ## 1. All is well: a linear model with independent inputs
#
# Ten inputs, of which three matter. Every input has a gate with a log-uniform prior. Four fits from four seeds are four
# *chains* of the evidence.

# %%
generator = torch.Generator().manual_seed(1)
x = torch.randn(400, 10, generator=generator)
signal = x[:, :3] @ torch.tensor([1.0, -0.7, 0.4])
y = (signal + 0.5 * torch.randn(400, generator=generator))[:, None]


def fit(net, family, inputs, seed):
    """One fit with the learning rate annealed to zero."""
    model = bc.lift(net, family, bc.Normal(), example_inputs=inputs[:1])
    return bc.fit(
        model, (inputs, y), epochs=EPOCHS, lr=0.02, batch_size=100, seed=seed, progress=False,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
    )  # fmt: skip


def fit_linear(inputs, seed):
    """Gates on the inputs of a linear model that starts somewhere else for every seed."""
    torch.manual_seed(seed)
    return fit(nn.Linear(10, 1), bc.families.LogUniform(gate_lr=3.0), inputs, seed)


def show(evidence):
    """What the four diagnostics say, in four lines."""
    bmr = evidence.tree["bmr"]
    print(f"k-hat of the whole fit: {evidence.posterior_khat:.2f}, limit {evidence.good_k:.2f} -> {evidence.method}")
    print(f"rows with a high k-hat, full network: {evidence.candidates[0].khat_bad:.0%}")
    khat = bmr["khat"].to_numpy()
    print(f"groups whose change of prior has a high k-hat: {(khat > 0.7).sum()} of {len(khat)}")
    if "rhat" in bmr:
        worst = bmr["rhat"].to_numpy().argmax()
        name, rhat, ess = (bmr[key].to_numpy()[worst] for key in ("group", "rhat", "ess"))
        print(f"worst R-hat: {rhat:.3f} for {name}, with {ess:.0f} effective draws")


fits = [fit_linear(x, seed) for seed in SEEDS]
score = bc.score(fits[0])
evidence = bc.evidence(fits[0], score, (x, y), num_draws=DRAWS, num_candidates=3, others=fits[1:])
show(evidence)
if not SMOKE:
    assert evidence.posterior_khat < evidence.good_k

# %% [markdown]
# Nothing objects, so leave-one-out corrects for the difference between $q$ and the posterior, and the decision can be
# taken at its word: the three planted inputs stay.

# %%
plan = bc.decide(score, evidence)
print("kept:", plan.kept()["input"], f"| {plan.num_abstained} undecided")
print(plan.explain("input[0]"))
print(plan.explain("input[5]"))

# %% [markdown]
# ### The same in ArviZ
#
# `to_arviz()` is what the installed ArviZ takes, so all of its tables and plots work: here the gates of the inputs,
# each chain a fit of its own.

# %%
data = evidence.to_arviz()
az.summary(data, var_names=["multiplier"])

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    az.plot_forest(data, var_names=["multiplier"], combined=True)

# %% [markdown]
# `to_arviz("reduced")` is the network without the groups that the score alone would remove. `az.compare` puts both side
# by side. It takes draws as if they came from the posterior, which case 1 has just shown to be harmless.

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    comparison = az.compare({"all inputs": data, "without the pruned": evidence.to_arviz("reduced")})
comparison

# %% [markdown]
# ### What the k-hat of a group means
#
# Bayesian model reduction has a closed form here and needs no draws. Its k-hat tells what importance sampling would
# have made of the same price. For a needed group no draw of $q$ falls below the edge of its ROPE, so that draws know
# nothing of the reduced model (k-hat is infinite): the price is one of extrapolation, and so negative that its size is
# of no matter. Near the threshold, where size does matter, k-hat is low.

# %%
bmr = evidence.tree["bmr"].to_dataset().to_dataframe()
bmr[["delta_f", "log_odds", "khat", "rhat", "ess"]].round(3)

# %% [markdown]
# ## 2. R-hat says no: an input that is nearly a copy of another
#
# Input 9 becomes input 0 plus a little noise. The data can hardly tell which of the two does the work. Weights are
# points in this family, so that every fit settles on a split of its own, and is sure of it.

# %%
copied = x.clone()
copied[:, 9] = x[:, 0] + 0.15 * torch.randn(400, generator=generator)
fits = [fit_linear(copied, seed) for seed in SEEDS]
scores = [bc.score(one) for one in fits]
evidence = bc.evidence(fits[0], scores[0], (copied, y), num_draws=DRAWS, num_candidates=3, others=fits[1:])
show(evidence)
print("log odds that input 9 is negligible, fit by fit:", [f"{s.log_odds()['input'][9]:.0f}" for s in scores])

# %%
gates = torch.as_tensor(evidence.tree["posterior"]["multiplier"].to_numpy())
rhat = evidence.tree["bmr"]["rhat"].to_numpy()
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained")
for seed, one in enumerate(fits):
    weights = (gates[seed] * one.mean().parameters["weight"]).detach()
    left.scatter(weights[:, 0], weights[:, 9], s=3, alpha=0.4, label=f"fit {seed}")
left.set(xlabel="weight of input 0", ylabel="weight of input 9, its near copy", title="Every fit settles elsewhere")
left.legend(markerscale=3, frameon=False)
right.bar(range(10), rhat - 1, color=[ORANGE if value > 1.05 else BLUE for value in rhat])
right.set(xlabel="input", ylabel="R-hat - 1", yscale="log", xticks=range(10), title="R-hat sees it")
plt.show()

# %% [markdown]
# The k-hat of the fit barely objects: importance weights compare $q$ with the posterior *where $q$ has draws*, and a
# place that no draw visits has no weight. Only fits from other starts can find it, and say which input it is. What to
# do: do not take one fit's word on input 9. Keep it, drop one of the two copies by hand, or find rows in which the two
# differ.
#
# (R-hat across seeds needs groups that keep their meaning from fit to fit: inputs do. Hidden units have no order that
# two fits would share, and their R-hat says nothing.)

# %% [markdown]
# ## 3. The k-hat of the fit says no: a hidden layer with a mean-field guide
#
# Sixteen hidden units and a Normal posterior on each of 193 weights. The true posterior has symmetries and correlations
# that a product of Normals cannot follow.

# %%
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
posterior = fit(net, bc.families.GroupNormalJeffreys(), x, 0)
score = bc.score(posterior)
evidence = bc.evidence(posterior, score, (x, y), num_draws=min(DRAWS, 200), num_candidates=3)
show(evidence)
for note in bc.decide(score, evidence).notes:
    print("note:", note)

# %% [markdown]
# Correcting for $q$ would be worse than not correcting, so $q$ is taken as the posterior, and the plan says so. The
# numbers are then statements about the network that is deployed, which is drawn from $q$, and not about the posterior.
#
# A predictive check that needs no importance weights at all uses rows that the fit has not seen:

# %%
fresh = torch.randn(300, 10, generator=generator)
noise = 0.5 * torch.randn(300, generator=generator)
held_out = (fresh, (fresh[:, :3] @ torch.tensor([1.0, -0.7, 0.4]) + noise)[:, None])
checked = bc.evidence(
    posterior, score, held_out, is_training_data=False, num_draws=min(DRAWS, 200), num_candidates=3
)  # fmt: skip
table = checked.to_frame()[["num_removed", "parameters", "elpd", "se", "diff", "diff_se"]]
print(checked.method)
table.round(2)

# %%
plan = bc.decide(score, checked)
print(plan.widths, "|", plan.describe_rule())
for note in plan.notes:
    print("note:", note)

# %% [markdown]
# ## What to remember
#
# - A closed-form price needs no draws, but it is a price under $q$: ask the k-hat of the fit how far $q$ reaches.
# - k-hat cannot see what $q$ does not visit. Fit from several seeds, and ask R-hat.
# - Where leave-one-out is unreliable, keep rows back for decisions. Never the test rows.
# - Whatever was found is in the plan's notes, in `report.html`, and in `posterior.nc` (`bc.read_evidence("run/")`).
