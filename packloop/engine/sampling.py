"""How new text is sampled: the defaults and bounds of `packloop generate`."""

from __future__ import annotations

from dataclasses import dataclass

from packloop.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The options of that name, `--max-new-tokens` and so on. Raises ConfigError for one out of bounds."""

    max_new_tokens: int = 100
    greedy: bool = False  # the likeliest token each time; temperature and top_p are not used
    temperature: float = 0.9
    top_p: float = 0.9  # the likeliest tokens that make up this probability
    batch_size: int = 16  # texts at a time
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {low} is needed")
        if not self.temperature > 0:
            raise ConfigError(
                f"--temperature {self.temperature}: a number above 0 is needed; --greedy takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: a number above 0, at most 1, is needed")
