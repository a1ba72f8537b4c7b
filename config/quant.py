"""Quantisation: the format of a model's weights, and the way to find the codes, after training or in it."""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError

METHODS = ("none", "rtn", "gptq", "awq", "smoothquant", "nf4")
CALIBRATED = ("gptq", "awq", "smoothquant")  # methods that look at what the model reads
SCALED = ("awq", "smoothquant")  # methods that scale the input of a layer


@dataclass
class QuantConfig:
    """The format of a quantised model (modules/quantized/). `none`: full precision."""

    method: str = option("none", choices=METHODS)  # rtn: round to nearest
    bits: int = option(8, choices=(4, 8))
    group_size: int | None = option(None, at_least=2)  # numbers that share a scale; None: a whole row
    symmetric: bool = True
    double_quant: bool = False  # nf4: scales in 8 bits as well
    act_order: bool = True  # gptq: columns with large inputs first
    head: bool = False  # the output head too, and with it a tied embedding

    def check(self):
        """Refuse combinations that a method does not have."""
        fixed = {"nf4": 4, "smoothquant": 8}.get(self.method, self.bits)
        if self.bits != fixed:
            raise UserError(f"quant.method={self.method} has {fixed} bits: take --bits {fixed} (quant.bits)")
        if self.method in ("nf4", "smoothquant") and self.group_size:
            own = "blocks of 64" if self.method == "nf4" else "one scale for each row"
            raise UserError(f"quant.method={self.method} has {own}: leave --group out (quant.group_size)")
        if self.method in ("nf4", "smoothquant") and not self.symmetric:
            raise UserError(f"quant.method={self.method} has no zero points: leave --asymmetric out")
        if self.double_quant and self.method != "nf4":
            raise UserError("--double (quant.double_quant) is for quant.method=nf4: leave it out")


@dataclass
class QATConfig:
    """Quantisation-aware training (modules/quantized/fake.py): what is trained is what rounding leaves."""

    bits: int | None = option(None, choices=(4, 8))  # None: train in full precision
    group_size: int | None = option(None, at_least=2)  # numbers that share a scale; None: a whole row
    kind: str = option("lsq", choices=("ste", "lsq"))  # scales from the largest numbers, or learned
