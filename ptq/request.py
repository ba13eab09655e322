"""What `quantize` was asked for: text becomes objects here, and what makes no sense is refused before any work is spent."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq import plugins
from ptq.contracts import Exporter, Finisher, Reconstructor
from ptq.errors import SpecError
from ptq.graph.plan import QuantPlan
from ptq.quant.ranges import Estimator, estimators
from ptq.sources import Data, build_source
from ptq.spec import PRECISIONS, BitConfig, Budget, Override, PlanRules, Repair


@dataclass(frozen=True)
class Request:
    """Every choice of one `quantize`. wanted: widths, a budget, or None where `plan` says them.

    data: where images come from, not yet settled for the network. estimates: how ranges are chosen. mends: repairs.
    memory: bytes for what blocks see, None: a share of what is free. precision: blocks are trained in. ranges: what `estimates`
    were made from.
    """

    data: Any
    method: Reconstructor
    finisher: Finisher | None
    exporter: Exporter | None
    wanted: BitConfig | Budget | None
    plan: QuantPlan | str | Path | None
    rules: PlanRules
    estimates: list[Estimator]
    mends: Repair
    memory: int | None
    precision: str
    ranges: str

    def recipe(self) -> dict[str, Any]:
        """The choices as plain data, resolved, but for where the images come from."""
        rules = self.rules
        return {
            "bits": "plan" if self.wanted is None else str(self.wanted),
            "rounding": plugins.describe(self.method), "ranges": self.ranges, "edges": rules.edges, "adds": rules.adds,
            "weights": rules.weights, "activations": rules.activations, "scales": rules.scales,
            "placement": rules.placement, "ties": rules.ties, "layers": [str(o) for o in rules.overrides],
            "repair": str(self.mends), "finish": None if self.finisher is None else plugins.describe(self.finisher),
            "precision": self.precision,
        }  # fmt: skip


def resolve(
    bits: str | BitConfig | Budget, data: Data, rounding: str | Reconstructor, finish: str | Finisher | None,
    repair: str | Repair, ranges: str, target: str | Exporter | None, plan: QuantPlan | str | Path | None,
    cache_memory: float | None, precision: str, effort: str, rules: dict[str, Any], layers: Iterable[str | Override],
    by_target: dict[str, str],
) -> Request:  # fmt: skip
    """The request that arguments of `quantize` make.

    Args:
        rules: fields of `PlanRules`. by_target: further ones; "auto" is what the target asks for, or the default.

    Raises:
        SpecError, PluginError: an argument that does not exist, is out of range or contradicts another.
    """
    if precision not in PRECISIONS:
        raise SpecError(f"precision {precision!r} asked for; known: {', '.join(PRECISIONS)}")
    if rounding is None:
        raise SpecError("rounding=None given; 'nearest' is rounding without training")
    source = build_source(data, effort)
    method = plugins.build("reconstructors", rounding, effort) if isinstance(rounding, str) else rounding
    finisher, exporter = plugins.chosen("finishers", finish, effort), plugins.chosen("exporters", target)
    placed = _settled(by_target, exporter)
    layers = [layers] if isinstance(layers, str) else layers
    overrides = tuple(Override.parse(o) if isinstance(o, str) else o for o in layers)
    plan_rules = PlanRules(**rules, overrides=overrides, **placed)
    if plan is not None and overrides:
        raise SpecError(f"a plan and {overrides[0]} given; a plan says every width already")
    wanted = None if plan is not None else read_bits(bits)
    mends = Repair.parse(repair) if isinstance(repair, str) else repair
    return Request(
        source, method, finisher, exporter, wanted, plan, plan_rules, estimators(ranges), mends, _bytes(cache_memory),
        precision, ranges,
    )  # fmt: skip


def _settled(given: dict[str, str], exporter: Exporter | None) -> dict[str, Any]:
    wanted = {} if exporter is None else exporter.rules
    return {k: wanted[k] if v == "auto" else v for k, v in given.items() if v != "auto" or k in wanted}


def read_bits(bits: str | BitConfig | Budget) -> BitConfig | Budget:
    """Widths or a budget, from text where it is text.

    Raises:
        SpecError: the text is neither.
    """
    if not isinstance(bits, str):
        return bits
    return Budget.parse(bits) if bits.strip().lower().startswith("auto") else BitConfig.parse(bits)


def _bytes(gigabytes: float | None) -> int | None:
    if gigabytes is None:
        return None
    if not 0 <= gigabytes < 1e9:  # NaN too
        raise SpecError(f"cache memory of {gigabytes} GB asked for; give gigabytes, 0 or more")
    return int(gigabytes * 1e9)
