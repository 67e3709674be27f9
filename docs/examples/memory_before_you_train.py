# %% [markdown]
# # Memory before you train
#
# What will a step of each method hold, and would it fit on a card that is not here? The step itself runs on torch's
# meta device, where tensors have shapes and no numbers, so this needs neither a GPU nor data nor weights. Only at the
# end a small model is trained in earnest, to see whether the prediction holds.

# %%
import torch

from snell_dist.config import check
from snell_dist.memory import plan
from snell_dist.memory.gpus import GIB, find
from snell_dist.memory.overhead import Overhead
from snell_dist.memory.predict import Predictor
from snell_dist.memory.profile import profile
from snell_dist.remat import Remat
from snell_dist.run_config import Run


def configuration(backbone: dict, method: dict, batch_size: int = 8) -> Run:
    """The same keys as in a YAML file."""
    data = {"name": "image_folder", "root": "photos", "batch_size": batch_size}
    return check({"backbone": backbone, "method": method, "data": data, "train": {"steps": 1}}, Run)


# %% [markdown]
# ## Methods compared
#
# A ViT-B/16 at batch 8 in float32: with everything kept for backward, and with blocks recomputed.

# %%
METHODS = {
    "SNELL-8": {"name": "snell", "rank": 8},
    "LoRA-8": {"name": "lora", "rank": 8},
    "full sparse": {"name": "sparse"},
    "full": {"name": "full"},
}
peaks = {}
for label, method in METHODS.items():
    predictor = Predictor(configuration({"name": "vit", "size": "base"}, method))
    for policy in ("none", "block"):
        predicted = predictor.predict(8, policy=Remat(policy=policy))
        peaks[label, policy] = predicted.footprint.peak_bytes
    print(
        f"{label:12} {predicted.trainable_numbers:>11,} train"
        f"  {peaks[label, 'none'] / GIB:.2f} GiB, recomputed {peaks[label, 'block'] / GIB:.2f} GiB"
    )

# %% [markdown]
# An adapter saves gradients and optimizer state, not activations: recomputation saves more than the choice between
# adapters, and an adapter with it more than either.

# %% [markdown]
# ## Would it fit?
#
# A ViT-L/16 at batch 128 on one card with 24 GiB: not as it is. What to change, then?

# %%
machine = plan.Machine(gpus=1, nodes=1, gpu=find("rtx4090", None))
wish = configuration({"name": "vit", "size": "large"}, METHODS["SNELL-8"], batch_size=128)
made = plan.make("mine", wish, machine, Overhead())
print(f"{machine}: as it is {made.own.bytes / GIB:.1f} GiB, {'fits' if made.fits(made.own) else 'does not fit'}")
print(f"chosen: {made.choice.words}, {made.choice.bytes / GIB:.1f} GiB")
print("to change:", plan.delta(made))

# %% [markdown]
# ## Does the prediction hold?
#
# A small model, trained for one step here; what the allocator counts stands beside what was said before.

# %%
small = {"name": "vit", "size": "tiny", "image_size": 32, "patch_size": 8, "width": 96, "depth": 4, "heads": 4}
found = profile(configuration(small, METHODS["SNELL-8"]), torch.device("cpu"))
said, measured = found.predicted.footprint.peak_bytes, found.measured.peak_bytes
print(f"predicted {said:,} bytes, measured {measured:,}: off by {abs(said / measured - 1):.3%}")
