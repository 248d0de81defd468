"""Recipes of the pool's sources: each is `recipe(world, gallery, n, rng, settings) -> samples`.

A recipe returns at most `n` samples: fewer where the packages hold fewer, none where they are
absent. All its randomness comes from `rng`, so a source does not change when another one does.
"""
