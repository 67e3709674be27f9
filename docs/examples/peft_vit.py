# %% [markdown]
# # SNELL in Hugging Face PEFT
#
# A Vision Transformer of transformers, adapted through PEFT and trained by transformers' `Trainer`; then saved, loaded
# again and merged, as with any other method of PEFT. The images are scikit-learn's handwritten digits, and the base is
# trained first, on the digits 0 to 4, so that nothing is downloaded. Ten seconds on a CPU.

# %%
import copy
import tempfile

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from snell_dist.peft import SnellConfig

torch.manual_seed(0)
folder = tempfile.mkdtemp()


class Digits(Dataset):
    """Some digits, as `Trainer` wants them; every third image of each is for testing."""

    def __init__(self, digits: list[int], test: bool) -> None:
        inks, labels = load_digits(return_X_y=True)
        chosen = [i for i, label in enumerate(labels) if label in digits and (i % 3 == 0) == test]
        self.pixels = torch.tensor(inks[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        self.labels = [digits.index(labels[i]) for i in chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def train(model: torch.nn.Module, digits: list[int], steps: int, lr: float) -> float:
    """Accuracy on the test images after so many steps."""
    settings = TrainingArguments(
        folder, max_steps=steps, learning_rate=lr, per_device_train_batch_size=64, per_device_eval_batch_size=512,
        warmup_steps=10, lr_scheduler_type="cosine", save_strategy="no", report_to="none", disable_tqdm=True,
        logging_strategy="no", use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model,
        settings,
        train_dataset=Digits(digits, test=False),
        eval_dataset=Digits(digits, test=True),
        compute_metrics=lambda said: {"accuracy": (said.predictions.argmax(-1) == said.label_ids).mean()},
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


# %% [markdown]
# ## A base
#
# In earnest: `ViTForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=5)`.

# %%
config = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=256, num_labels=5,
)  # fmt: skip
model = ViTForImageClassification(config)
print(f"base, on 0 to 4: {train(model, [0, 1, 2, 3, 4], steps=100, lr=3e-3):.1%}")
base = copy.deepcopy(model)

# %% [markdown]
# ## Adapt it
#
# Every linear layer but the classifier gets SNELL's factors; the classifier is trained whole, since it is new.

# %%
model = get_peft_model(model, SnellConfig(rank=8, sparsity=0.9, modules_to_save=["classifier"]))
model.print_trainable_parameters()
accuracy = train(model, [5, 6, 7, 8, 9], steps=100, lr=5e-2)
print(f"adapted, on 5 to 9: {accuracy:.1%}")

# %% [markdown]
# ## Save it, load it
#
# PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`. A process that loads them imports
# `snell_dist.peft` first, so that PEFT knows the method.

# %%
model.save_pretrained(f"{folder}/adapter")
loaded = PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/adapter")
pixels = Digits([5, 6, 7, 8, 9], test=True).pixels
with torch.no_grad():
    logits = model.eval()(pixels).logits
    print("loaded, logits differ by", (loaded.eval()(pixels).logits - logits).abs().max().item())

# %% [markdown]
# ## Without it, and merged
#
# The base is still there; `merge_and_unload` makes a plain model of transformers, as fast as the base.

# %%
with torch.no_grad(), loaded.disable_adapter():
    same = torch.equal(loaded(pixels).logits, base.eval()(pixels).logits)
print("without the adapter it is the base:", same)
merged = loaded.merge_and_unload()
with torch.no_grad():
    error = (merged(pixels).logits - logits).norm() / logits.norm()
print(f"merged: {type(merged).__name__}, logits differ by {error:.1e}, relative")
