"""Contrastive tuning of an image and a text tower (CLIP; Radford et al., 2021), zero-shot accuracy as the result.

    z_ij = s <image_i, text_j>, unit features
    loss = mean of cross-entropy(z, i) over rows and over columns
    sigmoid form (SigLIP; Zhai et al., 2023), for models with a bias b: sum_ij log(1 + exp(-+(z_ij + b))) / N

A class name becomes a caption by one of the backbone's templates, drawn anew for each image. Every pair of the
whole batch counts, over micro-batches and ranks: features are made first without a graph, the loss gives their
gradients (each rank its own rows against all gathered features), and a second forward carries those back, one
micro-batch at a time. Memory: one micro-batch's activations, and features of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from snell_dist import dist
from snell_dist.anatomy import Backbone
from snell_dist.backbones import BackboneSection
from snell_dist.data import PADDING, Batch, DataSection, Images, Splits
from snell_dist.tasks import TaskSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.engines import Engine
    from snell_dist.evaluate import Measured

SCALE = "logit_scale"
LARGEST_SCALE = math.log(100)  # CLIP's bound on the logarithm of its scale


class Contrastive(TaskSection):
    name: Literal["contrastive"]

    def build(self, backbone: BackboneSection, classes: Sequence[str]) -> Backbone:
        return backbone.towers()

    def logits(self, backbone: Backbone, classes: Sequence[str]) -> Callable[[Tensor], Tensor]:
        model = backbone.model
        directions = class_directions(lambda tokens: model(None, tokens)[1], captions_of(backbone, classes))

        def logits(images: Tensor) -> Tensor:
            features, _, scale, *_ = model(images, None)
            return scale * features @ directions.to(features.device).t()

        return logits

    def prepare(self, backbone: Backbone, splits: Splits) -> Contrast:
        return Contrast(captions_of(backbone, splits.classes))


@dataclass(frozen=True)
class Contrast:
    """See `Task` for the contract. The model gives (image features, text features, scale[, bias]), lengths 1."""

    tokens: Tensor  # [classes, templates, L]: the captions of each class

    def step(self, engine: Engine, batches: Iterable[Batch]) -> Tensor:
        import torch

        pieces, outputs, states = list(batches), [], []
        captions = [self._captions(batch.labels) for batch in pieces]
        whole = len(pieces) == 1  # then one forward serves
        with torch.set_grad_enabled(whole):
            for batch, tokens in zip(pieces if not whole else engine.accumulate(pieces), captions, strict=True):
                states.append(dist.random_state(engine.device))
                outputs.append(engine.forward(batch.images.to(engine.device), tokens.to(engine.device)))
        labels = torch.cat([batch.labels for batch in pieces]).to(engine.device)
        loss, gradients = pairwise(outputs, labels != PADDING, pieces[0].total)
        for i, batch in enumerate(engine.accumulate(pieces) if not whole else pieces):
            if not whole:
                dist.set_random_state(states[i], engine.device)  # dropout as in the first forward
                outputs[i] = engine.forward(batch.images, captions[i].to(engine.device))
            shares = [(output * gradient).sum() for output, gradient in zip(outputs[i], gradients[i], strict=True)]
            engine.backward(torch.stack(shares).sum() * dist.world_size())  # engines average over ranks
        return loss

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, texts, *scalars = model(batch.images, self._captions(batch.labels).to(batch.images.device))
        return own_rows(images, texts, images, texts, scalars, batch.labels != PADDING, 0, len(batch.labels))

    def after_step(self, engine: Engine) -> None:
        for name, scale in engine.weights([SCALE]):
            engine.load_weights({name: scale.clamp(0, LARGEST_SCALE)})

    def evaluate(self, engine: Engine, images: Images, data: DataSection) -> Measured:
        from snell_dist.evaluate import evaluate

        training = engine.model.training
        engine.model.eval()
        directions = class_directions(lambda tokens: engine.forward(None, tokens.to(engine.device))[1], self.tokens)
        engine.model.train(training)

        def logits(batch: Batch) -> Tensor:
            features, _, scale, *_ = engine.forward(batch.images, None)
            return scale * features @ directions.t()

        return evaluate(engine, logits, images, len(self.tokens), data)

    def _captions(self, labels: Tensor) -> Tensor:
        """Tokens [B, L] of a caption for each label; padding gets any."""
        import torch

        drawn = torch.randint(self.tokens.shape[1], labels.shape)
        return self.tokens[labels.cpu().clamp(min=0), drawn]


def captions_of(backbone: Backbone, classes: Sequence[str]) -> Tensor:
    """Tokens [classes, templates, L] of the captions of each class."""
    said = [template.format(name) for name in classes for template in backbone.templates]
    return backbone.tokenized(said).unflatten(0, (len(classes), -1))


def class_directions(features: Callable[[Tensor], Tensor], captions: Tensor) -> Tensor:
    """[classes, D]: the mean of each class's caption features, at length 1.

    captions: [classes, T, L]; features: of an evaluating model, from tokens [T, L] to [T, D].
    """
    import torch
    from torch.nn.functional import normalize

    with torch.no_grad():
        means = [features(tokens).mean(0) for tokens in captions]
    return normalize(torch.stack(means), dim=-1)


def pairwise(outputs: Sequence[Sequence[Tensor]], real: Tensor, total: int) -> tuple[Tensor, list[list[Tensor]]]:
    """The loss over all pairs of all ranks: this rank's share of it, and its gradient by every output.

    outputs: of each micro-batch (images [B, D], texts [B, D], scale[, bias]); real [all B]: False for padding.
    Gradients are those of the sum of all ranks' shares; the scalars' are in the last micro-batch.
    """
    import torch

    images, texts = (torch.cat([output[i].detach() for output in outputs]) for i in (0, 1))
    scalars = [scalar.detach().requires_grad_() for scalar in outputs[-1][2:]]
    all_images, all_texts = (dist.gather_rows(t).requires_grad_() for t in (images, texts))
    own = [images.requires_grad_(), texts.requires_grad_()]
    mine = slice(dist.rank() * len(images), (dist.rank() + 1) * len(images))
    loss = own_rows(images, texts, all_images, all_texts, scalars, dist.gather_rows(real), mine.start, total)
    wanted = [*own, all_images, all_texts, *scalars]
    gradients = torch.autograd.grad(
        loss, wanted, materialize_grads=True
    )  # the sigmoid form looks at images' rows alone
    # A feature counts in its own rank's rows, and as a column in everyone's.
    columns = [dist.sum_over_ranks(gradient.contiguous())[mine] for gradient in gradients[2:4]]
    sizes = [len(output[0]) for output in outputs]
    by_images, by_texts = ((row + column).split(sizes) for row, column in zip(gradients[:2], columns, strict=True))
    zeros = [torch.zeros_like(scalar) for scalar in scalars]
    last = len(outputs) - 1
    return loss.detach(), [
        [by_images[i], by_texts[i], *(gradients[4:] if i == last else zeros)] for i in range(len(outputs))
    ]


def own_rows(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, scalars: Sequence[Tensor], real: Tensor,
    start: int, total: int,
) -> Tensor:  # fmt: skip
    """The loss of this rank's rows against everyone's: images [B, D], all_images [N, D], real [N]; / total."""
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    scale, *bias = scalars
    places = torch.arange(start, start + len(images), device=images.device)
    mine = real[places]
    if bias:
        z = scale * images @ all_texts.t() + bias[0]
        signs = torch.full_like(z, -1).scatter_(1, places.unsqueeze(1), 1)
        return -(logsigmoid(signs * z) * (mine.unsqueeze(1) & real)).sum() / total
    labels = torch.where(mine, places, PADDING)
    loss = images.new_zeros(())
    for one, other in ((images, all_texts), (texts, all_images)):
        z = (scale * one @ other.t()).masked_fill(~real, -torch.inf)
        loss = loss + cross_entropy(z, labels, ignore_index=PADDING, reduction="sum")
    return loss / (2 * total)
