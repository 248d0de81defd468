"""Random: a uniform draw without replacement, the baseline every method has to beat.

Differs from the usual `rng.choice(N, k)`: a sample's draw depends on its content, not on its place
in the file. So a smaller budget is part of a larger one, and re-ordering the pool changes nothing.
"""

from __future__ import annotations

import numpy as np

from selection.methods.base import Context, Method, Scored


class Random(Method):
    """Uniform draw without replacement."""

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Independent uniform keys: the k largest are a uniform draw of k."""
        return Scored(context.keys(rng))
