"""One joint pass over the whole network, after its blocks: scales and biases tuned to the teacher's own outputs.

    min over s_w, s_a, b, V of   KL( p ‖ p_q ) + λ_z ‖z - z_q‖² / ‖z‖² + λ_b mean over blocks of ‖y - y_q‖² / ‖y‖²

p, z: class probabilities and scores of teacher and student; y: what their blocks yield. Codes stay as rounding left them, or,
with `lr_round` above 0, may still change to the other of the two codes that the float weight lies between, 1[σ(V) > ½].

Ref: Esser et al., LSQ, ICLR 2020 (step sizes by gradient); Nagel et al., AdaRound, ICML 2020 (the two codes of a weight).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ptq.augment import blend
from ptq.contracts import Feedback, Presets, make_rng
from ptq.errors import SpecError
from ptq.graph.blocks import extract, input_value_node, split
from ptq.graph.insert import fake_quantize_bias, round_bias
from ptq.graph.ops import input_node, output_node, weighted_nodes
from ptq.quant.affine import QParams, along_axis
from ptq.quant.fake_quant import (
    ActFakeQuant,
    Dequantize,
    FloatBias,
    integer_codes,
    store_integer,
    swap,
    weight_grid,
)

__all__ = ["Logits"]

_LEAST_GAIN = 1e-2  # of a weight scale
_BLENDS = 3  # of each image that judges, with others


@dataclass(frozen=True)
class Logits:
    """Step sizes and biases of all layers at once, by Adam along a cosine; kept if it helps on images held back from it.

    steps: optimizer steps. batch_size: images a step. lr_weight, lr_act, lr_bias: rates for the scales of weights and
    activations and for biases, each relative to the size of what it moves. lr_round: rate for V. logits, blocks: λ_z, λ_b.
    held_out: share of the images that only judge. mix: a of the Beta(a, a) by whose draws images are blended in pairs, and
    teacher and student compared on the blends; 0 leaves them apart. A network knows its training pictures, and pictures made
    from it, too well: one class has all the probability, which tells little; blends lie between classes. What is held back
    judges with its blends too.

    Ref for mix: Haroush et al., The Knowledge Within, CVPR 2020, §4.2 (MixUp, with the teacher's outputs on the blend).
    """

    steps: int = 1000
    batch_size: int = 64
    lr_weight: float = 1e-3
    lr_act: float = 2e-3
    lr_bias: float = 1e-3
    lr_round: float = 0.0
    logits: float = 1.0
    blocks: float = 0.0
    held_out: float = 0.125
    mix: float = 1.0

    presets: ClassVar[Presets] = {"quick": {"steps": 150}, "standard": {"steps": 300}}

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise SpecError(f"held_out={self.held_out} given; it is a share of the images, above 0 and below 1")
        if min(self.logits, self.blocks) < 0:
            raise SpecError(f"logits={self.logits}, blocks={self.blocks} given; weights of the loss are 0 or more")
        if not self.lr_weight + self.lr_act + self.lr_bias + self.lr_round:
            raise SpecError("every rate of the joint pass is 0; one above is needed, or --finish none")
        if self.mix < 0:
            raise SpecError(
                f"mix={self.mix} given; the parameter of a Beta distribution is above 0, and 0 mixes nothing"
            )

    def finish(
        self, reference: fx.GraphModule, student: fx.GraphModule, images: Tensor, judges: Tensor,
        *, seed: int, device: torch.device, feedback: Feedback,
    ) -> tuple[fx.GraphModule, dict[str, float]]:  # fmt: skip
        """See `ptq.contracts.Finisher`."""
        if not len(judges):
            feedback.note(
                f"{len(images)} images are too few for a joint pass, which takes 48: 16 at least are held back to judge it"
            )
            return student, {}
        if self.mix > 0:
            judges = torch.cat([judges, *((judges + judges.roll(k, 0)) / 2 for k in range(1, 1 + _BLENDS))])
        before = self._distance(reference, student, judges, device)
        tuned = copy.deepcopy(student)
        groups = self._groups(reference, tuned)
        if not groups:
            feedback.note("the joint pass found nothing to tune: no scale that may move, no bias")
            return student, {}
        with torch.enable_grad():
            self._train(reference, tuned, groups, images, seed, device, feedback)
        _settle(tuned)
        after = self._distance(reference, tuned, judges, device)
        figures = {"finish_before": before, "finish_after": after}
        if not after < before:  # NaN compares false too
            feedback.note(
                f"the joint pass did not help on {len(judges)} images held back ({before:.4g} before, {after:.4g} after): undone"
            )
            return student, figures
        return tuned, figures

    def _distance(self, reference: fx.GraphModule, student: fx.GraphModule, x: Tensor, device: torch.device) -> float:
        """KL of the students' classes and relative error of its scores, on images [N, C, H, W]."""
        with torch.no_grad():
            pairs = [(reference(part.to(device)), student(part.to(device))) for part in x.split(64)]
        wanted, found = (torch.cat([pair[k].cpu() for pair in pairs]) for k in (0, 1))
        return float(_output_loss(found, wanted, self.logits))

    def _train(
        self, reference: fx.GraphModule, student: fx.GraphModule, groups: list[dict[str, Any]], images: Tensor, seed: int,
        device: torch.device, feedback: Feedback,
    ) -> None:  # fmt: skip
        borders = [name for block in split(student, "block")[:-1] for name in block.outputs] if self.blocks else []
        result = output_node(student).meta["value"]
        names = tuple(dict.fromkeys([*borders, result]))
        stem = input_value_node(student)
        quantize_input = student.get_submodule(str(stem.target)) if stem.op != "placeholder" else nn.Identity()
        teacher_part = extract(reference, (input_node(reference).meta["value"],), names)
        student_part = extract(student, (stem.meta["value"],), names)
        optimizer = torch.optim.Adam(groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        rng = make_rng(seed, "finish/batches")
        for step in range(self.steps):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            x = images[torch.randint(len(images), (min(self.batch_size, len(images)),), generator=rng)].to(device)
            if self.mix > 0 and len(x) > 1:
                x = blend(x, x.flip(0), self.mix, rng)
            with torch.no_grad():
                wanted = dict(zip(names, teacher_part(x)))
                x = quantize_input(x)
            found = dict(zip(names, student_part(x)))
            loss = _output_loss(found[result], wanted[result], self.logits)
            if borders:
                loss = loss + self.blocks * torch.stack([_relative(found[b], wanted[b]) for b in borders]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            feedback.progress("joint pass", step + 1, self.steps)

    def _groups(self, reference: fx.GraphModule, student: fx.GraphModule) -> list[dict[str, Any]]:
        """Makes what is to be tuned learnable; Adam's parameter groups."""
        groups = []

        def train(parameter: nn.Parameter, lr: float) -> None:
            if lr > 0:
                parameter.requires_grad_(True)
                groups.append(
                    {"params": [parameter], "lr": lr * float(parameter.detach().abs().mean().clamp_min(1e-12))}
                )

        for node in weighted_nodes(student):
            layer, held = student.get_submodule(str(node.target)), None
            if isinstance(weight_grid(layer), Dequantize):
                held = integer_codes(layer, "weight")
            if held is None:
                continue
            original: Tensor = reference.get_submodule(str(node.target)).weight  # type: ignore[assignment]
            grid = _Undecided(*held, original.detach())
            swap(layer, "weight", grid)
            if not grid.spec.power_of_two:
                train(grid.gain, self.lr_weight)
            if self.lr_round > 0:
                grid.v.requires_grad_(True)
                groups.append({"params": [grid.v], "lr": self.lr_round})
            if layer.bias is not None:
                swap(layer, "bias", FloatBias(), layer.bias.detach().clone())  # type: ignore[operator]
                fake_quantize_bias(student, node)
                train(layer.parametrizations["bias"].original, self.lr_bias)  # type: ignore[index, arg-type]
        stem = input_value_node(student)
        for path, module in student.named_modules():
            if isinstance(module, ActFakeQuant) and path != str(stem.target) and not module.spec.power_of_two:
                train(module.scale, self.lr_act)
        return groups

    @classmethod
    def smoke(cls, folder: Path) -> Self:
        """A few steps."""
        return cls(steps=3, batch_size=4)


class _Undecided(nn.Module):
    """Parametrization of a weight stored as codes: the codes, or where V says so the other neighbour of the float weight."""

    def __init__(self, codes: Tensor, q: QParams, weight: Tensor) -> None:
        super().__init__()
        self.spec = q.spec
        self.register_buffer("first_scale", q.scale.detach().clone())
        # Of its first value, per channel: Adam's steps have one size, and one that suits ordinary channels is none for tiny ones.
        self.gain = nn.Parameter(torch.ones_like(q.scale), requires_grad=False)
        self.register_buffer("zero_point", q.zero_point.clone())
        s = along_axis(q.scale.detach(), weight.ndim, q.spec.axis)
        z = along_axis(q.zero_point, weight.ndim, q.spec.axis)
        step = torch.sign(weight / s + z - codes)
        other = (codes + step).clamp(q.spec.qmin, q.spec.qmax)
        self.register_buffer("z", z.float())
        self.register_buffer("step", other - codes)
        self.v = nn.Parameter(torch.full_like(weight, -2.0), requires_grad=False)

    @property
    def scale(self) -> Tensor:
        """The scale as it stands, one per channel."""
        return self.first_scale * self.gain.clamp_min(_LEAST_GAIN)  # type: ignore[operator]

    def decided(self, codes: Tensor) -> Tensor:
        """Codes as they stand."""
        return codes + (self.v > 0) * self.step  # type: ignore[operator]

    def forward(self, codes: Tensor) -> Tensor:
        now = codes.float() + self.step * (self.v > 0)  # type: ignore[operator]
        if self.v.requires_grad:  # straight-through: forwards the decision, backwards the sigmoid
            soft = torch.sigmoid(self.v)
            now = now + self.step * (soft - soft.detach())  # type: ignore[operator]
        return (now - self.z) * along_axis(self.scale, now.ndim, self.spec.axis)  # pyright: ignore[reportOperatorIssue]


@torch.no_grad()
def _settle(student: fx.GraphModule) -> None:
    """Stores weights and biases as integers again, on the tuned grids."""
    for module in student.modules():
        if isinstance(module, ActFakeQuant):
            module.scale.requires_grad_(False)
            module.scale.clamp_(min=torch.finfo(torch.float32).tiny)
    for node in weighted_nodes(student):
        layer = student.get_submodule(str(node.target))
        grid = weight_grid(layer)
        if not isinstance(grid, _Undecided):
            continue
        codes: Tensor = layer.parametrizations["weight"].original  # type: ignore[index, union-attr, assignment]
        q = QParams(grid.scale.detach().clone(), grid.zero_point, grid.spec)  # type: ignore[arg-type]
        store_integer(layer, "weight", grid.decided(codes.detach()), q)
        round_bias(student, node)
    student.requires_grad_(False)
    for parameter in student.parameters():
        parameter.grad = None


def _output_loss(found: Tensor, wanted: Tensor, logits: float) -> Tensor:
    """KL of class probabilities, where there are classes, and the relative error of the scores."""
    loss = logits * _relative(found, wanted)
    if found.ndim < 2 or found.shape[1] < 2:
        return loss
    p, q = (F.log_softmax(v.movedim(1, -1).flatten(0, -2), 1) for v in (wanted, found))
    return loss + F.kl_div(q, p, reduction="batchmean", log_target=True)


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
