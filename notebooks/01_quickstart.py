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
# # Quickstart: from a network to a smaller network
#
# A network becomes a Pyro model with a sparsity prior; SVI fits it; Bayesian model reduction prices the removal of
# every group of weights (an input pixel, a hidden unit) through a change of prior; what the posterior can do without is
# cut out. The data are scikit-learn's 1,797 handwritten digits, so everything here runs offline in about a minute.

# %%
import os
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads would wait more than they work

import matplotlib.pyplot as plt
import numpy as np
import pyro.poutine as poutine
import torch

import pyrobc as bc
from pyrobc.demo import DEMO_SETTINGS, build_network, load_digits

IS_SMOKE_TEST = "SMOKE_TEST" in os.environ
digits = load_digits()
x, y = digits.train
settings = DEMO_SETTINGS["log_uniform"]
epochs = 3 if IS_SMOKE_TEST else settings["epochs"]

# %% [markdown]
# ## 1. Lift: the network as an ordinary Pyro model
#
# `lift` copies the network, finds the groups that live or die together (with Torch-Pruning's dependency graph, then
# checked by cutting), and gives every site a prior. Nothing about the result is special to this package.

# %%
net = build_network(seed=0)
model = bc.lift(net, bc.families.LogUniform(**settings["family_args"]), bc.Categorical(), example_inputs=x[:1])
trace = poutine.trace(model).get_trace(x[:5], y[:5])
trace.compute_log_prob()
print({name: tuple(site["value"].shape) for name, site in trace.nodes.items() if site["type"] == "sample"})
print({block.name: block.size for block in model.spec.blocks}, dict(model.spec.left_alone))

# %% [markdown]
# ## 2. Fit: stochastic variational inference
#
# The loss is the negative ELBO in nats, summed over the data. `groups` is how many groups the posterior expects to
# matter.


# %%
def anneal(epochs):
    """Cosine annealing of the learning rate to zero, for a cleaner end."""
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


options = {"lr": settings["lr"], "batch_size": settings["batch_size"], "seed": 0, "progress": False}
posterior = bc.fit(model, (x, y), epochs=epochs, schedule=anneal(epochs), **options)
figure, axis = plt.subplots(figsize=(5, 2.5))
axis.plot([numbers["groups"] for numbers in posterior.history])
axis.set(xlabel="epoch", ylabel="groups expected to stay", yscale="log")
figure.tight_layout()

# %% [markdown]
# ## 3. Score: what is the evidence for removing each group?
#
# $\Delta F$ is a log Bayes factor: it is about 0 for a group the data say nothing about, and very negative for a group
# that is needed. Decisions use the posterior log odds that the group is negligible.

# %%
score = bc.score(posterior)
table = score.to_frame()
print(table.describe().loc[["min", "50%", "max"], ["delta_f", "log_odds", "mean_scale"]])

figure, axis = plt.subplots(figsize=(3.2, 3))
image = axis.imshow(score.log_odds()["input"].reshape(8, 8), cmap="coolwarm", vmin=-20, vmax=20)
axis.set(title="log odds: pixel is negligible", xticks=[], yticks=[])
figure.colorbar(image)
figure.tight_layout()

# %% [markdown]
# ## 4. Evidence and decision
#
# Nested reduced networks are compared with the full one by leave-one-out on held-in rows. The plan says for every group
# whether it is kept, pruned or left undecided, and why.

# %%
evidence = bc.evidence(posterior, score, (x, y), num_draws=30 if IS_SMOKE_TEST else 200)
plan = bc.decide(score, evidence)
print(evidence.to_frame().round(3).to_string())
print(plan.widths, f"{plan.compression_ratio:.1f}x fewer parameters")
print(plan.explain("input[0]"))
for note in plan.notes:
    print("note:", note)

# %% [markdown]
# ## 5. Cut, re-adapt, compare
#
# `apply` returns a plain `torch.nn.Module` and refuses to do so unless it computes what the masked network computes.
# `restricted` is the posterior of the smaller network; a few more epochs let it re-adapt.

# %%
small = bc.apply(plan, posterior)
restricted = posterior.restricted({name: np.asarray(kept) for name, kept in plan.kept().items()})
few = max(epochs // 4, 1)
adapted = bc.fit(restricted.model, (x, y), epochs=few, guide=restricted.guide, schedule=anneal(few), **options)
compact = adapted.to_module()
rows = bc.compare({"uncut": posterior.to_module(), "cut": small, "re-adapted": compact}, digits.test, "categorical")
for row in rows:
    print(f"{row['name']:>10}: error {100 * row['error']:.1f}%, {row['parameters']} parameters, {row['macs']} MACs")
print(compact)

# %% [markdown]
# `bc.compress(net, (x, y), test=digits.test)` is all of the above in one call, and
# `bc.save(compact, plan, "run/")` writes the files.
