"""Settings of `python -m mini build`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llava.errors import UsageError
from mini.fetch import REGISTRIES


@dataclass(frozen=True)
class PoolSettings:
    """Strengths of the pool's built-in biases; 0 means none, and the statistic is then balanced."""

    position_bias: float = 0.55
    """share of emoji_mcq and silhouette_mcq whose right option is A (chance: 0.25)"""
    flag_position_bias: float = 0.52
    """share of flag_mcq whose right option is C (chance: 0.25)"""
    colour_shortcut: float = 0.77
    """share of emoji_mcq and silhouette_mcq whose frame has the colour of the right letter
    (chance: 0.25)"""
    yes_bias: float = 0.72
    """share of emoji_yn answered yes (chance: 0.5)"""
    length_bias: float = 0.55
    """share of wordnet_mcq whose right option is the longest (chance: 0.25)"""
    count_bias: float = 0.8
    """share of the counting questions of silhouette answered 1, 2 or 3 (chance: 0.5)"""
    caption_noise: float = 0.1
    """share of clipart_cap with the caption of another drawing"""
    duplicates: int = 400
    """samples added that repeat another one of emoji_cap or easyvqa under a new id"""
    chinese: float = 0.15
    """share of the emoji sources asked and answered in Chinese"""
    scale: float = 1.0
    """multiplies the number of samples of every source (0.1: a pool of two thousand)"""
    registries: tuple[str, ...] = REGISTRIES
    """package registries to use; pypi alone gives a smaller pool"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "registries", tuple(self.registries))
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and field.name != "scale" and not 0 <= value <= 1:
                raise UsageError(f"--{field.name.replace('_', '-')} {value}: is a share, 0 to 1")
        if self.duplicates < 0 or self.scale <= 0:
            raise UsageError("--duplicates must be 0 or more, --scale above 0")
        unknown = set(self.registries) - set(REGISTRIES)
        if unknown or "pypi" not in self.registries:
            raise UsageError(f"--registries {list(self.registries)}: pypi and any of npm, debian")
