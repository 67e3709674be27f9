# %% [markdown]
# # Many tasks on one base
#
# SNELL's delta is sparse, so what a task changes of its base is small. Here two tasks are tuned on one base; then one
# model stays in memory, and their deltas are swapped in and out of it in milliseconds. Each time the base's own bits
# come back.

# %%
import time

import timm
import torch
from sklearn.datasets import load_digits

import snell_dist
from snell_dist.cli import main


def snell(words: str) -> None:
    """A command, as it would be typed."""
    assert main(words.split()) == 0


# %% [markdown]
# ## A base, and two tasks
#
# The base learns the digits 0 to 4; the tasks are to tell 5, 6 and 7 apart, and all even digits.

# %%
snell("train demo/pretrain train.steps=100 train.eval_every=null --folder base")
tuned = "train demo backbone.weights=base/adapter.safetensors train.steps=60 train.eval_every=null"
snell(f"{tuned} data.classes=[5,6,7] --folder middle")
snell(f"{tuned} data.classes=[0,2,4,6,8] --folder even")

# %% [markdown]
# ## What each of them is
#
# `merge` makes the base a plain model of timm. `export --format delta` writes what a task changed: the values of the
# entries that are not zero, their positions, and the classifier.

# %%
snell("merge base --to plain")
snell("export middle --format delta --to middle_delta")
snell("export even --format delta --to even_delta")

# %% [markdown]
# ## One resident model

# %%
model = timm.create_model("local-dir:plain", pretrained=True).eval()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
resident = snell_dist.Resident(model)
for task in ("middle", "even"):
    resident.add(task, f"{task}_delta")

inks, labels = load_digits(return_X_y=True)
images = torch.tensor(inks, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
digits = {"middle": [5, 6, 7], "even": [0, 2, 4, 6, 8]}
accuracy = {}
for task in ("middle", "even", "middle"):
    begin = time.perf_counter()
    tuned = resident.use(task)
    took = time.perf_counter() - begin
    mine = [i for i, label in enumerate(labels) if label in digits[task]]
    with torch.no_grad():
        said = tuned(images[mine]).argmax(1)
    accuracy[task] = sum(digits[task][s] == labels[i] for s, i in zip(said, mine, strict=True)) / len(mine)
    print(f"{task}, swapped in {took * 1e3:.1f} ms: {', '.join(resident.classes)}: {accuracy[task]:.1%}")

# %% [markdown]
# ## The base is still the base

# %%
resident.use(None)
same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
print("the base has its own bits:", same)
