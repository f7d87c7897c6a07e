"""Gates: what is measured on a bundle before anyone gets it, and can refuse it.

    backend    backends here that answer it at all                                (verify.py)
    parity     logits and scores against the twin's, largest and mean difference  (parity.py)
    route      clips routed as the twin routes them
    clean      accuracy lost against the twin                                     (accuracy.py)
    robust     adversarial clips, made on the twin, that break the engine alone
    sparsity   what a routed clip costs, over router alone + expert alone         (sparsity.py)
    precision  layers that are not what was asked, or do not run as that          (precision.py,
                                                                                   executed.py)

Each has a bound that a flag moves, but for the first and the last: what was asked is what is
delivered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmoe.errors import GateError
from vmoe.runtime.bench.certificate import BOUND as SPARSE
from vmoe.settings import Settings, opt

# Largest and mean difference, as shares of the twin's largest logit. fp32: sums in another order.
# The others: three to six times what was measured on the model that ships: fp16 3.5e-4 and 5e-5,
# bf16 3.8e-3 and 5e-4, int8 0.039 and 1.5e-3. tf32 has as many bits as fp16.
PARITY = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-3, "bf16": 0.02, "int8": 0.12}
PARITY_MEAN = {"fp32": 2e-5, "tf32": 3e-4, "fp16": 3e-4, "bf16": 3e-3, "int8": 5e-3}
SMALLEST = 1e-3  # where every logit (or score) is smaller than this, it is the unit
WITHOUT_FLAG = ("backend", "precision")


def judged_as(precision: str, *, tf32: bool) -> str:
    """Return by whose bounds a precision is judged: fp32 that may be rounded to tf32, by its."""
    return "tf32" if tf32 and precision == "fp32" else precision


def _by_precision(bounds: dict[str, float]) -> str:
    return ", ".join(f"{name} {bound:g}" for name, bound in bounds.items())


@dataclass(frozen=True)
class GateSettings(Settings):
    """The bounds that a bundle must keep."""

    gate_parity: float | None = opt(
        None,
        "largest difference to the twin, as a share of its largest logit (or score) [default: "
        f"{_by_precision(PARITY)}: 11, 11, 8 and 8 bits of precision in every layer; three times "
        "or more what was measured on the model that ships; tf32 is that of --trt --tf32]",
        above=0,
    )
    gate_parity_mean: float | None = opt(
        None, f"the same of the mean difference [default: {_by_precision(PARITY_MEAN)}]", above=0
    )
    gate_route: float = opt(
        100.0, "clips routed as the twin routes them, in per cent; ties count as agreement",
        at_least=0, at_most=100,
    )  # fmt: skip
    gate_clean: float = opt(
        1.0, "accuracy that may be lost against the twin, in points", at_least=0, at_most=100
    )
    gate_robust: float = opt(
        2.0,
        "adversarial clips, made on the twin, that the engine alone gets wrong, in per cent; those "
        "that it alone gets right are no excuse",
        at_least=0, at_most=100,
    )  # fmt: skip
    gate_sparsity: float | None = opt(
        None,
        "time of a routed clip over router alone + expert alone, of the worst route [default: "
        f"{SPARSE:g}; not judged of the lowering dense, which is no sparse one]",
        above=0,
    )
    robust: Path | None = opt(
        None, "adversarial clips of vmoe-attack --save-adv for the gate; default: PGD on the twin"
    )
    robust_clips: int | None = opt(
        None, "clips that PGD attacks for the gate; 0 is none [default: 16, 64 below fp32]",
        at_least=0,
    )  # fmt: skip

    def parity(self, precision: str) -> tuple[float, float]:
        """Return the bounds of the largest and the mean difference, as shares."""
        most, mean = self.gate_parity, self.gate_parity_mean
        return (
            PARITY[precision] if most is None else most,
            PARITY_MEAN[precision] if mean is None else mean,
        )


@dataclass(frozen=True)
class Gate:
    """One gate's finding.

    Attributes:
        name: as its flag: `parity`, `route` and so on.
        what: what was measured.
        measured: the value found.
        bound: the value that it must keep.
        unit: of both; empty for a plain number.
        least: whether the bound is the smallest value allowed, not the largest.
    """

    name: str
    what: str
    measured: float
    bound: float
    unit: str = ""
    least: bool = False

    @property
    def ok(self) -> bool:
        """Whether it keeps the bound; what is not a number never does."""
        return self.measured >= self.bound if self.least else self.measured <= self.bound

    def line(self) -> str:
        """Return the finding as a line says it."""
        kept, broken = (">=", "<") if self.least else ("<=", ">")
        shown = f"{self._measured} {kept if self.ok else broken} {self._bound}"
        return f"gate {self.name}: {self.what} {shown}: {'ok' if self.ok else 'REFUSED'}"

    def refusal(self) -> str:
        """Return why it refuses, as part of a sentence."""
        must = "at least" if self.least else "at most"
        return f"{self.what} is {self._measured}, must be {must} {self._bound}"

    @property
    def _measured(self) -> str:
        return f"{self.measured:.4g}{self.unit}"

    @property
    def _bound(self) -> str:
        return f"{self.bound:.4g}{self.unit}"

    def to_report(self) -> dict[str, Any]:
        """Return it as report.json has it."""
        return {
            "gate": self.name, "what": self.what, "measured": self.measured, "bound": self.bound,
            "unit": self.unit.strip(), "ok": self.ok,
        }  # fmt: skip


def refuse(gates: Iterable[Gate], where: str) -> None:
    """Raise GateError for the gates that a bundle did not pass.

    Args:
        gates: all of them.
        where: what became of the bundle, as a sentence.
    """
    failed = [gate for gate in gates if not gate.ok]
    if not failed:
        return
    flags = dict.fromkeys(f"--gate-{gate.name}" for gate in failed if gate.name not in WITHOUT_FLAG)
    hint = f" If you can live with it, say so with {' or '.join(flags)}." if flags else ""
    why = "; ".join(gate.refusal() for gate in failed)
    raise GateError(f"refused: {why}. {where}{hint}")
