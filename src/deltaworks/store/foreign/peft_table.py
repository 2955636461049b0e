"""The methods of huggingface/peft 0.21 that we hold: one row for each, for reading and for writing.

To add one, add a row to one of the two files; ``tests/test_peft.py`` takes a configuration of it. What has no row is
ADAPTION_PROMPT (no method here yet), and the types that no method here equals; of P_TUNING what it has made is read.
"""

from __future__ import annotations

from deltaworks.store.foreign.peft_lowrank import ADALORA, LOHA, LOKR, LORA, VERA
from deltaworks.store.foreign.peft_others import (
    BAT,
    BOFT,
    FOURIERFT,
    HRA,
    IA3,
    LN_TUNING,
    MISS,
    OFT,
    P_TUNING,
    PREFIX_TUNING,
    PROMPT_TUNING,
)  # fmt: skip
from deltaworks.store.foreign.peft_types import Type

TYPES: tuple[Type, ...] = (
    LORA, ADALORA, LOHA, LOKR, VERA, OFT, BOFT, HRA, FOURIERFT, MISS, BAT, IA3, LN_TUNING, PROMPT_TUNING,
    PREFIX_TUNING, P_TUNING,
)  # fmt: skip
