"""Meta Networks (Munkhdalai and Yu, 2017): a network that is told its weights by its gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mann_ext.fast_weights import (
    CoordinateLSTM,
    CoordinateMLP,
    FastConv2d,
    FastLinear,
    FastSequential,
    MetaLearner,
    example_gradients,
)
from mann_ext.memory import _inputs
from mann_ext.ops.content import content_read

__all__ = ["MetaNet", "conv_net"]

Variant = Literal["metanet", "minus", "plus"]
VARIANTS = ("metanet", "minus", "plus")


def conv_net(
    ways: int,
    filters: int = 64,
    image_size: int = 28,
    channels: int = 1,
    width: int = 64,
    blocks: int = 5,
    **factory: Any,
) -> FastSequential:
    """The paper's CNN without biases: blocks of 3 x 3 convolution, ReLU and 2 x 2 max-pooling (odd
    sizes rounded up), a hidden layer of ``width`` units and the output layer."""
    layers: list[nn.Module] = []
    side = image_size
    for _ in range(blocks):
        layers += [
            FastConv2d(channels, filters, 3, padding=1, bias=False, **factory),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        channels, side = filters, -(-side // 2)
    layers += [
        nn.Flatten(),
        FastLinear(channels * side**2, width, bias=False, **factory),
        FastLinear(width, ways, bias=False, activation=None, **factory),
    ]
    return FastSequential(*layers)


class MetaNet(nn.Module):
    """Learns a task of classes never seen before from a few labelled examples of each::

        g_i  = gradient of the loss of the embedding u on support example i, by its slow weights Q
        Q*   = d(g_1, ..., g_T)                                       task-level fast weights
        W*_i = m(gradient of the loss of the base learner b on support example i, by W)
        r'_i = u(Q, Q*, x'_i)                  the memory: keys r'_i, values W*_i
        a    = softmax_i(beta cosine(u(Q, Q*, x), r'_i))  W* = sum_i a_i W*_i
        p(y | x) = softmax b(W, W*, x)

    where a layer with fast weights computes relu(W x) + relu(W* x), and the last one W x + W* x;
    keys and what is compared with them are W x + W* x of the hidden layer of u, too.

    Variants: "minus" has no Q*; "plus" also gives b task-level fast weights, made by d from the
    gradients by W.

    d reads the gradients in the order of falling loss. So, ties apart, permuting the support
    examples changes nothing; and permuting labels permutes the outputs, if the rows of the slow
    weights of both output layers are permuted with them (those are the same for all tasks).

    Args:
        ways: classes a task.
        variant: "metanet", "minus" or "plus".
        filters: of each convolution.
        image_size: height and width of the images.
        channels: of the images.
        width: of the hidden linear layer, and of the keys.
        blocks: convolutions, each halving the image.
        meta_size: hidden units of m and d.
        task_examples: T, how many support examples (those of the largest loss) d sees; None: all.
        read_strength: beta, the same for all queries. The paper has 1, with which the weight of the
            best of 5 examples is at most 0.65 and one step learns from a blur of them.
        second_order: True: training differentiates through the gradients too; False: they are
            inputs like others, as in the authors' code.
        device, dtype: of the parameters.

    Example:
        >>> model = MetaNet(ways=3, filters=4, image_size=8, width=8, blocks=3)
        >>> support, queries = torch.rand(3, 1, 8, 8), torch.rand(7, 1, 8, 8)
        >>> model(support, torch.arange(3), queries).shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        ways: int = 5,
        variant: Variant = "metanet",
        filters: int = 64,
        image_size: int = 28,
        second_order: bool = False,
        *,
        channels: int = 1,
        width: int = 64,
        blocks: int = 5,
        meta_size: int = 20,
        task_examples: int | None = None,
        read_strength: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _inputs.check_sizes(
            "MetaNet", ways=ways, filters=filters, image_size=image_size, channels=channels,
            width=width, blocks=blocks, meta_size=meta_size,
            task_examples=1 if task_examples is None else task_examples,
        )  # fmt: skip
        if variant not in VARIANTS:
            raise ValueError(f"MetaNet: expected variant one of {VARIANTS}, got {variant!r}")
        if not read_strength > 0:
            raise ValueError(f"MetaNet: expected read_strength > 0, got {read_strength}")
        self.ways, self.variant, self.second_order = ways, variant, second_order
        self.read_strength = read_strength
        self.filters, self.image_size, self.channels = filters, image_size, channels
        self.width, self.blocks, self.meta_size = width, blocks, meta_size
        self.task_examples = task_examples
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (ways, filters, image_size, channels, width, blocks)
        self.base = conv_net(*sizes, **factory)
        self.embedding = conv_net(*sizes, **factory)
        self.example_learner = MetaLearner(lambda: CoordinateMLP(meta_size, **factory))
        self.task_learner: MetaLearner | None = None
        if variant != "minus":
            self.task_learner = MetaLearner(lambda: CoordinateLSTM(meta_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New random slow and meta weights."""
        self.example_learner.reset_parameters()
        if self.task_learner is not None:
            self.task_learner.reset_parameters()
        self.reset_slow_weights()

    def reset_slow_weights(self) -> None:
        """New random slow weights of b and u; the meta learners stay (continual learning)."""
        for net in (self.base, self.embedding):
            _initialise(net)

    def meta_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of m and d, which are of no size of b or u."""
        yield from self.example_learner.parameters()
        if self.task_learner is not None:
            yield from self.task_learner.parameters()

    def slow_parameters(self) -> Iterator[nn.Parameter]:
        """Slow weights of b and u."""
        yield from self.base.parameters()
        yield from self.embedding.parameters()

    def with_ways(self, ways: int) -> MetaNet:
        """A copy for tasks of another number of classes.

        Labels are given to classes at random, so the slow output weights of one class are as good
        as another's: for another number of classes all of them are their mean.
        """
        _inputs.check_sizes("MetaNet", ways=ways)
        model = copy.deepcopy(self)
        model.ways = ways
        for net in (model.base, model.embedding):
            layer = net[-1]
            assert isinstance(layer, FastLinear)
            if ways == layer.out_features:
                continue
            mean = layer.weight.detach().mean(0).repeat(ways, 1)
            layer.weight = nn.Parameter(mean, requires_grad=layer.weight.requires_grad)
            layer.out_features = ways
        return model

    def with_base(self, filters: int | None = None) -> MetaNet:
        """A copy whose base learner is new: random slow weights, not trained (``requires_grad`` is
        False), and ``filters`` of its own. m is coordinate-wise and so serves it as it is."""
        filters = self.filters if filters is None else filters
        _inputs.check_sizes("MetaNet", filters=filters)
        model = copy.deepcopy(self)
        model.filters = filters
        weight = next(self.base.parameters())
        model.base = conv_net(
            self.ways, filters, self.image_size, self.channels, self.width, self.blocks,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        _initialise(model.base)
        model.base.requires_grad_(False)
        return model

    def extra_repr(self) -> str:
        return (
            f"ways={self.ways}, variant={self.variant!r}, "
            f"read_strength={self.read_strength:g}, second_order={self.second_order}"
        )

    def forward(self, support: Tensor, support_labels: Tensor, queries: Tensor) -> Tensor:
        """Classify queries after one look at the support examples.

        Args:
            support: (S, C, H, W).
            support_labels: (S,) int64, 0 to ways - 1.
            queries: (Q, C, H, W).

        Returns:
            logits (Q, ways).

        Raises:
            ValueError, TypeError: an input does not fit; the message says how.
        """
        self._check(support, support_labels, queries)
        gradients, losses = self._gradients(self.base, support, support_labels)
        example_weights = self.example_learner(gradients)
        task_weights, base_task_weights = [], []
        if self.task_learner is not None:
            if self.variant == "plus":
                base_task_weights.append(self._task_weights(gradients, losses))
            gradients, losses = self._gradients(self.embedding, support, support_labels)
            # The output layer serves the gradients alone.
            gradients.popitem()
            task_weights.append(self._task_weights(gradients, losses))
        shots = support.shape[0]
        represented = self._represent(torch.cat([support, queries]), *task_weights)
        keys, asked = represented[:shots], represented[shots:]
        strengths = asked.new_full(asked.shape[:1], self.read_strength)
        read_weights = content_read(asked, keys, strengths=strengths).weights
        fast = {
            name: (read_weights @ weight.flatten(1)).view(-1, *weight.shape[1:])
            for name, weight in example_weights.items()
        }
        return self.base(queries, fast, *base_task_weights)

    def _represent(self, x: Tensor, *task_weights: dict[str, Tensor]) -> Tensor:
        """Keys, and what is compared with them: the hidden layer of u, (images, width).

        Before its ReLU, as in the authors' code: without signs all cosines are near one another,
        and learning as much takes a quarter more tasks.
        """
        body, hidden = cast(FastSequential, self.embedding[:-2]), self.embedding[-2]
        assert isinstance(hidden, FastLinear)
        name = f"{len(body)}.weight"
        others = [{k: w for k, w in weights.items() if k != name} for weights in task_weights]
        slow, *fast = hidden.parts(body(x, *others), *(weights[name] for weights in task_weights))
        return sum(fast, slow)

    def loss(
        self, support: Tensor, support_labels: Tensor, queries: Tensor, query_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of meta-training, cross entropy over the queries, and the logits (Q, ways)."""
        logits = self(support, support_labels, queries)
        return F.cross_entropy(logits, query_labels), logits

    def _gradients(
        self, net: FastSequential, support: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Of the cross entropy of each support example by the slow weights, and the losses (S,)."""

        def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(net, parameters, (x.unsqueeze(0),))
            return F.cross_entropy(logits, label.unsqueeze(0))

        return example_gradients(
            loss, dict(net.fast_parameters()), support, labels, self.second_order
        )

    def _task_weights(self, gradients: dict[str, Tensor], losses: Tensor) -> dict[str, Tensor]:
        order = losses.detach().argsort(descending=True)[: self.task_examples]
        assert self.task_learner is not None
        return self.task_learner({name: g[order] for name, g in gradients.items()})

    def _check(self, support: Any, labels: Any, queries: Any) -> None:
        weight = next(self.base.parameters())
        shape = (self.channels, self.image_size, self.image_size)
        for name, images in (("support", support), ("queries", queries)):
            if not isinstance(images, Tensor):
                raise TypeError(
                    f"MetaNet: expected {name} to be a tensor, got {type(images).__name__}"
                )
            if images.dim() != 4 or tuple(images.shape[1:]) != shape or images.shape[0] == 0:
                expected = ", ".join(map(str, shape))
                raise ValueError(
                    f"MetaNet: expected {name} of shape (images, {expected}), at least one image, "
                    f"got {tuple(images.shape)}"
                )
            if images.dtype != weight.dtype:
                raise TypeError(
                    f"MetaNet: expected {name} of dtype {weight.dtype} as the parameters are, got "
                    f"{images.dtype}; convert it with .to({weight.dtype})"
                )
            if images.device != weight.device:
                raise ValueError(
                    f"MetaNet: expected {name} on {weight.device}, got {images.device}; move it "
                    f"with .to({str(weight.device)!r})"
                )
        if not isinstance(labels, Tensor) or labels.dtype != torch.long:
            found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(
                f"MetaNet: expected support_labels to be a tensor of dtype int64, got {found}"
            )
        if labels.shape != support.shape[:1]:
            raise ValueError(
                f"MetaNet: expected support_labels of shape ({support.shape[0]},), one a support "
                f"example, got {tuple(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= self.ways:
            raise ValueError(
                f"MetaNet: expected support_labels from 0 to {self.ways - 1} for {self.ways} "
                f"classes, got {labels.min().item()} to {labels.max().item()}; see with_ways"
            )


def _initialise(net: FastSequential) -> None:
    for _, weight in net.fast_parameters():
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
