"""The quality lab: what merging does to images, measured, plotted and shown.

Nothing here is imported by ``import toma_fx``; the commands ``toma-fx eval``, ``plot`` and ``show``
load it. Install what it needs with ``pip install toma-fx[lab]``.

Shape suffixes: ``P`` prompts, ``S`` seeds, ``N`` image tokens or images, ``D`` width, ``K``
clusters.
"""
