"""Files damaged as a failing disk, a broken copy or a stray editor would."""

import random
from pathlib import Path


def flip_bit(path, bit):
    """Flips one bit of a file, counted from its start."""
    content = bytearray(Path(path).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    Path(path).write_bytes(content)


def random_damage(path, generator: random.Random):
    """Flips a random bit of a file, cuts its end off or removes it; returns what was done, in words."""
    size = Path(path).stat().st_size
    kind = generator.choices(["flip", "truncate", "remove"], [8, 3, 1])[0]
    if kind == "remove" or size == 0:
        Path(path).unlink()
        return f"{path} removed"
    if kind == "flip":
        bit = generator.randrange(8 * size)
        flip_bit(path, bit)
        return f"bit {bit} of {path} flipped"
    kept = generator.randrange(size)
    with open(path, "r+b") as file:
        file.truncate(kept)
    return f"{path} cut to {kept} bytes"
