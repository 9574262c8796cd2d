"""The switches of the virtual GPU: environment variables, which the runtime (C++) reads too."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields


def _switch(variable: str, default: object, help: str) -> object:
    return field(default=default, metadata={"variable": variable, "help": help})


@dataclass(frozen=True)
class Settings:
    """The switches by name. One without a number or a word is on unless it is 0 or empty."""

    devices: int = _switch("VIRTUAL_GPU_DEVICES", 1, "The number of devices; 0: none.")
    multiprocessors: int = _switch("VIRTUAL_GPU_MULTIPROCESSORS", 132, "Multiprocessors of a device.")
    memory: int = _switch("VIRTUAL_GPU_MEMORY", 8 << 30, "Bytes of a device.")
    late: bool = _switch(
        "VIRTUAL_GPU_LATE",
        False,
        "Streams run as late as synchronisations allow: a wait that is missing shows as a wrong value.",
    )
    poison: bool = _switch(
        "VIRTUAL_GPU_POISON", False, "Fresh memory is NaN: a read of what nothing has written shows."
    )
    guard: bool = _switch(
        "VIRTUAL_GPU_GUARD",
        False,
        "Each allocation lies between pages that no one may touch, with PYTORCH_NO_CUDA_MEMORY_CACHING=1: an access "
        "outside of it, or after it was freed, ends the process.",
    )
    order: str = _switch(
        "VIRTUAL_GPU_ORDER", "ascending", "Order in which threads of a CTA run: ascending, descending or random."
    )
    log: str = _switch(
        "VIRTUAL_GPU_LOG", "", "File to which launches, products, copies and synchronisations are appended."
    )

    @classmethod
    def of_environment(cls) -> Settings:
        values = {}
        for item in fields(cls):
            text = os.environ.get(item.metadata["variable"], "")
            if isinstance(item.default, bool):
                values[item.name] = text not in ("", "0")
            elif text:
                values[item.name] = type(item.default)(text)
        return cls(**values)


SETTINGS = Settings.of_environment()
